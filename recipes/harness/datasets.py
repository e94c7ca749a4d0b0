"""Data sets of labelled images, for training a teacher and for the supervised students it is compared with."""

import copy
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_data_config
from torch.utils.data import Dataset

from hf_noisekd.image_datasets import (
    Images,
    convert_image,
    draw_indices,
    find_column,
    image_mode,
    load_splits,
    naming_the_image,
    read_labels,
    short_name,
)

DIGITS = "scikit-learn digits"


class ImageDataset(Dataset):
    """Small images held in memory, served in whole batches `{"pixel_values": [B, C, H, W], "labels": [B]}`.

    They are cropped and mirrored on the device that they lie on.

    Args:
        images: uint8 images of shape `[N, C, H, W]`.
        labels: Classes of shape `[N]`, in [0, num_classes - 1].
        mean: Mean of each channel of pixels in [0, 1], subtracted from them.
        std: Standard deviation of each channel, by which they are then divided.
        label_names: Name of each class.
        crop_padding: Pixels of reflected border for random crops; 0 for none. For training.
        flip: Mirror half of the images. For training.
        name: Name of the data set, for results and model cards.
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
        name: str | None = None,
    ):
        self.images = images
        self.labels = labels
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.label_names = list(label_names)
        self.crop_padding = crop_padding
        self.flip = flip
        self.name = name

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

    def subset(self, num_images: int, seed: int = 0, *, augmented: bool = False) -> "ImageDataset":
        """Return a random part of the images, as they are or with this data set's augmentation.

        With the same seed a smaller part lies in a larger one.

        Args:
            num_images: Number of images, in [1, N].
            seed: Seed of the draw.
            augmented: Whether to crop and mirror them as here.
        """
        indices = torch.tensor(draw_indices(len(self), num_images, seed, self.name), device=self.images.device)
        part = copy.copy(self)
        part.images, part.labels = self.images[indices], self.labels[indices]
        if not augmented:
            part.crop_padding, part.flip = 0, False
        return part

    def to(self, device: torch.device) -> "ImageDataset":
        """Bring the images to a device, in place, and return the data set."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        device = self.images.device
        indices = torch.as_tensor(indices, device=device)
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        pixel_values = (self.images[indices].float() / 255 - mean) / std
        if self.flip:
            mirrored = torch.rand(len(indices), 1, 1, 1, device=device) < 0.5
            pixel_values = torch.where(mirrored, pixel_values.flip(-1), pixel_values)
        if self.crop_padding:
            pixel_values = _random_crops(pixel_values, self.crop_padding)
        return {"pixel_values": pixel_values, "labels": self.labels[indices]}


def load_image_datasets(
    name: str,
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    crop_padding: int = 4,
    flip: bool = True,
) -> tuple[ImageDataset, ImageDataset]:
    """Load the training images, with augmentation, and the test images of a data set of small images of one size.

    Args:
        name: Id on the Hugging Face Hub (`uoft-cs/cifar10`) or a local folder that `datasets.load_dataset` reads. The
            test images are those of its split `test`, or where there is none `validation`. [`DIGITS`] are those of
            [`digit_datasets`].
        config: Configuration of a data set that has several, such as `cropped_digits` of SVHN.
        image_column: Name of the column of images. Default: the only one of type `Image`.
        label_column: Name of the column of classes. Default: the only one of type `ClassLabel`.
        crop_padding: As in [`ImageDataset`], for the training images.
        flip: Likewise.

    Raises:
        ValueError: There is no such data set, split or column, or an image cannot be read, is of another size than the
            first or has no label; the message names what was found.
    """
    if name == DIGITS:
        return digit_datasets()
    images, labels = {}, {}
    for split, dataset in _train_and_test(name, config).items():
        described = f"the {split} split of {name}"
        column = find_column(dataset.features, datasets.Image, image_column, name)
        label_names, labels[split] = read_labels(dataset, label_column, described)
        images[split] = _stacked(dataset.select_columns(column), column, described)
    mean, std = channel_statistics(images["train"])
    shared = {"mean": mean, "std": std, "label_names": label_names, "name": short_name(name)}
    return (
        ImageDataset(images["train"], torch.tensor(labels["train"]), crop_padding=crop_padding, flip=flip, **shared),
        ImageDataset(images["test"], torch.tensor(labels["test"]), **shared),
    )


