"""Work-arounds for bugs of PyTorch on CPUs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from hf_noisekd.models.classifier import logits_of_blanks


def training_memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return the fastest memory format in which `model` trains correctly on `device`.

    That is channels last, except on CPUs for a model with a strided 1x1 convolution of fewer than 16 input channels:
    its backward pass would corrupt the heap (oneDNN issue 6035, seen with torch 2.15).
    """
    breaks_channels_last = device.type == "cpu" and any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
        for module in model.modules()
    )
    return torch.contiguous_format if breaks_channels_last else torch.channels_last


@contextmanager
def fast_depthwise(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which some depthwise convolutions of `model` compute in float32 under autocast on a CPU.

    Those have strides or kernels above 3; their gradients in bfloat16 take two to five times as long (torch 2.15).
    """
    layers = [
        layer
        for layer in (model.modules() if device.type == "cpu" else ())
        if isinstance(layer, nn.Conv2d)
        and layer.groups == layer.in_channels > 1
        and (max(layer.stride) > 1 or max(layer.kernel_size) > 3)
    ]

    def in_float32(forward: Callable, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return forward(x)
        with torch.autocast("cpu", enabled=False):
            return forward(x.float()).to(x.dtype)

    for layer in layers:
        layer.forward = partial(in_float32, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def layer_that_bfloat16_breaks(model: nn.Module, input_size: tuple[int, int, int]) -> str | None:
    """Return the name of a convolution whose gradient a CPU computes wrongly in bfloat16, or None.

    For images of `input_size` its input has a side shorter than its stride or half its kernel, and it is neither 1x1
    nor depthwise: its gradient contains uninitialised memory (seen with torch 2.15 and its oneDNN).
    """
    broken = []

    def look(name: str, layer: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        for side, kernel, stride in zip(inputs[0].shape[-2:], layer.kernel_size, layer.stride, strict=True):
            if kernel > 1 and side < max(stride, kernel // 2):
                broken.append(name)

    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d) and not 1 < layer.groups == layer.in_channels:
                stack.enter_context(layer.register_forward_pre_hook(partial(look, name)))
        logits_of_blanks(model, input_size, "model")
    return broken[0] if broken else None
