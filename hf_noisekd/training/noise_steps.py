"""Noise in place of a data set: made from the arguments, and drawn where a training step runs."""

import math
from collections.abc import Iterator

from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset

from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.training.base import BaseTrainer


class NoiseStepsTrainer(BaseTrainer):
    """A trainer whose training data may be a [`NoiseDataset`]."""

    _needs_number = False  # of all steps, which sizes of the noise are shares of

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training batches: for noise of step numbers, which is drawn where the step runs.

        So steps before a resumption cost nothing, and gradient accumulation does not hold several batches.
        """
        if not isinstance(self.train_dataset, NoiseDataset):
            return super().get_train_dataloader()
        # Not prepared by Accelerate, which would draw on rank 0 and broadcast, or draw every rank's noise on each.
        return DataLoaderShard(_NoiseSteps(self.train_dataset), batch_size=None)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the number of training images in an epoch, over all processes."""
        if isinstance(dataloader.dataset, _NoiseSteps):
            return len(dataloader) * self.train_dataset.batch_size * self.args.world_size
        return super().num_examples(dataloader)

    def _prepare_inputs(self, inputs):
        if "noise_step" in inputs:
            inputs = {"pixel_values": self.train_dataset.draw(inputs["noise_step"])}
        return super()._prepare_inputs(inputs)

    def count_steps(self, needs_number: bool | None = None) -> int | None:
        """Give the noise the number of all steps, if it needs that; return the number of updates then."""
        if needs_number is not None:
            self._needs_number = needs_number
        if not self._needs_number:
            return None
        updates, self.train_dataset.total_steps = self._training_length()
        return updates

    def full_size_images(self, steps: int) -> float:
        """Return how many images this process trains on in so many steps, small ones as shares of one of full size."""
        noise = self.train_dataset
        share = sum(share * math.prod(size) for size, share in noise.image_sizes()) / math.prod(noise.input_size[1:])
        return steps * self.args.gradient_accumulation_steps * noise.batch_size * share

    def _training_length(self) -> tuple[int, int]:
        """Return the numbers of updates and of batches of the whole training."""
        updates, accumulation = self.args.max_steps, self.args.gradient_accumulation_steps
        if self.train_dataset.num_steps is None:
            return updates, updates * accumulation
        batches = len(self.train_dataset)
        updates_per_epoch = math.ceil(batches / accumulation)
        if updates <= 0:
            updates = math.ceil(self.args.num_train_epochs * updates_per_epoch)
        epochs, rest = divmod(updates, updates_per_epoch)
        # The last update of an epoch may have fewer batches than the others.
        return updates, epochs * batches + min(rest * accumulation, batches)


class _NoiseSteps(IterableDataset):
    """The step numbers of a [`NoiseDataset`], for a loader that leaves the drawing to the training step."""

    def __init__(self, noise: NoiseDataset):
        self.noise = noise

    def set_epoch(self, epoch: int) -> None:
        self.noise.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, int]]:
        return ({"noise_step": step} for step in self.noise.steps())

    def __len__(self) -> int:
        return len(self.noise)
