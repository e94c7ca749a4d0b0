"""Width: the channels that layers of a network share, and a network with fewer of them.

Which layers must lose the same channels is found by torch-pruning's dependency graph (Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023). Those channels are kept whose loss would change the predictions the most.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch_pruning import DependencyGraph
from torch_pruning.pruner.function import BasePruningFunc

from hf_noisekd.models.batch_norm import find_batch_norm
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, logits_of_blanks, to_device_of
from hf_noisekd.shrinking.least_squares import CHUNK_SIZE, RidgeFit

LAYERS = (nn.Conv2d, nn.Linear)
MULTIPLE = 8  # of the channels of a layer
MIN_CHANNELS = 8
# Steps of torch-pruning's search for one group: a DenseNet-264 takes 7,240, and a ReXNet would never end.
MAX_VISITS = 10_000
# What torch-pruning raises for a network that it cannot analyse, and what layers raise that no longer fit together.
FAULTS = (ValueError, RuntimeError, IndexError, AssertionError, TypeError, KeyError, AttributeError)


@dataclass
class ChannelGroup:
    """Channels that layers share: the outputs of its root, counted from 0.

    They are removed in runs of `unit` channels, for grouped convolutions, and each of `parts` equal parts must lose
    the same number, for GroupNorm. `writers` are the layers that output them, and `readers` those that have them as
    input: name, indices of the outputs or inputs, and the channel of each.
    """

    root: str
    channels: int
    unit: int = 1
    parts: int = 1
    writers: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    readers: list[tuple[str, list[int], list[int]]] = field(default_factory=list)

    def width(self, share: float) -> int:
        """Return a share of its channels, rounded to a number that hardware likes and that can be reached."""
        step = math.lcm(MULTIPLE, self.unit * self.parts)
        if self.channels % step:
            step = self.unit * self.parts
        wanted = round(self.channels * share / step) * step
        return min(max(wanted, step, MIN_CHANNELS), self.channels)


class ChannelCutter:
    """Cuts channels of a classifier in place; `groups`, by root, are empty if torch-pruning cannot analyse it."""

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]):
        self._model, self._input_size = model, input_size
        self._num_classes = logits_of_blanks(model, input_size, "model").shape[-1]
        # A layer with one output for each class counts as the classifier, whose outputs stay.
        heads = [x for x in model.modules() if isinstance(x, LAYERS) and num_outputs(x) == self._num_classes]
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        model.requires_grad_(True)
        self.groups: dict[str, ChannelGroup] = {}
        self.kept: dict[str, list[int]] = {}  # outputs that a narrowed layer has kept, by its name
        with warnings.catch_warnings(), torch.enable_grad(), evaluation_mode(model), suppress(*FAULTS):
            warnings.simplefilter("ignore")
            self._graph = _BoundedGraph().build_dependency(
                model,
                to_device_of(model, torch.zeros(2, *input_size)),
                # timm's 1d convolutions run along the channels.
                ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Conv1d)],
                verbose=False,
            )
            found = self._graph.get_all_groups(ignored_layers=heads, root_module_types=list(LAYERS))
            self.groups = {group.root: group for group in map(self._describe, found) if self._is_sound(group)}

    def _describe(self, found: Any) -> ChannelGroup:
        root = found[0].dep.target.module
        group = ChannelGroup(self._names[root], num_outputs(root))
        for item in found:
            layer, is_input = item.dep.target.module, self._graph.is_in_channel_pruning_fn(item.dep.handler)
            if isinstance(layer, nn.GroupNorm) and layer.num_groups < layer.num_channels:
                group.parts = math.lcm(group.parts, layer.num_groups)
            if _is_grouped(layer):
                group.unit = math.lcm(group.unit, layer.out_channels // layer.groups)
            if isinstance(layer, LAYERS) and (not is_input or _is_grouped(layer) or _is_depthwise(layer)):
                group.writers.append((self._names[layer], list(item.idxs), list(item.root_idxs)))
            elif isinstance(layer, LAYERS):
                group.readers.append((self._names[layer], list(item.idxs), list(item.root_idxs)))
        return group

    def _is_sound(self, group: ChannelGroup) -> bool:
        """Whether the layers have the inputs and channels that the graph lists."""
        return all(
            max(inputs, default=0) < num_inputs(self._modules[name]) and max(channels, default=0) < group.channels
            for name, inputs, channels in group.readers
        )

    def cut(self, removed: Mapping[str, Sequence[int]]) -> bool:
        """Remove channels, by the root of their group; return False if the model has become unusable."""
        try:
            for root, channels in removed.items():
                if channels:
                    for name, outputs, of in self.groups[root].writers if root in self.groups else ():
                        lost = _lost(outputs, of, channels)
                        self.kept[name] = sorted(set(range(num_outputs(self._modules[name]))) - lost)
                    module = self._modules[root]
                    handler = self._graph.get_pruner_of_module(module).prune_out_channels
                    self._graph.get_pruning_group(module, handler, list(channels)).prune()
            return logits_of_blanks(self._model, self._input_size, "model").shape[-1] == self._num_classes
        except FAULTS:
            return False


def channel_importance(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    images: Sequence[torch.Tensor],
    statistics: AbstractContextManager,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Return how much the predictions for images would change without each channel, by the root of its group.

    As KL divergence, to second order, that is `E[(d log p(y) / d m)^2] / 2`: `m` scales the channel in the input of
    each reader, and `y` is drawn from the prediction `p` (Theis et al., "Faster gaze prediction with dense networks and
    Fisher pruning", 2018), with `statistics` as the context of the forward passes on batches `[B, C, H, W]`.
    """
    importance = {root: torch.zeros(group.channels) for root, group in groups.items()}
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # A separate tensor, for the gradient through this layer alone.
        inputs[name] = args[0].clone() if args[0].requires_grad else args[0].detach().requires_grad_()
        inputs[name].retain_grad()
        return inputs[name], *args[1:]

    readers = {name for group in groups.values() for name, *_ in group.readers}
    with ExitStack() as stack, torch.enable_grad(), evaluation_mode(model), statistics:
        for name in readers:
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(keep, name)))
        for batch in images:
            inputs.clear()
            log_probs = compute_logits(model, to_device_of(model, batch)).float().log_softmax(-1)
            drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator).to(log_probs.device)
            model.zero_grad()
            log_probs.gather(1, drawn).sum().backward()
            slopes = {name: _by_channel(model.get_submodule(name), x) for name, x in inputs.items()}
            for root, group in groups.items():
                total = torch.zeros(len(batch), group.channels)
                for name, idxs, channels in group.readers:
                    if name in slopes:
                        total.index_add_(1, torch.tensor(channels), slopes[name][:, idxs])
                importance[root] += total.square().sum(0) / 2
    model.zero_grad()
    return importance


