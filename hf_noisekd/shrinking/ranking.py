"""Which blocks of a network change its predictions the least when they are left out, compared on noise, without data.

Both networks, whole and cut, use BatchNorm statistics of the batch, so that later layers see inputs of the usual size.
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

CANDIDATES = 4  # blocks that are evaluated again at each step


def order_of_removal(
    model: nn.Module,
    blocks: Sequence[Place],
    savings: Mapping[Place, float],
    images: Sequence[torch.Tensor],
    *,
    enough: float = math.inf,
    at_most: Mapping[str, int] | None = None,
) -> list[Place]:
    """Return blocks of `model` in the order in which to leave them out.

    Next is the block without which, and without those before it, the predictions for `images`, batches `[B, C, H, W]`,
    change the least for what it saves; see [`divergence_from`]. To save forward passes, only those that changed the
    least when last evaluated are tried. The order ends where the blocks save `enough` together; savings beyond that do
    not count. `at_most` limits the number of blocks of a stage, by its name.
    """
    expected = log_probs(model, images)

    def change_without(removed: Sequence[Place]) -> float:
        remove_blocks(rest := copy.deepcopy(model), removed)
        return divergence_from(expected, rest, images)

    order: list[Place] = []
    changes = {block: change_without([block]) for block in blocks}
    total = 0.0
    while (missing := enough - sum(savings[block] for block in order)) > 0:

        def price(block: Place, missing: float = missing) -> float:
            return changes[block] / min(savings[block], missing)

        stages = Counter(block.stage for block in order)
        left = [block for block in changes if stages[block.stage] < (at_most or {}).get(block.stage, math.inf)]
        if not left:
            break
        tried = sorted(left, key=price)[:CANDIDATES]
        if order:
            changes.update({block: max(change_without([*order, block]) - total, 0.0) for block in tried})
        best = min(tried, key=price)
        total += changes.pop(best)
        order.append(best)
    return order


def divergence_from(expected: torch.Tensor, model: nn.Module, images: Sequence[torch.Tensor]) -> float:
    """Return the mean KL divergence, in nats, of `model` from `expected`, [`log_probs`] of another for the images."""
    return (expected.exp() * (expected - log_probs(model, images))).sum(-1).mean().item()


@torch.no_grad()
def log_probs(model: nn.Module, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the log-probabilities `[N, num_classes]` for batches `[B, C, H, W]`, on the CPU."""
    with evaluation_mode(model), statistics_of_batch(model):
        logits = [compute_logits(model, to_device_of(model, batch)).float().cpu() for batch in images]
    return torch.cat(logits).log_softmax(-1)
