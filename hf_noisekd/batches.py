"""Batches of images: drawn as a whole, or collated from samples; all of one size, with labels that fit."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler


class DrawnDataset(IterableDataset):
    """A data set that draws whole batches by their number, such as noise; it has no labels."""

    name: str  # in results
    batch_size: int
    num_steps: int | None  # batches in an epoch

    def draw(self, step: int) -> torch.Tensor:
        """Return the batch `[B, C, H, W]` of a step."""
        raise NotImplementedError

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError(f"This {type(self).__name__} is unbounded: it has no length. Pass num_steps for one.")
        return self.num_steps


class SizedDataset(Protocol):
    """A data set of a known number of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class FullBatchSampler(Sampler[list[int]]):
    """Batches of equal size over a data set of `size` images in order; the last one is filled up from its start.

    A data set below `batch_size` is one batch. Process `rank` gets every `world_size`-th one. `counts` says how many
    images of each batch are not filling. Batch statistics need 2 images; with fewer there is a `ValueError`.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if size < 2:
            raise ValueError(
                f"The evaluation data set has {size} image{'' if size == 1 else 's'}: it needs at least 2, and about "
                "256 for batch statistics that mean something."
            )
        batch_size = min(batch_size, size)
        starts = range(rank * batch_size, size, world_size * batch_size)
        self.counts = [min(batch_size, size - start) for start in starts]
        self._batches = [[index % size for index in range(start, start + batch_size)] for start in starts]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def collate_images(samples: Sequence) -> dict[str, torch.Tensor]:
    """Make a batch of samples `{"pixel_values": [C, H, W], "labels": int}` or `(pixels, label)`.

    `label` counts as `labels`. A whole batch, as a data set may give from `__getitems__`, passes unchanged. Samples
    without a tensor of pixels are a `ValueError`.
    """
    if isinstance(samples, dict):
        return samples
    if isinstance(samples[0], tuple | list) and len(samples[0]) == 2:
        samples = [{"pixel_values": pixels, "labels": label} for pixels, label in samples]
    first = samples[0]
    if not isinstance(first, dict) or not isinstance(first.get("pixel_values"), torch.Tensor):
        found = sorted(first) if isinstance(first, dict) else type(first).__name__
        raise ValueError(
            'Images must come as {"pixel_values": tensor [C, H, W], "labels": int} or as (tensor, label), found '
            f"{found}. Apply the model's preprocessing, for example with `dataset.with_transform(...)`."
        )
    batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
    label = next((key for key in ("labels", "label") if key in first), None)
    if label is not None:
        batch["labels"] = torch.as_tensor([int(sample[label]) for sample in samples])
    return batch


def check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Raise a `ValueError` that names the first of `labels` out of [0, num_classes - 1], if there is one."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(
            f"Found label {wrong[0].item()}, but the model has {num_classes} classes: labels must lie in "
            f"[0, {num_classes - 1}]. Is this the data set of another teacher?"
        )


def dataset_name(dataset: Dataset | SizedDataset) -> str | None:
    """Return the name that a data set has (`name`, or that of `datasets`), or None."""
    names = (getattr(dataset, "name", None), getattr(getattr(dataset, "info", None), "dataset_name", None))
    return next((name for name in names if isinstance(name, str)), None)
