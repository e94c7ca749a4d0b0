"""The cost of a forward pass."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of


@torch.no_grad()
def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Return multiply-adds of convolutions and matrix products by module for a `[C, H, W]` image; `""` is the total."""
    with evaluation_mode(model), FlopCounterMode(display=False) as counter:
        compute_logits(model, to_device_of(model, torch.zeros(1, *input_size)))
    # The keys start with the name of the class.
    found = {path.partition(".")[2]: sum(flops.values()) // 2 for path, flops in counter.get_flop_counts().items()}
    return {name: found.get(name, 0) for name, _ in model.named_modules()}
