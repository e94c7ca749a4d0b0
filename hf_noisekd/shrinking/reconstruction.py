"""Blocks of a cut network, trained one by one for what their teacher's blocks output.

All parameters of a block learn by gradient steps, on what the student itself has there by then, as in BRECQ (Li et al.,
ICLR 2021) after quantisation. That the features of a few images recover a network without some of its blocks is from
PRACTISE (Wang & Wu, CVPR 2023). BatchNorm layers keep their statistics.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_noisekd.shrinking.least_squares import CHUNK_SIZE, HELD_OUT
from hf_noisekd.shrinking.walk import BlockPair

STEPS, LEARNING_RATE = 400, 1e-3  # of Adam, falling linearly to 0
# Images of a step: fewer if they are large, as each has many positions then, and takes long.
MIN_BATCH, MAX_BATCH, BATCH_PIXELS = 4, 32, 2**15


@dataclass(eq=False)
class Reconstruction:
    """The training of a block of the student for the output of its teacher's, on images and their mirror images.

    The student is at its block, and the teacher at the end of its own. The images are those of which both networks keep
    the features.
    """

    pair: BlockPair
    seed: int = 0

    def __post_init__(self):
        student, teacher = self.pair.student, self.pair.teacher
        self.block = student.block
        self.num_images = min(student.num_kept, teacher.num_kept)
        height, width = student.image_size
        self._batch_size = min(max(BATCH_PIXELS // (height * width), MIN_BATCH), MAX_BATCH)

    def helps(self) -> bool:
        """Return whether a training without every fourth image makes the squared error on these smaller.

        The block does not change.
        """
        held_out = torch.arange(self.num_images) % HELD_OUT == HELD_OUT - 1
        tests, examples = held_out.nonzero()[:, 0], (~held_out.repeat(2)).nonzero()[:, 0]
        if not len(tests):
            return False
        # Each image as often as with all of them.
        weights = self._trained(examples, STEPS * len(examples) // (2 * self.num_images))
        return self._error(tests, weights) < self._error(tests)

    def train(self) -> None:
        """Train the block on all images, in place."""
        weights = self._trained(torch.arange(2 * self.num_images), STEPS)
        for name, parameter in self.block.block.named_parameters():
            parameter.copy_(weights[name])

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _trained(self, examples: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
        """Return the parameters after a training on some examples; those from `num_images` on are mirror images."""
        weights = {name: tensor.detach().clone() for name, tensor in self.block.block.named_parameters()}
        adam = torch.optim.Adam([tensor.requires_grad_() for tensor in weights.values()], LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
        generator, scale = torch.Generator().manual_seed(self.seed), self.pair.teacher.features[0].var()
        for _ in range(steps):
            inputs, goals = self._draw(examples[torch.randint(len(examples), (self._batch_size,), generator=generator)])
            adam.zero_grad()
            (F.mse_loss(self.block.output(inputs, weights), goals) / scale).backward()
            adam.step()
            schedule.step()
        return weights

    def _error(self, examples: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> float:
        """Return the sum of squared errors of some examples, with other weights than those of the block."""
        total = 0.0
        for chosen in examples.split(CHUNK_SIZE):
            inputs, goals = self._draw(chosen)
            total += (self.block.output(inputs, weights) - goals).square().sum().item()
        return total

    def _draw(self, examples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the block of the student gets for examples, and what it is to output."""
        mirrored, images = (examples // self.num_images).tolist(), (examples % self.num_images).tolist()
        student, teacher = self.pair.student, self.pair.teacher
        inputs, outputs = (walk.features_of(images, mirrored) for walk in (student, teacher))
        return inputs, self.pair.of_student(outputs)
