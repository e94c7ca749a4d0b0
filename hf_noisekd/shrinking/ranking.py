"""What can be cut out of a network with the least change of its answers: told on noise, without data.

Each network, the whole and the cut one, answers with its BatchNorm layers on the statistics of the batch, so that what
is left sees inputs of the usual size.
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hf_noisekd.models.batch_norm import statistics_of_batch
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of
from hf_noisekd.shrinking.blocks import Place, remove_blocks

# Blocks that are looked at again, after another one was left out, before the next one is chosen.
LOOK_AGAIN = 4


def order_of_removal(
    model: nn.Module,
    blocks: Sequence[Place],
    worth: Mapping[Place, float],
    images: Sequence[torch.Tensor],
    *,
    enough: float = math.inf,
    at_most: Mapping[str, int] | None = None,
) -> list[Place]:
    """Return blocks of `model` in the order in which to leave them out, the least missed first.

    That is the one without which, and without those before it, the answers to batches `[B, C, H, W]` change the least,
    for what it is `worth`; see [`divergence_from`]. To spare forward passes only a few are tried at each step: those
    that were the least missed the last time. It ends where all of them are worth `enough`; what is beyond counts
    nothing. Of a stage that `at_most` names there are so many at most.
    """
    expected = log_probs(model, images)

    def change_without(removed: Sequence[Place]) -> float:
        rest = copy.deepcopy(model)
        remove_blocks(rest, removed)
        return divergence_from(expected, rest, images)

    order: list[Place] = []
    changes = {block: change_without([block]) for block in blocks}
    total = 0.0
    while changes and (missing := enough - sum(worth[block] for block in order)) > 0:

        def price(block: Place, missing: float = missing) -> float:
            return changes[block] / min(worth[block], missing)

        stages = Counter(block.stage for block in order)
        left = [block for block in changes if stages[block.stage] < (at_most or {}).get(block.stage, math.inf)]
        if not left:
            break
        tried = sorted(left, key=price)[:LOOK_AGAIN]
        if order:
            changes.update({block: max(change_without([*order, block]) - total, 0.0) for block in tried})
        best = min(tried, key=price)
        total += changes.pop(best)
        order.append(best)
    return order


def divergence_from(expected: torch.Tensor, model: nn.Module, images: Sequence[torch.Tensor]) -> float:
    """Return the mean KL divergence, in nats, of answers from those of `model` to batches of images.

    `expected` are the [`log_probs`] of another model for the same images.
    """
    return (expected.exp() * (expected - log_probs(model, images))).sum(-1).mean().item()


@torch.no_grad()
def log_probs(model: nn.Module, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logarithms of the answers `[N, num_classes]` to batches `[B, C, H, W]`, on the CPU."""
    with evaluation_mode(model), statistics_of_batch(model):
        logits = [compute_logits(model, to_device_of(model, batch)).float().cpu() for batch in images]
    return torch.cat(logits).log_softmax(-1)
