"""Cut a teacher down to a budget of multiply-adds or parameters, where its answers change the least."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_noisekd.models.batch_norm import statistics_of_batch
from hf_noisekd.models.classifier import count_parameters, device_of
from hf_noisekd.models.cost import count_macs
from hf_noisekd.models.input_size import input_size_of
from hf_noisekd.models.loading import differing
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.record.schema import StartFacts
from hf_noisekd.shrinking.blocks import Place, removable_blocks, remove_blocks
from hf_noisekd.shrinking.channels import ChannelCutter, ChannelGroup, channel_importance, least_important, num_inputs
from hf_noisekd.shrinking.ranking import divergence_from, log_probs, order_of_removal
from hf_noisekd.shrinking.shrunk import build_cut, shapes_of, timm_model_of

MAX_DEPTHS = 8  # numbers of blocks to leave out that are tried, beside none
# A network that lost blocks alone stores statistics that nearly hold, and is taken even if it is so many times worse.
PREFERENCE = 1.25
RANKING_PIXELS = 2**20  # of the noise on which answers are compared


@dataclass(frozen=True)
class Budget:
    """What a network may cost: multiply-adds for an image, and parameters; either may be without limit."""

    macs: float = math.inf
    params: float = math.inf

    def holds(self, model: nn.Module, input_size: tuple[int, int, int]) -> bool:
        """Return whether `model` costs no more."""
        return self.holds_for(count_macs(model, input_size)[""], count_parameters(model))

    def holds_for(self, macs: float, params: float) -> bool:
        """Return whether these are no more."""
        return macs <= self.macs and params <= self.params

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
    images: Sequence[torch.Tensor] | None = None,
) -> tuple[nn.Module, StartFacts]:
    """Cut a smaller network out of a timm model, without training: whole blocks first, then channels.

    Blocks go first whose loss changes the answers the least for the multiply-adds that it saves. For each number of
    them all layers are narrowed by the same share until the budget is met, each to its most important channels; see
    [`channel_importance`]. Of the networks so made the one is returned whose answers are the closest to the teacher's,
    each answering on the statistics of the batch; one that lost blocks alone has the benefit of a quarter. The
    BatchNorm layers store what is left of the teacher's statistics, which hold no longer where channels were cut;
    [`recalibrate_batch_norm`] gives them some that do.

    Args:
        teacher: A timm model. It does not change.
        keep: Share of the teacher's multiply-adds that the result may have, in (0, 1).
        max_macs: Multiply-adds for an image that it may have.
        max_params: Parameters that it may have.
        input_size: `(channels, height, width)` of the images. Default: what the teacher declares.
        images: Batches `[B, C, H, W]` to compare answers on. Default: noise of dead leaves.

    Returns:
        The network, in evaluation mode, which can be saved as any other, and what was cut.

    Raises:
        ValueError: There is no budget or it cannot be met, or the teacher is no timm model.
    """
    teacher = timm_model_of(teacher)
    size = input_size_of(teacher, input_size)
    costs = count_macs(teacher, size)
    budget = _budget(costs[""], count_parameters(teacher), keep, max_macs, max_params)
    images = ranking_noise(teacher, size) if images is None else images
    best = min(_cuts(teacher, budget, size, images), key=lambda found: found[0], default=None)
    if best is None:
        raise ValueError(
            f"{type(teacher).__name__} cannot be cut to {budget}: too few of its layers can be narrowed or "
            "left out. Allow more, or name a smaller student."
        )
    _, cut, removed = best
    student = build_cut(cut, teacher, removed)
    remove_blocks(rest := copy.deepcopy(teacher), removed)
    return student, StartFacts(
        removed_blocks=[place.name for place in removed],
        tensors=len(student.state_dict()),
        from_teacher=len(student.state_dict()),
        cut=len(differing(shapes_of(rest), shapes_of(student))),
        macs=count_macs(student, size)[""] / costs[""],
    )


def _cuts(
    teacher: nn.Module, budget: Budget, size: tuple[int, int, int], images: Sequence[torch.Tensor]
) -> Iterator[tuple[float, nn.Module, list[Place]]]:
    """Yield networks that meet a budget, each with how much its answers change, and the blocks that it lost."""
    costs, blocks = count_macs(teacher, size), removable_blocks(teacher, size)
    enough = costs[""] - budget.macs if budget.params == math.inf else math.inf
    blocks = order_of_removal(teacher, blocks, {place: costs[place.name] for place in blocks}, images, enough=enough)
    expected = log_probs(teacher, images)
    fixed: set[str] = set()
    for number in sorted({round(len(blocks) * step / MAX_DEPTHS) for step in range(MAX_DEPTHS + 1)}):
        cut, removed = copy.deepcopy(teacher), blocks[:number]
        name_before = remove_blocks(cut, removed)
        fits = budget.holds(cut, size)
        narrow = cut if fits else _narrowed(cut, budget, size, images, fixed, name_before)
        if narrow is not None and budget.holds(narrow, size):  # products without weights are not in the plan
            yield divergence_from(expected, narrow, images) / (PREFERENCE if fits else 1), narrow, removed
        if fits:
            return  # with fewer blocks it gets worse


def _budget(macs: float, params: float, keep: float | None, max_macs: float | None, max_params: float | None) -> Budget:
    if keep is not None and not 0 < keep < 1:
        raise ValueError(f"keep is {keep}: use the share of the multiply-adds to keep, between 0 and 1, such as 0.5.")
    for name, limit, found in (("max_macs", max_macs, macs), ("max_params", max_params, params)):
        if limit is not None and not 0 < limit < found:
            raise ValueError(f"{name} is {limit:,}: use a number between 0 and what the teacher has, {found:,}.")
    if keep is None and max_macs is None and max_params is None:
        raise ValueError("There is no budget to cut the teacher to: give keep, max_macs or max_params.")
    return Budget(min(macs * (keep or 1), max_macs or math.inf), max_params or math.inf)


def ranking_noise(model: nn.Module, input_size: tuple[int, int, int], seed: int = 0) -> list[torch.Tensor]:
    """Return the noise `[B, C, H, W]` on which answers are compared by default, on the device of `model`."""
    size = RANKING_PIXELS // (input_size[1] * input_size[2])
    noise = NoiseDataset.for_model(
        model,
        input_size=input_size,
        distribution="dead_leaves",
        batch_size=min(256, max(32, size)),
        held_out=True,
        seed=seed,
        device=device_of(model),
    )
    return [noise.draw(0)]


def _narrowed(
    whole: nn.Module,
    budget: Budget,
    input_size: tuple[int, int, int],
    images: Sequence[torch.Tensor],
    fixed: set[str],
    name_before: Mapping[str, str],
) -> nn.Module | None:
    """Return `whole` with all its layers narrowed by the same share to a budget, or None if that cannot be done.

    Layers that do not bear it stay as they are, and get into `fixed`, by their names in the teacher, `name_before`.
    """
    while True:
        cut = copy.deepcopy(whole)
        cutter = ChannelCutter(cut, input_size)
        groups = {root: group for root, group in cutter.groups.items() if name_before[root] not in fixed}
        widths = _widths(whole, groups, budget, input_size)
        if widths is None:
            return None
        importance = channel_importance(cut, groups, images, statistics_of_batch(cut))
        removed = {root: least_important(groups[root], importance[root], width) for root, width in widths.items()}
        if cutter.cut(removed):
            return cut
        failing = [root for root in removed if not _bears(whole, {root: removed[root]}, input_size)]
        if not failing:
            return None
        fixed |= {name_before[root] for root in failing}


def _bears(whole: nn.Module, removed: Mapping[str, Sequence[int]], input_size: tuple[int, int, int]) -> bool:
    return ChannelCutter(copy.deepcopy(whole), input_size).cut(removed)


def _widths(
    model: nn.Module, groups: Mapping[str, ChannelGroup], budget: Budget, input_size: tuple[int, int, int]
) -> dict[str, int] | None:
    """Return the widths of all groups, the same share of what they are as far as can be, that meet a budget."""
    costs = count_macs(model, input_size)
    params = {name: sum(p.numel() for p in module.parameters(recurse=False)) for name, module in model.named_modules()}

    def cost(widths: Mapping[str, int]) -> tuple[float, float]:
        share = dict.fromkeys(costs, 1.0)
        for root, group in groups.items():
            rest = widths[root] / group.channels
            for name in group.writers:
                share[name] *= rest
            for name, inputs, _ in group.readers:
                share[name] -= share[name] * (1 - rest) * len(inputs) / num_inputs(model.get_submodule(name))
        leaves = [name for name in costs if params.get(name)]
        return sum(costs[n] * share[n] for n in leaves), sum(params[n] * share[n] for n in leaves)

    best, low, high = None, 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        widths = {root: group.width(share) for root, group in groups.items()}
        if budget.holds_for(*cost(widths)):
            best, low = widths, share
        else:
            high = share
    return best
