"""Calibration images: noise optimised to have the statistics that a teacher's BatchNorm layers store.

They are made as in DeepInversion (Yin et al., CVPR 2020), and replace real images for a student's running statistics,
int8 calibration, and the comparison of student and teacher. They can show what the teacher memorised: keep them as
private as the teacher.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_noisekd.batches import resized
from hf_noisekd.calibration.matching import LEARNING_RATE, match_statistics
from hf_noisekd.calibration.moments import store_statistics
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import check_finite, compute_logits, device_of, to_device_of
from hf_noisekd.models.cpu_faults import training_memory_format
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.record.schema import CalibrationFacts, ImagesFacts

logger = logging.getLogger(__name__)

START = "dead_leaves|cutmix:0.5"  # the noise that needs the fewest steps
MIN_TRIED = 6  # images of the batch that is tried first: a third of them are held out
MIN_BATCH, MATCHED_PIXELS = 32, 2**20  # of images that are matched together
# A teacher agrees with itself after half of these. Statistics for a student with features of its own need them all.
STEPS = 120
MIN_SELF_AGREEMENT = 90.0  # percent; with less the images would spoil a student's statistics
MAX_GAIN = 15.0  # percent that the first round may lack, for a second one to be worth its time
MIN_OF_ONE_BATCH = 60.0  # percent; few images of a good kind have less than many
ENOUGH_REAL = 64  # unlabelled images, where those made are not good enough


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationImages:
    """Images matched to a teacher, or given ones; iterating gives batches `[B, C, H, W]`, of all that are not held out.

    Beside a few that are given there may be others, `made` for the same teacher.
    """

    pixel_values: torch.Tensor  # [N, C, H, W], preprocessed as for the teacher
    held_out: torch.Tensor  # [M, C, H, W], others, made in the same way, to evaluate on
    batch_size: int
    seed: int = 0
    given: ImagesFacts | None = None  # of real images of the user's; None if they are made without data
    steps: int = 0  # of optimisation; 0 if the teacher stores no statistics, and these are noise
    distance: float | None = None  # mean KL divergence from the stored statistics, in nats; None for noise
    self_agreement: float | None = None  # in percent; NaN if meaningless; None for noise
    made: "CalibrationImages | None" = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        return chain(self.pixel_values.split(self.batch_size), self.made or ())

    def __len__(self) -> int:
        return len(self.pixel_values) + (len(self.made) if self.made else 0)

    @property
    def to_compare_on(self) -> torch.Tensor:
        """All that are held out, `[M, C, H, W]`."""
        return torch.cat([self.held_out, self.made.held_out]) if self.made else self.held_out

    def at(self, size: Sequence[int]) -> "CalibrationImages":
        """Return the same images in another `(height, width)`."""
        made = self.made and self.made.at(size)
        pixel_values, held_out = resized(self.pixel_values, size), resized(self.held_out, size)
        return replace(self, pixel_values=pixel_values, held_out=held_out, made=made)

    def to(self, device: torch.device | str) -> "CalibrationImages":
        """Return the same images on another device."""
        made = self.made and self.made.to(device)
        return replace(self, pixel_values=self.pixel_values.to(device), held_out=self.held_out.to(device), made=made)

    @property
    def facts(self) -> CalibrationFacts | None:
        """The facts of those that are made, for a student's provenance; None if all are given."""
        if self.given:
            return self.made.facts if self.made else None
        assert self.self_agreement is not None
        sizes = {"images": len(self), "held_out": len(self.held_out)}
        return CalibrationFacts(**sizes, steps=self.steps, seed=self.seed, self_agreement=self.self_agreement)

    @property
    def real(self) -> ImagesFacts | None:
        """The facts of real images that statistics are of, without those held out; None if they are made."""
        return self.given and replace(self.given, images=len(self.pixel_values))

    @property
    def problem(self) -> str | None:
        """Why no statistics should be re-estimated on them, as a sentence, or None if they are good enough."""
        if self.self_agreement is None:
            if self.given:
                return "The teacher has no stored BatchNorm statistics, so those of the images cannot be checked."
            return (
                "The teacher has no stored BatchNorm statistics, so the calibration images are noise. Use real images."
            )
        if self.given:
            if self.self_agreement >= MIN_SELF_AGREEMENT:
                return None
            if math.isnan(self.self_agreement):
                return (
                    "The given images cannot be checked: the teacher predicts one class for all held-out ones, so "
                    "agreement on these says nothing. Give images of several classes."
                )
            return (
                "The given images are too few, or too unlike the teacher's data, for statistics: with those of the "
                f"images the teacher agrees with itself on {self.self_agreement:.0f} % of held-out ones."
            )
        after = f"after {self.steps:,} steps (distance {self.distance:.2g})"
        if math.isnan(self.self_agreement):
            return (
                f"The calibration images cannot be checked: {after} the teacher predicts one class for all of them, or "
                "NaN. Use more images, or real ones."
            )
        if self.self_agreement < MIN_SELF_AGREEMENT:
            return (
                f"The calibration images are too unlike the teacher's data: {after} the teacher with statistics of "
                f"these images agrees with itself on {self.self_agreement:.0f} % of held-out ones, below "
                f"{MIN_SELF_AGREEMENT:.0f} %. Give unlabelled images of its task instead, {ENOUGH_REAL} or more: "
                "images=FOLDER."
            )
        return None

    @torch.no_grad()
    def measure_self_agreement(self, teacher: nn.Module) -> float:
        """Return `self_agreement`; NaN if the teacher predicts one class for all, or anything is not finite."""
        held_out = self.to_compare_on
        if not all(batch.isfinite().all() for batch in (*self, held_out)):
            return math.nan
        changed = copy.deepcopy(teacher)
        store_statistics(changed, self)
        # Copies, because some models change their input in place.
        before, after = (
            torch.cat(
                [compute_logits(model, to_device_of(model, batch.clone())) for batch in held_out.split(self.batch_size)]
            )
            for model in (teacher, changed)
        )
        classes = before.argmax(-1)
        if not (before.isfinite().all() and after.isfinite().all()) or (classes == classes[0]).all():
            return math.nan
        return 100 * (classes == after.argmax(-1)).float().mean().item()

    def say_problem(self) -> None:
        """Log the problem of given images, where the teacher's statistics are used in place of theirs."""
        if self.self_agreement is not None and self.problem:
            # At many classes no few images are enough, and that is no fault of theirs.
            level = logging.WARNING if math.isnan(self.self_agreement) else logging.INFO
            logger.log(level, "%s The teacher's stored statistics stay.", self.problem)

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
    steps: int = STEPS,
    max_steps: int = 900,
    max_image_steps: float = math.inf,
    batch_size: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> CalibrationImages:
    """Make images with the statistics that the BatchNorm layers of a teacher store, from noise.

    Adam optimises the pixels of dead-leaves noise, with the teacher in evaluation mode. The loss is the mean, over
    BatchNorm layers and their channels, of `KL(N(m, v) || N(M, V))`, with mean `m` and variance `v` of the batch, and
    the stored `M` and `V`. After half of `steps`, and after all, the images are checked: a copy of the teacher with
    statistics of the images must predict the same class as the teacher for at least 90 % of the held-out images.
    Otherwise optimisation continues, each time for as many steps again, up to `max_steps` in all, as long as this
    share, growing as before, would get there. Of many batches one is matched first, and alone returned if it is
    hopeless. The last share is `self_agreement`; [`CalibrationImages.check`] refuses images that stay below, or that
    are all of one predicted class. For a teacher without stored statistics they are unchanged noise, with a warning.

    Args:
        teacher: The classifier. It does not change; the images are made on its device, in float32.
        num_images: Number of images, at least 2.
        num_held_out: Number of held-out images, at least 2. Default: half as many.
        input_size: `(channels, height, width)`. Default: what the teacher declares.
        steps: Steps of images that are good enough. Ranges of int8 need fewer than statistics of a student.
        max_steps: Most steps in all.
        max_image_steps: Most images times steps in all; there are fewer images then, at least a million pixels.
        batch_size: Images that are matched together, which bounds the memory. Each batch has the statistics alone, so
            small ones give less varied images. Default: as many as have a million pixels, in [32, 256].
        seed: Seed of the noise. The same seed gives the same images on the same device, on a GPU up to rounding.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: A number is out of range, the input size is unknown, or the teacher is damaged.
    """
    num_held_out = default_held_out(num_images) if num_held_out is None else num_held_out
    numbers = {"num_images": num_images, "num_held_out": num_held_out, "batch_size": batch_size}
    for name, value in (numbers | {"steps": steps, "max_steps": max_steps}).items():
        if value is not None and value < (least := 2 if name in numbers else 1):
            raise ValueError(f"{name} is {value}: use at least {least}.")
    check_finite(teacher, "teacher")
    input_size = input_size_of(teacher, input_size)
    batch_size = batch_size or _default_batch_size(input_size)
    if max_image_steps < math.inf:
        number = max(int(max_image_steps / steps), min(batch_size, least_images(input_size)))
        num_images, num_held_out = _at_most(number, num_images, num_held_out)
        max_steps = min(max_steps, max(steps, int(max_image_steps) // (num_images + num_held_out)))
    start = _noise(teacher, num_images, batch_size, held_out=False, input_size=input_size, seed=seed)
    start += _noise(teacher, num_held_out, batch_size, held_out=True, input_size=input_size, seed=seed)
    if not stored_statistics(teacher):
        logger.warning("%s stores no BatchNorm statistics: its calibration images are noise.", type(teacher).__name__)
        return _as_made(start, num_images, seed)
    return _matched(frozen_copy(teacher), start, num_images, seed, steps, _rounds(steps, max_steps), show_progress)


def frozen_copy(teacher: nn.Module) -> nn.Module:
    """Return a copy of a teacher to match images with, in evaluation mode and float32."""
    frozen = copy.deepcopy(teacher).float().eval().requires_grad_(False)
    return frozen.to(memory_format=training_memory_format(frozen, device_of(frozen)))


def _matched(
    teacher: nn.Module,
    start: Sequence[torch.Tensor],
    num_images: int,
    seed: int,
    enough: int,
    rounds: Sequence[int],
    show_progress: bool,
) -> CalibrationImages:
    """Match batches, `num_images` and the held-out images, until they are good enough, or hopeless, or rounds end."""
    batches, before = list(start), -math.inf
    with tqdm(disable=not show_progress, desc="Matching images") as bar:
        for index, count in enumerate(rounds):
            steps = sum(rounds[: index + 1])
            bar.total = steps * len(start)
            options = {"learning_rate": LEARNING_RATE / 2**index, "on_step": bar.update}  # the first rate undoes it
            matched = []
            for batch in batches:
                matched.append(match_statistics(teacher, batch, count, **options))
                if index == 0 and len(matched) == 1 and len(start) > 2 and len(batch) >= MIN_TRIED:
                    made, agreement = _checked(teacher, matched, -(-2 * len(batch) // 3), seed, steps)
                    if agreement < MIN_OF_ONE_BATCH:
                        return made
            made, agreement = _checked(teacher, matched, num_images, seed, steps)
            gain = min(agreement - before, MAX_GAIN)
            if (made.problem is None and steps >= enough) or not agreement + gain >= MIN_SELF_AGREEMENT:
                break
            batches, before = [images for images, _ in matched], agreement
    return made


def _checked(
    teacher: nn.Module, matched: Sequence[tuple[torch.Tensor, float]], num_images: int, seed: int, steps: int
) -> tuple[CalibrationImages, float]:
    """Return matched batches, each with its distance, as calibration images, and their self-agreement."""
    batches = [images for images, _ in matched]
    distance = sum(len(images) * distance for images, distance in matched) / sum(map(len, batches))
    made = replace(_as_made(batches, num_images, seed), steps=steps, distance=distance)
    agreement = made.measure_self_agreement(teacher)
    return replace(made, self_agreement=agreement), agreement


def _rounds(steps: int, max_steps: int) -> list[int]:
    """Return the numbers of steps before each check: half, and then each time as many again, `max_steps` in all."""
    rounds = [min(-(-steps // 2), max_steps)]
    while sum(rounds) < max_steps:
        rounds.append(min(sum(rounds), max_steps - sum(rounds)))
    return rounds


def _at_most(number: int, num_images: int, num_held_out: int) -> tuple[int, int]:
    """Return numbers of images and of held-out images in the same proportion, `number` together or fewer."""
    if (wanted := num_images + num_held_out) <= number:
        return num_images, num_held_out
    num_held_out = max(2, number * num_held_out // wanted)
    return max(2, number - num_held_out), num_held_out


def default_held_out(num_images: int) -> int:
    """Return the default number of held-out images."""
    return max(2, num_images // 2)


def noise_images(teacher: nn.Module, number: int, *, input_size: Sequence[int], seed: int) -> torch.Tensor:
    """Return the noise from which held-out calibration images are made, to compare a student with `teacher`."""
    batch_size = _default_batch_size(input_size)
    return torch.cat(_noise(teacher, number, batch_size, held_out=True, input_size=input_size, seed=seed))


def least_images(input_size: Sequence[int]) -> int:
    """Return the number of images, with those held out, that are made after the shortest training."""
    return min(128, max(16, MATCHED_PIXELS // math.prod(input_size[1:])))


def _default_batch_size(input_size: Sequence[int]) -> int:
    return min(256, max(MIN_BATCH, MATCHED_PIXELS // math.prod(input_size[1:])))


def _noise(teacher: nn.Module, number: int, batch_size: int, **kwargs) -> list[torch.Tensor]:
    """Return noise images in batches of about equal size."""
    noise = NoiseDataset.for_model(teacher, distribution=START, device=device_of(teacher), **kwargs)
    parts = math.ceil(number / batch_size)
    sizes = [number // parts + (part < number % parts) for part in range(parts)]
    batches = []
    for step, noise.batch_size in enumerate(sizes):
        batches.append(noise.draw(step))
    return batches


def _as_made(batches: Sequence[torch.Tensor], num_images: int, seed: int) -> CalibrationImages:
    images = torch.cat(list(batches))
    return CalibrationImages(images[:num_images], images[num_images:], batch_size=len(batches[0]), seed=seed)
