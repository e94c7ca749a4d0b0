"""The features at the end of a block, in a network and in its teacher."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hf_noisekd.models.classifier import compute_logits

TOLERANCE = 1e-3


class _BlockEnd(Exception):  # noqa: N818 - it ends a forward pass
    pass


class Call(NamedTuple):
    """A call of a block in its network: its arguments, whose tensors are copies, and its output."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The arguments that are tensors."""
        return [value for value in (*self.args, *self.kwargs.values()) if torch.is_tensor(value)]

    @property
    def values(self) -> list[Any]:
        """The other arguments."""
        return [value for value in (*self.args, *self.kwargs.values()) if not torch.is_tensor(value)]


class Block:
    """A block in its network: what is in front of the activation that ends it, if one does, else its output."""

    def __init__(self, model: nn.Module, name: str, sample: torch.Tensor):
        self.model, self.block = model, model.get_submodule(name)
        self.activation = self._last_activation(sample)

    def run(self, batch: torch.Tensor, layers: Iterable[nn.Module] = (), added: tuple | None = None) -> tuple:
        """Return the features at the end, and the inputs of `layers`; `added` is a layer and what its output gains."""
        seen: dict[nn.Module | str, torch.Tensor] = {}
        with ExitStack() as stack:
            for layer in layers:
                keep: Any = lambda module, args: seen.__setitem__(module, args[0].clone())  # noqa: E731
                stack.enter_context(layer.register_forward_pre_hook(keep))
            if added:
                add: Any = lambda _, __, output: output + added[1]  # noqa: E731
                stack.enter_context(added[0].register_forward_hook(add))
            if self.activation:
                end: Any = lambda _, args: seen.__setitem__("end", args[0].clone())  # noqa: E731
                stack.enter_context(self.activation.register_forward_pre_hook(end))
            output = self.call(batch).output
        return seen.get("end", output), [seen[layer] for layer in layers]

    def call(self, batch: torch.Tensor) -> Call:
        """Return what the block is called with, for images, and its output."""
        given: list[tuple[tuple, dict]] = []

        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given.append((tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}))

        with ExitStack() as stack:
            stack.enter_context(self.block.register_forward_pre_hook(note, with_kwargs=True))
            stack.enter_context(self.block.register_forward_hook(self._end))
            try:
                compute_logits(self.model, batch.clone())
            except _BlockEnd as stop:
                return Call(*given[-1], stop.args[0])
        raise AssertionError("the block was not called")

    @staticmethod
    def _end(block: nn.Module, args: tuple, output: torch.Tensor) -> None:
        raise _BlockEnd(output)

    def _last_activation(self, sample: torch.Tensor) -> nn.Module | None:
        """Return the module without weights that ends the block, if its output has the shape of its input."""
        self.activation = None
        found: dict[nn.Module, torch.Tensor] = {}

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            if args and torch.is_tensor(args[0]) and torch.is_tensor(output) and args[0].shape == output.shape:
                found[module] = output

        with ExitStack() as stack:
            for module in self.block.modules():
                if not [*module.children()] and not [*module.parameters()] and not isinstance(module, nn.Identity):
                    stack.enter_context(module.register_forward_hook(note))
            output, _ = self.run(sample)
        return next((module for module, tensor in reversed(found.items()) if tensor is output), None)


@dataclass
class BlockPair:
    """A block of a student, and that of its teacher whose features it is to have."""

    student: Block
    teacher: Block
    dim: int = 1  # of the channels
    channels: Sequence[int] | None = None  # of the teacher that the student has; None for all

    @classmethod
    def of(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        names: tuple[str, str],
        kept: Mapping[str, Sequence[int]],
        sample: torch.Tensor,
    ) -> "BlockPair | None":
        """Return the blocks of these names, or None if their ends do not compare, or are alike: nothing was cut so far.

        `kept` has, of narrowed layers of the student, the teacher's channels that they output.
        """
        block, goal = Block(student, names[0], sample), Block(teacher, names[1], sample)
        features, wanted = block.run(sample)[0], goal.run(sample)[0]
        if not (torch.is_tensor(features) and torch.is_tensor(wanted)):
            return None
        if (block.activation is None) != (goal.activation is None) or _are_close(features, wanted):
            return None
        if features.shape == wanted.shape:
            return cls(block, goal)
        # Which layer's channels reach the end is not known here: those of no other come as close.
        pairs = [
            cls(block, goal, dim, channels)
            for name, channels in kept.items()
            for dim in (1, -1)
            if name.startswith(f"{names[0]}.") and max(channels) < wanted.shape[dim]
        ]
        fitting = [pair for pair in pairs if pair.of_student(wanted).shape == features.shape]
        return min(fitting, key=lambda pair: F.mse_loss(pair.of_student(wanted), features).item(), default=None)

    def of_student(self, features: torch.Tensor) -> torch.Tensor:
        """Return those of the teacher's features whose channels the student has."""
        if self.channels is None:
            return features
        return features.index_select(self.dim, torch.tensor(self.channels, device=features.device))

    def goal(self, batch: torch.Tensor) -> torch.Tensor:
        """Return what the student is to have at the end of its block."""
        return self.of_student(self.teacher.run(batch)[0])

    def output_goal(self, batch: torch.Tensor) -> torch.Tensor:
        """Return what the block of the student is to output: the same, behind the activation."""
        return self.of_student(self.teacher.call(batch).output)


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value  # some blocks change their input in place


def _are_close(features: torch.Tensor, wanted: torch.Tensor) -> bool:
    tolerance = TOLERANCE * wanted.std().item()
    return features.shape == wanted.shape and torch.allclose(features, wanted, rtol=0, atol=tolerance)
