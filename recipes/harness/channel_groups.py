"""How many groups of channels of a network can be cut."""

import copy

from torch import nn

from hf_noisekd.shrinking.channels import ChannelCutter


def groups_left_alone(model: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Return how many groups, of all, torch-pruning cannot follow or takes for others."""
    cutter = ChannelCutter(copy.deepcopy(model), input_size)
    return f"{len(cutter.left_alone)} of {len(cutter.left_alone) + len(cutter.groups)}"
