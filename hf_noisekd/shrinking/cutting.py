"""Cut a teacher down to a budget of multiply-adds or parameters, with the least change of its predictions."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.calibration.given_images import given_images, pixels_of_batches
from hf_noisekd.calibration.moments import Batches
from hf_noisekd.models.classifier import (
    architecture_of,
    compute_alike,
    count_parameters,
    device_of,
    with_input_size,
)
from hf_noisekd.models.cost import count_macs
from hf_noisekd.models.cpu_faults import training_memory_format
from hf_noisekd.models.loading import differing
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.record.schema import StartFacts
from hf_noisekd.shrinking.blocks import removable_blocks, remove_blocks
from hf_noisekd.shrinking.channels import (
    ChannelCutter,
    ChannelGroup,
    channel_importance,
    least_important,
)
from hf_noisekd.shrinking.compensation import compensate
from hf_noisekd.shrinking.dependency_graph import num_inputs
from hf_noisekd.shrinking.ranking import Comparison, num_ranked, order_of_removal
from hf_noisekd.shrinking.repair import Cut, fit_to_teacher
from hf_noisekd.shrinking.shrunk import build_cut, shapes_of, timm_model_of

MAX_DEPTHS = 8  # numbers of removed blocks to try, besides none
# A network that lost only blocks keeps nearly correct BatchNorm statistics: it may diverge so many times more.
PREFERENCE = 1.25
UNUSED = 0.03  # share of the teacher's multiply-adds; a note is made if the budget has more left
LEAST_SIDE, SIDE_STEP = 64, 8  # pixels of images that may be made smaller, and by how many at a time


@dataclass(frozen=True)
class Budget:
    """The most a network may have: multiply-adds for an image, and parameters; either may be infinite."""

    macs: float = math.inf
    params: float = math.inf

    @classmethod
    def of(
        cls,
        teacher: nn.Module,
        input_size: tuple[int, int, int],
        keep: float | None = None,
        max_macs: float | None = None,
        max_params: float | None = None,
    ) -> "Budget":
        """Return the budget of the arguments of [`shrink`], or raise its `ValueError`."""
        macs, params = count_macs(teacher, input_size)[""], count_parameters(teacher)
        limits = {"keep": (keep, 1), "max_macs": (max_macs, macs), "max_params": (max_params, params)}
        if all(limit is None for limit, _ in limits.values()):
            raise ValueError("There is no budget to cut the teacher to: give keep, max_macs or max_params.")
        for name, (limit, whole) in limits.items():
            if limit is not None and not 0 < limit < whole:
                raise ValueError(f"{name} is {limit:,}: use a number above 0 and below {whole:,}, the whole teacher.")

        def most(limit: float | None, whole: int) -> float:
            return math.inf if limit is None else limit * whole if limit < 1 else limit

        return cls(min(most(keep, macs), most(max_macs, macs)), most(max_params, params))

    def holds(self, model: nn.Module, input_size: tuple[int, int, int]) -> bool:
        """Return whether `model` is within the budget."""
        return count_macs(model, input_size)[""] <= self.macs and count_parameters(model) <= self.params

    def __str__(self) -> str:
        limits = ((self.macs, "multiply-adds"), (self.params, "parameters"))
        return " and ".join(f"{limit:,.0f} {what}" for limit, what in limits if limit < math.inf)


def shrink(
    teacher: nn.Module,
    keep: float | None = None,
    *,
    max_macs: float | None = None,
    max_params: float | None = None,
    input_size: tuple[int, int, int] | None = None,
    images: CalibrationImages | Batches | None = None,
    min_side: float = 1.0,
) -> tuple[nn.Module, StartFacts]:
    """Cut a smaller network out of a timm model, without training: whole blocks first, then channels.

    Those blocks are removed first that change the predictions the least for the multiply-adds they save. For several
    numbers of removed blocks, all layers are narrowed by about the same share until the budget is met, each to its most
    important channels; see [`channel_importance`]. The network with the smallest KL divergence from the teacher is
    taken; one that lost only blocks may have 25 % more. What reads narrowed layers is changed, so that the channels
    that stay stand for those removed; see [`compensate`].

    With `images` the network is also repaired: one by one, its blocks are fitted to the teacher's features, by least
    squares and gradient steps. Without, the BatchNorm layers keep what is left of the teacher's statistics, which are
    wrong once channels were cut: correct them with [`recalibrate_batch_norm`].

    Args:
        teacher: A timm model. It does not change. If it is in half precision, it is cut in float32.
        keep: Share of the teacher's multiply-adds that the result may have, in (0, 1).
        max_macs: Most multiply-adds for an image; below 1 a share of the teacher's.
        max_params: Most parameters, likewise.
        input_size: `(channels, height, width)` of the images. Default: what the teacher declares.
        images: [`calibration_images`] of the teacher, or batches `[B, C, H, W]` of unlabelled images of its task, 16 or
            more, preprocessed, to compare predictions and to repair on. Default: noise to compare on, and no repair.
        min_side: Below 1, the network may also take smaller images, down to this share of their sides, where that
            changes the predictions for `images` less: noise would not tell. Not with `max_params` alone, nor for images
            of fewer than 64 pixels a side.

    Returns:
        The network, in float32 and evaluation mode, which can be saved like any other, and what was cut.

    Raises:
        ValueError: There is no budget, it cannot be met, the teacher is not a timm model, or the images do not fit it.
    """
    limits: dict[str, Any] = {"keep": keep, "max_macs": max_macs, "max_params": max_params}
    return cut_to_budget(teacher, input_size=input_size, images=images, min_side=min_side, **limits)[:2]


@torch.inference_mode(False)
def cut_to_budget(
    teacher: nn.Module,
    *,
    input_size: tuple[int, int, int] | None,
    images: CalibrationImages | Batches | None,
    min_side: float = 1.0,
    trains_blocks: bool = True,
    **limits: float | None,
) -> tuple[nn.Module, StartFacts, Cut]:
    """Return what [`shrink`] does, and what was cut; for `trains_blocks` see [`repair`]."""
    teacher = _in_float32(timm_model_of(teacher))
    size = input_size_of(teacher, input_size)
    budget = Budget.of(teacher, size, **limits)
    if images is not None and not isinstance(images, CalibrationImages):
        images = given_images(teacher, pixels_of_batches(images, size))
        images.say_problem()
    compared = Comparison.on(images or ranking_noise(teacher, size))
    expected = compared.log_probs(teacher)
    cuts = [_best_cut(teacher, budget, size, compared, expected)]
    if images and (smaller := _smaller_size(teacher, budget, size, min_side)):
        cuts.append(_best_cut(with_input_size(teacher, smaller), budget, smaller, compared.at(smaller[1:]), expected))
    best = min(filter(None, cuts), key=lambda found: found.change, default=None)
    if best is None:
        raise ValueError(
            f"{type(teacher).__name__} cannot be cut to {budget}: too few of its layers can be narrowed or "
            "left out. Raise the limit, or give a smaller student."
        )
    whole, cut = with_input_size(teacher, best.input_size), best.cut
    student = build_cut(best.network, whole, cut.removed).to(device_of(teacher))
    if not compute_alike(best.network, student, best.input_size):
        raise ValueError(
            f"timm builds {architecture_of(teacher)} with the same weights and other logits than the teacher's, which "
            "was changed by hand (an activation, eps, ...): build it through timm's arguments, or give a student."
        )
    fitted_on = images and images.at(best.input_size[1:])
    recalibrated, repaired = fit_to_teacher(student, whole, cut, fitted_on, trains_blocks=trains_blocks)
    remove_blocks(rest := copy.deepcopy(teacher), cut.removed)
    macs_of_teacher = count_macs(teacher, size)[""]
    macs, most = count_macs(student, best.input_size)[""] / macs_of_teacher, budget.macs / macs_of_teacher
    facts = StartFacts(
        removed_blocks=[place.name for place in cut.removed],
        tensors=len(student.state_dict()),
        from_teacher=len(student.state_dict()),
        cut=len(differing(shapes_of(rest), shapes_of(student))),
        macs=macs,
        allowed_macs=most if macs + UNUSED < most < 1 and budget.params == math.inf else None,
        recalibrated=recalibrated,
        repaired_blocks=repaired,
    )
    if best.input_size != size:
        found = compared.at(best.input_size[1:]).log_probs(whole)
        agreement = 100 * (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
        facts = replace(facts, teacher_input_size=list(size), size_agreement=agreement)
    return student, facts, cut


def _in_float32(model: nn.Module) -> nn.Module:
    """Return a model, or a copy of it in float32 if it is in another type, in which gradients and solutions fail."""
    others = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} - {torch.float32}
    return copy.deepcopy(model).float() if others else model


class _Found(NamedTuple):
    """A network within a budget, and how much its predictions differ from the teacher's."""

    change: float
    network: nn.Module
    cut: Cut
    input_size: tuple[int, int, int]


