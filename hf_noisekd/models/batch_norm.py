"""Find BatchNorm layers, and use statistics of the batch in them, alone or mixed with the stored ones.

Noise shifts all hidden layers of a teacher, which normalise by the running statistics of real images. Statistics of the
batch bring them back to about N(0, 1) (Raikwar & Mishra, NeurIPS 2022, section 3.2 and Algorithm 1). Mixed statistics
are in between (Schneider et al., NeurIPS 2020, who adapt networks to corrupted images in this way).
"""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from hf_noisekd.models.classifier import logits_of_blanks


def find_batch_norm(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of `model` by name, in its order, without frozen ones, which have no batch mode."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether `model` has a layer that [`find_batch_norm`] finds."""
    return bool(find_batch_norm(model))


def check_has_batch_norm(model: nn.Module) -> None:
    """Raise a `ValueError` that names the normalisation layers found, unless one is BatchNorm."""
    if has_batch_norm(model):
        return
    # Heads and whole networks can have "norm" in their names, too.
    names = [type(module).__name__ for module in model.modules() if module._parameters or module._buffers]
    found = Counter(name for name in names if "norm" in name.lower())
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.items()) or "no normalisation layer at all"
    advice = " Replace frozen BatchNorm by nn.BatchNorm2d." if num_frozen(model) else ""
    raise ValueError(
        f"{type(model).__name__} has no BatchNorm layer that can use batch statistics (found {kinds}).{advice}"
    )


def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance `[C]` of each channel of `[B, C, ...]`, in float32."""
    variance, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
    return mean, variance


def num_frozen(model: nn.Module) -> int:
    """Return the number of frozen BatchNorm layers, which use stored statistics in any mode."""
    return sum("frozenbatchnorm" in type(module).__name__.lower() for module in model.modules())


def stored_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return those of the layers of [`find_batch_norm`] that store a mean and a variance."""
    return {name: layer for name, layer in find_batch_norm(model).items() if layer.running_mean is not None}


class batch_statistics(ContextDecorator):  # noqa: N801 - used like a function: `with batch_statistics(teacher): ...`
    """Context under which BatchNorm layers normalise by statistics of the batch (Raikwar & Mishra 2022, Algorithm 1).

    With a `weight` below 1 they normalise by mixed moments: `weight * batch + (1 - weight) * stored`, for mean and
    variance. No buffer changes, and no other module changes its mode: drop-out and drop-path of an `eval()` model stay
    off. If `model.eval()` or `model.train()` is called inside, the layers take that mode at the exit; otherwise, also
    after an exception, everything is as before. The context can be entered again and nested, so build it once.

    Args:
        model: Any module with BatchNorm layers: 1d, 2d, 3d, Sync, or timm's `BatchNormAct2d`.
        fraction: Share of the layers that use batch statistics, in [0, 1], rounded to the nearest layer. The others
            keep their mode (Table 3 of the paper). The layers of a larger fraction include those of a smaller one.
        seed: Seed of the order in which layers are taken.
        weight: Weight of the batch, in [0, 1]: 0 is evaluation mode. A layer without stored statistics uses the batch
            alone.

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
        self.share = len(self.layer_names) / len(layers)  # `fraction`, rounded
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
    """A layer under the context, until `release`. It replaces the layer's `train`, to note modes set meanwhile."""

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
        self._forward: Callable = layer.forward
        self._own_forward = layer.__dict__.get("forward")
        if weight > 0 and not layer.training:
            layer.__dict__["forward"] = self._mixed  # no hook: a model that was compiled before would not notice it

    def __call__(self, mode: bool = True) -> _BatchNorm:
        """Note the mode for the release, and set that of the children of the layer."""
        if self._outer:
            self._outer(mode)
        else:
            self._before = mode, self._before[1]
            for child in self._layer.children():
                child.train(mode)
        return self._layer

    def _mixed(self, x: torch.Tensor) -> torch.Tensor:
        """Change the input so that normalising it by stored moments has the effect of mixed ones."""
        layer = self._layer
        if layer.train is not self:
            return self._forward(x)  # a nested context has the layer
        stored = layer.running_mean.float(), layer.running_var.float()
        mean, variance = (old.lerp(new, self._weight) for old, new in zip(stored, channel_moments(x), strict=True))
        scale = ((stored[1] + layer.eps) / (variance + layer.eps)).sqrt()
        shape = (1, -1, *[1] * (x.ndim - 2))
        return self._forward(
            torch.addcmul((stored[0] - mean * scale).view(shape), x.float(), scale.view(shape)).to(x.dtype)
        )

    def release(self) -> None:
        self._layer.training, self._layer.track_running_stats = self._before
        self._layer.__dict__.pop("forward", None)
        if self._own_forward:
            self._layer.forward = self._own_forward
        if self._outer:
            self._layer.train = self._outer
        else:
            del self._layer.train


def statistics_of_batch(model: nn.Module, **kwargs) -> AbstractContextManager:
    """Return the context of [`batch_statistics`], or one that does nothing for a model without BatchNorm."""
    return batch_statistics(model, **kwargs) if has_batch_norm(model) else nullcontext()


def check_leaves_stored_statistics(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Raise a `ValueError` if a forward pass under [`batch_statistics`] uses or changes stored statistics.

    Traced networks and those with frozen BatchNorm do. A model that stores none, as with LayerNorm, passes.
    """
    advice = "or set teacher_statistics=0 to use it as it is, which usually gives a worse student."
    if frozen := num_frozen(model):
        raise ValueError(
            f"{type(model).__name__} has {frozen} frozen BatchNorm layers, which cannot use batch statistics: replace "
            f"them by nn.BatchNorm2d, {advice}"
        )
    with statistics_of_batch(model), _CountBatchNorm() as calls:
        logits_of_blanks(model, input_size, "teacher")
    if calls.on_stored_statistics:
        raise ValueError(
            f"{type(model).__name__} cannot use batch statistics: {calls.on_stored_statistics} of {calls.total} "
            f"normalisations use stored ones in any mode, as in a traced network. Give the original network, {advice}"
        )


class _CountBatchNorm(TorchDispatchMode):
    """Counts batch normalisations, and those that are passed stored statistics."""

    total = on_stored_statistics = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "batch_norm" in func.name() and "backward" not in func.name():
            self.total += 1
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.on_stored_statistics += given.get("running_mean") is not None
        return func(*args, **(kwargs or {}))