def digit_datasets() -> tuple[ImageDataset, ImageDataset]:
    """Return three quarters of the digits to train on, shifted by up to a pixel, and the rest to test on."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    mean, std = channel_statistics(images[train])
    shared = {
        "name": DIGITS,
        "mean": mean,
        "std": std,
        "label_names": [str(digit) for digit in range(10)],
    }
    return (
        ImageDataset(images[train], labels[train], crop_padding=1, **shared),
        ImageDataset(images[test], labels[test], **shared),
    )


def load_photo_datasets(
    name: str,
    cfg: Mapping,
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Images, Images]:
    """Load the training images, with timm's augmentation, and the test images of a data set of photos of any size.

    Args:
        name: As in [`load_image_datasets`].
        cfg: timm's `pretrained_cfg` of the model that will see the images, which says how it wants them.
        config: As in [`load_image_datasets`].
        image_column: Likewise.
        label_column: Likewise.

    Raises:
        ValueError: There is no such data set, split or column, or an image has no label; the message names what was
            found. An image that cannot be read is named when it is asked for.
    """
    preprocessing = resolve_data_config(pretrained_cfg=dict(cfg))
    loaded = []
    for split, dataset in _train_and_test(name, config).items():
        label_names, labels = read_labels(dataset, label_column, f"the {split} split of {name}")
        loaded.append(
            Images(
                dataset[find_column(dataset.features, datasets.Image, image_column, name)],
                labels,
                transform=create_transform(**preprocessing, is_training=split == "train"),
                mode=image_mode(preprocessing["input_size"][0]),
                indices=range(len(dataset)),
                name=short_name(name),
                pretrained_cfg=preprocessing | {"num_classes": len(label_names), "label_names": label_names},
            )
        )
    return tuple(loaded)


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images `[N, C, H, W]`, in units of 255."""
    std, mean = zip(
        *(torch.std_mean(images[:, channel].float() / 255) for channel in range(images.shape[1])), strict=True
    )
    return tuple(round(m.item(), 4) for m in mean), tuple(round(s.item(), 4) for s in std)


def _stacked(dataset: datasets.Dataset, column: str, name: str) -> torch.Tensor:
    """Return images of one size as uint8 `[N, 3, H, W]`."""
    arrays = []
    rows = iter(dataset)
    for index in range(len(dataset)):
        with naming_the_image(index, name):
            arrays.append(np.asarray(convert_image(next(rows)[column], "RGB")))
        if arrays[index].shape != arrays[0].shape:
            (height, width), (first_height, first_width) = arrays[index].shape[:2], arrays[0].shape[:2]
            raise ValueError(
                f"Image {index} of {name} has {height}x{width} pixels and the first {first_height}x{first_width}: this "
                "needs images of one size. See recipes/food101.py for photos of any size."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _train_and_test(name: str, config: str | None) -> dict[str, datasets.Dataset]:
    splits = load_splits(name, "train", config=config)
    test = splits.get("test", splits.get("validation"))
    if test is None:
        raise ValueError(
            f"{name} has no test and no validation split, only {', '.join(splits)}: give a data set that has one, or a "
            "folder with both."
        )
    return {"train": splits["train"], "test": test}


def _random_crops(pixel_values: torch.Tensor, padding: int) -> torch.Tensor:
    """Cut an image of the same size out of each reflected one, at a place of its own."""
    batch = len(pixel_values)
    padded = F.pad(pixel_values, (padding,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1), device=pixel_values.device)
    count, channel, row, column = (torch.arange(size, device=pixel_values.device) for size in pixel_values.shape)
    rows, columns = (top + row)[:, None, :, None], (left + column)[:, None, None, :]
    return padded[count[:, None, None, None], channel[None, :, None, None], rows, columns]