def _best_cut(
    teacher: nn.Module, budget: Budget, size: tuple[int, int, int], compared: Comparison, expected: torch.Tensor
) -> _Found | None:
    """Return the network within a budget whose predictions are the closest to those `expected`."""
    cuts = _cuts(teacher, budget, size, compared, expected)
    return min(cuts, key=lambda found: found.change, default=None)


def _smaller_size(
    teacher: nn.Module, budget: Budget, size: tuple[int, int, int], min_side: float
) -> tuple[int, int, int] | None:
    """Return the largest input size at which the whole teacher is within a budget, or the smallest allowed, if any."""
    channels, *sides = size
    smaller = None
    if min(sides) < LEAST_SIDE or budget.macs == math.inf:
        return None
    for steps in range(1, min(sides) // SIDE_STEP):
        share = 1 - steps * SIDE_STEP / min(sides)
        if share < min_side:
            break
        height, width = (round(share * side / SIDE_STEP) * SIDE_STEP for side in sides)
        try:
            holds = budget.holds(teacher, (channels, height, width))
        except (RuntimeError, ValueError, AssertionError):  # it takes images of one size alone
            break
        smaller = (channels, height, width)
        if holds:
            break
    return smaller


def _cuts(
    teacher: nn.Module, budget: Budget, size: tuple[int, int, int], compared: Comparison, expected: torch.Tensor
) -> Iterator[_Found]:
    """Yield networks within a budget."""
    costs, blocks = count_macs(teacher, size), removable_blocks(teacher, size)
    enough = costs[""] - budget.macs if budget.params == math.inf else math.inf
    blocks = order_of_removal(teacher, blocks, {place: costs[place.name] for place in blocks}, compared, enough=enough)
    fixed: set[str] = set()
    for number in sorted({round(len(blocks) * step / MAX_DEPTHS) for step in range(MAX_DEPTHS + 1)}):
        cut, removed = copy.deepcopy(teacher), blocks[:number]
        name_before = remove_blocks(cut, removed)
        fits = budget.holds(cut, size)
        narrow, kept = (cut, {}) if fits else _narrowed(cut, budget, size, compared, fixed, name_before)
        if narrow is not None and budget.holds(narrow, size):  # what `_widths` counted is an estimate
            change = compared.divergence(expected, narrow) / (PREFERENCE if fits else 1)
            yield _Found(change, narrow, Cut(removed, kept), size)
        if fits:
            return  # removing even more would only be worse


def ranking_noise(model: nn.Module, input_size: tuple[int, int, int], seed: int = 0) -> list[torch.Tensor]:
    """Return the default noise to compare predictions on: a batch `[B, C, H, W]`, on the device of `model`."""
    device = device_of(model)
    options = {"distribution": "dead_leaves", "held_out": True, "seed": seed, "device": device}
    options["memory_format"] = training_memory_format(model, device)  # the importance of channels takes gradients
    return [NoiseDataset.for_model(model, input_size=input_size, batch_size=num_ranked(input_size), **options).draw(0)]


def _narrowed(
    whole: nn.Module,
    budget: Budget,
    input_size: tuple[int, int, int],
    compared: Comparison,
    fixed: set[str],
    name_before: Mapping[str, str],
) -> tuple[nn.Module | None, dict[str, list[int]]]:
    """Return `whole` with all its layers narrowed by about the same share to a budget, or None if that is impossible.

    Beside it are the outputs that narrowed layers keep. Layers that cannot be narrowed stay, and their names in the
    teacher, from `name_before`, are added to `fixed`.
    """
    cut = copy.deepcopy(whole)
    cutter = ChannelCutter(cut, input_size, {name for name, before in name_before.items() if before in fixed})
    fixed |= {name_before[name] for writers in cutter.left_alone.values() for name in writers}
    widths = _widths(whole, cutter.groups, budget, input_size)
    if widths is None:
        return None, {}
    importance = channel_importance(cut, cutter.groups, compared.batches, compared.statistics(cut))
    removed = {root: least_important(cutter.groups[root], importance[root], width) for root, width in widths.items()}
    compensate(cut, cutter.groups, removed, compared.batches, compared.statistics(cut))
    return (cut, cutter.kept) if cutter.cut(removed) else (None, {})


def _widths(
    model: nn.Module, groups: Mapping[str, ChannelGroup], budget: Budget, input_size: tuple[int, int, int]
) -> dict[str, int] | None:
    """Return the widths of all groups that meet a budget, or None: about the same share of each, and then what is left.

    That goes to the groups one by one, a step each, the narrowest first, until no step is within the budget.
    """
    costs = _Costs(model, groups, input_size)
    best: dict[str, int] | None = None
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        widths = {root: group.width(share) for root, group in groups.items()}
        if costs.are_within(budget, widths):
            best, low = widths, share
        else:
            high = share
    if best is None:
        return None
    shares, left = {root: width / groups[root].channels for root, width in best.items()}, set(groups)
    while left:
        root = min(sorted(left), key=lambda root: shares[root])
        wider = best | {root: min(best[root] + groups[root].step, groups[root].channels)}
        if wider == best or not costs.are_within(budget, wider):
            left.remove(root)  # what does not fit now will not fit later
        else:
            best, shares[root] = wider, wider[root] / groups[root].channels
    return best


class _Costs:
    """What a network costs if groups of channels are narrowed, which nothing else is then."""

    def __init__(self, model: nn.Module, groups: Mapping[str, ChannelGroup], input_size: tuple[int, int, int]):
        self._groups = groups
        macs = count_macs(model, input_size)
        self._macs = dict(macs)  # of each module without those in it
        for name in filter(None, macs):
            self._macs[name.rpartition(".")[0]] -= macs[name]
        self._params = dict(model.named_parameters())
        self._inputs = {
            name: num_inputs(model.get_submodule(name)) for group in groups.values() for name, *_ in group.readers
        }

    def are_within(self, budget: Budget, widths: Mapping[str, int]) -> bool:
        """Return whether a network whose groups have these widths, by root, is within a budget."""
        outputs, inputs = defaultdict[str, float](lambda: 1.0), defaultdict[str, float](lambda: 1.0)
        for root, group in self._groups.items():
            rest = widths[root] / group.channels
            for name, dim, indices, _ in group.tensors:  # a norm behind a concatenation is of several groups
                if name in self._params and (size := self._params[name].shape[dim]) > 1:
                    outputs[name] -= (1 - rest) * len(indices) / size
            for name, indices, _ in group.readers:
                inputs[f"{name}.weight"] -= (1 - rest) * len(indices) / self._inputs[name]
        macs = sum(n * outputs[f"{name}.weight"] * inputs[f"{name}.weight"] for name, n in self._macs.items() if n)
        params = sum(tensor.numel() * outputs[name] * inputs[name] for name, tensor in self._params.items())
        return macs <= budget.macs and params <= budget.params
