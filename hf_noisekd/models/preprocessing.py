"""How a model wants its images, in timm's terms and in transformers'."""

from torch import nn
from transformers import AutoImageProcessor, BitImageProcessor, PreTrainedModel

from hf_noisekd.models.classifier import declared_input_size, pretrained_cfg_of

# What a student takes over from its teacher's `pretrained_cfg`: how to turn an image into pixels.
PREPROCESSING_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
PIL_NUMBERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def preprocessing_of(model: nn.Module) -> dict:
    """Return what is known of how `model` wants its images, in timm's terms: those of [`PREPROCESSING_KEYS`]."""
    cfg = pretrained_cfg_of(model)
    if cfg or not isinstance(model, PreTrainedModel):
        return {key: cfg[key] for key in PREPROCESSING_KEYS if cfg.get(key) is not None}
    processor = image_processor_of(model)
    if processor is None:
        return {}
    processor = processor.to_dict()
    names = {number: name for name, number in PIL_NUMBERS.items()}
    preprocessing = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    preprocessing["interpolation"] = names.get(processor.get("resample"))
    size = processor.get("size") or {}
    if processor.get("crop_pct"):
        preprocessing["crop_pct"] = processor["crop_pct"]
    elif processor.get("do_center_crop") and size.get("shortest_edge"):
        preprocessing["crop_pct"] = processor["crop_size"]["height"] / size["shortest_edge"]
    elif size.get("height"):
        preprocessing |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return {key: value for key, value in preprocessing.items() if value is not None}


def image_processor_of(model: nn.Module):
    """Return transformers' image processor for a model, its own or one like timm's evaluation; None if not known."""
    if isinstance(model, PreTrainedModel):
        try:
            return AutoImageProcessor.from_pretrained(model.name_or_path)
        except (OSError, ValueError):
            return None
    preprocessing = preprocessing_of(model)
    input_size = declared_input_size(model)
    if not {"mean", "std"} <= preprocessing.keys() or input_size is None:
        return None
    size = {"height": input_size[1], "width": input_size[2]}
    squash = preprocessing.get("crop_mode") == "squash"
    return BitImageProcessor(
        size=size if squash else {"shortest_edge": int(min(input_size[1:]) / preprocessing.get("crop_pct", 1.0))},
        do_center_crop=not squash,
        crop_size=size,
        resample=PIL_NUMBERS[preprocessing.get("interpolation", "bicubic")],
        image_mean=list(preprocessing["mean"]),
        image_std=list(preprocessing["std"]),
    )
