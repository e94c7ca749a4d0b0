"""Real images, for training a teacher and for evaluation. Nothing that distils with noise imports this module."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import Dataset

from hf_noisekd.models.classifier import declared_input_size, declared_num_classes, pretrained_cfg_of
from hf_noisekd.models.hub import image_processor_of

# Pillow's name for what a model of so many channels sees.
IMAGE_MODES = {1: "L", 3: "RGB"}


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
        indices = torch.tensor(_drawn(len(self), num_images, seed, self.name))
        part = copy.copy(self)
        part.images, part.labels = self.images[indices], self.labels[indices]
        if not augmented:
            part.crop_padding, part.flip = 0, False
        return part

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


class Images(Dataset):
    """Images of any size and kind, decoded and preprocessed when they are asked for.

    Each comes as `{"pixel_values": [C, H, W], "labels": int}`, or without labels.

    Args:
        images: The images, as one column of a data set of the `datasets` library.
        labels: Class of each image, or None.
        transform: From a Pillow image of mode `mode` to pixels `[C, H, W]`.
        mode: `"RGB"` or `"L"`. Transparency is dropped, as timm and transformers do.
        indices: Which images to serve, in this order.
        name: Name of the data set, for results and model cards.
        pretrained_cfg: What a timm model trained on these images should say about them in its `pretrained_cfg`.
    """

    def __init__(
        self,
        images: Sequence[PIL.Image.Image],
        labels: Sequence[int] | None,
        *,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        mode: str,
        indices: Sequence[int],
        name: str,
        pretrained_cfg: Mapping | None = None,
    ):
        self.images = images
        self.labels = labels
        self.transform = transform
        self.mode = mode
        self.indices = indices
        self.name = name
        self.pretrained_cfg = dict(pretrained_cfg or {})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor | int]:
        index = self.indices[position]
        with _reading(index, self.name):
            image = _converted(self.images[index], self.mode)
        sample = {"pixel_values": self.transform(image)}
        return sample if self.labels is None else sample | {"labels": self.labels[index]}


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
            test images are those of its split `test`, or where there is none `validation`.
        config: Configuration of a data set that has several, such as `cropped_digits` of SVHN.
        image_column: Name of the column of images. Default: the only one of type `Image`.
        label_column: Name of the column of classes. Default: the only one of type `ClassLabel`.
        crop_padding: As in [`ImageDataset`], for the training images.
        flip: Likewise.

    Raises:
        ValueError: There is no such data set, split or column, or an image cannot be read, is of another size than the
            first or has no label; the message names what was found.
    """
    images, labels = {}, {}
    for split, dataset in _train_and_test(name, config).items():
        described = f"the {split} split of {name}"
        column = _column(dataset.features, datasets.Image, image_column, name)
        label_names, labels[split] = _labels(dataset, label_column, described)
        images[split] = _stacked(dataset.select_columns(column), column, described)
    mean, std = channel_statistics(images["train"])
    shared = {"mean": mean, "std": std, "label_names": label_names, "name": _short_name(name)}
    return (
        ImageDataset(images["train"], torch.tensor(labels["train"]), crop_padding=crop_padding, flip=flip, **shared),
        ImageDataset(images["test"], torch.tensor(labels["test"]), **shared),
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
        label_names, labels = _labels(dataset, label_column, f"the {split} split of {name}")
        loaded.append(
            Images(
                dataset[_column(dataset.features, datasets.Image, image_column, name)],
                labels,
                transform=create_transform(**preprocessing, is_training=split == "train"),
                mode=_mode(preprocessing["input_size"][0]),
                indices=range(len(dataset)),
                name=_short_name(name),
                pretrained_cfg=preprocessing | {"num_classes": len(label_names), "label_names": label_names},
            )
        )
    return tuple(loaded)


def load_images(
    name: str,
    model: nn.Module,
    *,
    split: str = "test",
    num_images: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: bool = True,
) -> Images:
    """Load a split of a data set, preprocessed for `model` as in timm's or transformers' own evaluation.

    Args:
        name: Id on the Hugging Face Hub, a local folder that `datasets.load_dataset` reads, or a parquet file, which is
            taken for the split.
        model: The classifier, which says how it wants its images.
        split: Which split.
        num_images: Serve this many images only, drawn with `seed`, in the order in which they stand. With the same seed
            a smaller number gives a part of what a larger one gives.
        seed: Seed of that draw.
        image_column: As in [`load_image_datasets`].
        label_column: Likewise.
        labels: Whether labels are needed. Otherwise the data set need not have any.

    Raises:
        ValueError: There is no such data set, split or column, or too few images; the data set has more classes than
            the model; some images have no label; or it is not known how the model wants its images.
    """
    mode, transform = _preprocessing(model)
    dataset = _load_splits(name, split)[split]
    return Images(
        dataset[_column(dataset.features, datasets.Image, image_column, name)],
        _labels_for(model, dataset, label_column, f"the {split} split of {name}") if labels else None,
        transform=transform,
        mode=mode,
        indices=_drawn(len(dataset), num_images, seed, name),
        name=_short_name(name),
    )


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images `[N, C, H, W]`, in units of 255."""
    std, mean = zip(
        *(torch.std_mean(images[:, channel].float() / 255) for channel in range(images.shape[1])), strict=True
    )
    return tuple(round(m.item(), 4) for m in mean), tuple(round(s.item(), 4) for s in std)


def _labels(dataset: datasets.Dataset, column: str | None, name: str) -> tuple[list[str], list[int]]:
    """Return the names of the classes, and the class of each image."""
    column = _column(dataset.features, datasets.ClassLabel, column, name)
    labels = dataset[column][:]
    unlabelled = next((index for index, label in enumerate(labels) if label is None or label < 0), None)
    if unlabelled is not None:
        raise ValueError(f"Image {unlabelled} of {name} has no label: choose another split.")
    return dataset.features[column].names, labels


def _labels_for(model: nn.Module, dataset: datasets.Dataset, column: str | None, name: str) -> list[int]:
    """Return the class of each image, after a check that the model has as many."""
    label_names, labels = _labels(dataset, column, name)
    num_classes = declared_num_classes(model)
    if num_classes is not None and len(label_names) > num_classes:
        raise ValueError(
            f"{name} has {len(label_names)} classes, and the model only {num_classes}: use a data set of the model's "
            "own classes."
        )
    return labels


def _stacked(dataset: datasets.Dataset, column: str, name: str) -> torch.Tensor:
    """Return images of one size as uint8 `[N, 3, H, W]`."""
    arrays = []
    rows = iter(dataset)
    for index in range(len(dataset)):
        with _reading(index, name):
            arrays.append(np.asarray(_converted(next(rows)[column], "RGB")))
        if arrays[index].shape != arrays[0].shape:
            (height, width), (first_height, first_width) = arrays[index].shape[:2], arrays[0].shape[:2]
            raise ValueError(
                f"Image {index} of {name} has {height}x{width} pixels and the first {first_height}x{first_width}: this "
                "needs images of one size. See recipes/food101.py for photos of any size."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@contextmanager
def _reading(index: int, name: str) -> Iterator[None]:
    """Context that says which image could not be read."""
    try:
        yield
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"Image {index} of {name} cannot be read: {error}. Replace or remove it.") from error


def _train_and_test(name: str, config: str | None) -> dict[str, datasets.Dataset]:
    splits = _load_splits(name, "train", config=config)
    test = splits.get("test", splits.get("validation"))
    if test is None:
        raise ValueError(
            f"{name} has no test and no validation split, only {', '.join(splits)}: give a data set that has one, or a "
            "folder with both."
        )
    return {"train": splits["train"], "test": test}


def _load_splits(name: str, required: str, config: str | None = None) -> datasets.DatasetDict:
    """Load a data set that must have the split `required`, for which a single parquet file is taken."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            splits = datasets.load_dataset("parquet", data_files={required: str(path)})
        else:
            splits = datasets.load_dataset(str(path) if path.is_dir() else name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"The data set {name!r} cannot be loaded: {error}") from error
    if required not in splits:
        raise ValueError(f"{name} has no {required} split, only {', '.join(splits)}.")
    return splits


def _short_name(name: str) -> str:
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _drawn(size: int, num_images: int | None, seed: int, name: str) -> Sequence[int]:
    if num_images is None:
        return range(size)
    if not 1 <= num_images <= size:
        raise ValueError(f"num_images must lie in [1, {size}], the number of images in {name}; got {num_images}.")
    indices = list(range(size))
    random.Random(seed).shuffle(indices)
    return sorted(indices[:num_images])


def _preprocessing(model: nn.Module) -> tuple[str, Callable[[PIL.Image.Image], torch.Tensor]]:
    """Return the Pillow mode that `model` takes, and what makes pixels `[C, H, W]` of such an image."""
    cfg = pretrained_cfg_of(model)
    if cfg:
        return _timm_preprocessing(model, cfg)
    processor = image_processor_of(model)
    if processor is None:
        raise ValueError(
            f"{type(model).__name__} does not say how it wants its images: save an image processor into its folder, "
            "with AutoImageProcessor's save_pretrained, or pass a data set that is preprocessed already."
        )
    return _mode(getattr(model.config, "num_channels", 3)), _Processed(processor)


def _timm_preprocessing(model: nn.Module, cfg: dict) -> tuple[str, Callable[[PIL.Image.Image], torch.Tensor]]:
    config = resolve_data_config(pretrained_cfg=cfg)
    channels = (declared_input_size(model) or config["input_size"])[0]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            raise ValueError(
                f"The model takes {channels} channel{'' if channels == 1 else 's'} and its pretrained_cfg gives {key} "
                f"for {len(config[key])}, {tuple(config[key])}: build it with "
                f'`pretrained_cfg_overlay={{"mean": ..., "std": ...}}`.'
            )
    return _mode(channels), create_transform(**config, is_training=False)


class _Processed:
    """An image processor of transformers as a function of one image; a class, so that workers can be sent it."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, image: PIL.Image.Image) -> torch.Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def _mode(channels: int) -> str:
    if channels not in IMAGE_MODES:
        raise ValueError(f"The model takes {channels} channels; images can be read for 1 (gray) or 3 (RGB).")
    return IMAGE_MODES[channels]


def _converted(image: PIL.Image.Image | None, mode: str) -> PIL.Image.Image:
    """Return an image in a Pillow mode of 8 bits a channel. Its EXIF orientation was applied by `datasets`."""
    if image is None:
        raise ValueError("there is none")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode is {image.mode}, and Pillow would clip it at 255; convert it to 8 bits a channel")
    if image.mode == "P":
        # The same colours; on the straight way Pillow warns of transparency.
        image = image.convert("RGBA")
    return image.convert(mode)


def _random_crops(pixel_values: torch.Tensor, padding: int) -> torch.Tensor:
    """Cut an image of the same size out of each reflected one, at a place of its own."""
    batch, _, height, width = pixel_values.shape
    padded = F.pad(pixel_values, (padding,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1))
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + torch.arange(width))[:, None, None, :]
    images = torch.arange(batch)[:, None, None, None]
    return padded[images, torch.arange(padded.shape[1])[None, :, None, None], rows, columns]


def _column(features: datasets.Features, kind: type, column: str | None, name: str) -> str:
    """Return `column` after a check of its type, or the only one of type `kind`."""
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    if column in found:
        return column
    if column is not None:
        raise ValueError(f"{name} has no column {column!r} of type {kind.__name__}; found {found or dict(features)}.")
    if len(found) != 1:
        option = {"Image": "image_column", "ClassLabel": "label_column"}[kind.__name__]
        choose = f": name the one to use ({option})" if found else f" among {dict(features)}"
        raise ValueError(
            f"{name} needs exactly one column of type {kind.__name__}, found {', '.join(found) or 'none'}{choose}."
        )
    return found[0]
