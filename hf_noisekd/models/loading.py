"""Load a teacher or a student from where people keep them: a name, the Hub, a folder, a file.

No pickled code runs. A loaded model keeps its Hub id, revision and licence in `origin`, as far as there are any.
"""

import argparse
import difflib
import json
import pickle
from collections.abc import Collection, Iterator, Mapping
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
from hf_noisekd.models.classifier import nonfinite_tensor, pretrained_cfg_of

# In how many batches a BatchNorm layer was trained, which no answer depends on.
BATCH_COUNT = "num_batches_tracked"


def load_teacher(
    source: str | Path | nn.Module, *, checkpoint: str | Path | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Load a trained classifier.

    Args:
        source: A module, returned as it is; a timm name with pretrained weights (`resnet34.a1_in1k`); a Hub id
            (`org/repo`, `hf-hub:org/repo@revision`); or a folder in timm's or transformers' layout, with safetensors.
        checkpoint: File of weights for the timm architecture that `source` names: safetensors, or what `torch.save`
            wrote, read with `weights_only=True`. The numbers of classes and of input channels are read off it.
        trust_remote_code: Run the Python code that a transformers model on the Hub brings along.

    Raises:
        ValueError: There is no such model, or it is damaged; the message says what was found.
    """
    if checkpoint is not None:
        return _load_checkpoint(str(source), Path(checkpoint).expanduser())
    return _load(source, trust_remote_code, pretrained=True)


def load_student(
    source: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a student like a teacher, or build one with random weights where `source` is a timm name.

    `num_classes` and `input_size`, `(channels, height, width)`, are those of a model built by name, and `model_args`
    what timm builds it with beside them. A checkpoint records these.

    Raises:
        ValueError: There is no such model, or it is damaged, or timm does not build it with such arguments; the message
            says what was found.
    """
    kwargs: dict[str, Any] = {"num_classes": num_classes}
    if input_size is not None:
        kwargs |= {"in_chans": input_size[0], "pretrained_cfg_overlay": {"input_size": tuple(input_size)}}
    if not model_args:
        return _load(source, trust_remote_code, pretrained=False, **kwargs)
    if isinstance(source, nn.Module) or has_weights(str(source)):
        raise ValueError("Arguments for timm are for a student given by its timm name, and this one is built already.")
    try:
        model = _load(source, trust_remote_code, pretrained=False, **kwargs | dict(model_args))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm does not build {source!r} with {_as_text(model_args)}: {error}") from error
    noted: Any = getattr(model, "model_args", {})
    model.model_args = noted | dict(model_args)
    return model


def _as_text(model_args: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in model_args.items())


def _load(source: str | Path | nn.Module, trust_remote_code: bool, pretrained: bool, **kwargs) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str | Path):
        raise ValueError(f"A model must be a name, a folder or an nn.Module, got {type(source).__name__}.")
    source = str(source)
    if has_weights(source):
        return _load_with_weights(source, trust_remote_code)
    model = _create_timm_model(source, pretrained=pretrained, **kwargs)
    if pretrained:
        cfg = pretrained_cfg_of(model)
        origin: Any = {"id": cfg.get("hf_hub_id"), "license": _license_text(cfg.get("license"))}
        weights = try_to_load_from_cache(cfg["hf_hub_id"], WEIGHTS_NAME) if cfg.get("hf_hub_id") else None
        if isinstance(weights, str):
            origin["revision"] = Path(weights).parent.name
        model.origin = origin
    return model


def _create_timm_model(name: str, **kwargs) -> nn.Module:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(
            f"Unknown model {name!r}: it is no timm model, no folder, and no Hub id of the form 'org/repo'."
            + nearest_architecture(architecture)
        )
    try:
        return timm.create_model(name, **kwargs)
    except (OSError, HFValidationError) as error:
        raise ValueError(f"The weights of the timm model {name!r} could not be had: {_missing(error)}") from error
    except RuntimeError as error:  # timm's answer to a weight tag it does not know
        raise ValueError(f"Cannot build the timm model {name!r}: {error}") from error


def nearest_architecture(architecture: str) -> str:
    """Return a question that names timm's architectures of a similar name, or nothing, for an error message."""
    nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    return f" Did you mean {', '.join(nearest)}?" if nearest else ""


def has_weights(source: str) -> bool:
    """Whether `source` points at saved weights, rather than naming an architecture."""
    return "/" in source or ":" in source or Path(source).exists()


def _load_with_weights(source: str, trust_remote_code: bool) -> nn.Module:
    origin: Any
    folder, origin = model_folder(source, trust_remote_code)
    if origin and not any(folder.glob("model*.safetensors")):
        raise ValueError(f"{source} has no {WEIGHTS_NAME} on the Hub: ask for one there, or convert its weights.")
    check_model_folder(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_NAME} holds no JSON object")
        if "architecture" in config:
            model = _load_timm_folder(folder, config["architecture"], config.get("model_args"))
        else:
            model = _load_transformers_folder(folder, trust_remote_code)
    except Exception as error:  # a configuration may hold anything
        raise ValueError(f"The model {source!r} cannot be loaded: {error}") from error
    if name := nonfinite_tensor(model):
        raise ValueError(f"The model {source!r} is damaged: its {name!r} holds a NaN or an infinity. Get it again.")
    license = _license_text(pretrained_cfg_of(model).get("license")) or _card_license(folder)
    model.origin = origin | {"license": license}
    if config.get("noisekd"):
        model.noisekd = config["noisekd"]
    return model


