"""Which layers must lose the same channels: torch-pruning's graph, with bounds, and with convolutions of groups."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch_pruning import DependencyGraph
from torch_pruning.pruner.function import BasePruningFunc

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
LAYERS = (*_CONVOLUTIONS, nn.Linear)
# Steps of torch-pruning's search for one group: a DenseNet-264 takes 7,240, and that of a ReXNet would never end.
MAX_VISITS = 10_000
# What torch-pruning raises for a network that it cannot analyse, and what layers raise that no longer fit together.
FAULTS = (ValueError, RuntimeError, IndexError, AssertionError, TypeError, KeyError, AttributeError)


class BoundedGraph(DependencyGraph):
    """A dependency graph where grouped convolutions lose whole groups, and whose searches end after [`MAX_VISITS`]."""

    def __init__(self):
        super().__init__()
        self._whole_groups = _WholeGroups()
        self._in_channel_pruning_fn.add(self._whole_groups.prune_in_channels)
        self._out_channel_pruning_fn.add(self._whole_groups.prune_out_channels)

    def get_pruner_of_module(self, module: nn.Module) -> BasePruningFunc:  # noqa: D102 - torch-pruning's
        # torch-pruning registers pruners by class, and the class of grouped convolutions is that of all others.
        return self._whole_groups if is_grouped(module) else super().get_pruner_of_module(module)

    def build_dependency(self, *args, **kwargs):  # noqa: D102 - torch-pruning's
        built = super().build_dependency(*args, **kwargs)
        for node in self.module2node.values():
            node.dependencies = _Counted(node.dependencies, self._count)
        return built

    def get_pruning_group(self, *args, **kwargs):  # noqa: D102 - torch-pruning's
        self._visits = 0
        return super().get_pruning_group(*args, **kwargs)

    def _count(self) -> None:
        self._visits += 1
        if self._visits > MAX_VISITS:
            raise RuntimeError(f"The search for a group of channels did not end after {MAX_VISITS:,} steps.")


class _Counted(list):
    """A list that calls a function whenever it is iterated over."""

    def __init__(self, items: Iterable, count: Callable[[], None]):
        super().__init__(items)
        self._count = count

    def __iter__(self) -> Iterator:
        self._count()
        return super().__iter__()


class _WholeGroups(BasePruningFunc):
    """Removes whole groups from a grouped convolution: outputs together with inputs."""

    def prune_out_channels(self, layer: nn.Conv2d, idxs: Sequence[int]) -> nn.Conv2d:
        kept = [index for index in range(layer.out_channels) if index not in set(idxs)]
        layer.groups = len(kept) * layer.groups // layer.out_channels
        layer.in_channels = layer.out_channels = len(kept)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        if layer.bias is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Conv2d) -> int:
        return layer.out_channels

    get_in_channels = get_out_channels


def num_outputs(layer: Any) -> int:
    """Return the number of output channels of a convolution or a linear layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def num_inputs(layer: Any) -> int:
    """Return the number of input channels of a convolution or a linear layer."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def weight_by_output(layer: Any) -> torch.Tensor:
    """Return the weight `[outputs, inputs, ...]` of one of [`LAYERS`]: a view."""
    return layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight


def is_depthwise(layer: Any) -> bool:
    """Return whether a layer is a convolution of each channel by itself."""
    return isinstance(layer, _CONVOLUTIONS) and 1 < layer.groups == layer.out_channels


def is_grouped(layer: Any) -> bool:
    """Return whether a layer is a convolution of groups of several channels, as many outputs as inputs."""
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups < layer.out_channels == layer.in_channels
