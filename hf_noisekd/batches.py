"""Batches of images: drawn whole or collated from samples, with checked labels."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, IterableDataset, Sampler


class DrawnDataset(IterableDataset):
    """A data set that draws whole batches by step number, such as noise; without labels."""

    name: str  # in results
    batch_size: int
    num_steps: int | None  # batches in an epoch

    def draw(self, step: int) -> torch.Tensor:
        """Return the batch `[B, C, H, W]` of a step."""
        raise NotImplementedError

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError(f"This {type(self).__name__} has no length: pass num_steps.")
        return self.num_steps


class SizedDataset(Protocol):
    """A data set of a known number of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class PixelsDataset(Dataset):
    """Images `[N, C, H, W]` without labels.

    With `augments` an image is shifted at random by up to an eighth of its side, where its reflection fills it up, and
    mirrored or not.
    """

    def __init__(self, pixel_values: torch.Tensor, name: str | None = None, *, augments: bool = False):
        self.name = name
        self._pixel_values, self._augments = pixel_values, augments

    def __len__(self) -> int:
        return len(self._pixel_values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self._pixel_values[index]
        if not self._augments:
            return {"pixel_values": image}
        height, width = image.shape[-2:]
        y, x = height // 8, width // 8
        top, left, mirrors = (int(torch.randint(number, ())) for number in (2 * y + 1, 2 * x + 1, 2))
        padded = F.pad(image, (x, x, y, y), mode="reflect")[:, top : top + height, left : left + width]
        return {"pixel_values": padded.flip(-1) if mirrors else padded}


def resized(pixel_values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return images `[N, C, H, W]` in another `(height, width)`."""
    return F.interpolate(pixel_values, tuple(size), mode="bicubic", antialias=True)


class ResizedDataset(Dataset):
    """The samples of a data set, in the forms of [`collate_images`], in another `(height, width)`."""

    def __init__(self, dataset: SizedDataset, size: Sequence[int]):
        self.dataset, self.size = dataset, size
        self.name = dataset_name(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = collate_images([self.dataset[index]])
        sample: dict[str, Any] = {"pixel_values": resized(batch["pixel_values"], self.size)[0]}
        return sample | ({"labels": int(batch["labels"])} if "labels" in batch else {})


class FullBatchSampler(Sampler[list[int]]):
    """Batches of equal size over `size` images in order; the last one is filled up with the first images.

    Fewer images than `batch_size` are one batch. Process `rank` gets every `world_size`-th batch. `counts` is the
    number of images of each batch without the filling. Fewer than 2 images are a `ValueError`: batch statistics need 2.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if size < 2:
            raise ValueError(f"The evaluation set has {size} image{'s' * (size != 1)}: use at least 2, better 256.")
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

    `label` is a key, too. A whole batch from `__getitems__` stays as it is. Without pixels, or with pixels of different
    shapes, there is a `ValueError`.
    """
    if isinstance(samples, dict):
        return samples
    if isinstance(samples[0], tuple | list) and len(samples[0]) == 2:
        samples = [{"pixel_values": pixels, "labels": label} for pixels, label in samples]
    first = samples[0]
    if not isinstance(first, dict) or not isinstance(first.get("pixel_values"), torch.Tensor):
        found = sorted(first) if isinstance(first, dict) else type(first).__name__
        raise ValueError(
            'Samples must be {"pixel_values": tensor [C, H, W], "labels": int} or (tensor, label), found '
            f"{found}. Apply the model's preprocessing, for example with `dataset.with_transform(...)`."
        )
    pixels = [sample["pixel_values"] for sample in samples]
    if other := next((one.shape for one in pixels if one.shape != pixels[0].shape), None):
        raise ValueError(
            f"The images of a batch have different shapes, {list(pixels[0].shape)} and {list(other)}: bring them to "
            "one size, as the model's preprocessing does."
        )
    batch = {"pixel_values": torch.stack(pixels)}
    label = next((key for key in ("labels", "label") if key in first), None)
    if label is not None:
        batch["labels"] = torch.as_tensor([int(sample[label]) for sample in samples])
    return batch


def check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Raise a `ValueError` if any of `labels` is not in [0, num_classes - 1]."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(
            f"Found label {wrong[0].item()}, but the model has {num_classes} classes: labels must lie in "
            f"[0, {num_classes - 1}]. Use a data set with the classes of the model."
        )


def dataset_name(dataset: Dataset | SizedDataset) -> str | None:
    """Return the name of a data set (its `name`, or that in the `datasets` library), or None."""
    names = (getattr(dataset, "name", None), getattr(getattr(dataset, "info", None), "dataset_name", None))
    return next((name for name in names if isinstance(name, str)), None)
