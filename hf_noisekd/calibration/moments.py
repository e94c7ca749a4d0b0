"""Mean and variance of the inputs of BatchNorm layers."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from hf_noisekd.models.batch_norm import batch_statistics, channel_moments, stored_statistics
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of

Batches = Iterable[torch.Tensor | Mapping[str, torch.Tensor]]

CHUNK_SIZE = 256  # images in a forward pass; in the first pass each chunk uses its own statistics
MAX_CHANGE = 1e-4  # mean KL divergence of a layer's old statistics from its new ones, in nats, to stop at


@torch.no_grad()
def store_statistics(model: nn.Module, batches: Batches, names: Collection[str] | None = None) -> int:
    """Store the statistics of images in the BatchNorm layers of `model`; return the number of images.

    See [`recalibrate_batch_norm`], which also updates the provenance. After an error the statistics are unchanged. With
    `names` only these layers get other statistics.
    """
    layers: dict[str, Any] = dict(stored_statistics(model))
    if names is not None:
        layers = {name: layer for name, layer in layers.items() if name in names}
    before = {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in layers.items()}
    try:
        with evaluation_mode(model):
            statistics = batch_statistics(model) if names is None else nullcontext()
            num_images, exact, change = _store_moments(model, layers, batches, statistics)
            exact = exact and (names is None or len(layers) == 1)
            # Each pass makes at least one more layer exact, except for layers that are called several times.
            for _ in range(len(layers) + 10):
                if exact or change < MAX_CHANGE:
                    break
                *_, change = _store_moments(model, layers, batches, nullcontext())
    except BaseException:
        for name, (mean, variance) in before.items():
            layers[name].running_mean.copy_(mean)
            layers[name].running_var.copy_(variance)
        raise
    return num_images


def _store_moments(
    model: nn.Module, layers: Mapping[str, Any], batches: Batches, statistics: AbstractContextManager
) -> tuple[int, bool, float]:
    """Store the moments of all images; return their number, if each layer saw one call, and the largest change."""
    moments = {name: _Moments(name) for name in layers}
    num_images = num_chunks = 0
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(moments[name].pool))
        for chunk in _chunks(batches):
            with statistics:
                compute_logits(model, to_device_of(model, chunk))
            num_images, num_chunks = num_images + len(chunk), num_chunks + 1
    if not num_chunks:
        raise ValueError("Recalibration got no batch: pass at least one batch of 2 or more images.")
    seen = {name: of for name, of in moments.items() if of.calls}
    for name, of in seen.items():
        if not (of.mean.isfinite().all() and of.squares.isfinite().all()):
            raise ValueError(
                f"BatchNorm layer {name!r} saw a NaN or an infinity: check the images and the weights of the model. "
                "Nothing was changed."
            )
    change = max((of.store(layers[name]) for name, of in seen.items()), default=0.0)
    return num_images, all(of.calls == 1 for of in seen.values()), change


class _Moments:
    """Count, mean and squared deviations per channel, in float64, by the update of Chan, Golub & LeVeque (1979)."""

    def __init__(self, name: str):
        self.name = name
        self.calls, self.count, self.mean, self.squares = 0, 0, torch.zeros(()), torch.zeros(())

    def pool(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if (count := inputs[0].numel() // inputs[0].shape[1]) < 2:
            raise ValueError(f"BatchNorm layer {self.name!r} saw one value a channel: recalibrate on 2 images or more.")
        batch_mean, variance = (moment.cpu().double() for moment in channel_moments(inputs[0]))
        delta = batch_mean - self.mean
        self.mean = self.mean + delta * (count / (self.count + count))
        self.squares = self.squares + variance * count + delta**2 * (self.count * count / (self.count + count))
        self.count += count
        self.calls += 1

    def store(self, layer: Any) -> float:
        """Store them in a layer, and return the KL divergence of the old ones, averaged over channels."""
        mean, variance = self.mean.float(), (self.squares / (self.count - 1)).float()
        old_mean, old_variance = layer.running_mean.float().cpu(), layer.running_var.float().cpu()
        change = gaussian_kl(old_mean, old_variance, mean, variance, layer.eps)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        return change.item()


def gaussian_kl(
    mean: torch.Tensor, variance: torch.Tensor, other_mean: torch.Tensor, other_variance: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return `KL(N(mean, variance) || N(other_mean, other_variance))`, in nats, averaged over the channels `[C]`.

    `eps` is added to both variances, as BatchNorm does.
    """
    ratio = (variance + eps) / (other_variance + eps)
    shift = (mean - other_mean).square() / (other_variance + eps)
    return (ratio + shift - 1 - ratio.log()).mean() / 2


def as_batches(batches: Batches | torch.Tensor | Mapping[str, torch.Tensor]) -> Batches:
    """Return batches as they are, and one batch alone, a tensor or a mapping, as the only one."""
    return [batches] if isinstance(batches, torch.Tensor | Mapping) else batches


def pixel_values_of(batch: Any) -> torch.Tensor:
    """Return the images `[B, C, H, W]` of a batch: the tensor, its `pixel_values`, or its first part."""
    if isinstance(batch, Mapping):
        batch = batch["pixel_values"]
    return batch[0] if isinstance(batch, tuple | list) else batch


def _chunks(batches: Batches) -> Iterator[torch.Tensor]:
    """Yield images of equal size in chunks of [`CHUNK_SIZE`]; the last one may have nearly twice as many."""
    waiting: list[torch.Tensor] = []
    for batch in batches:
        for images in pixel_values_of(batch).split(CHUNK_SIZE):
            if waiting and waiting[0].shape[1:] != images.shape[1:]:
                yield torch.cat(waiting)
                waiting = []
            waiting.append(images)
            if sum(map(len, waiting)) >= 2 * CHUNK_SIZE:
                whole = torch.cat(waiting)
                yield whole[:CHUNK_SIZE]
                waiting = [whole[CHUNK_SIZE:]]
    if waiting:
        yield torch.cat(waiting)
