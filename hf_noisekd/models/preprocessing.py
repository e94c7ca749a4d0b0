"""How a model wants its images, in timm's terms: what a student takes over from its teacher."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel

from hf_noisekd.models.classifier import declare, declared_input_size, format_size, pretrained_cfg_of
from hf_noisekd.record.schema import noisekd_section

logger = logging.getLogger(__name__)

# What a student takes over from its teacher's `pretrained_cfg`: how to turn an image into pixels.
PREPROCESSING_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
# timm's names, by Pillow's numbers.
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# The image processors of transformers that do what their options say, as it is read here. Others may do more:
# PPLCNetImageProcessor exchanges the channels, and none of its options says so.
READABLE = (
    "Beit Bit Blip ChineseCLIP CLIP ConvNext DeiT DINOv3ViT EfficientNet Levit MobileNetV1 MobileNetV2 MobileViT "
    "OwlViT PoolFormer Pvt RTDetr Segformer Siglip TextNet ViT"
)


def preprocessing_of(model: nn.Module) -> dict:
    """Return what is known of how `model` wants its images, in timm's terms: those of [`PREPROCESSING_KEYS`].

    Where a transformers model's image processor says the size of what comes out, that is `input_size`.
    """
    return _known_and_unknown(model)[0]


def unknown_preprocessing(model: nn.Module) -> str:
    """Return why a student cannot be given all of the preprocessing of `model`; nothing if it can."""
    return _known_and_unknown(model)[1]


def take_preprocessing(model: nn.Module, teacher_model: nn.Module) -> None:
    """Have a timm model declare the preprocessing of its teacher, as it does once it is saved."""
    if cfg := pretrained_cfg_of(model):
        known = preprocessing_of(teacher_model)
        declare(model, cfg | {key: known.get(key) for key in PREPROCESSING_KEYS})


def input_size_of(model: nn.Module, given: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Return the `(channels, height, width)` of the images of a model, or raise a `ValueError` if it is unknown.

    That is `given`, or else the size in timm's `pretrained_cfg` or in `config.image_size`, the output size of the image
    processor, as for transformers' ResNets, or the size of the noise that a student was trained with.
    """
    if given is not None:
        channels, height, width = given
        return channels, height, width
    declared, made = declared_input_size(model), preprocessing_of(model).get("input_size")
    if declared and made and declared != tuple(made):
        logger.warning(
            "%s declares images of %s, but its image processor makes %s. The first is used: give input_size for "
            "another.",
            type(model).__name__,
            format_size(declared),
            format_size(made),
        )
    noise = noisekd_section(model).get("noise")
    size = declared or made or (noise.get("input_size") if isinstance(noise, dict) else None)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} does not declare its input size in `pretrained_cfg`, in `config.image_size` or by "
            "an image processor: give input_size, the channels, height and width, such as 3 224 224."
        )
    return tuple(size)


def image_processor_of(model: nn.Module):
    """Return the image processor that lies beside a transformers model, or None."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        return AutoImageProcessor.from_pretrained(model.name_or_path)
    except Exception:  # there is none, or a file that may hold anything
        return None


def _known_and_unknown(model: nn.Module) -> tuple[dict, str]:
    cfg, known = pretrained_cfg_of(model), dict[str, Any]()
    if cfg or not isinstance(model, PreTrainedModel):
        known = {key: cfg[key] for key in PREPROCESSING_KEYS if cfg.get(key) is not None}
        return known, "" if {"mean", "std"} <= known.keys() else "it has no `pretrained_cfg` with mean and std"
    processor = image_processor_of(model)
    if processor is None:
        return {}, "no image processor that can be read lies beside it"
    kind = type(processor).__name__.removesuffix("Pil").removesuffix("ImageProcessor")
    try:
        if kind not in READABLE.split() or not type(processor).__module__.startswith("transformers."):
            raise ValueError("what it does is not known")
        channels = getattr(model.config, "num_channels", 3)
        known["mean"], known["std"] = _scale(kind, processor, channels)
        mode, resized, size = _sizes(kind, processor)
        if size is None:
            # So that at least images of the student's own size are taken as they are.
            return known | {"crop_pct": 1.0}, "its image processor does not bring images to one size"
        known["input_size"] = (channels, *size)
        crop_pct, interpolation = _crop_pct(mode, resized, size), INTERPOLATIONS[int(processor.resample)]
    except Exception as error:  # its file may hold anything
        return known, f"its {type(processor).__name__} cannot be said in timm's terms ({error})"
    return known | {"crop_mode": mode, "crop_pct": crop_pct, "interpolation": interpolation}, ""


def _scale(kind: str, processor: Any, channels: int) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation, in units of 255, by which pixels are normalised."""
    if kind == "MobileViT" and processor.do_flip_channel_order:
        raise ValueError("it exchanges the channels")
    normalizes = processor.do_normalize and kind != "MobileViT"
    scale = (processor.image_mean, processor.image_std) if normalizes else (0, 1)
    mean, std = (np.broadcast_to(values, channels) for values in scale)
    if kind == "EfficientNet":
        mean = mean + int(processor.do_rescale and processor.rescale_offset)
        std = std * np.array(processor.image_std if processor.include_top else 1)
    unit = 1 / (255 * (processor.rescale_factor if processor.do_rescale else 1))
    return (mean * unit).tolist(), (std * unit).tolist()


def _sizes(kind: str, processor: Any) -> tuple[str, tuple | None, tuple | None]:
    """Return timm's `crop_mode`, the size (of a square image) after resizing and after cropping; None if it varies."""
    size, edge, crop = processor.size, processor.size.shortest_edge, processor.crop_size
    if (processor.do_pad and processor.pad_size) or (kind == "ConvNext" and processor.do_center_crop):
        raise ValueError("it pads images, or crops them twice")
    cut = (crop.height, crop.width) if processor.do_center_crop and kind not in ("RTDetr", "Segformer") else None
    if not processor.do_resize or size.longest_edge or size.max_height or kind == "TextNet":  # it rounds up the sides
        return "center", None, cut
    if kind == "ConvNext":  # crops by itself, where it does not squash
        cut = (edge, edge)
        if edge >= 384:
            return "squash", cut, cut
    if kind in ("ConvNext", "PoolFormer") or (kind == "Levit" and edge):
        edge = int(edge / (224 / 256 if kind == "Levit" else processor.crop_pct))
    resized = (edge, edge) if edge else (size.height, size.width)
    return ("center", resized, cut) if edge else ("squash", resized, cut or resized)


def _crop_pct(mode: str, resized: tuple | None, size: tuple) -> float:
    """Return the `crop_pct` for which timm resizes and crops as [`_sizes`] says."""
    if resized and (mode == "squash" or size[0] == size[1]):
        largest = min(1.0, size[0] / resized[0], size[1] / resized[1])
        for crop_pct in (largest, math.nextafter(largest, 0)):
            if resized == tuple(math.floor(side / crop_pct) for side in size):  # as timm computes it
                return crop_pct
    raise ValueError("it crops otherwise than timm can")
