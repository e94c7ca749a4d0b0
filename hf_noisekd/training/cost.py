"""What a training takes in time and memory, measured on a few images before its first step."""

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from hf_noisekd.calibration.calibration_images import frozen_copy, noise_images
from hf_noisekd.calibration.matching import match_statistics
from hf_noisekd.models.classifier import compute_logits, device_of
from hf_noisekd.models.cpu_faults import fast_depthwise
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)

MEASURED_PIXELS = 2**20  # of the images that are measured, fewer than a batch has at 224 pixels
MIN_MEASURED = 8
MOST_MATCHED = 128  # images; more do not take longer in proportion


@dataclass(frozen=True)
class ImageCost:
    """What an image of full size takes, in seconds, and in bytes that are kept for the backward pass."""

    training: float  # of a step: it is drawn, both models' logits are computed, and the student's gradient
    evaluation: float  # of both models' logits, the student's twice
    memory: float


@dataclass(frozen=True)
class Estimate:
    """What a training takes, in seconds, and in bytes that a step keeps for its backward pass."""

    steps: int
    step: float
    evaluation: float
    memory: float
    device: torch.device

    @property
    def seconds(self) -> float:
        """The sum of all."""
        return self.steps * self.step + self.evaluation

    def __str__(self) -> str:
        parts = [f"{self.steps:,} steps of {duration(self.step)}"]
        parts += [f"{duration(self.evaluation)} to evaluate"] if self.evaluation else []
        text = f"About {duration(self.seconds)} on {named(self.device)}: {', '.join(parts)}."
        return f"{text} A step keeps {self.memory / 2**30:.1f} GiB in memory."


def named(device: torch.device) -> str:
    """Return what a time was measured on, as text."""
    return f"a CPU of {torch.get_num_threads()} threads" if device.type == "cpu" else f"a {device.type}"


def duration(seconds: float) -> str:
    """Return a time as text, in the largest unit of which there are two or more."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{1000 * seconds:.0f} ms"


def cost_of_an_image(
    student: nn.Module,
    teacher: Teacher,
    draw: Callable[[int], torch.Tensor],
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    autocast: Callable[[], AbstractContextManager],
    batch_size: int,
) -> ImageCost:
    """Measure what an image takes; the models stay as they are.

    `draw` returns so many training images of full size, `loss_of` the loss of student's and teacher's logits, and
    `autocast` is the context that they are computed in. Of a large batch only a part is measured.
    """
    number = min(batch_size, max(MIN_MEASURED, MEASURED_PIXELS // math.prod(teacher.input_size[1:])))
    trained, device = copy.deepcopy(student).train(), device_of(student)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> None:
        kept.clear()
        pixel_values = draw(number)
        with autocast():
            teacher_logits = teacher.training_logits(pixel_values)
            with fast_depthwise(trained, device), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = loss_of(compute_logits(trained, pixel_values), teacher_logits)
        loss.backward()

    @torch.no_grad()
    def evaluate() -> None:
        pixel_values = draw(number).float()
        teacher.logits(pixel_values, noise=True)
        compute_logits(trained, pixel_values)
        compute_logits(trained, pixel_values)

    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        training = min(_seconds(step, device), _seconds(step, device))
        memory = sum(kept.values()) - sum(tensor.nbytes for tensor in trained.parameters())
        evaluation = _seconds(evaluate, device)
    return ImageCost(training / number, evaluation / number, max(memory, 0) / number)


def cost_of_matching(teacher: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Measure how many seconds an image takes in a step in which it is matched to `teacher`."""
    number = min(MOST_MATCHED, max(MIN_MEASURED, MEASURED_PIXELS // math.prod(input_size[1:])))
    images = noise_images(teacher, number, input_size=input_size, seed=0)
    frozen, device = frozen_copy(teacher), images.device

    def match() -> None:
        match_statistics(frozen, images, 1)

    return min(_seconds(match, device), _seconds(match, device)) / number


def say_what_matching_takes(
    teacher: nn.Module, input_size: tuple[int, int, int], number: int, steps: int, max_steps: int
) -> None:
    """Log what it takes to make `number` images, with those held out, of a teacher that stores statistics."""
    step, first = number * cost_of_matching(teacher, input_size), min(steps, max_steps)
    more = f", up to {max_steps:,} where they need them ({duration(max_steps * step)})" if max_steps > first else ""
    takes, device = duration(first * step), named(device_of(teacher))
    logger.info("About %s on %s: %d steps to make %d images without data%s.", takes, device, first, number, more)


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    """Return how long a call takes."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
