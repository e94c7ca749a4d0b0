"""Repair a cut network: block by block, it is fitted to the features of its teacher.

Both networks see the same images. From the first block to the last, with the features that the student itself has by
then, the last linear layers of a block are solved for what the teacher has there, see [`Solver`], and the whole block
is trained for it, see [`Reconstruction`]. Where blocks were left out, the block before them is fitted to the output of
the last one of them. No class of a network is known here.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.calibration.moments import store_statistics
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import compute_logits, copied_state, evaluation_mode, to_device_of
from hf_noisekd.shrinking.blocks import Place, remove_blocks, stages_of
from hf_noisekd.shrinking.closed_form import Solver
from hf_noisekd.shrinking.least_squares import CHUNK_SIZE
from hf_noisekd.shrinking.ranking import Comparison, running_statistics
from hf_noisekd.shrinking.reconstruction import Reconstruction
from hf_noisekd.shrinking.walk import TRIED_IMAGES, BlockPair, Walk


class Pair(NamedTuple):
    """A block of the student, and the block of the teacher whose output it is to have."""

    student: str
    teacher: str
    before: Sequence[str] = ()  # blocks of the teacher that lead there, from the one that the student has on


def pairs_of(teacher: nn.Module, removed: Collection[Place]) -> list[Pair]:
    """Return the blocks that are left without those `removed`, each with the last one up to the next that is left."""
    pairs = []
    name_before = remove_blocks(copy.deepcopy(teacher), removed)
    name_after = {before: after for after, before in name_before.items()}
    for stage, keys in stages_of(teacher).items():
        left = [index for index, key in enumerate(keys) if Place(stage, key) not in removed]
        for index, next_left in zip(left, [*left[1:], len(keys)], strict=True):
            first, *_ = whole = [Place(stage, key).name for key in keys[index:next_left]]
            if first in name_after:  # not in a block that was removed
                pairs.append(Pair(name_after[first], whole[-1], whole[:-1]))
    names = {pair.student for pair in pairs}
    # A block of blocks ends where the last of these does.
    return [pair for pair in pairs if pair.before or not any(name.startswith(f"{pair.student}.") for name in names)]


class Cut(NamedTuple):
    """How a network was cut out of its teacher."""

    removed: Collection[Place]  # blocks of the teacher that were left out
    kept: Mapping[str, Sequence[int]]  # of narrowed layers, by name, the teacher's channels that they output

    @property
    def is_whole(self) -> bool:
        """Whether nothing was cut."""
        return not self.removed and not self.kept


@torch.no_grad()
def repair(
    student: nn.Module,
    teacher: nn.Module,
    cut: Cut,
    images: Iterable[torch.Tensor],
    *,
    recalibrates: bool = False,
    trains_blocks: bool = True,
) -> int:
    """Fit the blocks of a cut network to the features of its teacher, in place; return how many became better.

    Both use running statistics, and `images` are batches `[B, C, H, W]` of one size. A block is solved, and then with
    `trains_blocks` trained, each only where it lowers the squared error on images that it was not fitted to. Then it
    is done on all of them. With `recalibrates` each BatchNorm layer first gets statistics of the images, once all
    before its block is repaired; later ones would undo the repair.
    """
    pixels = torch.cat([to_device_of(student, batch) for batch in images])
    pairs = {pair.student: pair for pair in pairs_of(teacher, cut.removed)}
    norms = stored_statistics(student) if recalibrates else {}
    walk, goal = (Walk(model, pixels, mirrors=trains_blocks) for model in (student, teacher))
    better, waiting = 0, list[str]()
    with evaluation_mode(student, teacher):
        for name in _in_order(student, [*pairs, *norms], pixels[:TRIED_IMAGES]):
            if name in norms:
                waiting.append(name)
                continue
            before = [norm for norm in waiting if not norm.startswith(f"{name}.")]
            if before:
                store_statistics(student, [pixels], before)
            walk.enter(name)
            if inside := [norm for norm in waiting if norm not in before]:
                walk.store_statistics(inside)
            waiting = []
            for one in pairs[name].before:
                goal.enter(one)
                goal.leave()
            goal.enter(pairs[name].teacher)
            better += _repair_block(walk, goal, cut.kept, trains_blocks)
        if waiting:
            store_statistics(student, [pixels], waiting)
    return better


def _repair_block(student: Walk, teacher: Walk, kept: Mapping[str, Sequence[int]], trains: bool) -> bool:
    """Solve the block at hand, then train it, each where it helps, and leave it; return whether one of them did."""
    block, pair = student.block.block, BlockPair.of(student, teacher, kept)
    solver = Solver.of(pair) if pair else None
    solution = solver.solve() if solver else None
    is_trained = pair is not None and trains and student.block.is_alone
    teacher.leave(needs_outputs=is_trained)
    training = Reconstruction(pair) if pair and is_trained else None
    if not (solver and solution):
        helps = training is not None and training.helps()
    else:
        before = copied_state(block)
        # Solved for the held-out images, too, it could not be compared on them.
        solver.add(*solution.without_held_out)
        helps = training is not None and training.helps()
        block.load_state_dict(before)
        solver.add(solution.weights, solution.offsets)
    if training and helps:
        training.train()
    student.leave()
    return helps or solution is not None


def fit_to_teacher(
    student: nn.Module,
    teacher: nn.Module,
    cut: Cut,
    images: CalibrationImages | None,
    *,
    trains_blocks: bool = True,
) -> tuple[bool, int]:
    """Give a cut network statistics of images, where these are good enough, and repair it; in place.

    What is best on the held-out images stays: the network as it was cut, with other statistics, or repaired, too, with
    or without the training of blocks: on a few dozen images better features can give worse predictions. Return whether
    it has other statistics now, and how many blocks were repaired. Without images nothing is done.
    """
    if images is None:
        return False, 0
    held_out = Comparison([*images.to_compare_on.split(CHUNK_SIZE)], running_statistics)
    expected = held_out.log_probs(teacher)
    recalibrates = bool(stored_statistics(student)) and not images.problem
    states, repaired = [copied_state(student)], [0]
    for trains in (True, False) if trains_blocks else (False,):
        student.load_state_dict(states[0])
        repaired.append(repair(student, teacher, cut, images, recalibrates=recalibrates, trains_blocks=trains))
        states.append(copied_state(student))
    if recalibrates:
        student.load_state_dict(states[0])
        repaired.append(0)
        store_statistics(student, images)
        states.append(copied_state(student))
    divergences = []
    for state in states:
        student.load_state_dict(state)
        divergences.append(held_out.divergence(expected, student))
    best = min(range(len(states)), key=lambda index: divergences[index])
    student.load_state_dict(states[best])
    return recalibrates and best > 0, repaired[best]


def _in_order(model: nn.Module, names: Iterable[str], sample: torch.Tensor) -> list[str]:
    """Return those of the named modules that are called once, in the order in which they end."""
    modules, ended = dict(model.named_modules()), list[str]()
    with ExitStack() as stack:
        for name in names:
            if name in modules:
                note: Any = lambda *_, name=name: ended.append(name)  # noqa: E731
                stack.enter_context(modules[name].register_forward_hook(note))
        compute_logits(model, sample.clone())
    return [name for name in ended if ended.count(name) == 1]
