"""Real images, for training a teacher and for evaluation. Nothing that distils with noise imports this module."""

from collections.abc import Sequence

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset


class ImageDataset(Dataset):
    """Small images held in memory, served in whole batches `{"pixel_values": [B, C, H, W], "labels": [B]}`.

    Args:
        images: uint8 images of shape `[N, C, H, W]`.
        labels: Classes of shape `[N]`, in [0, num_classes - 1].
        mean: Mean of each channel of pixels in [0, 1], subtracted from them.
        std: Standard deviation of each channel, by which they are then divided.
        label_names: Name of each class.
        crop_padding: Pixels of reflected border for random crops; 0 for none. For training.
        flip: Mirror half of the images. For training.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        label_names: Sequence[str],
        crop_padding: int = 0,
        flip: bool = False,
    ):
        self.images = images
        self.labels = labels
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.label_names = list(label_names)
        self.crop_padding = crop_padding
        self.flip = flip

    @property
    def pretrained_cfg(self) -> dict:
        """What a timm model trained on these images should say about them in its `pretrained_cfg`."""
        return {
            "input_size": tuple(self.images.shape[1:]),
            "mean": self.mean,
            "std": self.std,
            "crop_pct": 1.0,
            "num_classes": len(self.label_names),
            "label_names": self.label_names,
        }

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        indices = torch.as_tensor(indices)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        pixel_values = (self.images[indices].float() / 255 - mean) / std
        if self.flip:
            mirrored = torch.rand(len(indices), 1, 1, 1) < 0.5
            pixel_values = torch.where(mirrored, pixel_values.flip(-1), pixel_values)
        if self.crop_padding:
            pixel_values = _random_crops(pixel_values, self.crop_padding)
        return {"pixel_values": pixel_values, "labels": self.labels[indices]}


def load_image_datasets(name: str, *, crop_padding: int = 4, flip: bool = True) -> tuple[ImageDataset, ImageDataset]:
    """Load the training images, with augmentation, and the test images of a data set of small images of one size.

    Args:
        name: Id on the Hugging Face Hub (`uoft-cs/cifar10`) or a local folder that `datasets.load_dataset` reads. Its
            columns are found by their type: one `Image`, one `ClassLabel`.
        crop_padding: As in [`ImageDataset`], for the training images.
        flip: Likewise.

    Raises:
        ValueError: There is no `train` or `test` split, or no such column; the message names what was found.
    """
    splits = datasets.load_dataset(name)
    missing = {"train", "test"} - set(splits)
    if missing:
        raise ValueError(f"{name} has no {' and no '.join(sorted(missing))} split, only {', '.join(splits)}.")
    features = splits["train"].features
    image_column = _column_of_type(features, datasets.Image, name)
    label_column = _column_of_type(features, datasets.ClassLabel, name)
    label_names = features[label_column].names
    images, labels = {}, {}
    for split in ("train", "test"):
        arrays = [np.asarray(row[image_column].convert("RGB")) for row in splits[split]]
        images[split] = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        labels[split] = torch.tensor(splits[split][label_column])
    mean, std = channel_statistics(images["train"])
    shared = {"mean": mean, "std": std, "label_names": label_names}
    return (
        ImageDataset(images["train"], labels["train"], crop_padding=crop_padding, flip=flip, **shared),
        ImageDataset(images["test"], labels["test"], **shared),
    )


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images `[N, C, H, W]`, in units of 255."""
    std, mean = zip(
        *(torch.std_mean(images[:, channel].float() / 255) for channel in range(images.shape[1])), strict=True
    )
    return tuple(round(m.item(), 4) for m in mean), tuple(round(s.item(), 4) for s in std)


def _random_crops(pixel_values: torch.Tensor, padding: int) -> torch.Tensor:
    """Cut an image of the same size out of each reflected one, at a place of its own."""
    batch, _, height, width = pixel_values.shape
    padded = F.pad(pixel_values, (padding,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1))
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + torch.arange(width))[:, None, None, :]
    images = torch.arange(batch)[:, None, None, None]
    return padded[images, torch.arange(padded.shape[1])[None, :, None, None], rows, columns]


def _column_of_type(features: datasets.Features, kind: type, name: str) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"{name} needs exactly one column of type {kind.__name__}, found {found or 'none'} among {dict(features)}."
        )
    return found[0]