def model_folder(source: str, trust_remote_code: bool = False) -> tuple[Path, dict]:
    """Return the folder of a model, downloaded where `source` is no local one, and its Hub `id` and `revision`.

    Raises:
        ValueError: There is none, here or on the Hub.
    """
    folder = Path(source.removeprefix("local-dir:")).expanduser()
    if folder.is_file():
        raise ValueError(
            f"{source} is a file: a model is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}. For a file of weights "
            "name its timm architecture, and pass the file as checkpoint."
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
    except Exception as error:  # of the Hub's client, and of either of the HTTP libraries below it
        text = f"There is no folder {source!r}, and no such model could be had from the Hub: {_missing(error)}"
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
    # So that it is saved again with what it was built with, which older versions of timm forget.
    model.model_args = getattr(model, "model_args", {}) | {
        key: value for key, value in (model_args or {}).items() if key not in ("num_classes", "in_chans")
    }
    # By our own hand: timm would read whatever else lies in the folder, older versions by unpickling it.
    _fit(model, safetensors.torch.load_file(folder / WEIGHTS_NAME))
    return model


def _load_transformers_folder(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    model, info = AutoModelForImageClassification.from_pretrained(
        str(folder),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        dtype=torch.float32,  # whatever it is stored in
    )
    # transformers would go on with random weights in place of those that are missing.
    wrong = [
        *(key for key in info["missing_keys"] if not key.endswith(BATCH_COUNT)),
        *(key for key, *_ in info["mismatched_keys"]),
    ]
    if wrong:
        raise ValueError(f"the weights do not fit the architecture: {len(wrong)} are missing, first {wrong[0]!r}.")
    return model


def _load_checkpoint(architecture: str, checkpoint: Path) -> nn.Module:
    if not checkpoint.is_file():
        raise ValueError(f"There is no file {str(checkpoint)!r}{', it is no ordinary one' * checkpoint.exists()}.")
    model = _create_timm_model(architecture, pretrained=False)
    cfg = pretrained_cfg_of(model)
    try:
        state_dict = _weights_among(_read_checkpoint(checkpoint), model.state_dict().keys())
        kwargs = {}
        if f"{cfg.get('classifier')}.weight" in state_dict:
            kwargs["num_classes"] = len(state_dict[f"{cfg['classifier']}.weight"])
        if f"{cfg.get('first_conv')}.weight" in state_dict:
            kwargs["in_chans"] = state_dict[f"{cfg['first_conv']}.weight"].shape[1]
        model = _create_timm_model(architecture, pretrained=False, **kwargs)
        _fit(model, state_dict)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} cannot be loaded: it is damaged, or holds Python objects beside "
            "weights, which may run code. Save the `state_dict()` of the model alone."
        ) from error
    except Exception as error:  # a file may hold anything
        raise ValueError(f"The checkpoint {str(checkpoint)!r} cannot be loaded: {error}") from error
    if name := nonfinite_tensor(model):
        raise ValueError(f"The checkpoint {str(checkpoint)!r} is damaged: its {name!r} holds a NaN or an infinity.")
    return model


def _read_checkpoint(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # of timm's training script
        return torch.load(path, map_location="cpu", weights_only=True)


def _weights_among(content: Any, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint that are called most like `names`; averaged weights before others."""
    found = list(_named_tensors(content))
    if not found:
        raise ValueError("it holds no tensors with names")
    return max(found, key=lambda tensors: len(tensors.keys() & names))


def _named_tensors(content: Any, depth: int = 8) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the mappings from names to tensors in what was saved, also those below a prefix, such as `module.`."""
    if not isinstance(content, Mapping) or depth == 0:
        return
    # timm, too, takes the weights that were averaged over the training.
    for key in sorted(content, key=lambda key: "ema" not in str(key)):
        yield from _named_tensors(content[key], depth - 1)
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}
    if tensors:
        yield tensors
    for prefix in dict.fromkeys(name.partition(".")[0] + "." for name in tensors if "." in name):
        below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        yield from _named_tensors(below, depth - 1)


def _fit(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load weights, or raise a `ValueError` where names or shapes differ; older files do not count batches."""
    uncounted = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(BATCH_COUNT)}
    state_dict = uncounted | dict(state_dict)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state_dict.items()}
    if names := differing(expected, found):
        raise ValueError(
            f"the weights do not fit the architecture: {len(names)} tensors differ, first {names[0]!r}: the model has "
            f"{expected.get(names[0], 'nothing')}, the file {found.get(names[0], 'nothing')}."
        )
    model.load_state_dict(state_dict)


def differing(expected: Mapping, found: Mapping) -> list[str]:
    """Return the names under which two mappings do not hold the same, in order."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _card_license(folder: Path) -> str | None:
    try:
        data = ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None
    license = _license_text(data.get("license"))
    return _license_text(data.get("license_name")) or license if license == "other" else license


def _license_text(license: Any) -> str | None:
    """Return a licence, or several, as a text."""
    return ", ".join(map(str, license if isinstance(license, list | tuple) else [license])) if license else None
