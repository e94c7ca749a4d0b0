"""A network cut and repaired, and what of it could not be cut."""

import copy
from unittest.mock import patch

import torch
from torch import nn

from hf_noisekd.calibration.given_images import given_images
from hf_noisekd.record.schema import StartFacts
from hf_noisekd.shrinking.channels import ChannelCutter
from hf_noisekd.shrinking.cutting import cut_to_budget
from hf_noisekd.shrinking.repair import fit_to_teacher

RANKED = 16  # noise images to choose a cut on: it is to be tried, not to be good


def groups_left_alone(model: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Return how many groups of channels, of all, torch-pruning cannot follow or takes for others."""
    cutter = ChannelCutter(copy.deepcopy(model), input_size)
    return f"{len(cutter.left_alone)} of {len(cutter.left_alone) + len(cutter.groups)}"


def cut_and_repaired(
    teacher: nn.Module, keep: float, images: torch.Tensor, others: torch.Tensor
) -> tuple[nn.Module, StartFacts, list[float]]:
    """Return a cut network, repaired on `images`, how it was cut, and its errors on `others` before and after repair.

    Images are `[N, C, H, W]`. An error is the root mean square of the differences of logits, in percent of the standard
    deviation of the teacher's.
    """
    size = tuple(images.shape[1:])
    with patch("hf_noisekd.shrinking.cutting.num_ranked", lambda size: RANKED):
        student, facts, cut = cut_to_budget(teacher, keep=keep, input_size=size, images=None)
    errors = [logit_error(student, teacher, others)]
    fit_to_teacher(student, teacher, cut, given_images(teacher, images))
    return student, facts, [*errors, logit_error(student, teacher, others)]


@torch.no_grad()
def logit_error(student: nn.Module, teacher: nn.Module, images: torch.Tensor) -> float:
    """Return the error of [`cut_and_repaired`]."""
    # Copies, because some models change their input in place.
    logits, expected = (model.eval()(images.clone()) for model in (student, teacher))
    return 100 * ((logits - expected).square().mean().sqrt() / expected.std(0).mean()).item()
