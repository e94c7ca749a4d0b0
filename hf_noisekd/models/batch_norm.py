"""BatchNorm layers: find them, and run them on the statistics of the batch at hand.

Noise shifts all hidden layers of a teacher, as these normalise by the running statistics of real images. Those of the
batch bring them back to about N(0, 1) (Raikwar & Mishra, NeurIPS 2022, section 3.2 and Algorithm 1).
"""

import random
from collections import Counter
from contextlib import ContextDecorator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from hf_noisekd.models.classifier import answer_to_blanks


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether `model` has a layer that [`find_batch_norm`] finds."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def find_batch_norm(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of `model` by name, in its order; frozen ones have no batch mode and do not count.

    Raises:
        ValueError: The model has no such layer. The message names the normalisation layers that were found.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not layers:
        found = Counter(type(module).__name__ for module in model.modules() if "norm" in type(module).__name__.lower())
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.items()) or "no normalisation layer at all"
        frozen = " Frozen BatchNorm cannot use batch statistics: replace it by nn.BatchNorm2d."
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm layer that can use batch statistics (found {kinds}). "
            "Noise distillation needs a teacher with BatchNorm, such as a ResNet, MobileNet, EfficientNet or RegNet."
            + (frozen if any("frozen" in kind.lower() for kind in found) else "")
        )
    return layers


def stored_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return those of the layers of [`find_batch_norm`] that store a mean and a variance; none if there is none."""
    layers = find_batch_norm(model) if has_batch_norm(model) else {}
    return {name: layer for name, layer in layers.items() if layer.running_mean is not None}


class batch_statistics(ContextDecorator):  # noqa: N801 - used like a function: `with batch_statistics(teacher): ...`
    """Context under which BatchNorm layers normalise by the batch at hand (Raikwar & Mishra 2022, Algorithm 1).

    No buffer changes, and no other module changes its mode: drop-out and drop-path of an `eval()` model stay off. Modes
    set inside, as by `model.eval()`, hold for the layers from the exit on. Else, also after an exception, everything is
    as it was then. It can be entered many times, also nested, so a training loop builds it once.

    Args:
        model: Any module with BatchNorm layers, of 1d, 2d, 3d, Sync, or timm's `BatchNormAct2d`.
        fraction: Share of the layers to put on batch statistics, in [0, 1], rounded to the nearest layer. The others
            keep the mode they have (Table 3 of the paper). A larger fraction contains a smaller one.
        seed: Seed of the order in which layers are taken.

    Raises:
        ValueError: `model` has no BatchNorm layer, or `fraction` is out of range.
    """

    def __init__(self, model: nn.Module, fraction: float = 1.0, seed: int = 0):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
        layers = find_batch_norm(model)
        chosen = random.Random(seed).sample(list(layers), k=len(layers))[: round(fraction * len(layers))]
        self.layer_names = [name for name in layers if name in set(chosen)]
        self._layers = [layers[name] for name in self.layer_names]
        self._held: list[list[_Held]] = []

    def __enter__(self) -> "batch_statistics":
        self._held.append([_Held(layer) for layer in self._layers])
        return self

    def __exit__(self, *exception) -> None:
        for held in self._held.pop():
            held.release()


class _Held:
    """A layer on the statistics of the batch, whose `train` it takes the place of, until it is released."""

    def __init__(self, layer: _BatchNorm):
        self._layer = layer
        self._outer: _Held | None = layer.__dict__.get("train")
        self._before = layer.training, layer.track_running_stats
        # Set as attributes: `layer.train()` would also switch on the drop-out inside timm's BatchNormAct2d.
        # Without `track_running_stats` torch passes no buffer to the kernel, so none can change.
        layer.training, layer.track_running_stats, layer.train = True, False, self  # type: ignore[method-assign]

    def __call__(self, mode: bool = True) -> _BatchNorm:
        """Keep the mode for later, and set that of what is inside the layer."""
        if self._outer:
            self._outer(mode)
        else:
            self._before = mode, self._before[1]
            for child in self._layer.children():
                child.train(mode)
        return self._layer

    def release(self) -> None:
        self._layer.training, self._layer.track_running_stats = self._before
        if self._outer:
            self._layer.train = self._outer  # type: ignore[method-assign]
        else:
            del self._layer.train


def check_uses_the_batch(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Check that under [`batch_statistics`] no normalisation of a forward pass uses or changes stored statistics.

    Raises:
        ValueError: It does, as traced networks do, or has no layer that [`find_batch_norm`] finds.
    """
    find_batch_norm(model)
    with batch_statistics(model), _CountBatchNorm() as calls:
        answer_to_blanks(model, input_size, "teacher")
    if calls.on_stored_statistics:
        raise ValueError(
            f"{type(model).__name__} cannot use batch statistics throughout: {calls.on_stored_statistics} of "
            f"{calls.total} normalisations use stored ones whatever its BatchNorm layers are set to, as in a traced "
            "network. Give the network that it was made of."
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
