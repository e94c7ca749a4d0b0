"""Depth: the blocks of a network that can be left out, because their output has the shape of their input."""

import copy
from collections.abc import Collection
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_noisekd.models.classifier import logits_of_blanks

MIN_LAYERS = 2  # with weights, in a block
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


class Place(NamedTuple):
    """Where a block is."""

    stage: str  # name of the module that runs the blocks one after another
    key: str  # name of the block in that module

    @property
    def name(self) -> str:
        """Name of the block in the network."""
        return f"{self.stage}.{self.key}" if self.stage else self.key


def stages_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the modules of `model` that run several blocks, by name, with the keys of their blocks in order.

    These are `nn.Sequential`, `nn.ModuleList`, and modules whose children are all of one class, like timm's RegNet
    stages. A child counts as a block if it has at least two layers with weights.
    """
    stages = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if isinstance(module, nn.Sequential | nn.ModuleList) or len(set(map(type, children.values()))) == 1:
            num_layers = {key: sum(isinstance(x, WEIGHTED) for x in child.modules()) for key, child in children.items()}
            blocks = [key for key, number in num_layers.items() if number >= MIN_LAYERS]
            if len(blocks) > 1:
                stages[name] = blocks
    return stages


def removable_blocks(model: nn.Module, input_size: tuple[int, int, int]) -> list[Place]:
    """Return the blocks that can be left out, in order: their output has the shape of their input.

    A forward pass without the block must work; it fails where another layer needs its output, too. Of nested blocks
    only the outermost counts. The first block of a stage stays: no stage becomes empty, and it usually changes the
    shape.
    """
    same_shape = {Place(stage, key): list[bool]() for stage, keys in stages_of(model).items() for key in keys[1:]}

    def compare(place: Place, block: nn.Module, inputs: tuple, output: Any) -> None:
        shape = getattr(inputs[0], "shape", None) if inputs else None
        same_shape[place].append(torch.is_tensor(output) and output.shape == shape)

    with ExitStack() as stack:
        for place in same_shape:
            stack.enter_context(model.get_submodule(place.name).register_forward_hook(partial(compare, place)))
        logits_of_blanks(model, input_size, "model")
    fitting = [place for place, same in same_shape.items() if same == [True]]
    outermost = [place for place in fitting if not any(place.name.startswith(f"{other.name}.") for other in fitting)]
    removable = []
    for place in outermost:
        remove_blocks(rest := copy.deepcopy(model), [place])
        with suppress(ValueError, IndexError, AttributeError, TypeError):
            logits_of_blanks(rest, input_size, "model")
            removable.append(place)
    return removable


def remove_blocks(model: nn.Module, places: Collection[Place]) -> dict[str, str]:
    """Remove blocks of `model`, in place: later blocks of a stage take their names. Return old names by new ones."""
    before = {module: name for name, module in model.named_modules()}
    # The innermost first: the names of the others do not change by that.
    for stage in sorted({place.stage: None for place in places}, key=lambda name: name.count("."), reverse=True):
        children, blocks = model.get_submodule(stage)._modules, stages_of(model)[stage]
        kept = [children[key] for key in blocks if Place(stage, key) not in places]
        children.update(zip(blocks, kept, strict=False))
        for key in blocks[len(kept) :]:
            del children[key]
    return {name: before[module] for name, module in model.named_modules()}
