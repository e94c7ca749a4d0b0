"""Let the channels that stay in a network stand for those that are cut out of it."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_noisekd.models.batch_norm import find_batch_norm
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of
from hf_noisekd.shrinking.channels import ChannelGroup, indices_of
from hf_noisekd.shrinking.dependency_graph import num_inputs, weight_by_output
from hf_noisekd.shrinking.least_squares import CHUNK_SIZE, RidgeFit


@torch.no_grad()
def compensate(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    removed: Mapping[str, Sequence[int]],
    images: Sequence[torch.Tensor],
    statistics: AbstractContextManager,
) -> None:
    """Let the channels that stay stand for those to be removed, by root of their group, in the layers that read them.

    What a reader loses is predicted linearly from the inputs that it keeps, and its weights take that in:
    `W[kept] += W[removed] C`, with the coefficients `C` of ridge regression on batches `[B, C, H, W]` of images. A
    constant goes into its bias, or into the stored mean of a BatchNorm layer behind it. In place, and to be called
    before the cut; `statistics` is as for [`channel_importance`].
    """
    gone: dict[str, set[int]] = {}
    for root, channels in removed.items():
        for name, inputs, of in groups[root].readers:
            gone.setdefault(name, set()).update(indices_of(inputs, of, channels))
    readers = {name: _Reader(model.get_submodule(name), lost) for name, lost in gone.items() if lost}
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(statistics)
        fits = {name: RidgeFit(sum(map(len, images))) for name in readers}
        for name, reader in readers.items():
            stack.enter_context(reader.layer.register_forward_hook(partial(reader.take_in, fits[name])))
        for layer in find_batch_norm(model).values():
            for reader in readers.values():
                stack.enter_context(layer.register_forward_pre_hook(reader.note_norm))
        for batch in images:
            for chunk in batch.split(CHUNK_SIZE):
                compute_logits(model, to_device_of(model, chunk.clone()))  # some models change their input
    for name, reader in readers.items():
        reader.change(fits[name])


class _Reader:
    """A layer that loses inputs, and the BatchNorm layer behind it, if there is one."""

    def __init__(self, layer: Any, lost: Collection[int]):
        self.layer = layer
        self.lost = sorted(lost)
        self.kept = sorted(set(range(num_inputs(layer))) - set(lost))
        self.norm: Any = None
        self._output: torch.Tensor | None = None

    def take_in(self, fit: RidgeFit, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """Take in what the layer got; a hook."""
        x = args[0] if isinstance(layer, nn.Linear) else args[0].movedim(1, -1)
        rows = x.reshape(len(x), -1, 1, x.shape[-1])
        fit.add(rows[..., self.kept], rows[..., self.lost])
        self._output = output

    def note_norm(self, norm: Any, args: tuple) -> None:
        """Note that a BatchNorm layer got the layer's output; a hook."""
        if args[0] is self._output:
            self.norm = norm

    def change(self, fit: RidgeFit) -> None:
        """Change the weights for the lost inputs to be zero."""
        takes_offset = self.layer.bias is not None or getattr(self.norm, "running_mean", None) is not None
        solution = fit.solve(has_offset=takes_offset)
        if solution is None:
            return
        weight = weight_by_output(self.layer)
        lost = weight[:, self.lost].double().cpu()
        # The rest of the weight's dimensions are positions of a kernel.
        weight[:, self.kept] += torch.einsum("or...,kr->ok...", lost, solution.weights[0]).to(weight)
        offset = torch.einsum("or...,r->o", lost, solution.offsets[0]).to(weight)
        if isinstance(self.layer, nn.ConvTranspose2d):
            offset /= math.prod(self.layer.stride)  # each output position gets one of so many parts of the kernel
        if self.layer.bias is not None:
            self.layer.bias += offset
        elif takes_offset:
            self.norm.running_mean -= offset
