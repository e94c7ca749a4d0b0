"""Facts about an image classifier of any library, and its logits.

It maps pixels `[B, C, H, W]` to logits `[B, num_classes]`, or, in transformers, to an output with `logits`.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def compute_logits(model: nn.Module | Callable, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the logits `[B, num_classes]` of `model` for `pixel_values` `[B, C, H, W]`."""
    output = model(pixel_values)
    return getattr(output, "logits", output)


def logits_of_blanks(model: nn.Module, input_size: tuple[int, int, int], role: str) -> torch.Tensor:
    """Return the logits `[2, num_classes]` of `model` for two blank images, or raise a `ValueError` with its `role`."""
    pixel_values = to_device_of(model, torch.zeros(2, *input_size))
    try:
        with torch.no_grad(), evaluation_mode(model):
            logits = compute_logits(model, pixel_values)
    except (RuntimeError, ValueError, AssertionError) as error:
        text = f"The {role} does not take images of {format_size(input_size)}: {error}. Give another size."
        raise ValueError(text) from error
    if not torch.is_tensor(logits) or logits.ndim != 2:
        found = f"a tensor of shape {list(logits.shape)}" if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(f"The {role} must map images to logits [B, num_classes], but it returned {found}.")
    return logits


def format_size(sizes: Iterable[int]) -> str:
    """Return a size as text, such as 3x32x32."""
    return "x".join(map(str, sizes))


def to_device_of(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return pixels on the device of `model`, in the type of its first parameter."""
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    return pixel_values.to(device_of(model), dtype)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer of `model`; the CPU where it has none."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def declared_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return the `(channels, height, width)` that `model` declares, or None."""
    cfg = pretrained_cfg_of(model)
    if cfg.get("input_size"):
        # timm does not change the channels in `pretrained_cfg` for other `in_chans`.
        return (getattr(model, "in_chans", cfg["input_size"][0]), *cfg["input_size"][1:])
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return (getattr(config, "num_channels", 3), height, width)


def with_input_size(model: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """Return `model`, or a copy with the same weights that declares images of `(channels, height, width)`."""
    if declared_input_size(model) == tuple(input_size):
        return model
    changed = copy.copy(model)
    if bare_model(model) is not model:
        changed._modules = dict(model._modules)  # which the two share otherwise
        changed.timm_model = copy.copy(model.timm_model)
    declare_input_size(changed, input_size)
    return changed


def declare_input_size(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Have a timm or transformers model declare images of `(channels, height, width)`; others declare nothing."""
    if cfg := pretrained_cfg_of(model):
        for key in ("test_input_size", "test_crop_pct"):
            cfg.pop(key, None)
        declare(model, cfg | {"input_size": tuple(input_size)})
    elif isinstance(config := getattr(model, "config", None), PretrainedConfig):
        model.config = config = copy.deepcopy(config)
        config.image_size = list(input_size[1:])


def declare(model: nn.Module, cfg: Mapping[str, Any]) -> None:
    """Have a model, and the timm model that it may wrap, declare another `pretrained_cfg`."""
    for part in (model, bare_model(model)):
        part.pretrained_cfg = dict(cfg)  # type: ignore[assignment]
    if isinstance(config := getattr(model, "config", None), PretrainedConfig):
        model.config = config = copy.deepcopy(config)
        config.pretrained_cfg = dict(cfg)


def declared_num_classes(model: nn.Module) -> int | None:
    """Return the number of classes that `model` declares, or None."""
    return model.config.num_labels if isinstance(model, PreTrainedModel) else getattr(model, "num_classes", None)


def other_task_of(model: nn.Module) -> str | None:
    """Return what a transformers model says to do other than to choose one of several classes, or None."""
    task = getattr(getattr(model, "config", None), "problem_type", None)
    return None if task == "single_label_classification" else task


def pretrained_cfg_of(model: nn.Module) -> dict:
    """Return timm's `pretrained_cfg` of `model` or of the timm model that it wraps, or an empty dict."""
    # transformers keeps the entries of a checkpoint in `config` alone, not in the timm model that it wraps.
    cfg = getattr(model, "pretrained_cfg", None) or getattr(getattr(model, "timm_model", None), "pretrained_cfg", None)
    return dict(cfg or {}) | dict(getattr(getattr(model, "config", None), "pretrained_cfg", None) or {})


def bare_model(model: nn.Module) -> nn.Module:
    """Return the timm model inside transformers' wrapper, or any other model as it is."""
    bare = getattr(model, "timm_model", model)
    return bare if isinstance(bare, nn.Module) else model


def nonfinite_tensor(model: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer that holds a NaN or an infinity, or None."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None


def check_finite(model: nn.Module, role: str) -> None:
    """Raise a `ValueError` if a parameter or buffer of `model`, called `role`, holds a NaN or an infinity."""
    if name := nonfinite_tensor(model):
        raise ValueError(f"The {role} is damaged: its {name!r} holds a NaN or an infinity. Download or save it again.")


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Context under which all modules of `models` are in evaluation mode; their modes are restored after it."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def compute_alike(
    model: nn.Module, other: nn.Module, input_size: tuple[int, int, int], tolerance: float = 1e-3
) -> bool:
    """Return whether two models give the same logits for noise, within a share of the largest.

    `other` goes to the device of `model`.
    """
    pixel_values = to_device_of(model, torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)))
    with evaluation_mode(model, other.to(pixel_values)):
        # Copies, because some models change their input in place.
        logits, others = (compute_logits(each, pixel_values.clone()) for each in (model, other))
    return torch.allclose(logits, others, rtol=0, atol=tolerance * logits.abs().max().item(), equal_nan=True)


def architecture_of(model: nn.Module) -> str:
    """Return timm's name of the architecture, or else the name of the class."""
    return pretrained_cfg_of(model).get("architecture") or type(model).__name__


def class_names(model: nn.Module, num_classes: int) -> list[str]:
    """Return the class names of a model, or else numbers: without names transformers would use those of ImageNet."""
    names: Any = pretrained_cfg_of(model).get("label_names")
    if names is None:
        names = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(names, Mapping):
        # By number, which JSON stores as a string, and of which timm lets some be missing; or with their descriptions.
        numbered = {int(key): name for key, name in names.items() if str(key).isdecimal()}
        by_number = len(numbered) == len(names) and max(numbered, default=num_classes) < num_classes
        names = [numbered.get(index, index) for index in range(num_classes)] if by_number else [*names]
    known = isinstance(names, list | tuple) and len(names) == num_classes
    return list(map(str, names if known else range(num_classes)))


def class_descriptions(model: nn.Module) -> dict[str, str]:
    """Return what timm's `pretrained_cfg` of a model says of its classes, by name."""
    cfg = pretrained_cfg_of(model)
    names = cfg.get("label_names")
    if isinstance(names, Mapping) and any(map(str.isdecimal, map(str, names))):
        names = None
    found = cfg.get("label_descriptions") or names
    return {str(name): str(text) for name, text in found.items()} if isinstance(found, Mapping) else {}


def copied_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all parameters and buffers of `model`."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of `model`."""
    return sum(parameter.numel() for parameter in model.parameters())


def teacher_identity(teacher_model: nn.Module) -> dict:
    """Return architecture and size of a teacher, with Hub id and revision, or else a SHA-256 over all its state."""
    identity = {"architecture": architecture_of(teacher_model), "parameters": count_parameters(teacher_model)}
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
