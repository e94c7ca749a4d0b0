"""Load a teacher or a student from where people keep them, and save a student so that timm and transformers read it.

Only weights in safetensors are read from a folder or the Hub; no pickled code runs.
"""

import difflib
import json
import logging
from pathlib import Path

import safetensors.torch
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from timm.models._hub import save_config_for_hf
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from .classifier import declared_input_size, pretrained_cfg_of

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# What a student takes over from its teacher's `pretrained_cfg`: how to turn an image into pixels.
PREPROCESSING_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")


def load_teacher(source: str | nn.Module) -> nn.Module:
    """Load a trained classifier.

    Args:
        source: A module, returned as it is; a timm name with pretrained weights (`resnet34.a1_in1k`); a Hub id
            (`org/repo`, `hf-hub:org/repo@revision`); or a folder in timm's or transformers' layout.

    Raises:
        ValueError: There is no such model; the message gives the nearest names.
    """
    return _load(source, pretrained=True)


def load_student(
    source: str | nn.Module, *, num_classes: int | None = None, input_size: tuple[int, int, int] | None = None
) -> nn.Module:
    """Build a student, or load one to train further.

    Args:
        source: A module, returned as it is; a timm name (`resnet18_cifar`), which gives random weights; or a Hub id or
            folder as in [`load_teacher`], which gives the weights found there.
        num_classes: Classes of a model built by name.
        input_size: `(channels, height, width)` of a model built by name.

    Raises:
        ValueError: There is no such model; the message gives the nearest names.
    """
    kwargs = {}
    if isinstance(source, str) and not _has_weights(source):
        kwargs["num_classes"] = num_classes
        if input_size is not None:
            kwargs |= {"in_chans": input_size[0], "pretrained_cfg_overlay": {"input_size": tuple(input_size)}}
    return _load(source, pretrained=False, **kwargs)


def save_model(model: nn.Module, folder: str | Path, *, teacher_model: nn.Module | None = None) -> None:
    """Save a classifier: timm models in timm's Hub format, transformers models in theirs.

    timm's format is `model.safetensors` with the bare timm names and a `config.json` that timm, transformers'
    `AutoModelForImageClassification` and `AutoImageProcessor` all read. Of any other module only the weights can be
    saved, with a warning.

    Args:
        model: The classifier.
        folder: Where to write; made if missing.
        teacher_model: The teacher whose preprocessing and class names the model shares.
    """
    folder = Path(folder)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Copies in the default memory format: safetensors stores contiguous tensors that share no memory.
    state_dict = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    safetensors.torch.save_file(state_dict, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if not pretrained_cfg_of(model).get("architecture"):
        logger.warning(
            "%s is not a timm or transformers model: its weights were saved, without a %s to build it from.",
            type(model).__name__,
            CONFIG_NAME,
        )
        return
    _save_timm_config(model, folder / CONFIG_NAME, teacher_model)


def _save_timm_config(model: nn.Module, path: Path, teacher_model: nn.Module | None) -> None:
    teacher_cfg = pretrained_cfg_of(teacher_model) if teacher_model is not None else {}
    preprocessing = {key: teacher_cfg[key] for key in PREPROCESSING_KEYS if teacher_cfg.get(key) is not None}
    preprocessing["input_size"] = declared_input_size(model if not teacher_cfg else teacher_model)
    label_names = class_names(model if teacher_model is None else teacher_model, model.num_classes)
    save_config_for_hf(
        model,
        path,
        model_config={"pretrained_cfg": preprocessing, "label_names": label_names},
        model_args={"in_chans": declared_input_size(model)[0]} | getattr(model, "model_args", {}),
    )
    config = json.loads(path.read_text())
    # transformers passes `num_classes` by itself and fails on a second one.
    config["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def class_names(model: nn.Module, num_classes: int) -> list[str]:
    """Return the class names a model carries, or their numbers where it carries none.

    They have to be written, else transformers guesses those of ImageNet.
    """
    names = pretrained_cfg_of(model).get("label_names")
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    if names is None and id2label:
        names = [id2label[index] for index in sorted(id2label)]
    if names is None or len(names) != num_classes:
        return [str(index) for index in range(num_classes)]
    return list(names)


def _load(source: str | nn.Module, **kwargs) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str):
        raise ValueError(f"A model must be a name, a folder or an nn.Module, got {type(source).__name__}.")
    if _has_weights(source):
        return _load_with_weights(source)
    architecture = source.split(".")[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(nearest)}?" if nearest else ""
        raise ValueError(
            f"Unknown model {source!r}: it is no timm model, no folder, and no Hub id of the form 'org/repo'.{hint}"
        )
    try:
        return timm.create_model(source, **kwargs)
    except RuntimeError as error:  # timm's answer to a weight tag it does not know
        raise ValueError(f"Cannot build the timm model {source!r}: {error}") from error


def _has_weights(source: str) -> bool:
    """Whether `source` points at saved weights, rather than naming an architecture."""
    return "/" in source or ":" in source or Path(source).is_dir()


def _load_with_weights(source: str) -> nn.Module:
    folder = Path(source.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is not a model folder: it has no {name}.")
        config_path, timm_source, pretrained = folder / CONFIG_NAME, f"local-dir:{folder}", False
        transformers_source = {"pretrained_model_name_or_path": str(folder)}
    elif source.startswith(("/", ".", "~", "local-dir:")):
        raise ValueError(f"There is no folder {str(folder)!r}.")
    else:
        repo_id, _, revision = source.removeprefix("hf-hub:").partition("@")
        try:
            config_path = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision or None))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise ValueError(
                f"There is no folder {source!r}, and no such model could be had from the Hub: {error}"
            ) from error
        timm_source, pretrained = f"hf-hub:{source.removeprefix('hf-hub:')}", True
        transformers_source = {"pretrained_model_name_or_path": repo_id, "revision": revision or None}
    try:
        if "architecture" in json.loads(config_path.read_text()):
            model = timm.create_model(timm_source, pretrained=pretrained)
            if not pretrained:
                # By our own hand: timm 1.0.25 would unpickle whatever else lies in the folder.
                model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_NAME))
            return model
        return AutoModelForImageClassification.from_pretrained(**transformers_source, use_safetensors=True)
    except (safetensors.SafetensorError, json.JSONDecodeError, RuntimeError, OSError) as error:
        raise ValueError(f"The model {source!r} cannot be loaded: {error}") from error
