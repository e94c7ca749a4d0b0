"""Which blocks of a network change its predictions the least when they are left out, compared on noise or on images.

Both networks, whole and cut, use BatchNorm statistics of the batch, so that later layers see inputs of the usual size;
or stored ones, where there are images on which those of the batch spoil the teacher itself.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_noisekd.batches import resized
from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.models.batch_norm import statistics_of_batch
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of
from hf_noisekd.shrinking.blocks import Place, remove_blocks

RANKED_PIXELS = 2**20  # of the images on which predictions are compared
CANDIDATES = 4  # blocks that are evaluated again at each step


@dataclass
class Comparison:
    """What networks are compared on: batches `[B, C, H, W]`, and the context of their BatchNorm statistics."""

    batches: list[torch.Tensor]
    statistics: Callable[[nn.Module], AbstractContextManager] = statistics_of_batch
    images: CalibrationImages | None = None  # that the batches are of, to repair on; None for noise

    @classmethod
    def on(cls, images: CalibrationImages | Sequence[torch.Tensor]) -> "Comparison":
        """Compare on calibration images, with stored statistics if these images are not enough for others, or noise."""
        if not isinstance(images, CalibrationImages):
            return cls(list(images))
        some = torch.cat([*images])[: num_ranked(images.pixel_values.shape[1:])]
        return cls([some], running_statistics if images.problem else statistics_of_batch, images)

    def at(self, size: Sequence[int]) -> "Comparison":
        """Compare on the same images in another `(height, width)`."""
        return replace(self, batches=[resized(batch, size) for batch in self.batches])

    @torch.no_grad()
    def log_probs(self, model: nn.Module) -> torch.Tensor:
        """Return the log-probabilities `[N, num_classes]`, on the CPU."""
        with evaluation_mode(model), self.statistics(model):
            # Copies, because some models change their input in place.
            logits = [compute_logits(model, to_device_of(model, batch.clone())).float().cpu() for batch in self.batches]
        return torch.cat(logits).log_softmax(-1)

    def divergence(self, expected: torch.Tensor, model: nn.Module) -> float:
        """Return the mean KL divergence, in nats, of `model` from `expected`, the log-probabilities of another."""
        return (expected.exp() * (expected - self.log_probs(model))).sum(-1).mean().item()


def num_ranked(input_size: Sequence[int]) -> int:
    """Return the number of images of a size `(channels, height, width)` on which networks are compared."""
    return min(256, max(32, RANKED_PIXELS // math.prod(input_size[1:])))


def running_statistics(model: nn.Module) -> AbstractContextManager:
    """Return a context that changes nothing: in evaluation mode a model uses its running statistics."""
    return nullcontext()


def order_of_removal(
    model: nn.Module,
    blocks: Sequence[Place],
    savings: Mapping[Place, float],
    compared: Comparison,
    *,
    enough: float = math.inf,
    at_most: Mapping[str, int] | None = None,
) -> list[Place]:
    """Return blocks of `model` in the order in which to leave them out.

    Next is the block without which, and without those before it, the predictions change the least for what it saves;
    see [`Comparison`]. To save forward passes, only those that changed the
    least when last evaluated are tried. The order ends where the blocks save `enough` together; savings beyond that do
    not count. `at_most` limits the number of blocks of a stage, by its name.
    """
    expected = compared.log_probs(model)

    def change_without(removed: Sequence[Place]) -> float:
        remove_blocks(rest := copy.deepcopy(model), removed)
        return compared.divergence(expected, rest)

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
