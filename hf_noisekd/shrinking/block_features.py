"""A block in its network: how it is called, whether it can be called alone, and its features."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

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
    """A block in its network, and how it is called for a few images, a `sample`.

    Its features are what is in front of the activation that ends it, if one does, else its output.
    """

    def __init__(self, model: nn.Module, name: str, sample: torch.Tensor):
        self.model, self.name, self.block, self.sample = model, name, model.get_submodule(name), sample
        self.activation: nn.Module | None = None
        self.called = self.call(sample)
        # One that gets several tensors, or whose output depends on more than its arguments, needs its network.
        self.is_alone = self._can_be_called_alone()
        self.activation = self._last_activation()

    def run(
        self, x: torch.Tensor, layers: Iterable[nn.Module] = (), added: tuple | None = None, *, alone: bool = False
    ) -> tuple:
        """Return the features for images, or `alone` for what the block gets of them, and the inputs of `layers`.

        `added` is a layer and what its output gains.
        """
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
            output = self.output(x) if alone else self.call(x).output
        return seen.get("end", output), [seen[layer] for layer in layers]

    def run_sample(self, added: tuple | None = None) -> Any:
        """Return the features for the sample."""
        x = self.called.tensors[0] if self.is_alone else self.sample
        return self.run(x, added=added, alone=self.is_alone)[0]

    def call(self, images: torch.Tensor) -> Call:
        """Return what the block is called with for images, and its output."""
        given: list[tuple[tuple, dict]] = []

        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given.append((tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}))

        with ExitStack() as stack:
            stack.enter_context(self.block.register_forward_pre_hook(note, with_kwargs=True))
            stack.enter_context(self.block.register_forward_hook(self._end))
            try:
                compute_logits(self.model, images.clone())
            except _BlockEnd as stop:
                return Call(*given[-1], stop.args[0])
        raise AssertionError("the block was not called")

    def output(self, x: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
        """Return the output of the block alone, called as for the sample but with another tensor."""
        x = x.clone()  # which it may change
        args = tuple(x if torch.is_tensor(value) else value for value in self.called.args)
        kwargs = {name: x if torch.is_tensor(value) else value for name, value in self.called.kwargs.items()}
        return functional_call(self.block, dict(weights or {}), args, kwargs)

    @staticmethod
    def _end(block: nn.Module, args: tuple, output: torch.Tensor) -> None:
        raise _BlockEnd(output)

    def _can_be_called_alone(self) -> bool:
        call = self.called
        if [x.shape[:1] for x in call.tensors] != [self.sample.shape[:1]] or not all(map(_is_plain, call.values)):
            return False
        return torch.is_tensor(call.output) and are_close(self.output(call.tensors[0]), call.output)

    def _last_activation(self) -> nn.Module | None:
        """Return the module without weights that ends the block, if its output has the shape of its input."""
        found: dict[nn.Module, torch.Tensor] = {}

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            if args and torch.is_tensor(args[0]) and torch.is_tensor(output) and args[0].shape == output.shape:
                found[module] = output

        with ExitStack() as stack:
            for module in self.block.modules():
                if not [*module.children()] and not [*module.parameters()] and not isinstance(module, nn.Identity):
                    stack.enter_context(module.register_forward_hook(note))
            output = self.run_sample()
        return next((module for module, tensor in reversed(found.items()) if tensor is output), None)


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value  # some blocks change their input in place


def are_close(features: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Return whether features are alike but for rounding."""
    tolerance = TOLERANCE * wanted.std().item()
    return features.shape == wanted.shape and torch.allclose(features, wanted, rtol=0, atol=tolerance)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
