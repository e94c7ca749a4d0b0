"""Real images, for training a teacher and for evaluation. Distillation with noise does not import this module."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path

import datasets
import PIL.Image
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hf_noisekd.models.classifier import (
    class_descriptions,
    class_names,
    declared_input_size,
    declared_num_classes,
    pretrained_cfg_of,
)
from hf_noisekd.models.preprocessing import image_processor_of, unknown_preprocessing

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class Images(Dataset):
    """Images, decoded and preprocessed on access: `{"pixel_values": [C, H, W], "labels": int}`, or without labels."""

    images: Sequence[PIL.Image.Image]  # a column of a data set of the `datasets` library
    labels: Sequence[int] | None  # the class of each
    _: KW_ONLY
    transform: Callable[[PIL.Image.Image], torch.Tensor]  # from a Pillow image of mode `mode` to pixels `[C, H, W]`
    mode: str  # "RGB" or "L"; transparency is dropped, as timm and transformers do
    indices: Sequence[int]  # of the images to serve, in order
    name: str  # of the data set, for results and model cards
    pretrained_cfg: Mapping = field(default_factory=dict)  # that of a timm model trained on these images

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor | int]:
        index = self.indices[position]
        with naming_the_image(index, self.name):
            image = convert_image(self.images[index], self.mode)
        sample: dict[str, torch.Tensor | int] = {"pixel_values": self.transform(image)}
        return sample if self.labels is None else sample | {"labels": self.labels[index]}


def load_images(
    name: str | Path,
    model: nn.Module,
    *,
    split: str = "test",
    num_images: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: bool = True,
) -> Images:
    """Load a split of a data set, preprocessed for `model` as in the evaluations of timm and transformers.

    Labels are class indices of the model: its classes and those of the data set are matched by name. If no name of the
    data set is among the model's, both are assumed to be in the same order, with a warning.

    Args:
        name: Hub id, local folder for `datasets.load_dataset`, or parquet file with the split.
        model: The classifier, whose preprocessing is used.
        split: Name of the split.
        num_images: Serve only this many images, drawn with `seed`, in order; smaller draws are subsets of larger ones.
        seed: Seed of that draw.
        image_column: Name of the column of images. Default: the only one of type `Image`.
        label_column: Name of the column of classes. Default: the only one of type `ClassLabel`.
        labels: Whether to serve labels. Otherwise the data set need not have any.

    Raises:
        ValueError: There is no such data set, split or column, or too few images; the classes do not match those of the
            model; an image has no label; or the preprocessing of the model is unknown.
    """
    name, (mode, transform) = str(name), _preprocessing(model)
    dataset = load_splits(name, split)[split]
    images = dataset[find_column(dataset.features, datasets.Image, image_column, name)]
    classes = None
    if labels:
        name_of_split = f"the {split} split of {name}"
        label_names, classes = read_labels(dataset, label_column, name_of_split)
        positions = _positions(label_names, model, name_of_split)
        classes = [positions[label] for label in classes]
    indices = draw_indices(len(dataset), num_images, seed, name)
    return Images(images, classes, transform=transform, mode=mode, indices=indices, name=short_name(name))


def read_labels(dataset: datasets.Dataset, column: str | None, name: str) -> tuple[list[str], list[int]]:
    """Return the names of the classes, and the class of each image."""
    column = find_column(dataset.features, datasets.ClassLabel, column, name)
    labels = dataset[column][:]
    unlabelled = next((index for index, label in enumerate(labels) if label is None or label < 0), None)
    if unlabelled is not None:
        raise ValueError(f"Image {unlabelled} of {name} has no label: choose another split.")
    return dataset.features[column].names, labels


def _positions(label_names: Sequence[str], model: nn.Module, name: str) -> Sequence[int]:
    """Return for each class of the data set `name` its index in `model`."""
    num_classes = declared_num_classes(model) or len(label_names)
    known = class_names(model, num_classes)
    descriptions = class_descriptions(model)
    described = [descriptions.get(name, name) for name in known]
    counts = Counter(described)
    if not set(label_names) <= set(known) and all(counts[label] == 1 for label in label_names):
        known = described
    unknown = [label for label in label_names if label not in known]
    if not unknown:
        for label in label_names:
            if known.count(label) > 1:  # two classes of ImageNet are called "crane"
                raise ValueError(f"{name} has the class {label!r}, and the model two of that name: rename them.")
        return [known.index(label) for label in label_names]
    classes = f"{', '.join(map(repr, known[:3]))}{', ...' if num_classes > 3 else ''}"
    if len(unknown) < len(label_names):
        raise ValueError(
            f"{name} has the class {unknown[0]!r}, which is none of the model's ({classes}), though others are: rename "
            "the classes of the data set, or use a data set with the classes of the model."
        )
    if len(label_names) > num_classes:
        raise ValueError(
            f"{name} has {len(label_names)} classes, and the model only {num_classes}: use a data set with the classes "
            "of the model."
        )
    logger.warning(
        f"None of the {len(label_names)} classes of {name}, such as {unknown[0]!r}, is one of the model ({classes}). "
        "They are assumed to be in the same order; if they are not, accuracies are wrong."
    )
    return range(num_classes)


@contextmanager
def naming_the_image(index: int, name: str) -> Iterator[None]:
    """Context in which an error names the image."""
    try:
        yield
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"Image {index} of {name} cannot be read: {error}. Replace or remove it.") from error


def load_splits(name: str, required: str, config: str | None = None) -> datasets.DatasetDict:
    """Load a data set with the split `required`, or a parquet file as that split."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            splits = datasets.load_dataset("parquet", data_files={required: str(path)})
        else:
            splits = datasets.load_dataset(str(path.resolve()) if path.is_dir() else name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"The data set {name!r} cannot be loaded: {error}") from error
    served = sum(map(len, splits.values()))
    if path.is_dir() and served < (number := _count_image_files(path)):
        logger.warning(
            f"{name} serves {served:,} of its {number:,} image files: `datasets` reads a split into words such as "
            "'train' or 'test' in their names, or those of their folders, and reads metadata.csv. Rename these."
        )
    if required not in splits:
        raise ValueError(f"{name} has no {required} split, only {', '.join(splits)}.")
    return splits


