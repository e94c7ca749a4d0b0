"""Width: the channels that layers of a network share, and a network with fewer of them.

Which layers must lose the same channels is told by torch-pruning's dependency graph (Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023). Which of them are spared is told by the answers that would change without them.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch_pruning import DependencyGraph
from torch_pruning.pruner.function import BasePruningFunc

from hf_noisekd.models.classifier import compute_logits, evaluation_mode, logits_of_blanks, to_device_of

LAYERS = (nn.Conv2d, nn.Linear)
MULTIPLE = 8  # of the channels of a layer
MIN_CHANNELS = 8
# Layers that torch-pruning may come by for one group, again and again: 7,240 in a DenseNet-264, no end in a ReXNet.
MAX_VISITS = 10_000
# Of torch-pruning where it cannot follow a network, and of layers that do not fit after it.
FAULTS = (ValueError, RuntimeError, IndexError, AssertionError, TypeError, KeyError, AttributeError)


@dataclass
class ChannelGroup:
    """Channels that layers share: the outputs of its root, counted from 0.

    They go in runs of `unit` channels, as the groups of a convolution do, and each of `parts` equal parts must lose as
    many, as for GroupNorm. `writers` are the layers whose outputs they are, and `readers` those that take them in: of
    each, its inputs and the channels that they are.
    """

    root: str
    channels: int
    unit: int = 1
    parts: int = 1
    writers: list[str] = field(default_factory=list)
    readers: list[tuple[str, list[int], list[int]]] = field(default_factory=list)

    def width(self, share: float) -> int:
        """Return a share of its channels, in a number that hardware likes and that can be left."""
        step = math.lcm(MULTIPLE, self.unit * self.parts)
        if self.channels % step:
            step = self.unit * self.parts
        wanted = round(self.channels * share / step) * step
        return min(max(wanted, step, MIN_CHANNELS), self.channels)


class ChannelCutter:
    """Finds the groups of channels of a model, and cuts them in place.

    Args:
        model: A classifier.
        input_size: `(channels, height, width)` of its images.

    Attributes:
        groups: Its groups by the name of their root; none where torch-pruning cannot follow the network.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]):
        self._model, self._input_size = model, input_size
        self._num_classes = logits_of_blanks(model, input_size, "model").shape[-1]
        # A layer with an output for each class is taken for the classifier, whose outputs stay.
        layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
        heads = [layer for layer in layers if num_outputs(layer) == self._num_classes]
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        model.requires_grad_(True)
        self.groups: dict[str, ChannelGroup] = {}
        # What torch-pruning cannot follow in a network ends it in one of these.
        with warnings.catch_warnings(), torch.enable_grad(), evaluation_mode(model), suppress(*FAULTS):
            warnings.simplefilter("ignore")
            self._graph = _BoundedGraph().build_dependency(
                model,
                to_device_of(model, torch.zeros(2, *input_size)),
                # timm's 1d convolutions run over the channels, in place of their being mixed.
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
            if not isinstance(layer, LAYERS):
                continue
            if not is_input or _is_grouped(layer) or _is_depthwise(layer):
                group.writers.append(self._names[layer])
            else:
                group.readers.append((self._names[layer], list(item.idxs), list(item.root_idxs)))
        return group

    def _is_sound(self, group: ChannelGroup) -> bool:
        """Whether the layers have the channels that the graph says they read."""
        return all(
            max(inputs, default=0) < num_inputs(self._modules[name]) and max(channels, default=0) < group.channels
            for name, inputs, channels in group.readers
        )

    def cut(self, removed: Mapping[str, Sequence[int]]) -> bool:
        """Take channels out of the model, by the root of their group; return whether it still answers.

        It does not where the dependency graph missed what the forward pass does. The model is of no use then.
        """
        try:
            for root, channels in removed.items():
                if channels:
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
    """Return how much the answers to images would change without each channel, by the root of its group.

    To second order that is, for the KL divergence of the answers, `E[(d log p(y) / d m)^2] / 2`: `m` scales the channel
    wherever it is read, and `y` is drawn from the answer `p` (Theis et al., "Faster gaze prediction with dense networks
    and Fisher pruning", 2018).

    Args:
        model: A classifier, whose parameters require gradients.
        groups: Those of [`ChannelCutter`].
        images: Batches `[B, C, H, W]`.
        statistics: Context for the forward passes.
        seed: Seed of the drawn classes.
    """
    importance = {root: torch.zeros(group.channels) for root, group in groups.items()}
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            # A tensor of its own: the gradient of what this layer alone reads.
            inputs[name] = args[0].clone() if args[0].requires_grad else args[0].detach().requires_grad_()
            inputs[name].retain_grad()
            return inputs[name], *args[1:]

        return hook

    readers = {name for group in groups.values() for name, *_ in group.readers}
    with ExitStack() as stack, torch.enable_grad(), evaluation_mode(model), statistics:
        for name in readers:
            stack.enter_context(model.get_submodule(name).register_forward_pre_hook(keep(name)))
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
    """Return the channels to remove from a group so that `kept` are left, a multiple of its unit and its parts."""
    by_part = importance.view(group.parts, -1, group.unit).sum(-1)
    if group.parts > 1:
        by_part = by_part.mean(0, keepdim=True).expand_as(by_part)
    num_units = by_part.shape[1]
    runs = by_part.argsort(dim=1)[:, : num_units - kept // (group.parts * group.unit)]
    runs = runs + torch.arange(group.parts)[:, None] * num_units
    return sorted((runs.flatten()[:, None] * group.unit + torch.arange(group.unit)).flatten().tolist())


class _BoundedGraph(DependencyGraph):
    """A dependency graph in which grouped convolutions lose whole groups of channels.

    The search for what goes together ends with a `RuntimeError` after [`MAX_VISITS`].
    """

    def __init__(self):
        super().__init__()
        self._whole_groups = _WholeGroups()
        self._in_channel_pruning_fn.add(self._whole_groups.prune_in_channels)
        self._out_channel_pruning_fn.add(self._whole_groups.prune_out_channels)

    def get_pruner_of_module(self, module: nn.Module) -> BasePruningFunc:
        # torch-pruning registers pruners by class, and these layers differ from others of their class by a number.
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
            raise RuntimeError(f"The search for a group of channels came by {MAX_VISITS:,} layers, without an end.")


class _Counted(list):
    """A list that tells when somebody goes through it."""

    def __init__(self, items: Iterable, count: Callable[[], None]):
        super().__init__(items)
        self._count = count

    def __iter__(self) -> Iterator:
        self._count()
        return super().__iter__()


class _WholeGroups(BasePruningFunc):
    """Takes whole groups out of a grouped convolution, whose outputs go with its inputs then."""

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
    product = product.flatten(1, -2).sum(1) if isinstance(layer, nn.Linear) and x.ndim > 2 else product
    return (product.flatten(2).sum(2) if product.ndim > 2 else product).cpu()


def num_outputs(layer: Any) -> int:
    """Return the number of channels that a convolution or a linear layer gives out."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def num_inputs(layer: Any) -> int:
    """Return the number of channels that a convolution or a linear layer takes in."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.out_channels


def _is_grouped(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups < layer.out_channels == layer.in_channels
