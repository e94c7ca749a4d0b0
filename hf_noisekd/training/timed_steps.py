"""The part of a trainer that says what its training will take, and fits it into a time."""

import copy
import json
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME

from hf_noisekd.calibration.calibration_images import default_held_out
from hf_noisekd.models.classifier import format_size
from hf_noisekd.models.memory import free_memory
from hf_noisekd.noise.dataset import MAX_STEPS, NoiseDataset
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.cost import Estimate, ImageCost, cost_of_an_image, duration
from hf_noisekd.training.evaluation import counts_of
from hf_noisekd.training.features import StageFeatures
from hf_noisekd.training.noise_steps import NoiseStepsTrainer
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)

MIN_PIXELS = 1e7  # of all training images; what takes seconds is not measured
LONG = 3600.0  # seconds, from which on an estimate is a warning
MIN_STEPS = 200  # that smaller batches are taken for
MIN_BATCH = 64  # the statistics of fewer images teach less
CANDIDATES = 3  # students that are compared at the end


class TimedTrainer(NoiseStepsTrainer):
    """A trainer on noise that estimates its time, and with `args.max_hours` chooses its steps."""

    args: NoiseKDConfig
    teacher: Teacher
    _features: StageFeatures | None  # that are compared beside the logits
    planned_for: float  # seconds that its planning took
    _asked_for: int | None = None  # the batch size before a training made it smaller

    def estimate(self) -> Estimate:
        """Measure on a few images what the training will take; a `ValueError` if it is not on noise."""
        if not isinstance(self.train_dataset, NoiseDataset):
            raise ValueError("Only a training on noise is estimated: one on a data set shows its progress.")
        return self._estimate(self._cost())

    def settle_time(self, checkpoint: str | bool | None) -> None:
        """Choose the number of steps for `args.max_hours`, or take that of a checkpoint, and log the estimate.

        Raises:
            ValueError: There is no time for a step.
            RuntimeError: A batch needs more memory than there is.
        """
        began_at = time.monotonic()
        if not isinstance(self.train_dataset, NoiseDataset):
            return
        if checkpoint:
            if self.args.max_hours:
                state = json.loads(Path(str(checkpoint), TRAINER_STATE_NAME).read_text())
                self._take(state["max_steps"], state["train_batch_size"])
            return
        images = self._training_length()[0] * self.train_dataset.batch_size
        if images * math.prod(self.teacher.input_size[1:]) < MIN_PIXELS and not self.args.max_hours:
            return
        cost = self._cost()
        if self.args.max_hours:
            self._fit(cost, 3600 * self.args.max_hours - self.planned_for, began_at)
        estimate = self._estimate(cost)
        free = free_memory(self.args.device)
        if self._sum_over_processes(torch.tensor([float(estimate.memory > free)])):
            raise RuntimeError(_too_large(self.train_dataset, estimate.memory, free))
        (logger.warning if estimate.seconds > LONG else logger.info)("%s", estimate)

    def _cost(self) -> ImageCost:
        def draw(number: int) -> torch.Tensor:
            noise = copy.copy(self.train_dataset)
            noise.batch_size, noise.resolutions = number, {1.0: 1.0}
            return noise.draw(0)

        batch_size = self.train_dataset.batch_size
        with self._features or nullcontext():
            return cost_of_an_image(
                self.model, self.teacher, draw, self.training_loss, self.accelerator.autocast, batch_size
            )

    def _estimate(self, cost: ImageCost) -> Estimate:
        steps, batch_size = self._training_length()[0], self.train_dataset.batch_size
        return Estimate(
            steps=steps,
            step=cost.training * self.full_size_images(1),
            evaluation=self._evaluated_images(steps) * cost.evaluation,
            memory=cost.memory * batch_size,
            device=self.args.device,
        )

    def _evaluated_images(self, steps: int) -> float:
        """Return how many images are evaluated on, in the training, after it, and to choose what it ends with."""
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        number = sum(sum(counts_of(self.get_eval_dataloader(dataset))) for dataset in datasets.values())
        every = math.inf
        if self.args.eval_strategy == "steps":
            every = self.args.eval_steps or self.args.logging_steps
            every *= steps if every < 1 else 1
        elif self.args.eval_strategy == "epoch":
            every = max(1, len(self.train_dataset) // self.args.gradient_accumulation_steps)
        at_end = number + CANDIDATES * default_held_out(self.args.num_calibration_images)
        return at_end + number * (steps // every if steps else 0)

    def _fit(self, cost: ImageCost, seconds: float, began_at: float) -> None:
        """Choose steps, and a smaller batch where there would be few, with which all ends in time."""
        fixed = self._evaluated_images(0) * cost.evaluation
        left = seconds - (time.monotonic() - began_at) - fixed
        free = free_memory(self.args.device)
        self._asked_for = batch_size = self._asked_for or self.train_dataset.batch_size
        of_one = cost.training * self.full_size_images(1) / self.train_dataset.batch_size

        def steps_of(batch_size: int) -> int:
            """Return how many steps there is time for, with the evaluations in between."""
            steps = max(0, int(left / (batch_size * of_one)))
            in_between = self._evaluated_images(steps) * cost.evaluation - fixed
            return int(steps * steps * batch_size * of_one / (steps * batch_size * of_one + in_between)) if steps else 0

        while batch_size >= 2 * MIN_BATCH and (steps_of(batch_size) < MIN_STEPS or cost.memory * batch_size > free):
            batch_size //= 2
        chosen = torch.tensor([min(steps_of(batch_size), MAX_STEPS), batch_size], device=self.args.device)
        self._take_from_process_0([chosen])
        steps, batch_size = chosen.tolist()
        if steps < 1:
            raise ValueError(
                f"max_hours is {self.args.max_hours:g}, and one step of {batch_size} images takes, with what comes "
                f"before and after it, {duration(seconds - left + batch_size * of_one)}: give more time."
            )
        self._take(steps, batch_size)

    def _take(self, steps: int, batch_size: int) -> None:
        self.args.max_steps = steps
        self.args.per_device_train_batch_size = self._train_batch_size = self.train_dataset.batch_size = batch_size


def _too_large(noise: NoiseDataset, needed: float, free: float) -> str:
    fits = max(2, int(noise.batch_size * free / needed * 0.9))
    return (
        f"A batch of {noise.batch_size} images of {format_size(noise.input_size)} keeps about {needed / 2**30:.1f} GiB "
        f"in memory, and {free / 2**30:.1f} GiB are free: set per_device_train_batch_size to {fits} or less."
    )
