"""What can be cut out of a network with the least change of its answers: told on noise, without data.

Each network, the whole and the cut one, answers with its BatchNorm layers on the statistics of the batch, so that what
is left sees inputs of the usual size.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from hf_noisekd.models.batch_norm import batch_statistics, has_batch_norm
from hf_noisekd.models.blocks import Place, remove_blocks
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of


def block_changes(model: nn.Module, blocks: Iterable[Place], images: Sequence[torch.Tensor]) -> dict[Place, float]:
    """Return how much the answers of `model` to batches `[B, C, H, W]` change without each of its blocks, in nats.

    That is the mean KL divergence of the whole model's answers from those of the rest.
    """
    changes = {}
    for block in blocks:
        rest = copy.deepcopy(model)
        remove_blocks(rest, [block])
        changes[block] = answer_change(model, rest, images)
    return changes


def answer_change(model: nn.Module, other: nn.Module, images: Sequence[torch.Tensor]) -> float:
    """Return the mean KL divergence, in nats, of the answers of `model` from those of `other` to batches of images."""
    expected = _log_probs(model, images)
    return (expected.exp() * (expected - _log_probs(other, images))).sum(-1).mean().item()


@torch.no_grad()
def _log_probs(model: nn.Module, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logarithms of the answers `[N, num_classes]` to batches `[B, C, H, W]`, on the CPU."""
    with evaluation_mode(model), statistics_of_batch(model):
        logits = [compute_logits(model, to_device_of(model, batch)).float().cpu() for batch in images]
    return torch.cat(logits).log_softmax(-1)


def statistics_of_batch(model: nn.Module) -> AbstractContextManager:
    """Return the context of [`batch_statistics`], or one that does nothing for a model without such layers."""
    return batch_statistics(model) if has_batch_norm(model) else nullcontext()
