"""The last linear layers of a block, solved in closed form for the features of its teacher.

`W += (G + r I)^-1 R`, with the covariance `G` of what these layers get and `R` that with the difference to what the
teacher has at the end of the block, in front of the last activation. Which layers reach it linearly is found by trial.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_noisekd.shrinking.block_features import TOLERANCE, Block
from hf_noisekd.shrinking.blocks import WEIGHTED
from hf_noisekd.shrinking.least_squares import RidgeFit, Solution
from hf_noisekd.shrinking.walk import BlockPair


@dataclass
class _Linear:
    """A layer whose output reaches the end of a block as `scale * output`, channel by channel."""

    module: Any
    scale: torch.Tensor  # [C]
    dim: int  # of the channels at the end of the block


@dataclass
class Solver:
    """Solves the last linear layers of a block together."""

    pair: BlockPair
    layers: Sequence[_Linear]
    shift: _Linear | None  # whose bias takes the offset

    @classmethod
    def of(cls, pair: BlockPair) -> "Solver | None":
        """Return the solver of a pair of blocks, or None if no layer reaches the end linearly."""
        found = [one for one in _linear_layers(pair.student.block) if one.scale.abs().min() > 0]
        layers = [one for one in found if isinstance(one.module, WEIGHTED)]
        dense = [one for one in layers if getattr(one.module, "groups", 1) == 1] or layers[-1:]
        if not dense:
            return None
        return cls(pair, dense, next((one for one in reversed(found) if one.module.bias is not None), None))

    def solve(self) -> Solution | None:
        """Return what to add to the layers, or None if nothing helps on held-out images."""
        pair = self.pair
        fit = RidgeFit(pair.student.num_images)
        for index in pair.student.chunks:
            features, inputs = pair.student.run(index, [one.module for one in self.layers])
            goal = pair.of_student(pair.teacher.run(index)[0])
            difference = _channels_last(goal - features, self.layers[0].dim)
            columns = [unfolded(one.module, x) for one, x in zip(self.layers, inputs, strict=True)]
            fit.add(torch.cat(columns, -1), difference.reshape(*columns[0].shape[:3], -1))
        return fit.solve(has_offset=self.shift is not None)

    def add(self, weights: torch.Tensor, offsets: torch.Tensor) -> None:
        """Add a solution to the layers, in place."""
        start = 0
        for one in self.layers:
            weight = one.module.weight
            size = weight[0].numel()
            change = weights[:, start : start + size].mT.reshape(len(weight), size).to(weight)
            weight.add_((change / one.scale[:, None]).reshape(weight.shape))
            start += size
        if self.shift:
            self.shift.module.bias.add_(offsets.flatten().to(self.shift.scale) / self.shift.scale)


def _linear_layers(block: Block) -> list[_Linear]:
    """Return the layers, in order of their calls, whose outputs reach the end of the block scaled by channel."""
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    with ExitStack() as stack:
        for module in block.block.modules():
            if isinstance(module, (*WEIGHTED, _BatchNorm)) and module.weight is not None:
                note: Any = lambda module, args, output: calls.append((module, args[0].clone(), output.clone()))  # noqa: E731
                stack.enter_context(module.register_forward_hook(note))
        features = block.run_sample()
    modules = [module for module, *_ in calls]
    found = []
    for module, x, output in calls:
        if modules.count(module) > 1 or (isinstance(module, WEIGHTED) and not _is_linear(module, x, output)):
            continue
        added = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output) * output.std()
        change = block.run_sample(added=(module, added)) - features
        rows = _channels_last(added, -1 if isinstance(module, nn.Linear) else 1).flatten(0, -2)
        for dim in (1, -1):
            changes = _channels_last(change, dim).flatten(0, -2)
            if changes.shape == rows.shape:
                scale = (changes * rows).sum(0) / rows.square().sum(0)
                if (changes - scale * rows).abs().max() <= TOLERANCE * changes.abs().max():
                    found.append(_Linear(module, scale, dim))
                    break
    return found


def _is_linear(layer: Any, x: torch.Tensor, output: torch.Tensor) -> bool:
    """Return whether a layer computes what [`unfolded`] and its weights give: not with padding of another kind."""
    if output.ndim < 3:  # of features that are pooled
        return False
    try:
        columns = unfolded(layer, x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    weight = layer.weight.reshape(columns.shape[2], -1, columns.shape[3])
    expected = torch.einsum("nlgd,god->nlgo", columns, weight).flatten(2)
    if layer.bias is not None:
        expected = expected + layer.bias
    rows = _channels_last(output, -1 if isinstance(layer, nn.Linear) else 1).flatten(1, -2)
    return rows.shape == expected.shape and torch.allclose(
        rows, expected, rtol=1e-2, atol=1e-3 * rows.abs().max().item()
    )


def unfolded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer multiplies by its weights, `[B, L, G, D]`, for an input of `L` output positions."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, 1, x.shape[-1])
    size = layer.kernel_size
    columns = F.unfold(x, size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride)
    return columns.reshape(len(x), layer.groups, -1, columns.shape[-1]).permute(0, 3, 1, 2)


def _channels_last(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.movedim(dim, -1)
