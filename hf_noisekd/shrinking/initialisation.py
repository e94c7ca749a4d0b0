"""A student that begins as a smaller copy of its teacher, where the one's layers correspond to the other's."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from hf_noisekd.models.batch_norm import statistics_of_batch
from hf_noisekd.models.cost import count_macs
from hf_noisekd.record.schema import StartFacts
from hf_noisekd.shrinking.blocks import removable_blocks, remove_blocks, stages_of
from hf_noisekd.shrinking.channels import LAYERS, ChannelCutter, channel_importance, least_important, num_outputs
from hf_noisekd.shrinking.ranking import order_of_removal

# Of the tensors of both, those that must correspond; else the two are no kin, and the student begins at random.
MIN_SHARE = 0.8


def initialise_from_teacher(
    student: nn.Module, teacher: nn.Module, input_size: tuple[int, int, int], images: Sequence[torch.Tensor]
) -> StartFacts | None:
    """Give a student with random weights those of its teacher, as far as their layers correspond.

    Stages in which the teacher has more blocks keep those without which its answers change the most, and always their
    first; layers in which it has more channels keep the most important ones; see [`channel_importance`].

    Args:
        student: A timm model. It is changed in place, or not at all.
        teacher: A timm model.
        input_size: `(channels, height, width)` of the images.
        images: Batches `[B, C, H, W]` to compare answers on: noise will do, for the layers are on its statistics.

    Returns:
        What was taken from the teacher, or None if the two are no kin.
    """
    if isinstance(teacher, torch.jit.ScriptModule):  # which cannot be cut
        return None
    surplus = _surplus(teacher, student)
    removable = [place for place in removable_blocks(teacher, input_size) if place.stage in surplus] if surplus else []
    some = [
        place
        for stage, number in surplus.items()
        for place in [place for place in removable if place.stage == stage][:number]
    ]
    # Before answers are compared: which blocks go makes no difference to the names of the rest.
    remove_blocks(cut := copy.deepcopy(teacher), some)
    names = cut.state_dict().keys() | student.state_dict().keys()
    if len(cut.state_dict().keys() & student.state_dict().keys()) < MIN_SHARE * len(names):
        return None
    removed = order_of_removal(teacher, removable, dict.fromkeys(removable, 1.0), images, at_most=surplus)
    remove_blocks(cut := copy.deepcopy(teacher), removed)
    whole = {name: tensor.shape for name, tensor in cut.state_dict().items()}
    if not _narrow(cut, student, input_size, images):
        return None
    weights, own = cut.state_dict(), student.state_dict()
    taken = [name for name in own if name in weights and weights[name].shape == own[name].shape]
    if len(taken) < MIN_SHARE * len(names):
        return None
    student.load_state_dict({name: weights[name] for name in taken}, strict=False)
    return StartFacts(
        removed_blocks=[place.name for place in removed],
        tensors=len(own),
        from_teacher=len(taken),
        cut=sum(weights[name].shape != whole[name] for name in taken),
        macs=count_macs(student, input_size)[""] / count_macs(teacher, input_size)[""],
    )


def _surplus(teacher: nn.Module, student: nn.Module) -> dict[str, int]:
    """Return how many more blocks a teacher has than the student, of the stages in which it has more."""
    wanted = {stage: len(blocks) for stage, blocks in stages_of(student).items()}
    # A stage of one block is none to `stages_of`.
    surplus = {
        stage: len(blocks) - wanted.get(stage, 1)
        for stage, blocks in stages_of(teacher).items()
        if _has_module(student, stage)
    }
    return {stage: number for stage, number in surplus.items() if number > 0}


def _narrow(
    cut: nn.Module, student: nn.Module, input_size: tuple[int, int, int], images: Sequence[torch.Tensor]
) -> bool:
    """Take channels out of `cut` until its layers are as wide as those of the student, where they can be.

    Returns:
        Whether it still answers.
    """
    widths = {name: num_outputs(module) for name, module in student.named_modules() if isinstance(module, LAYERS)}
    if all(num_outputs(cut.get_submodule(name)) == width for name, width in widths.items() if _has_module(cut, name)):
        return True
    cutter = ChannelCutter(cut, input_size)
    importance = channel_importance(cut, cutter.groups, images, statistics_of_batch(cut))
    removed = {}
    for root, group in cutter.groups.items():
        kept = widths.get(root, group.channels)
        if kept < group.channels and kept % (group.parts * group.unit) == 0:
            removed[root] = least_important(group, importance[root], kept)
    return cutter.cut(removed)


def _has_module(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())
