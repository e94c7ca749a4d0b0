"""A student initialised from its teacher, where their layers correspond."""

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.models.classifier import compute_alike, device_of
from hf_noisekd.models.cost import count_macs
from hf_noisekd.record.schema import StartFacts
from hf_noisekd.shrinking.blocks import Place, removable_blocks, remove_blocks, stages_of
from hf_noisekd.shrinking.channels import ChannelCutter, channel_importance, least_important
from hf_noisekd.shrinking.compensation import compensate
from hf_noisekd.shrinking.dependency_graph import LAYERS, num_outputs
from hf_noisekd.shrinking.ranking import Comparison, order_of_removal
from hf_noisekd.shrinking.repair import Cut, fit_to_teacher
from hf_noisekd.shrinking.shrunk import built_with, shapes_of

logger = logging.getLogger(__name__)

# Share of all tensors that must correspond; with fewer the student keeps its random weights.
MIN_SHARE = 0.8


def computing_like(
    teacher: nn.Module, student: nn.Module, build: Callable[[Mapping[str, Any]], nn.Module], given: Mapping[str, Any]
) -> nn.Module:
    """Return `student`, or the same with arguments of its teacher that change what is computed, and no tensor.

    Such are activations, strides and the number of heads. They are taken by a timm model of the teacher's class, where
    a configuration can hold them. `build` builds the student with arguments; those `given` stay.
    """
    if type(student) is not type(teacher):
        return student
    args, shapes, like, noted = dict(given), shapes_of(student), student, built_with(teacher)
    for key, value in noted.get("base_args", noted).items():  # of a network that was cut out of another
        if key in args or key == "img_size" or "drop" in key:  # the size is known, and rates are for the training
            continue
        with contextlib.suppress(TypeError, ValueError), torch.random.fork_rng(devices=[]):
            json.dumps(value)
            built = build(args | {key: value})
            if shapes_of(built) == shapes:
                args[key], like = value, built
    like.load_state_dict(student.state_dict())
    return like


def initialise_from_teacher(
    student: nn.Module,
    teacher: nn.Module,
    input_size: tuple[int, int, int],
    images: CalibrationImages | Sequence[torch.Tensor],
    *,
    trains_blocks: bool = True,
) -> tuple[StartFacts, Cut] | None:
    """Initialise a student with random weights from its teacher, as far as their layers correspond.

    Where the teacher has more blocks in a stage, the student takes the first and those whose loss would change the
    teacher's predictions the most. Where it has more channels, the student takes the most important ones; see
    [`channel_importance`]. Predictions are compared on `images`, batches `[B, C, H, W]`, such as noise. For
    `trains_blocks` see [`repair`].

    Returns what was taken from the teacher, and how it was cut, or None, with an unchanged student, if fewer than 80 %
    of their tensors correspond. Both are timm models.
    """
    if isinstance(teacher, torch.jit.ScriptModule):  # cannot be cut
        return None
    student.to(device_of(teacher))
    compared = Comparison.on(images)
    surplus = _surplus(teacher, student)
    removable = [place for place in removable_blocks(teacher, input_size) if place.stage in surplus] if surplus else []
    # The first ones stand in for those chosen below: the names of what is left are the same.
    some: list[Place] = []
    for stage, number in surplus.items():
        some += [place for place in removable if place.stage == stage][:number]
    remove_blocks(cut := copy.deepcopy(teacher), some)
    names = cut.state_dict().keys() | student.state_dict().keys()
    if len(cut.state_dict().keys() & student.state_dict().keys()) < MIN_SHARE * len(names):
        return None
    removed = order_of_removal(teacher, removable, dict.fromkeys(removable, 1.0), compared, at_most=surplus)
    remove_blocks(cut := copy.deepcopy(teacher), removed)
    whole = {name: tensor.shape for name, tensor in cut.state_dict().items()}
    if (kept := _narrow(cut, student, input_size, compared)) is None:
        return None
    made = Cut(removed, kept)
    weights, own = cut.state_dict(), student.state_dict()
    taken = [name for name in own if name in weights and weights[name].shape == own[name].shape]
    if len(taken) < MIN_SHARE * len(names):
        return None
    student.load_state_dict({name: weights[name] for name in taken}, strict=False)
    if len(taken) == len(own) and not compute_alike(cut, student, input_size):
        logger.warning(
            "The student has its teacher's weights and other logits: the two differ in what has no weights, such as "
            "activations or eps. Give the student the teacher's arguments of timm: %s.",
            built_with(teacher) or "not known",
        )
    recalibrated, repaired = fit_to_teacher(student, teacher, made, compared.images, trains_blocks=trains_blocks)
    facts = StartFacts(
        removed_blocks=[place.name for place in removed],
        tensors=len(own),
        from_teacher=len(taken),
        cut=sum(weights[name].shape != whole[name] for name in taken),
        macs=count_macs(student, input_size)[""] / count_macs(teacher, input_size)[""],
        recalibrated=recalibrated,
        repaired_blocks=repaired,
    )
    return facts, made


def _surplus(teacher: nn.Module, student: nn.Module) -> dict[str, int]:
    """Return how many more blocks a teacher has than the student, by stage, where it has more."""
    wanted, modules = stages_of(student), dict(student.named_modules())
    # `stages_of` leaves out stages of one block.
    surplus = {
        stage: len(blocks) - len(wanted.get(stage, [""]))
        for stage, blocks in stages_of(teacher).items()
        if stage in modules
    }
    return {stage: number for stage, number in surplus.items() if number > 0}


def _narrow(cut: nn.Module, student: nn.Module, input_size: tuple[int, int, int], compared: Comparison) -> dict | None:
    """Narrow the layers of `cut` to the student's widths where possible; return the outputs kept, None if it breaks."""
    widths = {name: num_outputs(module) for name, module in student.named_modules() if isinstance(module, LAYERS)}
    modules = dict(cut.named_modules())
    widths = {name: width for name, width in widths.items() if isinstance(modules.get(name), LAYERS)}
    if all(num_outputs(modules[name]) == width for name, width in widths.items()):
        return {}
    cutter = ChannelCutter(cut, input_size)
    importance = channel_importance(cut, cutter.groups, compared.batches, compared.statistics(cut))
    removed = {}
    for root, group in cutter.groups.items():
        kept = widths.get(root, group.channels)
        if kept < group.channels and kept % (group.parts * group.unit) == 0:
            removed[root] = least_important(group, importance[root], kept)
    compensate(cut, cutter.groups, removed, compared.batches, compared.statistics(cut))
    return cutter.kept if cutter.cut(removed) else None
