"""Optimise images until they have the statistics that the BatchNorm layers of a model store.

The loss is that of DeepInversion (Yin et al., CVPR 2020) without its terms for classes and smoothness, and with the KL
divergence of normal distributions instead of the distance of their moments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_noisekd.calibration.moments import gaussian_kl
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import compute_logits

LEARNING_RATE = 0.1
# An image is a sum of levels at 1, 1/2, 1/4, ... of its size, each optimised by Adam: large areas, which the statistics
# of deep layers depend on, change in a few steps.
MIN_SIDE = 2


def match_statistics(
    model: nn.Module,
    images: torch.Tensor,
    steps: int,
    *,
    learning_rate: float = LEARNING_RATE,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[torch.Tensor, float]:
    """Return images `[B, C, H, W]` optimised to have the stored statistics of `model`, and the last loss, in nats.

    `steps` of Adam start from `images`, with cosine decay of `learning_rate`, in standard deviations of the images.
    `on_step` is called after each. The model is in evaluation mode, and its parameters need no gradient.
    """
    levels = [images.detach().clone().requires_grad_()]
    while min(images.shape[2:]) >> len(levels) >= MIN_SIDE:
        size = [side >> len(levels) for side in images.shape[2:]]
        levels.append(images.new_zeros(*images.shape[:2], *size).requires_grad_())
    optimizer = torch.optim.Adam(levels, lr=learning_rate * images.std().item(), betas=(0.5, 0.9))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # The caller's autocast would round the statistics.
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False), _divergence(model) as layers:
        for _ in range(steps):
            layers.clear()
            compute_logits(model, _sum_of_levels(levels))
            if not layers:
                raise ValueError(f"No BatchNorm layer of {type(model).__name__} is reached by a forward pass.")
            loss = torch.stack(layers).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            on_step()
    return _sum_of_levels(levels).detach(), loss.item()


class _ChannelMoments(torch.autograd.Function):
    """Mean and variance `[C]` of each channel of `[B, C, ...]`, much faster than with autograd."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others = [0, *range(2, x.ndim)]
        mean = x.mean(others)
        ctx.save_for_backward(x, mean)
        return mean, (x - mean.view(1, -1, *[1] * (x.ndim - 2))).square_().mean(others)

    @staticmethod
    def backward(ctx, mean_grad: torch.Tensor, variance_grad: torch.Tensor) -> torch.Tensor:
        x, mean = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = variance_grad * (2 * mean.numel() / x.numel())
        shift = mean_grad * (mean.numel() / x.numel()) - scale * mean
        return torch.addcmul(shift.view(shape), x, scale.view(shape))


@contextmanager
def _divergence(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Context under which forward passes append the KL divergence of each layer's input from its statistics."""
    found: list[torch.Tensor] = []

    def compare(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        mean, variance = _ChannelMoments.apply(inputs[0])
        found.append(gaussian_kl(mean, variance, layer.running_mean.float(), layer.running_var.float(), layer.eps))

    with ExitStack() as stack:
        for layer in stored_statistics(model).values():
            stack.enter_context(layer.register_forward_pre_hook(compare))
        yield found


def _sum_of_levels(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    size = levels[0].shape[2:]
    images = levels[0].clone()  # some models change their input in place
    for level in levels[1:]:
        images = images + F.interpolate(level, size, mode="bilinear")
    return images
