"""BatchNorm layers: find them, and run them on the statistics of the batch at hand, or partly on these.

Noise shifts all hidden layers of a teacher, as these normalise by the running statistics of real images. Those of the
batch bring them back to about N(0, 1) (Raikwar & Mishra, NeurIPS 2022, section 3.2 and Algorithm 1). A mixture of both
is between the two (Schneider et al., NeurIPS 2020, who adapt networks to corrupted images by it).
"""

import random
from collections import Counter
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from hf_noisekd.models.classifier import logits_of_blanks


def find_batch_norm(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of `model` by name, in its order; frozen ones have no batch mode and do not count."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether `model` has a layer that [`find_batch_norm`] finds."""
    return bool(find_batch_norm(model))


def check_has_batch_norm(model: nn.Module) -> None:
    """Raise a `ValueError` that names the normalisation layers that were found, unless one is BatchNorm."""
    if has_batch_norm(model):
        return
    # Heads and whole networks have the word in their names, too.
    found = Counter(
        type(module).__name__
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        and (not list(module.children()) or module._parameters or module._buffers)
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.items()) or "no normalisation layer at all"
    frozen = " Frozen BatchNorm cannot: replace it by nn.BatchNorm2d." if num_frozen(model) else ""
    raise ValueError(
        f"{type(model).__name__} has no BatchNorm layer that can use batch statistics (found {kinds}).{frozen}"
    )


def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance `[C]` of each channel of `[B, C, ...]`, in float32."""
    variance, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
    return mean, variance


def num_frozen(model: nn.Module) -> int:
    """Return the number of frozen BatchNorm layers, which use what they store in any mode."""
    return sum("frozenbatchnorm" in type(module).__name__.lower() for module in model.modules())


def stored_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return those of the layers of [`find_batch_norm`] that store a mean and a variance; none if there is none."""
    return {name: layer for name, layer in find_batch_norm(model).items() if layer.running_mean is not None}


class batch_statistics(ContextDecorator):  # noqa: N801 - used like a function: `with batch_statistics(teacher): ...`
    """Context under which BatchNorm layers normalise by the batch at hand (Raikwar & Mishra 2022, Algorithm 1).

    With a `weight` below 1 they normalise by mixed moments: `weight` times mean and variance of the batch, and the rest
    of what they store. No buffer changes, and no other module changes its mode: drop-out and drop-path of an `eval()`
    model stay off. Modes set inside, as by `model.eval()`, hold for the layers from the exit on. Else, also after an
    exception, everything is as it was then. It can be entered many times, also nested, so a training loop builds it
    once.

    Args:
        model: Any module with BatchNorm layers, of 1d, 2d, 3d, Sync, or timm's `BatchNormAct2d`.
        fraction: Share of the layers to put on batch statistics, in [0, 1], rounded to the nearest layer. The others
            keep the mode they have (Table 3 of the paper). A larger fraction contains a smaller one.
        seed: Seed of the order in which layers are taken.
        weight: Weight of the batch, in [0, 1], against what a layer stores: 0 is evaluation mode. A layer that stores
            nothing has the batch alone.

    Raises:
        ValueError: `model` has no BatchNorm layer, or `fraction` or `weight` is out of range.
    """

    def __init__(self, model: nn.Module, fraction: float = 1.0, seed: int = 0, *, weight: float = 1.0):
        for name, value in (("fraction", fraction), ("weight", weight)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {value}.")
        check_has_batch_norm(model)
        layers = find_batch_norm(model)
        chosen = random.Random(seed).sample(list(layers), k=len(layers))[: round(fraction * len(layers))]
        self.layer_names = [name for name in layers if name in set(chosen)]
        self.share = len(self.layer_names) / len(layers)  # what `fraction` came to
        self._layers = [layers[name] for name in self.layer_names]
        self._weight = weight
        self._held: list[list[_Held]] = []

    def __enter__(self) -> "batch_statistics":
        self._held.append([_Held(layer, self._weight) for layer in self._layers])
        return self

    def __exit__(self, *exception) -> None:
        for held in self._held.pop():
            held.release()


class _Held:
    """A layer on the statistics of a context, whose `train` it takes the place of, until it is released."""

    def __init__(self, layer: _BatchNorm, weight: float):
        self._layer: Any = layer
        self._weight = weight
        self._outer: _Held | None = layer.__dict__.get("train")
        self._before = layer.training, layer.track_running_stats
        # Set as attributes: `layer.train()` would also switch on the drop-out inside timm's BatchNormAct2d.
        # Without `track_running_stats` torch passes no buffer to the kernel, so none can change.
        layer.training = layer.running_mean is None or weight == 1
        layer.track_running_stats = not layer.training
        layer.train = self  # type: ignore[method-assign]
        mixes = weight > 0 and not layer.training
        self._hook = layer.register_forward_pre_hook(self._mix) if mixes else None

    def __call__(self, mode: bool = True) -> _BatchNorm:
        """Keep the mode for later, and set that of what is inside the layer."""
        if self._outer:
            self._outer(mode)
        else:
            self._before = mode, self._before[1]
            for child in self._layer.children():
                child.train(mode)
        return self._layer

    def _mix(self, layer: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Change the input so that the layer, which normalises by what it stores, normalises it by mixed moments."""
        if layer.train is not self:
            return None  # a context inside this one holds the layer
        (x,) = inputs
        stored = layer.running_mean.float(), layer.running_var.float()
        mean, variance = (old.lerp(new, self._weight) for old, new in zip(stored, channel_moments(x), strict=True))
        scale = ((stored[1] + layer.eps) / (variance + layer.eps)).sqrt()
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (torch.addcmul((stored[0] - mean * scale).view(shape), x.float(), scale.view(shape)).to(x.dtype),)

    def release(self) -> None:
        self._layer.training, self._layer.track_running_stats = self._before
        if self._hook:
            self._hook.remove()
        if self._outer:
            self._layer.train = self._outer
        else:
            del self._layer.train


def statistics_of_batch(model: nn.Module, **kwargs) -> AbstractContextManager:
    """Return the context of [`batch_statistics`], or one that does nothing for a model without such layers."""
    return batch_statistics(model, **kwargs) if has_batch_norm(model) else nullcontext()


def check_leaves_stored_statistics(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Check that under [`batch_statistics`] no normalisation of a forward pass uses or changes stored statistics.

    A model that stores none, such as one with LayerNorm or GroupNorm, passes.

    Raises:
        ValueError: It does, as traced networks do, and such with frozen BatchNorm.
    """
    advice = "or set teacher_statistics=0 to use it as it is, which teaches less."
    if frozen := num_frozen(model):
        raise ValueError(
            f"{type(model).__name__} has {frozen} frozen BatchNorm layers, which cannot use batch statistics: replace "
            f"them by nn.BatchNorm2d, {advice}"
        )
    with statistics_of_batch(model), _CountBatchNorm() as calls:
        logits_of_blanks(model, input_size, "teacher")
    if calls.on_stored_statistics:
        raise ValueError(
            f"{type(model).__name__} cannot use batch statistics throughout: {calls.on_stored_statistics} of "
            f"{calls.total} normalisations use stored ones whatever its BatchNorm layers are set to, as in a traced "
            f"network. Give the network that it was made of, {advice}"
        )


class _CountBatchNorm(TorchDispatchMode):
    """Counts the normalisations of batches, and those among them that are given stored statistics."""

    total = on_stored_statistics = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        if "batch_norm" in func.name() and "backward" not in func.name():
            self.total += 1
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.on_stored_statistics += given.get("running_mean") is not None
        return func(*args, **(kwargs or {}))
