"""Depth: the blocks of a network that can be left out, since they give back what they take in shape."""

import copy
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_noisekd.models.classifier import logits_of_blanks

# A block has this many layers with weights at least: a convolution alone is a layer of one.
MIN_LAYERS = 2
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


class Place(NamedTuple):
    """Where a block stands."""

    stage: str  # name of the module that runs it and its neighbours in turn
    key: str  # its own name there

    @property
    def name(self) -> str:
        """Its name in the network."""
        return f"{self.stage}.{self.key}" if self.stage else self.key


def stages_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the modules of `model` that run blocks in turn, by name, with the keys of their blocks in order.

    These are `nn.Sequential`, `nn.ModuleList`, and modules whose children are all of one class, such as timm's RegNet
    stages. A block has two layers with weights or more. A child that has fewer is none and does not count.
    """
    stages = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if isinstance(module, nn.Sequential | nn.ModuleList) or len(set(map(type, children.values()))) == 1:
            blocks = [key for key, child in children.items() if _num_layers(child) >= MIN_LAYERS]
            if len(blocks) > 1:
                stages[name] = blocks
    return stages


def removable_blocks(model: nn.Module, input_size: tuple[int, int, int]) -> list[Place]:
    """Return the blocks that can be left out, in order: their output has the shape of their input.

    The network must answer without them, which it does not where another layer reads what they give out, too. Of
    blocks inside one another the outermost counts. The first block of a stage is not among them, so that none gets
    empty; it is the one that changes the shape as a rule.
    """
    places = {
        Place(stage, key): model.get_submodule(Place(stage, key).name)
        for stage, keys in stages_of(model).items()
        for key in keys[1:]
    }
    shapes: dict[Place, list[bool]] = {place: [] for place in places}
    with ExitStack() as stack:
        for place, block in places.items():

            def compare(module: nn.Module, inputs: tuple, output: Any, place: Place = place) -> None:
                shapes[place].append(
                    bool(inputs) and torch.is_tensor(output) and output.shape == getattr(inputs[0], "shape", None)
                )

            stack.enter_context(block.register_forward_hook(compare))
        logits_of_blanks(model, input_size, "model")
    fitting = [place for place, same in shapes.items() if same == [True]]
    outermost = [place for place in fitting if not any(place.name.startswith(f"{other.name}.") for other in fitting)]
    return [place for place in outermost if _answers_without(model, place, input_size)]


def _answers_without(model: nn.Module, place: Place, input_size: tuple[int, int, int]) -> bool:
    rest = copy.deepcopy(model)
    remove_blocks(rest, [place])
    try:
        logits_of_blanks(rest, input_size, "model")
    except (ValueError, IndexError, AttributeError, TypeError):
        return False
    return True


def remove_blocks(model: nn.Module, places: Collection[Place]) -> dict[str, str]:
    """Leave blocks out of `model`, in place; those behind them in a stage move up and take their names.

    Returns:
        The name that each module of what is left had before, by its name now.
    """
    before = {module: name for name, module in model.named_modules()}
    by_stage: dict[str, set[str]] = {}
    for place in places:
        by_stage.setdefault(place.stage, set()).add(place.key)
    # The innermost first: the names of the others still hold then.
    for stage in sorted(by_stage, key=lambda name: name.count("."), reverse=True):
        _keep_children(model.get_submodule(stage), stages_of(model)[stage], by_stage[stage])
    return {name: before[module] for name, module in model.named_modules()}


def _keep_children(module: nn.Module, blocks: list[str], removed: Collection[str]) -> None:
    kept = [module._modules[key] for key in blocks if key not in removed]
    for key, child in zip(blocks, kept, strict=False):
        module._modules[key] = child
    for key in blocks[len(kept) :]:
        del module._modules[key]


def _num_layers(module: nn.Module) -> int:
    return sum(isinstance(layer, WEIGHTED) for layer in module.modules())
