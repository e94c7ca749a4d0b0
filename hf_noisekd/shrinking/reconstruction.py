"""Blocks of a cut network, trained one by one for what their teacher's blocks output.

All parameters of a block learn by gradient steps, on what the student itself has there by then, as in BRECQ (Li et al.,
ICLR 2021) after quantisation. That the features of a few images recover a network without some of its blocks is from
PRACTISE (Wang & Wu, CVPR 2023). BatchNorm layers keep their statistics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

from hf_noisekd.shrinking.block_features import TOLERANCE, Block, BlockPair, Call
from hf_noisekd.shrinking.least_squares import CHUNK_SIZE, HELD_OUT

STEPS, LEARNING_RATE = 400, 1e-3  # of Adam, falling linearly to 0
# Images of a step: fewer if they are large, as each has many positions then, and takes long.
MIN_BATCH, MAX_BATCH, BATCH_PIXELS = 4, 32, 2**15
MEMORY = 2**30  # bytes of features that are kept at a time; of images that need more, the first are used


@dataclass(eq=False)
class Reconstruction:
    """The training of a block of the student for the output of its teacher's, on images and their mirror images."""

    block: Block
    call: Call  # for a few images
    inputs: torch.Tensor  # [2N, ...], of images and then of their mirror images
    goals: torch.Tensor  # [2N, ...]
    batch_size: int
    seed: int = 0

    @classmethod
    def of(cls, pair: BlockPair, batches: Sequence[torch.Tensor], sample: torch.Tensor) -> "Reconstruction | None":
        """Return that of a pair of blocks on batches `[B, C, H, W]`; `sample` is a few of their images.

        There is none where the block cannot be called alone: it gets several tensors, or other values for other images,
        or its output depends on more than that.
        """
        call, goal = pair.student.call(sample), pair.output_goal(sample)
        if not _can_be_called_alone(pair.student, call, len(sample)):
            return None
        num_bytes = call.tensors[0][0].nbytes + goal[0].nbytes
        images = torch.cat([*batches])[: max(MEMORY // (2 * num_bytes), HELD_OUT)]  # twice: their mirror images
        number = len(images)
        inputs, goals = (some.new_empty(2 * number, *some.shape[1:]) for some in (call.tensors[0], goal))
        for start in range(0, number, CHUNK_SIZE):
            chunk = images[start : start + CHUNK_SIZE]
            for first, x in ((start, chunk), (number + start, chunk.flip(-1))):
                other = pair.student.call(x)
                if other.values != call.values:
                    return None
                inputs[first : first + len(x)] = other.tensors[0]
                goals[first : first + len(x)] = pair.output_goal(x)
        height, width = images.shape[2:]
        batch_size = min(max(BATCH_PIXELS // (height * width), MIN_BATCH), MAX_BATCH)
        return cls(pair.student, call, inputs, goals, batch_size)

    def helps(self) -> bool:
        """Return whether a training without every fourth image makes the squared error on these smaller.

        The block does not change.
        """
        number = len(self.inputs) // 2
        held_out = torch.arange(number) % HELD_OUT == HELD_OUT - 1
        tests, examples = held_out.nonzero()[:, 0], (~held_out.repeat(2)).nonzero()[:, 0]
        if not len(tests):
            return False
        # Each image as often as with all of them.
        weights = self._trained(examples, STEPS * len(examples) // len(self.inputs))
        return self._error(tests, weights) < self._error(tests)

    def train(self) -> None:
        """Train the block on all images, in place."""
        weights = self._trained(torch.arange(len(self.inputs)), STEPS)
        for name, parameter in self.block.block.named_parameters():
            parameter.copy_(weights[name])

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _trained(self, examples: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
        """Return the parameters after a training on some examples, by their indices, on the CPU."""
        weights = {name: tensor.detach().clone() for name, tensor in self.block.block.named_parameters()}
        adam = torch.optim.Adam([tensor.requires_grad_() for tensor in weights.values()], LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
        generator, scale = torch.Generator().manual_seed(self.seed), self.goals.var()
        for _ in range(steps):
            chosen = examples[torch.randint(len(examples), (self.batch_size,), generator=generator)]
            x, goal = (tensor[chosen.to(tensor.device)] for tensor in (self.inputs, self.goals))
            adam.zero_grad()
            (F.mse_loss(_output(self.block, self.call, x, weights), goal) / scale).backward()
            adam.step()
            schedule.step()
        return weights

    def _error(self, examples: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> float:
        """Return the sum of squared errors of some examples, with other weights than those of the block."""
        total = 0.0
        for chosen in examples.split(CHUNK_SIZE):
            x, goal = (tensor[chosen.to(tensor.device)] for tensor in (self.inputs, self.goals))
            total += (_output(self.block, self.call, x, weights) - goal).square().sum().item()
        return total


def _output(block: Block, call: Call, x: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
    """Return the output of a block alone, called as before but with another tensor, which it may change."""
    args = tuple(x if torch.is_tensor(value) else value for value in call.args)
    kwargs = {name: x if torch.is_tensor(value) else value for name, value in call.kwargs.items()}
    return functional_call(block.block, dict(weights or {}), args, kwargs)


def _can_be_called_alone(block: Block, call: Call, number: int) -> bool:
    if [len(tensor) for tensor in call.tensors] != [number] or not all(map(_is_plain, call.values)):
        return False
    output = _output(block, call, call.tensors[0].clone())
    return torch.allclose(output, call.output, rtol=0, atol=TOLERANCE * call.output.std().item())


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
