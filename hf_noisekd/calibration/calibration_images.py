"""Calibration images: noise that is moved until a teacher's BatchNorm layers see the statistics that they store.

A teacher does not keep its training images, but each BatchNorm layer keeps the mean and the variance that its inputs
had. Images are optimised until their own come close, as in DeepInversion (Yin et al., CVPR 2020), whose terms for
classes and smoothness are left out: nothing but statistics is wanted of them. A student's running statistics, an int8
calibration and a comparison of student and teacher can then do without data.

The images can show what the teacher memorised. Keep them where the teacher is.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_noisekd.calibration.matching import LEARNING_RATE, match_statistics
from hf_noisekd.calibration.moments import store_statistics
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import check_finite, compute_logits, device_of
from hf_noisekd.models.cpu_faults import training_memory_format
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.record.schema import CalibrationFacts

logger = logging.getLogger(__name__)

# Edges and even areas, as photos have them, pasted into each other: the start that needs the fewest steps.
START = "dead_leaves|cutmix:0.5"
# In percent, below which the images would spoil the statistics of a student.
MIN_SELF_AGREEMENT = 90.0


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationImages:
    """Images matched to a teacher, and how well they are; made by [`calibration_images`].

    Iterating gives batches `[B, C, H, W]`, as [`recalibrate_batch_norm`] takes them.
    """

    pixel_values: torch.Tensor  # [N, C, H, W], preprocessed as for the teacher
    held_out: torch.Tensor  # [M, C, H, W], others, made in the same way, to measure on
    batch_size: int
    seed: int
    steps: int = 0  # of optimisation; none if the teacher stores no statistics, and these are noise
    distance: float | None = None  # mean KL divergence from the stored statistics, in nats; None for noise
    self_agreement: float | None = None  # in percent; NaN if it tells nothing; None for noise

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.pixel_values.split(self.batch_size))

    def __len__(self) -> int:
        return len(self.pixel_values)

    @property
    def facts(self) -> CalibrationFacts:
        """What a student's provenance says of them."""
        assert self.self_agreement is not None
        return CalibrationFacts(
            images=len(self),
            held_out=len(self.held_out),
            steps=self.steps,
            seed=self.seed,
            self_agreement=self.self_agreement,
        )

    @property
    def problem(self) -> str | None:
        """Why no statistics should be re-estimated on them, as a sentence, or None if they are good enough."""
        if self.self_agreement is None:
            return (
                "There are no stored BatchNorm statistics that images could be matched to, so the calibration images "
                "are noise, from which nothing is to be learnt about images. Use some real ones."
            )
        after = f"after {self.steps:,} steps (distance {self.distance:.2g})"
        if math.isnan(self.self_agreement):
            return (
                f"Nothing vouches for the calibration images: {after} the teacher gives all of them the same answer, "
                "or none. Use more images, or some real ones."
            )
        if self.self_agreement < MIN_SELF_AGREEMENT:
            return (
                f"The calibration images do not resemble the teacher's data well enough: {after} the teacher itself, "
                f"with its statistics re-estimated on them, gives its own answer to {self.self_agreement:.0f} % of "
                f"others like them, and {MIN_SELF_AGREEMENT:.0f} % are needed. Use more steps or more images, or some "
                "real ones."
            )
        return None

    def check(self) -> "CalibrationImages":
        """Return them, or raise a `ValueError` if they are not good enough; see [`CalibrationImages.problem`]."""
        if self.problem:
            raise ValueError(self.problem)
        return self


