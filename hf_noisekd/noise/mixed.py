"""Noise together with a few real images."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hf_noisekd.batches import SizedDataset, collate_images, dataset_name
from hf_noisekd.noise.dataset import NoiseDataset, draw_seed
from hf_noisekd.record.schema import ImagesFacts


class MixedDataset(NoiseDataset):
    """Noise in some steps and real images in the others, for distillation with few images.

    A batch is of one kind, because batch statistics of a mixed one would fit neither. Images are drawn with
    replacement, so a few are enough; use random augmentation. As for noise, step `k` of a rank is a function of
    `(seed, rank, k)` alone. Labels are ignored.

    Args:
        *args: As for [`NoiseDataset`].
        images: Real images, preprocessed as for the teacher, in the forms that [`collate_images`] takes.
        share: Share of the steps that use images, evenly spread, above 0 and up to 1. With 1 there is no noise.
        **kwargs: As for [`NoiseDataset`].

    Raises:
        ValueError: The images have another size than the noise, the share is out of range; or as for [`NoiseDataset`].
    """

    def __init__(self, *args, images: SizedDataset, share: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}: use a share of the steps above 0 and up to 1.")
        self.share = share
        if not len(images):
            raise ValueError("images is empty: pass at least one, or use NoiseDataset.")
        with _augmentation_seeded(0):
            found = tuple(collate_images([images[0]])["pixel_values"].shape[1:])
        if found != self.input_size:
            raise ValueError(f"The images have the size {found} and the noise {self.input_size}: make them equal.")
        self.images = images
        # None for images that were made without data.
        self.real: ImagesFacts | None = ImagesFacts(images=len(images), dataset=dataset_name(images))

    def draw(self, step: int) -> torch.Tensor:
        """Return the batch `[B, C, H, W]` of training step `step`, counted from 0 over all epochs."""
        if int(step * self.share) == int((step + 1) * self.share):
            return super().draw(step)
        with _augmentation_seeded(draw_seed(self.seed, self.rank, step, self.held_out)):
            indices = torch.randint(len(self.images), (self.batch_size,)).tolist()
            several = getattr(self.images, "__getitems__", lambda many: [self.images[one] for one in many])
            pixel_values = collate_images(several(indices))["pixel_values"]
        return pixel_values.to(self.device, self.dtype, memory_format=self.memory_format)


@contextmanager
def _augmentation_seeded(seed: int) -> Iterator[None]:
    """Context that seeds the global generators, which augmentation uses, and restores them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not those of GPUs, which would not be restored
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