def _count_image_files(folder: Path) -> int:
    """Return the number of image files that `datasets` should find in a folder and those in it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in ImageFolder.EXTENSIONS)
    return sum(not any(part.startswith((".", "__")) for part in path.parts) for path in paths)


def short_name(name: str) -> str:
    """Return the name of a data set for results: the last part of a path, or its id."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def draw_indices(size: int, num_images: int | None, seed: int, name: str) -> Sequence[int]:
    """Return `num_images` of `size` indices in order, drawn with `seed`; smaller draws are subsets of larger ones."""
    if num_images is None:
        return range(size)
    if not 1 <= num_images <= size:
        raise ValueError(f"num_images must lie in [1, {size}], the number of images in {name}; got {num_images}.")
    indices = list(range(size))
    random.Random(seed).shuffle(indices)
    return sorted(indices[:num_images])


def _preprocessing(model: nn.Module) -> tuple[str, Callable[[PIL.Image.Image], torch.Tensor]]:
    """Return the Pillow mode for `model`, and its transform from such an image to pixels `[C, H, W]`."""
    cfg = pretrained_cfg_of(model)
    processor = None if cfg else image_processor_of(model)
    if processor is not None:
        return image_mode(getattr(model.config, "num_channels", 3)), partial(_processed, processor)
    if unknown_preprocessing(model):
        advice = "set mean and std in the `pretrained_cfg` of its config.json"
        if isinstance(model, PreTrainedModel):
            advice = f"save an image processor into its folder, with AutoImageProcessor's save_pretrained, or {advice}"
        raise ValueError(
            f"The preprocessing of {type(model).__name__} is unknown: {advice}. In Python a preprocessed data set "
            "does as well."
        )
    config = resolve_data_config(pretrained_cfg=cfg)
    channels = (declared_input_size(model) or config["input_size"])[0]
    if not len(config["mean"]) == len(config["std"]) == channels:
        raise ValueError(
            f"The number of input channels is {channels}, but pretrained_cfg has mean {tuple(config['mean'])} and std "
            f'{tuple(config["std"])}: build the model with `pretrained_cfg_overlay={{"mean": ..., "std": ...}}`.'
        )
    return image_mode(channels), create_transform(**config, is_training=False)


def _processed(processor: Callable, image: PIL.Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def image_mode(channels: int) -> str:
    """Return the Pillow mode for a number of input channels."""
    if channels not in (1, 3):
        raise ValueError(f"The model has {channels} input channels; images can have 1 (gray) or 3 (RGB).")
    return "L" if channels == 1 else "RGB"


def convert_image(image: PIL.Image.Image | None, mode: str) -> PIL.Image.Image:
    """Return an image in a Pillow mode of 8 bits a channel. `datasets` has applied its EXIF orientation."""
    if image is None:
        raise ValueError("there is none")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode is {image.mode}, and Pillow would clip it at 255; convert it to 8 bits a channel")
    if image.mode == "P":
        image = image.convert("RGBA")  # the same colours, without Pillow's warning about transparency
    return image.convert(mode)


def find_column(features: datasets.Features, kind: type, column: str | None, name: str) -> str:
    """Return `column` after a check of its type, or by default the only one of type `kind`."""
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    wanted = [key for key in found if column in (None, key)]
    if len(wanted) != 1:
        needed = "exactly one column" if column is None else f"a column {column!r}"
        option = {"Image": "image_column", "ClassLabel": "label_column"}[kind.__name__]
        advice = f"name the one to use with {option}" if found else "give a data set that has one"
        raise ValueError(
            f"{name} needs {needed} of type {kind.__name__}, found {', '.join(found) or f'none among {list(features)}'}"
            f": {advice}."
        )
    return wanted[0]
