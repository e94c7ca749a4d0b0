"""The mean and the variance that the BatchNorm layers of a model see."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import nn

from hf_noisekd.models.batch_norm import batch_statistics, stored_statistics
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of

Batches = Iterable[torch.Tensor | Mapping[str, torch.Tensor]]

# Images that go through the model at a time, and whose own statistics stand for those of all in the first pass.
CHUNK_SIZE = 256


@torch.no_grad()
def store_statistics(model: nn.Module, batches: Batches) -> int:
    """Store the statistics of images in the BatchNorm layers of `model`; return the number of images.

    See [`recalibrate_batch_norm`], which also sees to what the model says of its making.
    """
    with evaluation_mode(model):
        num_images, num_chunks = _store_moments(model, batches, batch_statistics(model))
        if num_chunks > 1:
            _store_moments(model, batches, nullcontext())
    return num_images


def _store_moments(model: nn.Module, batches: Batches, statistics: AbstractContextManager) -> tuple[int, int]:
    """Store the moments of all layers in a pass of all images; return the numbers of images and of chunks."""
    moments = {name: _Moments(name) for name in stored_statistics(model)}
    num_images = num_chunks = 0
    with ExitStack() as stack:
        for name, layer in stored_statistics(model).items():
            stack.enter_context(layer.register_forward_pre_hook(moments[name].pool))
        for chunk in _chunks(batches):
            with statistics:
                compute_logits(model, to_device_of(model, chunk))
            num_images, num_chunks = num_images + len(chunk), num_chunks + 1
    if not num_chunks:
        raise ValueError("Recalibration got no batch: pass at least one batch of 2 or more images.")
    for name, layer in stored_statistics(model).items():
        if moments[name].count:
            stored = layer.state_dict()
            stored["running_mean"].copy_(moments[name].mean)
            stored["running_var"].copy_(moments[name].squares / (moments[name].count - 1))
    return num_images, num_chunks


class _Moments:
    """The count, the mean and the sum of squared deviations per channel of all inputs of a layer.

    By the pairwise update of Chan, Golub & LeVeque (1979), in double precision: exact to rounding.
    """

    def __init__(self, name: str):
        self.name = name
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def pool(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].float().movedim(1, 0).flatten(1)
        if (count := x.shape[1]) < 2:
            raise ValueError(f"BatchNorm layer {self.name!r} saw one value a channel: recalibrate on 2 images or more.")
        variance, batch_mean = (m.cpu().double() for m in torch.var_mean(x, dim=1, correction=0))
        delta = batch_mean - self.mean
        self.mean = self.mean + delta * (count / (self.count + count))
        self.squares = self.squares + variance * count + delta**2 * (self.count * count / (self.count + count))
        self.count += count


def _chunks(batches: Batches) -> Iterator[torch.Tensor]:
    """Yield the images in chunks of [`CHUNK_SIZE`], of which the last has up to twice as many, less one."""
    waiting: list[torch.Tensor] = []
    for batch in batches:
        waiting.append(batch["pixel_values"] if isinstance(batch, Mapping) else batch)
        while sum(map(len, waiting)) >= 2 * CHUNK_SIZE:
            images = torch.cat(waiting)
            yield images[:CHUNK_SIZE]
            waiting = [images[CHUNK_SIZE:]]
    if waiting:
        yield torch.cat(waiting)
