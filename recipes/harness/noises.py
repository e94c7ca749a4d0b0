"""Noises and a loss that the recipes compare with those of the package; importing this registers the noises."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from hf_noisekd import NoiseKDTrainer, register_noise
from hf_noisekd.noise.distributions import Shape, dead_leaves, normal, uniform

# Rows of the tables that have the names of noises which are registered under others.
REGISTERED_AS = {"dead_leaves|mixup:0.5": "mixed_leaves"}


def noise_of(row: str) -> str:
    """Return the text of the noise that a row of a table is named by."""
    return REGISTERED_AS.get(row, row)


def pyramid(generator: torch.Generator, shape: Shape) -> torch.Tensor:
    """Sums of octaves: white noise of each size from 2x2 up, enlarged to the image, with random weights."""
    batch, channels, height, width = shape
    octaves = max(1, math.ceil(math.log2(max(height, width))))
    decay = uniform(generator, (batch, 1, 1, 1), 0.0, 2.0)
    x = torch.zeros((), device=generator.device)
    for octave in range(1, octaves + 1):
        size = (batch, channels, min(height, 2**octave), min(width, 2**octave))
        weight = torch.exp(-decay * octave / 2 + normal(generator, (batch, 1, 1, 1)) * 0.7)
        x = x + weight * F.interpolate(normal(generator, size), (height, width), mode="bilinear")
    std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True, correction=0)
    return (x - mean) / std.clamp(min=1e-6)


def mixed_leaves(generator: torch.Generator, shape: Shape) -> torch.Tensor:
    """Dead leaves of which every second image, at random, is mixed with another one.

    By `cos(t)` and `sin(t)` with uniform `t`, which keep the variance of a batch.
    """
    images = dead_leaves(generator, shape)
    angle = uniform(generator, (len(images),)) * (math.pi / 2)
    angle = torch.where(uniform(generator, (len(images),)) < 0.5, angle, 0.0).view(-1, 1, 1, 1)
    others = images[torch.randperm(len(images), generator=generator, device=generator.device)]
    return images * angle.cos() + others * angle.sin()


register_noise("pyramid", pyramid)
register_noise("mixed_leaves", mixed_leaves)


class CentredLogitsTrainer(NoiseKDTrainer):
    """Distills by the mean squared error of logits without their mean over the classes, which softmax ignores.

    It is the limit of the Kullback-Leibler divergence for high temperatures up to a factor (Hinton, Vinyals & Dean,
    2015, section 2.1), so the temperature has no effect.
    """

    def distillation_loss(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Return the error in squared logits."""
        difference = student_logits.float() - teacher_logits.float()
        return (difference - difference.mean(-1, keepdim=True)).square().mean()

    def provenance(self):
        """Return how the student was made, with the name that this loss has in the results."""
        return replace(super().provenance(), loss_type="centered_mse")
