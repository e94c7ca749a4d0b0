"""Load a teacher or a student from where people keep them, and save one so that timm and transformers read it.

Only weights in safetensors are read from a folder or the Hub, and a file that the user points at by `weights_only`; no
pickled code runs. A model that was loaded remembers, in the attribute `origin`, its Hub id, revision and licence, as
far as there are any, and in `noisekd` what a folder of this package says about how it was made.
"""

import contextlib
import difflib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from timm.models import load_state_dict
from timm.models._hub import save_config_for_hf
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, BitImageProcessor, PreTrainedModel

from hf_noisekd.models.classifier import declared_input_size, noisekd_section, pretrained_cfg_of

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
RECORD_NAME = "noisekd.json"
# What a student takes over from its teacher's `pretrained_cfg`: how to turn an image into pixels.
PREPROCESSING_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
# What timm says about the published weights of an architecture, and does not hold for a student of that architecture.
OF_OTHER_WEIGHTS = (
    "tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes", "test_input_size",
    "test_crop_pct",
)  # fmt: skip


def load_teacher(
    source: str | Path | nn.Module, *, checkpoint: str | Path | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Load a trained classifier.

    Args:
        source: A module, returned as it is; a timm name with pretrained weights (`resnet34.a1_in1k`); a Hub id
            (`org/repo`, `org/repo@revision`, either with `hf-hub:` before it); or a folder in timm's or transformers'
            layout.
        checkpoint: File of weights for the timm architecture that `source` names: safetensors, or what `torch.save`
            wrote, read with `weights_only=True`. The numbers of classes and of input channels are read off it.
        trust_remote_code: Run the Python code that a transformers model on the Hub brings along.

    Raises:
        ValueError: There is no such model, or it is damaged; the message says what was found.
    """
    if checkpoint is not None:
        return _load_checkpoint(source, Path(checkpoint).expanduser())
    return _load(source, trust_remote_code, pretrained=True)


def load_student(
    source: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Build a student, or load one to train further.

    Args:
        source: A module, returned as it is; a timm name (`resnet18_cifar`), which gives random weights; or a Hub id or
            folder as in [`load_teacher`], which gives the weights found there.
        num_classes: Classes of a model built by name.
        input_size: `(channels, height, width)` of a model built by name.
        trust_remote_code: As in [`load_teacher`].

    Raises:
        ValueError: There is no such model, or it is damaged; the message says what was found.
    """
    kwargs = {}
    if not isinstance(source, nn.Module) and not has_weights(str(source)):
        kwargs["num_classes"] = num_classes
        if input_size is not None:
            kwargs |= {"in_chans": input_size[0], "pretrained_cfg_overlay": {"input_size": tuple(input_size)}}
    return _load(source, trust_remote_code, pretrained=False, **kwargs)


def save_model(model: nn.Module, folder: str | Path, *, teacher_model: nn.Module | None = None) -> None:
    """Save a classifier: timm models in timm's Hub format, transformers models in theirs.

    timm's format is `model.safetensors` with the bare timm names and a `config.json` that timm, transformers'
    `AutoModelForImageClassification` and `AutoImageProcessor` all read. Of any other module only the weights can be
    saved, with a warning. What stands in `model.noisekd` becomes the section `noisekd` of `config.json`.

    A new folder appears whole or not at all. In a folder that is there each file is replaced whole.

    Args:
        model: The classifier.
        folder: Where to write; made if missing.
        teacher_model: The teacher whose preprocessing and class names the model shares.
    """
    bare = getattr(model, "timm_model", model)  # the timm model in transformers' wrapper
    section = noisekd_section(model)
    with replacing_files(folder) as staging:
        if isinstance(bare, PreTrainedModel):
            if section:
                bare.config.noisekd = section
            if teacher_model is not None:
                names = class_names(teacher_model, bare.config.num_labels)
                bare.config.id2label = dict(enumerate(names))
                bare.config.label2id = {name: index for index, name in enumerate(names)}
            if processor := image_processor_of(bare if teacher_model is None else teacher_model):
                processor.save_pretrained(staging)
            bare.save_pretrained(staging)
            return
        # Copies in the default memory format: safetensors stores contiguous tensors that share no memory.
        state_dict = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in bare.state_dict().items()
        }
        safetensors.torch.save_file(state_dict, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        if pretrained_cfg_of(bare).get("architecture"):
            like = model if teacher_model is None else teacher_model
            _save_timm_config(bare, staging / CONFIG_NAME, like, section)
        else:
            logger.warning(
                "%s is not a timm or transformers model: its weights were saved, without a %s to build it from.",
                type(model).__name__,
                CONFIG_NAME,
            )


def teacher_identity(teacher_model: nn.Module) -> dict:
    """Return what identifies a teacher: its architecture and size, and its Hub id and revision, or else a hash.

    The hash is SHA-256 over the names, types, shapes and bytes of all parameters and buffers.
    """
    identity = {
        "architecture": architecture_of(teacher_model),
        "parameters": sum(parameter.numel() for parameter in teacher_model.parameters()),
    }
    origin = getattr(teacher_model, "origin", {})
    identity |= {key: origin[key] for key in ("id", "revision", "license") if origin.get(key)}
    if "revision" not in identity:
        state = hashlib.sha256()
        for name, tensor in sorted(teacher_model.state_dict().items()):
            array = tensor.detach().cpu().contiguous()
            state.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            state.update(array.flatten().view(torch.uint8).numpy().tobytes())
        identity["sha256"] = state.hexdigest()
    return identity


def architecture_of(model: nn.Module) -> str:
    """Return timm's name of the architecture, or the name of the class."""
    return pretrained_cfg_of(model).get("architecture") or type(model).__name__


@contextlib.contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """Context that gives an empty folder to write files to, which go to `folder` once all of them are written.

    If `folder` is not there yet it appears whole or, after an exception or a kill, not at all. Otherwise each file is
    replaced whole, one after another; other files stay.
    """
    folder = Path(folder)
    exists = folder.exists()
    staging = folder / ".saving" if exists else folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for file in staging.iterdir():
            file.chmod(staging.stat().st_mode & 0o666)  # as the user's umask has it; safetensors writes 0600
            with open(file, "r+b") as written:  # Windows synchronises no file that is open for reading
                os.fsync(written.fileno())
        if not exists:
            # Another process may have made the folder meanwhile, for its own files.
            with contextlib.suppress(OSError):
                staging.rename(folder)
                return
        # The configuration last: it tells what the weights are.
        for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_model_folder(folder: Path) -> None:
    """Check that `folder` has the files of a model.

    Raises:
        ValueError: There is no such folder, or a file is missing; the message says what was found instead.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    for name, pattern in ((CONFIG_NAME, "config.json"), (WEIGHTS_NAME, "model*.safetensors")):
        if not any(folder.glob(pattern)):
            pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
            hint = (
                f" It has {', '.join(pickles)}, which may run code when it is read: convert it to safetensors, or name "
                "its timm architecture and pass it as checkpoint, to be read with weights_only=True."
                if pickles
                else ""
            )
            raise ValueError(f"{folder} is not a model folder: it has no {name}.{hint}")


def preprocessing_of(model: nn.Module) -> dict:
    """Return how `model` wants its images, in timm's terms (`mean`, `std`, `interpolation`, `crop_pct`, ...).

    timm models say it in `pretrained_cfg`, transformers models in the image processor beside their weights. What is not
    known is left out.
    """
    cfg = pretrained_cfg_of(model)
    if cfg or not isinstance(model, PreTrainedModel):
        return {key: cfg[key] for key in PREPROCESSING_KEYS if cfg.get(key) is not None}
    processor = image_processor_of(model)
    if processor is None:
        return {}
    processor = processor.to_dict()
    preprocessing = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    if processor.get("resample") is not None:
        preprocessing["interpolation"] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(
            int(processor["resample"])
        )
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
    resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
    return BitImageProcessor(
        size=size if squash else {"shortest_edge": int(min(input_size[1:]) / preprocessing.get("crop_pct", 1.0))},
        do_center_crop=not squash,
        crop_size=size,
        resample=resample[preprocessing.get("interpolation", "bicubic")],
        image_mean=list(preprocessing["mean"]),
        image_std=list(preprocessing["std"]),
    )


def check_config_can_be_saved(model: nn.Module) -> None:
    """Check that [`save_model`] can write the configuration of `model`.

    Raises:
        ValueError: It is a timm model that was built with an argument which a configuration cannot hold.
    """
    bare = getattr(model, "timm_model", model)
    if pretrained_cfg_of(bare).get("architecture") and not isinstance(bare, PreTrainedModel):
        with tempfile.TemporaryDirectory() as folder:
            try:
                _save_timm_config(bare, Path(folder) / CONFIG_NAME, bare, {})
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"The student could not be saved: {error}. Build it with arguments that a {CONFIG_NAME} can hold, "
                    "such as texts and numbers."
                ) from error


def _save_timm_config(model: nn.Module, path: Path, like: nn.Module, section: Mapping) -> None:
    """Write the configuration of `model`, with the preprocessing and the classes of `like`, its teacher or itself."""
    preprocessing = preprocessing_of(like) | {"input_size": declared_input_size(like) or declared_input_size(model)}
    label_names = class_names(like, model.num_classes)
    save_config_for_hf(
        model,
        path,
        model_config={"pretrained_cfg": preprocessing, "label_names": label_names}
        | ({"noisekd": dict(section)} if section else {}),
        model_args={"in_chans": declared_input_size(model)[0]} | getattr(model, "model_args", {}),
    )
    config = json.loads(path.read_text())
    # transformers passes `num_classes` by itself and fails on a second one.
    config["model_args"].pop("num_classes", None)
    if getattr(like, "timm_model", like) is not model:
        for key in OF_OTHER_WEIGHTS:
            config["pretrained_cfg"].pop(key, None)
        if license_ := getattr(like, "origin", {}).get("license"):
            config["pretrained_cfg"]["license"] = license_
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


def _load(source: str | Path | nn.Module, trust_remote_code: bool, **kwargs) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str | Path):
        raise ValueError(f"A model must be a name, a folder or an nn.Module, got {type(source).__name__}.")
    source = str(source)
    if has_weights(source):
        return _load_with_weights(source, trust_remote_code)
    model = _create_timm_model(source, **kwargs)
    if kwargs.get("pretrained"):
        cfg = pretrained_cfg_of(model)
        model.origin = {"id": cfg.get("hf_hub_id"), "license": cfg.get("license")}
        weights = try_to_load_from_cache(cfg["hf_hub_id"], WEIGHTS_NAME) if cfg.get("hf_hub_id") else None
        if isinstance(weights, str):
            model.origin["revision"] = Path(weights).parent.name
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
    folder, origin = model_folder(source, trust_remote_code)
    if origin and not any(folder.glob("model*.safetensors")):
        raise ValueError(f"{source} has no {WEIGHTS_NAME} on the Hub: ask for one there, or convert its weights.")
    check_model_folder(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_NAME} holds no JSON object")
        if "architecture" in config:
            model = _load_timm_folder(folder, config)
        else:
            model = _load_transformers_folder(folder, trust_remote_code)
    except (safetensors.SafetensorError, RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The model {source!r} cannot be loaded: {error}") from error
    model.origin = origin | {"license": pretrained_cfg_of(model).get("license") or _card_license(folder)}
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
    patterns = [
        CONFIG_NAME,
        "model*.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        CARD_NAME,
        RECORD_NAME,
    ]
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision or None,
                allow_patterns=patterns + ["*.py"] * trust_remote_code,
                library_name="hf_noisekd",
            )
        )
    except Exception as error:  # of the Hub's client, and of either of the HTTP libraries below it
        raise ValueError(
            f"There is no folder {source!r}, and no such model could be had from the Hub: {_missing(error)}"
        ) from error
    return folder, {"id": repo_id, "revision": folder.name}


def _missing(error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return (
            "it is not in the local cache, and HF_HUB_OFFLINE=1 forbids requests. Fetch it once with `hf download`, or "
            "unset HF_HUB_OFFLINE."
        )
    return str(error)


def _load_timm_folder(folder: Path, config: Mapping) -> nn.Module:
    if not timm.is_model(config["architecture"]):
        raise ValueError(
            f"timm {timm.__version__} knows no architecture {config['architecture']!r}."
            + (nearest_architecture(config["architecture"]) or " Import the package that registers it, or update timm.")
        )
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
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
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if wrong:
        raise ValueError(f"the weights do not fit the architecture: {len(wrong)} are missing, first {wrong[0]!r}.")
    return model


def _load_checkpoint(architecture: str, checkpoint: Path) -> nn.Module:
    try:
        state_dict = load_state_dict(str(checkpoint), weights_only=True)
        cfg = pretrained_cfg_of(_create_timm_model(architecture, pretrained=False))
        kwargs = {}
        if f"{cfg.get('classifier')}.weight" in state_dict:
            kwargs["num_classes"] = len(state_dict[f"{cfg['classifier']}.weight"])
        if f"{cfg.get('first_conv')}.weight" in state_dict:
            kwargs["in_chans"] = state_dict[f"{cfg['first_conv']}.weight"].shape[1]
        model = _create_timm_model(architecture, pretrained=False, **kwargs)
        _fit(model, state_dict)
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {str(checkpoint)!r}.") from error
    except (safetensors.SafetensorError, RuntimeError, OSError, AttributeError, EOFError) as error:
        raise ValueError(f"The checkpoint {str(checkpoint)!r} cannot be loaded: {error}") from error
    return model


def _fit(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load weights that must fit exactly.

    Raises:
        ValueError: Names or shapes differ; the message names the first.
    """
    expected, found = (
        {name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (model.state_dict(), state_dict)
    )
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
    """Return the licence that the card of a model folder names, or None."""
    try:
        return ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
