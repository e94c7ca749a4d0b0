"""Width: the channels that layers of a network share, and a network with fewer of them.

Which layers must lose the same channels is found by torch-pruning's dependency graph (Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023). Those channels are kept whose loss would change the predictions the most.
"""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from hf_noisekd.models.classifier import (
    compute_alike,
    compute_logits,
    evaluation_mode,
    logits_of_blanks,
    to_device_of,
)
from hf_noisekd.shrinking.dependency_graph import (
    FAULTS,
    LAYERS,
    BoundedGraph,
    is_depthwise,
    is_grouped,
    num_inputs,
    num_outputs,
    weight_by_output,
)

MULTIPLE = 8  # of the channels of a layer
MIN_CHANNELS = 8
# Of logits of a network that lost channels which nothing read: float32 gives 1e-6, wrong channels 1e-3 and more.
SAME = 1e-4
# In the test, convolutions that standardise the weights of all inputs together take them as they are: else those for
# silent inputs would change the others.
PLAIN = {StdConv2d: nn.Conv2d, StdConv2dSame: Conv2dSame}


@dataclass
class ChannelGroup:
    """Channels that layers share: the outputs of its root, counted from 0.

    They are removed in runs of `unit` channels, for grouped convolutions, and each of `parts` equal parts must lose
    the same number, for GroupNorm. `writers` are the layers that output them, and `readers` those that have them as
    input: name, indices of the outputs or inputs, and the channel of each. `tensors` have something for each channel,
    all but the weights of readers: name, dimension, indices along it, and the channel of each.
    """

    root: str
    channels: int
    unit: int = 1
    parts: int = 1
    writers: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    readers: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    tensors: list[tuple[str, int, list[int], list[int]]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Channels by which its width can change, to numbers that hardware likes where it has one now."""
        step = math.lcm(MULTIPLE, self.unit * self.parts)
        return self.unit * self.parts if self.channels % step else step

    def width(self, share: float) -> int:
        """Return a share of its channels, rounded to a number that hardware likes and that can be reached."""
        wanted = round(self.channels * share / self.step) * self.step
        return min(max(wanted, self.step, MIN_CHANNELS), self.channels)

    @torch.no_grad()
    def silence(self, model: nn.Module, generator: torch.Generator) -> list[int]:
        """Let nothing read some of the channels of `model`, in place, at least half of them; return which.

        They become copies of the others, all of which get as many: what a norm takes over channels stays, too.
        """
        units = self.channels // (self.parts * self.unit)
        copies = next((number for number in range(2, units) if units % number == 0), units)
        numbers = torch.arange(self.channels)
        for part in numbers.view(self.parts, units, self.unit):
            order = torch.randperm(units, generator=generator)
            part[order] = part[order[: units // copies]].repeat(copies, 1)
        source = numbers.tolist()
        silent = [channel for channel, other in enumerate(source) if channel != other]
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, dim, indices, channels in self.tensors:
            places = defaultdict[int, list[int]](list)
            for index, channel in zip(indices, channels, strict=True):
                places[channel].append(index)
            tensor = tensors[name].movedim(dim, 0)
            if len(tensor) > 1:  # else it is the same for all
                to = [place for channel in silent for place in places[channel]]
                tensor[to] = tensor[[place for channel in silent for place in places[source[channel]]]]
        for name, inputs, of in self.readers:
            weight_by_output(model.get_submodule(name))[:, [*indices_of(inputs, of, silent)]] = 0
        return silent


class ChannelCutter:
    """Cuts channels of a classifier in place.

    `groups`, by root, are those that can be cut. `left_alone` has the writers of the others by root, without those of
    the classifier: torch-pruning cannot follow these, or takes other channels for theirs. That is tested, together if
    possible: channels that nothing reads can be cut without a change of the logits.

    Args:
        model: The classifier, which does not change before the cut but for `requires_grad`.
        input_size: `(channels, height, width)` of its images.
        fixed: Names of layers that are known not to be roots of groups that can be cut.
        groups: Those of a network of the same layers, if they are known; they are not tested again.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        fixed: Collection[str] = (),
        groups: Mapping[str, ChannelGroup] | None = None,
    ):
        self._model, self._input_size = model, input_size
        self._num_classes = logits_of_blanks(model, input_size, "model").shape[-1]
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        model.requires_grad_(True)
        self.groups = dict(groups or {})
        self.left_alone: dict[str, list[str]] = {}
        self.kept: dict[str, list[int]] = {}  # outputs that a narrowed layer has kept, by its name
        with warnings.catch_warnings(), torch.enable_grad(), evaluation_mode(model), suppress(*FAULTS):
            warnings.simplefilter("ignore")
            self._graph = BoundedGraph().build_dependency(
                model,
                to_device_of(model, torch.zeros(2, *input_size)),
                # timm's 1d convolutions run along the channels.
                ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Conv1d)],
                verbose=False,
            )
            if groups is None:
                found = self._find_groups(fixed)
                self._test(found, [*found])
                self.left_alone |= {root: _writers(group) for root, group in found.items() if root not in self.groups}

    def _find_groups(self, fixed: Collection[str]) -> dict[str, ChannelGroup]:
        """Return those groups that torch-pruning can follow, but for those of the classifier, by root."""
        groups: dict[str, ChannelGroup] = {}
        # A layer with one output for each class counts as the classifier, whose outputs stay.
        heads = {x for x in self._modules.values() if isinstance(x, LAYERS) and num_outputs(x) == self._num_classes}
        seen = heads | {self._modules[name] for name in fixed}
        for root in [module for module in self._graph.module2node if isinstance(module, LAYERS)]:
            if root in seen:
                continue
            try:
                found = self._found(root, range(num_outputs(root)))
            except FAULTS:
                self.left_alone[self._names[root]] = [self._names[root]]
                continue
            changed = {
                item.dep.target.module for item in found if self._graph.is_out_channel_pruning_fn(item.dep.handler)
            }
            seen |= changed
            group = self._describe(found)
            if changed & heads:
                continue
            if self._is_sound(group):
                groups[group.root] = group
            else:
                self.left_alone[group.root] = _writers(group)
        return groups

    def _found(self, root: nn.Module, channels: Sequence[int]) -> Any:
        """Return torch-pruning's group of some channels of its root."""
        handler = self._graph.get_pruner_of_module(root).prune_out_channels
        return self._graph.get_pruning_group(root, handler, list(channels))

    def _test(self, found: Mapping[str, ChannelGroup], roots: Sequence[str]) -> None:
        """Add to `self.groups` those of the groups found that can be cut together with what is there."""
        tried = self.groups | {root: found[root] for root in roots}
        if _are_in_step(self._model, self._input_size, tried):
            self.groups = tried
        elif len(roots) > 1:
            half = len(roots) // 2
            self._test(found, roots[:half])
            self._test(found, roots[half:])

    def _describe(self, found: Any) -> ChannelGroup:
        root = found[0].dep.target.module
        group = ChannelGroup(self._names[root], num_outputs(root))
        for item in found:
            layer, is_input = item.dep.target.module, self._graph.is_in_channel_pruning_fn(item.dep.handler)
            indices = (list(item.idxs), list(item.root_idxs))
            if isinstance(layer, nn.GroupNorm) and layer.num_groups < layer.num_channels:
                group.parts = math.lcm(group.parts, layer.num_groups)
            if is_grouped(layer):
                group.unit = math.lcm(group.unit, layer.out_channels // layer.groups)
            if isinstance(layer, LAYERS) and is_input and not is_grouped(layer) and not is_depthwise(layer):
                group.readers.append((self._names[layer], *indices))
                continue
            if isinstance(layer, LAYERS):
                group.writers.append((self._names[layer], *indices))
            group.tensors += [(name, dim, *indices) for name, dim in self._tensors(item.dep.target)]
        return group

    def _tensors(self, node: Any) -> Iterator[tuple[str, int]]:
        """Yield the tensors that have the channels of a node, by name, and along which dimension."""
        if isinstance(node.module, nn.Parameter):
            yield self._graph._param_to_name[node.module], node.pruning_dim
        elif (name := self._names.get(node.module)) is not None:
            along_inputs = isinstance(node.module, nn.ConvTranspose2d) and not is_depthwise(node.module)
            for key, tensor in (node.module._parameters | node.module._buffers).items():
                if tensor is not None and tensor.ndim:
                    is_weight = isinstance(node.module, LAYERS) and key == "weight"
                    yield f"{name}.{key}", int(along_inputs) if is_weight else -1

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
                        lost = indices_of(outputs, of, channels)
                        self.kept[name] = sorted(set(range(num_outputs(self._modules[name]))) - lost)
                    self._found(self._modules[root], channels).prune()
            return logits_of_blanks(self._model, self._input_size, "model").shape[-1] == self._num_classes
        except FAULTS:
            return False


def _writers(group: ChannelGroup) -> list[str]:
    return [name for name, *_ in group.writers]


def _are_in_step(model: nn.Module, input_size: tuple[int, int, int], groups: Mapping[str, ChannelGroup]) -> bool:
    """Return whether channels of all groups that nothing reads can be cut without a change of the logits."""
    silenced, generator = copy.deepcopy(model).cpu(), torch.Generator().manual_seed(0)  # GPUs round too much
    for layer in silenced.modules():
        layer.__class__ = PLAIN.get(type(layer), type(layer))  # else what they read would depend on the silent ones
    try:
        removed = {root: group.silence(silenced, generator) for root, group in groups.items()}
        cutter = ChannelCutter(cut := copy.deepcopy(silenced), input_size, groups=groups)
        return cutter.cut(removed) and compute_alike(silenced, cut, input_size, SAME)
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


def indices_of(indices: Sequence[int], channels: Sequence[int], chosen: Collection[int]) -> set[int]:
    """Return the indices of a layer whose channels are among those chosen."""
    chosen = set(chosen)
    return {index for index, channel in zip(indices, channels, strict=True) if channel in chosen}


def _by_channel(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    product = (x * x.grad).detach().float()
    if isinstance(layer, nn.Linear):  # channels last
        return product.reshape(len(x), -1, x.shape[-1]).sum(1).cpu()
    return product.flatten(2).sum(2).cpu()
