"""BatchNorm layers: find them, run them on the statistics of the batch at hand, re-estimate what they stored.

A teacher that is fed noise sees a covariate shift in every hidden layer: its BatchNorm layers normalise by the running
statistics of real images. Normalising by the mean and variance of the batch at hand instead brings the hidden layers
back to about N(0, 1), and with them the teacher's knowledge (Raikwar & Mishra, NeurIPS 2022, section 3.2 and
Algorithm 1). [`batch_statistics`] does that without touching the model otherwise.

A student that learnt from noise has running statistics of noise. [`recalibrate_batch_norm`] replaces them with those
of a few real images ("adjusting" in the paper), so that it can answer single images.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ContextDecorator, ExitStack, suppress

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_noisekd.models.classifier import compute_logits, evaluation_mode, noisekd_section, to_device_of


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether `model` has a layer that [`find_batch_norm`] finds."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def find_batch_norm(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of `model` by name, in the order of `model.named_modules()`.

    All kinds of `torch.nn.modules.batchnorm._BatchNorm` count: 1d, 2d, 3d, Sync, and timm's `BatchNormAct2d`. Frozen
    variants (timm's, torchvision's, those inside transformers) do not: they have no batch mode.

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


class batch_statistics(ContextDecorator):  # noqa: N801 - used like a function: `with batch_statistics(teacher): ...`
    """Context under which BatchNorm layers normalise by the batch at hand (Raikwar & Mishra 2022, Algorithm 1).

    Inside it the chosen layers use the mean and variance of their input. No buffer changes in value, dtype or count,
    and no other module changes its mode: drop-out and drop-path of an `eval()` model stay off. On exit, also after an
    exception, everything is as it was. The object is cheap to enter and can be entered many times, also nested, so a
    training loop builds it once.

    Args:
        model: Any module with BatchNorm layers.
        fraction: Share of the layers to put on batch statistics, in [0, 1]; the number is rounded to the nearest
            layer. The others keep the mode they have (Table 3 of the paper). Layers are taken in the order of
            `random.Random(seed).sample` over `model.named_modules()`, so a larger fraction contains a smaller one.
        seed: Seed of that order.

    Raises:
        ValueError: `model` has no BatchNorm layer, or `fraction` is out of range.

    Example:
        ```python
        with torch.no_grad(), batch_statistics(teacher):
            logits = teacher(noise)
        ```
    """

    def __init__(self, model: nn.Module, fraction: float = 1.0, seed: int = 0):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
        layers = find_batch_norm(model)
        chosen = random.Random(seed).sample(list(layers), k=len(layers))[: round(fraction * len(layers))]
        self.layer_names = [name for name in layers if name in set(chosen)]
        self._layers = [layers[name] for name in self.layer_names]
        self._saved: list[list[tuple[bool, bool]]] = []

    def __enter__(self) -> "batch_statistics":
        self._saved.append([(layer.training, layer.track_running_stats) for layer in self._layers])
        for layer in self._layers:
            # Set as attributes: `layer.train()` would also switch on the drop-out inside timm's BatchNormAct2d.
            # Without `track_running_stats` torch passes no buffer to the kernel, so none can change.
            layer.training = True
            layer.track_running_stats = False
        return self

    def __exit__(self, *exception) -> None:
        for layer, (training, track_running_stats) in zip(self._layers, self._saved.pop(), strict=True):
            layer.training = training
            layer.track_running_stats = track_running_stats


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]) -> None:
    """Re-estimate the running statistics of every BatchNorm layer from real images, in place.

    Each layer gets the mean and the unbiased variance of its input pooled over all images and positions, while the
    layers before it already use their new statistics. The result does not depend on how the images are cut into
    batches. (A training-mode pass of one batch that holds them all stores almost the same; it normalises by the biased
    variance on the way.) It costs one partial forward pass of the images for each layer. A layer that the forward pass
    never reaches keeps what it has, as does every `num_batches_tracked`. A student of this package remembers, in its
    attribute `noisekd`, that it is to be run with running statistics from now on.

    Args:
        model: The model. All its modules run in evaluation mode; modes are restored afterwards.
        batches: Images of shape `[B, C, H, W]`, preprocessed as for the model, or mappings with `pixel_values`. Must
            give the same images each time it is iterated over; a one-shot iterator is read into memory first.

    Raises:
        ValueError: The model has no BatchNorm layer, or there is no image, or a layer sees only one value a channel.
    """
    layers = {name: layer for name, layer in find_batch_norm(model).items() if layer.running_mean is not None}
    if iter(batches) is batches:
        batches = list(batches)

    with evaluation_mode(model):
        for name, calls in _calls_in_forward_order(model, layers, batches):
            count, mean, squares = _pooled_moments(model, layers[name], calls, batches)
            if count < 2:
                raise ValueError(f"BatchNorm layer {name!r} saw one value a channel: recalibrate on 2 images or more.")
            layers[name].running_mean.copy_(mean)
            layers[name].running_var.copy_(squares / (count - 1))
    if section := noisekd_section(model):
        images = sum(len(_pixel_values(batch)) for batch in batches)
        model.noisekd = section | {"batch_norm": "running", "recalibration": {"images": images}}


class _StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass once the layer of interest has seen its input."""


def _calls_in_forward_order(model, layers, batches) -> list[tuple[str, int]]:
    """Return the layers in the order in which a forward pass reaches them, each with its number of calls."""
    names = {layer: name for name, layer in layers.items()}
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for layer in names:
            handle = layer.register_forward_pre_hook(lambda layer, _: calls.update([names[layer]]))
            stack.callback(handle.remove)
        for batch in batches:
            compute_logits(model, to_device_of(model, _pixel_values(batch)[:2]))
            return list(calls.items())
    raise ValueError("Recalibration got no batch: pass at least one batch of 2 or more real images.")


def _pooled_moments(model, layer, calls, batches) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return the count, the mean and the sum of squared deviations per channel of all inputs of `layer`."""
    # Pairwise update of Chan, Golub & LeVeque (1979), in double precision on the host: exact to rounding, and the
    # per-channel vectors are tiny.
    total, mean, squares, seen = 0, torch.zeros(()), torch.zeros(()), 0

    def pool(_, inputs):
        nonlocal total, mean, squares, seen
        x = inputs[0].float().movedim(1, 0).flatten(1)
        variance, batch_mean = (m.cpu().double() for m in torch.var_mean(x, dim=1, correction=0))
        count = x.shape[1]
        delta = batch_mean - mean
        mean = mean + delta * (count / (total + count))
        squares = squares + variance * count + delta**2 * (total * count / (total + count))
        total += count
        seen += 1
        if seen == calls:
            raise _StopForward

    handle = layer.register_forward_pre_hook(pool)
    try:
        for batch in batches:
            seen = 0
            with suppress(_StopForward):
                compute_logits(model, to_device_of(model, _pixel_values(batch)))
    finally:
        handle.remove()
    return total, mean, squares


def _pixel_values(batch: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
    return batch["pixel_values"] if isinstance(batch, Mapping) else batch
