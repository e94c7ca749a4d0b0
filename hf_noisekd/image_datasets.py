"""Real images, for training a teacher and for evaluation. Nothing that distills with noise imports this module."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path

import datasets
import PIL.Image
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import Dataset

from hf_noisekd.models.classifier import class_names, declared_input_size, declared_num_classes, pretrained_cfg_of
from hf_noisekd.models.preprocessing import image_processor_of, unknown_preprocessing

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class Images(Dataset):
    """Images of any size and kind, decoded and preprocessed when they are asked for.

    Each comes as `{"pixel_values": [C, H, W], "labels": int}`, or without labels.
    """

    images: Sequence[PIL.Image.Image]  # one column of a data set of the `datasets` library
    labels: Sequence[int] | None  # the class of each
    _: KW_ONLY
    transform: Callable[[PIL.Image.Image], torch.Tensor]  # from a Pillow image of mode `mode` to pixels `[C, H, W]`
    mode: str  # "RGB" or "L"; transparency is dropped, as timm and transformers do
    indices: Sequence[int]  # which images to serve, in this order
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

    The labels are those of the model: its classes and those of the data set are joined by their names. Where the model
    knows none of the names the classes are taken to stand in its order, with a warning.

    Args:
        name: Hub id, local folder that `datasets.load_dataset` reads, or parquet file, which is taken for the split.
        model: The classifier, which says how it wants its images.
        split: Which split.
        num_images: Serve this many only, drawn with `seed`, in their order; a smaller draw is a part of a larger one.
        seed: Seed of that draw.
        image_column: Name of the column of images. Default: the only one of type `Image`.
        label_column: Name of the column of classes. Default: the only one of type `ClassLabel`.
        labels: Whether to serve labels. Otherwise the data set need not have any.

    Raises:
        ValueError: There is no such data set, split or column, or too few images; the model knows some of the classes
            and not all, or has fewer; some images have no label; or it is not known how the model wants its images.
    """
    mode, transform = _preprocessing(model)
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
    """Return for each class of the data set `name` its number in `model`."""
    num_classes = declared_num_classes(model) or len(label_names)
    known = class_names(model, num_classes)
    unknown = next((label for label in label_names if label not in known), None)
    if unknown is None:
        # Two classes of ImageNet are called "crane".
        twice = next((label for label in label_names if known.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"{name} has the class {twice!r}, and the model two of that name: rename them.")
        return [known.index(label) for label in label_names]
    examples = f"its own are {', '.join(map(repr, known[:3]))}{', ...' if num_classes > 3 else ''}"
    if any(label in known for label in label_names):
        raise ValueError(
            f"{name} has the class {unknown!r}, which the model does not know, though it knows others ({examples}): "
            "rename the classes of the data set, or use one of the model's own."
        )
    if len(label_names) > num_classes:
        raise ValueError(
            f"{name} has {len(label_names)} classes, and the model only {num_classes}: use a data set of the model's "
            "own classes."
        )
    logger.warning(
        "The model knows none of the %d classes of %s by name, such as %r (%s): they are taken to be its first %d, in "
        "this order. If they are not, every number measured on them is wrong.",
        len(label_names),
        name,
        unknown,
        examples,
        len(label_names),
    )
    return range(num_classes)


@contextmanager
def naming_the_image(index: int, name: str) -> Iterator[None]:
    """Context that says which image could not be read."""
    try:
        yield
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"Image {index} of {name} cannot be read: {error}. Replace or remove it.") from error


def load_splits(name: str, required: str, config: str | None = None) -> datasets.DatasetDict:
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


def short_name(name: str) -> str:
    """Return what a data set is called in results: the last part of a path, or its id."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def draw_indices(size: int, num_images: int | None, seed: int, name: str) -> Sequence[int]:
    """Return `num_images` of `size` indices in order, drawn with `seed`; a smaller draw is a part of a larger one."""
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
    processor = None if cfg else image_processor_of(model)
    if processor is not None:
        return image_mode(getattr(model.config, "num_channels", 3)), partial(_processed, processor)
    if unknown_preprocessing(model):
        raise ValueError(
            f"{type(model).__name__} does not say how it wants its images: save an image processor into its "
            "folder, with AutoImageProcessor's save_pretrained, give mean and std in the `pretrained_cfg` of its "
            "config.json, or pass a data set that is preprocessed already."
        )
    config = resolve_data_config(pretrained_cfg=cfg)
    channels = (declared_input_size(model) or config["input_size"])[0]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            raise ValueError(
                f"The model takes {channels} channel{'' if channels == 1 else 's'} and its pretrained_cfg gives {key} "
                f"for {len(config[key])}, {tuple(config[key])}: build it with "
                f'`pretrained_cfg_overlay={{"mean": ..., "std": ...}}`.'
            )
    return image_mode(channels), create_transform(**config, is_training=False)


def _processed(processor: Callable, image: PIL.Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def image_mode(channels: int) -> str:
    """Return the Pillow mode of the images that a model of so many input channels sees."""
    if channels not in (1, 3):
        raise ValueError(f"The model takes {channels} channels; images can be read for 1 (gray) or 3 (RGB).")
    return "L" if channels == 1 else "RGB"


def convert_image(image: PIL.Image.Image | None, mode: str) -> PIL.Image.Image:
    """Return an image in a Pillow mode of 8 bits a channel. Its EXIF orientation was applied by `datasets`."""
    if image is None:
        raise ValueError("there is none")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode is {image.mode}, and Pillow would clip it at 255; convert it to 8 bits a channel")
    if image.mode == "P":
        image = image.convert("RGBA")  # the same colours; on the straight way Pillow warns of transparency
    return image.convert(mode)


def find_column(features: datasets.Features, kind: type, column: str | None, name: str) -> str:
    """Return `column` after a check of its type, or the only one of type `kind`."""
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    wanted = [key for key in found if column in (None, key)]
    if len(wanted) == 1:
        return wanted[0]
    if column is not None:
        raise ValueError(f"{name} has no column {column!r} of type {kind.__name__}; found {found or dict(features)}.")
    option = {"Image": "image_column", "ClassLabel": "label_column"}[kind.__name__]
    choose = f": name the one to use ({option})" if found else f" among {dict(features)}"
    raise ValueError(
        f"{name} needs exactly one column of type {kind.__name__}, found {', '.join(found) or 'none'}{choose}."
    )
