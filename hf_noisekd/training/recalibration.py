"""Re-estimate the running statistics of a student from a few real images."""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch
from torch import nn

from hf_noisekd.models.batch_norm import find_batch_norm
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of
from hf_noisekd.release.record import ImagesFacts, Provenance


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]],
    *,
    dataset: str | None = None,
    split: str | None = None,
) -> None:
    """Re-estimate the running statistics of every BatchNorm layer from real images, in place.

    A student that learnt from noise has running statistics of noise; with those of a few real images ("adjusting" in
    Raikwar & Mishra 2022) it can answer single images, and its [`Provenance`] says so. Each layer that the forward pass
    reaches gets the mean and the unbiased variance of its input pooled over all images and positions, while the layers
    before it already use their new statistics: the same however the images are cut into batches, at the cost of one
    partial forward pass of them for each layer. No `num_batches_tracked` changes.

    Args:
        model: The model. It comes back in the modes it had.
        batches: Images of shape `[B, C, H, W]`, preprocessed as for the model, or mappings with `pixel_values`. Must
            give the same images each time it is iterated over; a one-shot iterator is read into memory first.
        dataset: Name of the data set that the images are of, for the provenance.
        split: Its split, likewise.

    Raises:
        ValueError: The model has no BatchNorm layer, or there is no image, or a layer sees only one value a channel.
    """
    provenance = Provenance.of(model)
    layers = {name: layer for name, layer in find_batch_norm(model).items() if layer.running_mean is not None}
    if iter(batches) is batches:
        batches = list(batches)
    with evaluation_mode(model):
        for name, calls in _calls_in_forward_order(model, layers, batches):
            count, mean, squares = _pooled_moments(model, layers[name], calls, batches)
            if count < 2:
                raise ValueError(f"BatchNorm layer {name!r} saw one value a channel: recalibrate on 2 images or more.")
            stored = layers[name].state_dict()
            stored["running_mean"].copy_(mean)
            stored["running_var"].copy_(squares / (count - 1))
    if provenance:
        images = sum(len(_pixel_values(batch)) for batch in batches)
        recalibration = ImagesFacts(images=images, dataset=dataset, split=split)
        replace(provenance, batch_norm="running", recalibration=recalibration).attach(model)


class _StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass once the layer of interest has seen its input."""


def _calls_in_forward_order(model, layers, batches) -> list[tuple[str, int]]:
    """Return the layers in the order in which a forward pass reaches them, each with its number of calls."""
    names = {layer: name for name, layer in layers.items()}
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for layer in names:
            stack.enter_context(layer.register_forward_pre_hook(lambda layer, _: calls.update([names[layer]])))
        for batch in batches:
            compute_logits(model, to_device_of(model, _pixel_values(batch)[:2]))
            return list(calls.items())
    raise ValueError("Recalibration got no batch: pass at least one batch of 2 or more real images.")


def _pooled_moments(model, layer, calls, batches) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return the count, the mean and the sum of squared deviations per channel of all inputs of `layer`."""
    # Pairwise update of Chan, Golub & LeVeque (1979), in double precision on the host: exact to rounding, and the
    # per-channel vectors are tiny.
    total, mean, squares, seen = 0, torch.zeros(()), torch.zeros(()), 0

    def pool(_, inputs):
        nonlocal total, mean, squares, seen
        x = inputs[0].float().movedim(1, 0).flatten(1)
        variance, batch_mean = (m.cpu().double() for m in torch.var_mean(x, dim=1, correction=0))
        count = x.shape[1]
        delta = batch_mean - mean
        mean = mean + delta * (count / (total + count))
        squares = squares + variance * count + delta**2 * (total * count / (total + count))
        total += count
        seen += 1
        if seen == calls:
            raise _StopForward

    with layer.register_forward_pre_hook(pool):
        for batch in batches:
            seen = 0
            with suppress(_StopForward):
                compute_logits(model, to_device_of(model, _pixel_values(batch)))
    return total, mean, squares


def _pixel_values(batch: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
    return batch["pixel_values"] if isinstance(batch, Mapping) else batch
