"""Load a teacher or a student from a timm name, the Hub, a folder or a file, without running pickled code.

A loaded model has its Hub id, revision and licence, where known, in `origin`.
"""

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_noisekd.files import CARD_NAME, CONFIG_NAME, RECORD_NAME, WEIGHTS_NAME, check_model_folder
from hf_noisekd.models.classifier import (
    check_finite,
    format_size,
    pretrained_cfg_of,
    with_input_size,
)
from hf_noisekd.models.preprocessing import input_size_of, preprocessing_of
from hf_noisekd.models.weights_file import WeightsFile

logger = logging.getLogger(__name__)

# Entries of timm about the published weights of an architecture, which are wrong for others.
OF_OTHER_WEIGHTS = (
    "tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes", "test_input_size",
    "test_crop_pct",
)  # fmt: skip
BATCH_COUNT = "num_batches_tracked"  # of BatchNorm, which no prediction depends on


def load_teacher(
    source: str | Path | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a trained classifier.

    Args:
        source: A module, returned as it is; a timm name with pretrained weights (`resnet34.a1_in1k`); a Hub id
            (`org/repo`, `hf-hub:org/repo@revision`); or a folder in timm's or transformers' layout, with safetensors.
        checkpoint: File of weights for the timm architecture `source`: safetensors, or a file of `torch.save`, loaded
            with `weights_only=True`. Its shapes give the numbers of classes and of input channels, and the arguments of
            timm's training script, where they are in it, the preprocessing and how the model is built.
        input_size: `(channels, height, width)` to declare in place of the model's own. A module that is given does not
            change: what is returned has its weights.
        trust_remote_code: Run the Python code that comes with a transformers model on the Hub.

    Raises:
        ValueError: There is no such model, it is damaged, or its image processor makes images of another size.
    """
    if checkpoint is not None:
        if isinstance(source, nn.Module) or not timm.is_model(str(source).partition(".")[0]):
            found = type(source).__name__ if isinstance(source, nn.Module) else repr(str(source))
            nearest = "" if isinstance(source, nn.Module) else nearest_architecture(str(source))
            raise ValueError(
                f"A checkpoint needs the timm name of its architecture, and the model is {found}.{nearest}"
            )
        model = _load_checkpoint(str(source), Path(checkpoint).expanduser())
    else:
        model = _load(source, trust_remote_code, pretrained=True)
    return model if input_size is None else _with_input_size(model, input_size)


def _with_input_size(model: nn.Module, input_size: Sequence[int]) -> nn.Module:
    """Return a model that declares an input size, or raise a `ValueError` if its image processor makes another."""
    channels, height, width = input_size
    made = preprocessing_of(model).get("input_size")
    if made and tuple(made) != (channels, height, width):
        raise ValueError(
            f"input_size is {format_size(input_size)}, and the model's image processor makes {format_size(made)}: "
            "leave input_size out, or save the model with an image processor for that size."
        )
    return with_input_size(model, (channels, height, width))


def load_student(
    source: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a student like a teacher, or build one with random weights where `source` is a timm name.

    `num_classes`, `input_size`, `(channels, height, width)`, and further arguments of timm, `model_args`, are for a
    model built by name. A checkpoint records them. There is a `ValueError` if timm does not build it with these.
    """
    kwargs: dict[str, Any] = {"num_classes": num_classes}
    if input_size is not None:
        kwargs |= {"in_chans": input_size[0], "pretrained_cfg_overlay": {"input_size": tuple(input_size)}}
    if model_args and (isinstance(source, nn.Module) or has_weights(str(source))):
        raise ValueError("Arguments for timm need a student given by its timm name, and this one is already built.")
    return _load(source, trust_remote_code, pretrained=False, model_args=model_args, **kwargs)


def _load(source: str | Path | nn.Module, trust_remote_code: bool, pretrained: bool, **kwargs) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    source = str(source)
    if has_weights(source):
        return _load_with_weights(source, trust_remote_code)
    model = _create_timm_model(source, pretrained=pretrained, **kwargs)
    if pretrained:
        cfg = pretrained_cfg_of(model)
        weights = try_to_load_from_cache(cfg["hf_hub_id"], WEIGHTS_NAME) if cfg.get("hf_hub_id") else None
        revision = {"revision": Path(weights).parent.name} if isinstance(weights, str) else {}
        origin: Any = {"id": cfg.get("hf_hub_id"), "license": _license_text(cfg.get("license"))}
        model.origin = origin | revision
    return model


def _create_timm_model(name: str, *, model_args: Mapping[str, Any] | None = None, **kwargs) -> nn.Module:
    """Build a timm model, and note in it the arguments that a checkpoint must record; else a `ValueError`."""
    model_args = dict(model_args or {})
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(
            f"Unknown model {name!r}: it is no timm model, no folder, and no Hub id of the form 'org/repo'."
            + nearest_architecture(architecture)
        )
    try:
        model = timm.create_model(name, **kwargs | model_args)
    except (OSError, HFValidationError) as error:
        raise ValueError(f"The weights of the timm model {name!r} cannot be loaded: {_missing(error)}") from error
    except RuntimeError as error:  # no weights, or none of this tag
        found = str(error).partition(" Use `pretrained")[0]  # an argument that only timm has
        raise ValueError(f"{found} Give a folder, a Hub id, or the weights of {name!r} as checkpoint.") from error
    except Exception as error:  # arguments may be anything
        if not model_args:
            raise
        given = " ".join(f"{key}={value}" for key, value in model_args.items())
        raise ValueError(f"timm does not build {name!r} with {given}: {error}") from error
    if model_args:
        model.model_args = getattr(model, "model_args", {}) | model_args
    return model


def nearest_architecture(architecture: str) -> str:
    """Return a suggestion for an error message: timm's architectures of a similar name, if there are any."""
    nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    return f" Did you mean {', '.join(nearest)}?" if nearest else ""


def has_weights(source: str) -> bool:
    """Whether `source` is a place of saved weights, and not the name of an architecture."""
    return "/" in source or ":" in source or Path(source).exists()


def _load_with_weights(source: str, trust_remote_code: bool) -> nn.Module:
    origin: Any
    folder, origin = model_folder(source, trust_remote_code)
    if origin and not any(folder.glob("model*.safetensors")):
        raise ValueError(f"{source} has no {WEIGHTS_NAME} on the Hub: convert its weights, or use another model.")
    check_model_folder(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        if "architecture" in config:
            model = _load_timm_folder(folder, config["architecture"], config.get("model_args"))
        else:
            model = _load_transformers_folder(folder, trust_remote_code)
    except Exception as error:  # a configuration may contain anything
        raise ValueError(f"The model {source!r} cannot be loaded: {error}") from error
    check_finite(model, f"model {source!r}")
    license = _license_text(pretrained_cfg_of(model).get("license")) or _card_license(folder)
    model.origin = origin | {"license": license}
    if config.get("noisekd"):
        model.noisekd = config["noisekd"]
    return model


def model_folder(source: str, trust_remote_code: bool = False) -> tuple[Path, dict]:
    """Return the folder of a model, and its Hub `id` and `revision` if it was downloaded; else a `ValueError`."""
    folder = Path(source.removeprefix("local-dir:")).expanduser()
    if folder.is_file():
        raise ValueError(
            f"{source} is a file, but a model is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}. For a file of "
            "weights give its timm architecture as the model, and the file as checkpoint."
        )
    if folder.is_dir():
        return folder, {}
    if source.startswith(("/", ".", "~", "local-dir:")):
        raise ValueError(f"There is no folder {str(folder)!r}.")
    repo_id, _, revision = source.removeprefix("hf-hub:").partition("@")
    files = [CONFIG_NAME, CARD_NAME, RECORD_NAME, "preprocessor_config.json", "model.safetensors.index.json"]
    files += ["model*.safetensors", *["*.py"] * trust_remote_code]
    try:
        copy = snapshot_download(repo_id, revision=revision or None, allow_patterns=files, library_name="hf_noisekd")
    except Exception as error:  # of the Hub's client, or of the HTTP libraries below it
        text = f"There is no folder {source!r}, and it could not be downloaded from the Hub: {_missing(error)}"
        raise ValueError(text) from error
    return Path(copy), {"id": repo_id, "revision": Path(copy).name}


def _missing(error: Exception) -> str:
    if not constants.HF_HUB_OFFLINE:
        return str(error)
    advice = "Fetch it once with `hf download`, or unset HF_HUB_OFFLINE."
    return f"it is not in the local cache, and HF_HUB_OFFLINE=1 forbids requests. {advice}"


def _load_timm_folder(folder: Path, architecture: str, model_args: Mapping[str, Any] | None) -> nn.Module:
    if not timm.is_model(architecture):
        advice = nearest_architecture(architecture) or " Import the package that registers it, or update timm."
        raise ValueError(f"timm {timm.__version__} knows no architecture {architecture!r}.{advice}")
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    # For saving it again: older versions of timm do not keep them.
    model.model_args = getattr(model, "model_args", {}) | {
        key: value for key, value in (model_args or {}).items() if key not in ("num_classes", "in_chans")
    }
    # Not by timm, which would also load pickled weights.
    _fit(model, safetensors.torch.load_file(folder / WEIGHTS_NAME))
    return model


def _load_transformers_folder(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    model, info = AutoModelForImageClassification.from_pretrained(
        str(folder),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        dtype=torch.float32,  # also if stored in another type
    )
    # transformers would go on with random weights for these.
    wrong = [key for key in info["missing_keys"] if not key.endswith(BATCH_COUNT)]
    wrong += [key for key, *_ in info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"the weights do not fit the architecture: {len(wrong)} are missing, first {wrong[0]!r}.")
    return model


def _load_checkpoint(name: str, path: Path) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    try:
        file = WeightsFile.read(path)
        name, model_args = file.full_name(name), file.model_args()
        model = _create_timm_model(name, pretrained=False, model_args=model_args)
        weights = file.weights(model.state_dict().keys())
        counts = _counts(model, weights)
        said = file.preprocessing(pretrained_cfg_of(model), counts["in_chans"])
        model = _create_timm_model(name, pretrained=False, model_args=model_args, pretrained_cfg_overlay=said, **counts)
        _fit(model, weights)
    except Exception as error:  # a file may contain anything
        raise ValueError(f"The checkpoint {str(path)!r} cannot be loaded: {error}") from error
    check_finite(model, f"checkpoint {str(path)!r}")
    cfg: Any = {key: value for key, value in pretrained_cfg_of(model).items() if key not in OF_OTHER_WEIGHTS}
    model.pretrained_cfg = cfg
    logger.info(
        "Preprocessing of %s: %s, %s, from %s.",
        path,
        format_size(input_size_of(model)),
        ", ".join(f"{key} {value}" for key, value in preprocessing_of(model).items()),
        "the arguments of its training" if said else f"timm's {name}, as the file says nothing of it",
    )
    return model


def _counts(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the numbers of classes and of input channels by the shapes of weights for a timm model of others."""
    own, channels = model.state_dict(), input_size_of(model)[0]
    counts = {"in_chans": channels}
    for name in _weights_of(model, "classifier") & weights.keys():
        counts["num_classes"] = len(weights[name])
    for name in _weights_of(model, "first_conv") & weights.keys() & own.keys():
        # A network may see an image as a smaller one of more channels.
        counts["in_chans"] = channels * weights[name].shape[1] // own[name].shape[1]
    return counts


def _weights_of(model: nn.Module, layer: str) -> set[str]:
    """Return the names of the weights of a layer in timm's `pretrained_cfg`, of which some networks have several."""
    names = pretrained_cfg_of(model).get(layer) or ()
    return {f"{name}.weight" for name in ((names,) if isinstance(names, str) else names)}


def _fit(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load weights, or raise a `ValueError` if names or shapes differ. Old files may lack the batch counts."""
    uncounted = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(BATCH_COUNT)}
    state_dict = uncounted | dict(state_dict)
    expected, found = ({k: list(v.shape) for k, v in state.items()} for state in (model.state_dict(), state_dict))
    if names := differing(expected, found):
        raise ValueError(
            f"the weights do not fit the architecture: {len(names)} tensors differ, first {names[0]!r}: the model has "
            f"{expected.get(names[0], 'nothing')}, the file {found.get(names[0], 'nothing')}."
        )
    model.load_state_dict(state_dict)


def differing(expected: Mapping, found: Mapping) -> list[str]:
    """Return the names whose values differ between two mappings, sorted."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _card_license(folder: Path) -> str | None:
    try:
        data = ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = _license_text(data.get("license_name")) if data.get("license") == "other" else None
    return named or _license_text(data.get("license"))


def _license_text(license: Any) -> str | None:
    """Return one licence or several as a string."""
    return ", ".join(map(str, license if isinstance(license, list | tuple) else [license])) if license else None
