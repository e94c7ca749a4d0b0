"""How a model wants its images, in timm's terms: what a student takes over from its teacher.

What a processor of transformers does is not read off its many options, but measured on images made for it.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel

from hf_noisekd.models.classifier import declared_input_size, format_size, pretrained_cfg_of
from hf_noisekd.record.schema import noisekd_section

logger = logging.getLogger(__name__)

# What a student takes over from its teacher's `pretrained_cfg`: how to turn an image into pixels.
PREPROCESSING_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
# timm's names, by Pillow's numbers.
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")

Size = tuple[int, int]  # height and width
Answer = Callable[[torch.Tensor], torch.Tensor]  # what a processor makes of an image `[C, H, W]` of bytes


def preprocessing_of(model: nn.Module) -> dict:
    """Return what is known of how `model` wants its images, in timm's terms: those of [`PREPROCESSING_KEYS`].

    Where a transformers model's image processor says the size of what comes out, that is `input_size`.
    """
    return _known_and_unknown(model)[0]


def unknown_preprocessing(model: nn.Module) -> str:
    """Return why a student cannot be given all of the preprocessing of `model`; nothing if it can."""
    return _known_and_unknown(model)[1]


def known_input_size(model: nn.Module, known: dict | None = None) -> tuple[int, int, int] | None:
    """Return the `(channels, height, width)` that a model declares, its image processor makes, or it was taught with.

    transformers' ResNets declare none. None where nobody says it. `known` is its [`preprocessing_of`], where that was
    measured already.
    """
    known = preprocessing_of(model) if known is None else known
    declared, made = declared_input_size(model), known.get("input_size")
    if declared and made and declared != made:
        logger.warning(
            "%s declares images of %s, and its image processor makes %s: it gets the first, unless you give another "
            "input size.",
            type(model).__name__,
            format_size(declared),
            format_size(made),
        )
    size = declared or made
    if size is None and isinstance(noise := noisekd_section(model).get("noise"), dict):
        size = noise.get("input_size")
    return None if size is None else tuple(size)


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

    def answer(image: torch.Tensor) -> torch.Tensor:
        pixels = processor(images=image, input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]
        return torch.as_tensor(pixels).double()

    try:
        channels = getattr(model.config, "num_channels", 3)
        sizes = {tuple(answer(_flat([0] * channels, size)).shape) for size in ((256, 256), (200, 300))}
        *_, height, width = (3, 256, 256) if len(sizes) > 1 else next(iter(sizes))
        size = (height, width)
        near = (math.ceil(1.25 * size[0]), math.ceil(1.25 * size[1]))
        known["mean"], known["std"] = _scale(answer, channels, near)
        if len(sizes) > 1:
            # So that at least images of the student's own size are taken as they are.
            return known | {"crop_pct": 1.0}, "its image processor does not bring images to one size"
        known["input_size"] = (channels, *size)
        known["crop_mode"], known["crop_pct"] = _crop(_levels(answer, channels, known), size, near)
        known["interpolation"] = INTERPOLATIONS[int(processor.resample)]
    except Exception as error:  # a processor may be anybody's code
        return known, f"its {type(processor).__name__} cannot be said in timm's terms ({error})"
    return known, ""


def _flat(levels: list[int], size: Size) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1).repeat(1, *size)


def _scale(answer: Answer, channels: int, size: Size) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation, in units of 255, by which pixels are normalised."""

    def flat(levels: list[int]) -> torch.Tensor:
        pixels = answer(_flat(levels, size)).flatten(1)
        if (pixels.amax(1) - pixels.amin(1)).max() > 1e-3 * pixels.abs().max():
            raise ValueError("an image of one colour comes out with others: is it padded?")
        return pixels.mean(1)

    black = flat([0] * channels)
    factors = torch.stack([flat([255 * (index == other) for other in range(channels)]) for index in range(channels)])
    factors = factors - black
    tolerance = 1e-3 * factors.abs().max()
    if not (factors.diag().abs() > tolerance).all() or (factors - factors.diag().diag()).abs().max() > tolerance:
        raise ValueError("a channel of what comes out is not the same channel of the image")
    factors = factors.diag()
    if ((flat([51] * channels) - black) - factors / 5).abs().max() > tolerance:
        raise ValueError("what comes out is no linear function of the pixels")
    return _rounded(-black / factors), _rounded(1 / factors)


def _rounded(values: torch.Tensor) -> list[float]:
    """Return what float32 knows of the values."""
    return [float(f"{value:.6g}") + 0.0 for value in values.tolist()]


def _levels(answer: Answer, channels: int, known: dict) -> Answer:
    """Return what makes of one channel of bytes `[H, W]`, as numbers in [0, 1], the same of what comes out."""

    def levels(channel: torch.Tensor) -> torch.Tensor:
        image = (255 * channel).round().byte().expand(channels, -1, -1).contiguous()
        return answer(image)[0] * known["std"][0] + known["mean"][0]

    return levels


def _crop(levels: Answer, size: Size, near: Size) -> tuple[str, float]:
    """Return timm's `crop_mode` and `crop_pct`.

    Args:
        levels: As of [`_levels`].
        size: That of what comes out.
        near: A size of about the same proportions.
    """
    seen = {near: _seen(levels, near)}
    for factors in ((1, 1.5), (1.5, 1), (2, 2)):
        other = (math.ceil(factors[0] * near[0]), math.ceil(factors[1] * near[1]))
        seen[other] = _seen(levels, other)
    # Resized to this, of which the middle is cut out.
    resized = round(near[0] / seen[near][0][0])
    crop_pct = size[0] / resized
    while math.floor(size[0] / crop_pct) < resized:  # as timm computes it
        crop_pct = math.nextafter(crop_pct, 0)
    height, width = (math.floor(side / crop_pct) for side in size)
    for mode in ("center", "squash"):
        for image, found in seen.items():
            pitches = (image[0] / height, image[1] / width)
            expected = (min(pitches),) * 2 if mode == "center" else pitches
            if any(
                abs(pitch - wanted) > 0.02 * wanted or abs(middle - (side - 1) / 2) > wanted + 1.5
                for (pitch, middle), wanted, side in zip(found, expected, image, strict=True)
            ):
                break
        else:
            return mode, crop_pct
    raise ValueError("it crops otherwise than timm can")


def _seen(levels: Answer, image: Size) -> list[tuple[float, float]]:
    """Return what is seen of images of a size, for their height and width.

    Each is the number of pixels that become one, and the place of the middle of what comes out. Both are read off an
    image that brightens evenly along a side.
    """
    seen = []
    for dim, side in enumerate(image):
        ramp = torch.linspace(0, 1, side)
        out = levels((ramp[:, None] if dim == 0 else ramp).expand(image)).mean(1 - dim) * (side - 1)
        edge = min(3, len(out) // 4)  # where the interpolation lacks neighbours
        places = np.arange(len(out)) - (len(out) - 1) / 2
        inside = slice(edge, len(out) - edge)
        pitch, middle = np.polyfit(places[inside], out.numpy()[inside], 1)
        if abs(pitch * places + middle - out.numpy())[inside].max() > pitch + side / 128:
            raise ValueError("it pads images, or bends them")
        seen.append((pitch, middle))
    return seen