def least_important(group: ChannelGroup, importance: torch.Tensor, kept: int) -> list[int]:
    """Return the channels to remove from a group to keep `kept`, a multiple of `unit * parts`."""
    by_part = importance.view(group.parts, -1, group.unit).sum(-1)
    if group.parts > 1:
        by_part = by_part.mean(0, keepdim=True).expand_as(by_part)
    num_units = by_part.shape[1]
    runs = by_part.argsort(dim=1)[:, : num_units - kept // (group.parts * group.unit)]
    runs = runs + torch.arange(group.parts)[:, None] * num_units
    return sorted((runs.flatten()[:, None] * group.unit + torch.arange(group.unit)).flatten().tolist())


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
            gone.setdefault(name, set()).update(_lost(inputs, of, channels))
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


def _lost(indices: Sequence[int], channels: Sequence[int], removed: Collection[int]) -> set[int]:
    """Return the indices whose channels are removed."""
    removed = set(removed)
    return {index for index, channel in zip(indices, channels, strict=True) if channel in removed}


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
        weight = self.layer.weight
        lost = weight[:, self.lost].double().cpu()
        # The rest of the weight's dimensions are positions of a kernel.
        weight[:, self.kept] += torch.einsum("or...,kr->ok...", lost, solution.weights[0]).to(weight)
        offset = torch.einsum("or...,r->o", lost, solution.offsets[0]).to(weight)
        if self.layer.bias is not None:
            self.layer.bias += offset
        elif takes_offset:
            self.norm.running_mean -= offset


class _BoundedGraph(DependencyGraph):
    """A dependency graph where grouped convolutions lose whole groups, and whose searches end after [`MAX_VISITS`]."""

    def __init__(self):
        super().__init__()
        self._whole_groups = _WholeGroups()
        self._in_channel_pruning_fn.add(self._whole_groups.prune_in_channels)
        self._out_channel_pruning_fn.add(self._whole_groups.prune_out_channels)

    def get_pruner_of_module(self, module: nn.Module) -> BasePruningFunc:
        # torch-pruning registers pruners by class, and the class of grouped convolutions is that of all others.
        return self._whole_groups if _is_grouped(module) else super().get_pruner_of_module(module)

    def build_dependency(self, *args, **kwargs):
        built = super().build_dependency(*args, **kwargs)
        for node in self.module2node.values():
            node.dependencies = _Counted(node.dependencies, self._count)
        return built

    def get_pruning_group(self, *args, **kwargs):
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


def _by_channel(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    product = (x * x.grad).detach().float()
    if isinstance(layer, nn.Linear):  # channels last
        return product.reshape(len(x), -1, x.shape[-1]).sum(1).cpu()
    return product.flatten(2).sum(2).cpu()


def num_outputs(layer: Any) -> int:
    """Return the number of output channels of a convolution or a linear layer."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def num_inputs(layer: Any) -> int:
    """Return the number of input channels of a convolution or a linear layer."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.out_channels


def _is_grouped(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups < layer.out_channels == layer.in_channels