@torch.inference_mode(False)
def calibration_images(
    teacher: nn.Module,
    num_images: int = 256,
    *,
    num_held_out: int | None = None,
    input_size: Sequence[int] | None = None,
    steps: int = 60,
    max_steps: int = 900,
    batch_size: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> CalibrationImages:
    """Make images with the statistics that the BatchNorm layers of a teacher store, from noise.

    They begin as dead leaves, and Adam moves their pixels with the teacher in evaluation mode. The loss is the mean
    over its BatchNorm layers, and over the channels of each, of `KL(N(m, v) || N(M, V))`: `m` and `v` are mean and
    variance of the batch, `M` and `V` the stored ones. After `steps` steps the images are tried out on the teacher
    itself: with its statistics re-estimated on them, how often does it give its own first answer to other images like
    them? Below 90 % the search goes on, each time for twice as many steps, up to `max_steps` in all. The last figure is
    `self_agreement`; [`CalibrationImages.check`] refuses images that stay below, and such as get one answer all.

    A teacher without stored statistics has nothing to match. Then they are the noise they would begin as, and a warning
    says so.

    Args:
        teacher: The classifier. It comes back unchanged; the images are made where it is, in float32.
        num_images: Number of images, at least 2.
        num_held_out: Number of the others, at least 2. Default: half as many.
        input_size: `(channels, height, width)`. Default: what the teacher declares.
        steps: Steps before the images are first tried out.
        max_steps: Steps at most. Less than `steps` means that number.
        batch_size: Images that are matched at a time, which bounds the memory. Each batch has the statistics by itself,
            so small ones give less varied images. Default: as many as have a million pixels, in [32, 256].
        seed: Seed of the noise. The same seed gives the same images on the same device, on a GPU up to rounding.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: A number is out of range, the teacher declares no input size and none was given, or it is damaged.
    """
    num_held_out = default_held_out(num_images) if num_held_out is None else num_held_out
    for name, value, least in (
        ("num_images", num_images, 2),
        ("num_held_out", num_held_out, 2),
        ("steps", steps, 1),
        ("max_steps", max_steps, 1),
        ("batch_size", batch_size, 2),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}: use at least {least}.")
    check_finite(teacher, "teacher")
    start = _start(teacher, (num_images, num_held_out), batch_size, input_size=input_size, seed=seed)
    if not stored_statistics(teacher):
        logger.warning("%s stores no BatchNorm statistics: its calibration images are noise.", type(teacher).__name__)
        return _as_made(start, num_images, seed)
    return _matched(_frozen_copy(teacher), start, num_images, seed, _rounds(steps, max_steps), show_progress)


def _matched(
    teacher: nn.Module,
    start: Sequence[torch.Tensor],
    num_images: int,
    seed: int,
    rounds: Sequence[int],
    show_progress: bool,
) -> CalibrationImages:
    """Match batches, of which the first have `num_images` images, until they are good enough or all rounds are over."""
    batches, steps = list(start), 0
    with tqdm(disable=not show_progress, desc="Matching images") as bar:
        for index, count in enumerate(rounds):
            bar.total = (steps + count) * len(start)
            # What is found is refined: a rate as high as the first would begin by losing it.
            rate = LEARNING_RATE / 2**index
            matched = [
                match_statistics(teacher, batch, count, learning_rate=rate, on_step=bar.update) for batch in batches
            ]
            batches, steps = [images for images, _ in matched], steps + count
            distance = sum(len(images) * distance for images, distance in matched) / sum(map(len, batches))
            made = replace(_as_made(batches, num_images, seed), steps=steps, distance=distance)
            made = replace(made, self_agreement=_self_agreement(teacher, made))
            if made.problem is None:
                break
    return made


def _rounds(steps: int, max_steps: int) -> list[int]:
    """Return the numbers of steps before each trial: twice as many each time, `max_steps` in all."""
    rounds = [min(steps, max_steps)]
    while sum(rounds) < max_steps:
        rounds.append(min(2 * rounds[-1], max_steps - sum(rounds)))
    return rounds


def default_held_out(num_images: int) -> int:
    """Return how many images are held out beside `num_images`."""
    return max(2, num_images // 2)


def noise_images(teacher: nn.Module, number: int, *, input_size: Sequence[int], seed: int) -> torch.Tensor:
    """Return the noise that held-out calibration images begin as, to compare a student with `teacher` on."""
    return torch.cat(_noise(teacher, number, None, held_out=True, input_size=input_size, seed=seed))


def _start(teacher: nn.Module, numbers: tuple[int, int], batch_size: int | None, **kwargs) -> list[torch.Tensor]:
    """Return batches of so many images, and of others that are held out."""
    return [
        batch
        for held_out, number in zip((False, True), numbers, strict=True)
        for batch in _noise(teacher, number, batch_size, held_out=held_out, **kwargs)
    ]


def _noise(teacher: nn.Module, number: int, batch_size: int | None, **kwargs) -> list[torch.Tensor]:
    """Return noise images in batches of about equal size."""
    noise = NoiseDataset.for_model(teacher, distribution=START, device=device_of(teacher), **kwargs)
    if batch_size is None:
        batch_size = min(256, max(32, 2**20 // math.prod(noise.input_size[1:])))
    parts = math.ceil(number / batch_size)
    sizes = [number // parts + (part < number % parts) for part in range(parts)]
    batches = []
    for step, noise.batch_size in enumerate(sizes):
        batches.append(noise.draw(step))
    return batches


def _as_made(batches: Sequence[torch.Tensor], num_images: int, seed: int) -> CalibrationImages:
    images = torch.cat(list(batches))
    return CalibrationImages(images[:num_images], images[num_images:], batch_size=len(batches[0]), seed=seed)


def _frozen_copy(teacher: nn.Module) -> nn.Module:
    frozen = copy.deepcopy(teacher).float().eval().requires_grad_(False)
    return frozen.to(memory_format=training_memory_format(frozen, device_of(frozen)))


@torch.no_grad()
def _self_agreement(teacher: nn.Module, images: CalibrationImages) -> float:
    """Return for how many of the held-out images, in percent, new statistics leave the teacher's first answer.

    NaN if the teacher gives one answer to all, with which anything agrees, or if anything is not finite.
    """
    if not all(batch.isfinite().all() for batch in (images.pixel_values, images.held_out)):
        return math.nan
    changed = copy.deepcopy(teacher)
    store_statistics(changed, images)
    # Copies, as some models change their input in place.
    before, after = (
        torch.cat([compute_logits(model, batch.clone()) for batch in images.held_out.split(images.batch_size)])
        for model in (teacher, changed)
    )
    answers = before.argmax(-1)
    if not (before.isfinite().all() and after.isfinite().all()) or (answers == answers[0]).all():
        return math.nan
    return 100 * (answers == after.argmax(-1)).float().mean().item()
