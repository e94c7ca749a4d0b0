"""Save a classifier so that timm and transformers can load it."""

import copy
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_noisekd.files import CONFIG_NAME, WEIGHTS_NAME, replacing_files
from hf_noisekd.models.classifier import (
    architecture_of,
    bare_model,
    class_descriptions,
    class_names,
    compute_alike,
    declared_input_size,
    pretrained_cfg_of,
)
from hf_noisekd.models.loading import OF_OTHER_WEIGHTS, differing
from hf_noisekd.models.preprocessing import (
    PREPROCESSING_KEYS,
    image_processor_of,
    preprocessing_of,
    unknown_preprocessing,
)
from hf_noisekd.record.plain import to_dict
from hf_noisekd.record.schema import Provenance, noisekd_section

logger = logging.getLogger(__name__)


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    teacher_model: nn.Module | None = None,
    provenance: Provenance | None = None,
) -> None:
    """Save a classifier: transformers models in their format, timm models in timm's, which transformers loads too.

    A new folder appears complete or not at all; in an existing one each file is replaced as a whole.

    Args:
        model: The classifier. If it is neither timm's nor transformers', only its weights are saved, with a warning.
        folder: Where to save `config.json` and `model.safetensors`.
        teacher_model: The model whose preprocessing and class names it shares. Default: the model itself.
        provenance: How it was made, for the section `noisekd` of `config.json`. Default: that of the model itself.
    """
    bare = bare_model(model)
    section = noisekd_section(model) if provenance is None else to_dict(provenance)
    like = model if teacher_model is None else teacher_model
    with replacing_files(folder) as staging:
        if isinstance(bare, PreTrainedModel):
            if section:
                bare.config.noisekd = section
            if teacher_model is not None:
                names = class_names(teacher_model, bare.config.num_labels)
                bare.config.id2label = dict(enumerate(names))
                bare.config.label2id = {name: index for index, name in enumerate(names)}
            bare.save_pretrained(staging)
            _save_image_processor(staging, like, declared_input_size(like) or declared_input_size(bare))
            return
        # safetensors needs contiguous tensors that share no memory.
        state_dict = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in bare.state_dict().items()
        }
        safetensors.torch.save_file(state_dict, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        if pretrained_cfg_of(bare).get("architecture"):
            _save_timm_config(bare, staging / CONFIG_NAME, like, section)
        else:
            text = "%s is not a timm or transformers model: only its weights were saved, without a %s."
            logger.warning(text, type(model).__name__, CONFIG_NAME)


def check_can_be_saved(
    model: nn.Module, input_size: tuple[int, int, int] | None, *, teacher_model: nn.Module | None = None
) -> None:
    """Raise a `ValueError` if a timm or transformers model, once saved, could not be loaded again unchanged.

    A model built from its saved configuration, with its weights, must give the same logits for images of `input_size`.
    Warn if the preprocessing of its teacher cannot be saved with it.
    """
    bare = bare_model(model)
    is_transformers = isinstance(bare, PreTrainedModel)
    if not is_transformers and not pretrained_cfg_of(bare).get("architecture"):
        return
    try:
        again = _built_anew(bare, model if teacher_model is None else teacher_model)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"The model could not be saved: {error}. Build it with arguments that a {CONFIG_NAME} can hold: strings "
            "and numbers."
        ) from error
    if difference := _difference(bare, again, input_size):
        library = "transformers" if is_transformers else "timm"
        raise ValueError(
            f"The model could not be loaded again after saving: {library} builds another {architecture_of(bare)} "
            f"({difference}). Change it through the arguments of {library}, not by hand, or wrap it in your own "
            "module, of which only the weights are saved."
        )
    if teacher_model is None:
        return
    takes_processor = is_transformers and image_processor_of(teacher_model) is not None
    if not takes_processor and (unknown := unknown_preprocessing(teacher_model)):
        logger.warning(
            "The teacher's preprocessing cannot all be saved with the student: %s. Users may apply that of ImageNet. "
            "Save an image processor with the teacher, or set mean and std in its `pretrained_cfg`.",
            unknown,
        )


def _built_anew(model: nn.Module, like: nn.Module) -> nn.Module:
    """Return a model built from the configuration of `model`, as by loading it again, with random weights."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):  # the training's stay the same
        if isinstance(model, PreTrainedModel):
            config = copy.deepcopy(model.config)
            is_known = type(config) in AutoModelForImageClassification._model_mapping
            return AutoModelForImageClassification.from_config(config) if is_known else type(model)(config)
        _save_timm_config(model, Path(folder) / CONFIG_NAME, like, {})
        return timm.create_model(f"local-dir:{folder}", pretrained=False)


def _difference(model: nn.Module, again: nn.Module, input_size: tuple[int, int, int] | None) -> str:
    """Return how `again`, with the weights of `model`, differs from it; an empty string if it does not."""
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (model, again)]
    if names := differing(*shapes):
        return f"{len(names)} tensors differ, first {names[0]!r}"
    again.load_state_dict(model.state_dict())
    return "" if input_size is None or compute_alike(model, again, input_size) else "the same weights give other logits"


def _save_image_processor(folder: Path, like: nn.Module, input_size: tuple[int, int, int] | None) -> None:
    """Give the saved transformers model in a folder the preprocessing of `like`, its teacher or itself."""
    cfg, known = pretrained_cfg_of(like), preprocessing_of(like)
    processor = None if cfg else image_processor_of(like)
    if processor is not None:
        processor.save_pretrained(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    for key in ("pretrained_cfg", "image_processor_type"):
        config.pop(key, None)
    if cfg and input_size and {"mean", "std"} <= known.keys():
        # The only processor of transformers that crops as timm does; it is built from `config.json`.
        config["pretrained_cfg"] = known | {"input_size": input_size}
        config["image_processor_type"] = "TimmWrapperImageProcessor"
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_timm_config(model: nn.Module, path: Path, like: nn.Module, section: dict) -> None:
    """Write the configuration of `model`, with the preprocessing and the classes of `like`, its teacher or itself."""
    size: Any = declared_input_size(model)  # of a timm model never None
    num_classes: Any = model.num_classes
    known = {"input_size": declared_input_size(like) or size} | preprocessing_of(like)
    model_config = {"pretrained_cfg": known, "label_names": class_names(like, num_classes)}
    model_config["label_descriptions"] = class_descriptions(like)
    if section:
        model_config["noisekd"] = section
    model_args = {"in_chans": size[0]} | getattr(model, "model_args", {})
    save_config_for_hf(model, path, model_config=model_config, model_args=model_args)
    config = json.loads(path.read_text())
    # transformers passes `num_classes` itself and fails on a second one.
    config["model_args"].pop("num_classes", None)
    # Otherwise unknown values would become those of the architecture, or timm's defaults.
    config["pretrained_cfg"] |= {key: None for key in PREPROCESSING_KEYS if key not in known}
    if bare_model(like) is not model:
        for key in OF_OTHER_WEIGHTS:
            config["pretrained_cfg"].pop(key, None)
    if license_ := getattr(like, "origin", {}).get("license"):
        config["pretrained_cfg"]["license"] = license_
    path.write_text(json.dumps(config, indent=2) + "\n")
