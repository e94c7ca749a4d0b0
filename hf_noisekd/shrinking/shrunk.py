"""Networks that were cut out of a timm model: their description, and building them again from it.

If arguments of the timm model describe the network, it is built by that model's name. For all others importing this
module registers the architecture `shrunk`, which timm and transformers then load like any other.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, load_pretrained, register_model
from timm.models.resnet import ResNet
from torch import nn

from hf_noisekd.models.classifier import architecture_of, bare_model, declared_input_size, pretrained_cfg_of
from hf_noisekd.shrinking.blocks import Place, remove_blocks

ARCHITECTURE = "shrunk"
Sizes = Mapping[str, Mapping[str, Any]]

default_cfgs = generate_default_cfgs({ARCHITECTURE: {}})


@register_model
def shrunk(
    pretrained: bool = False,
    *,
    base: str,
    base_args: Mapping[str, Any] | None = None,
    removed: Sequence[Sequence[str]] = (),
    sizes: Sizes | None = None,
    **kwargs,
) -> nn.Module:
    """Build a network that was cut out of a timm model.

    `base` and `base_args` are timm's name and the arguments of the original. `removed` has each removed block as the
    name of its stage and its name there; `sizes` is what changed in size after that, by module: shapes of tensors, and
    attributes like `out_channels`. `pretrained` loads the weights that stand beside the configuration.
    """
    base_args, sizes, removed = dict(base_args or {}), dict(sizes or {}), [list(place) for place in removed]
    model = timm.create_model(base, **base_args | kwargs)
    remove_blocks(model, [Place(*place) for place in removed])
    _resize(model, sizes)
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"architecture": ARCHITECTURE}
    if pretrained:
        load_pretrained(model, model.pretrained_cfg, model.num_classes, _input_channels(model))
    # timm noted the arguments of the base; a checkpoint must record these.
    model._model_args = {}
    model.model_args = {"base": base, "base_args": base_args, "removed": removed, "sizes": sizes}
    return model


def timm_model_of(model: nn.Module) -> nn.Module:
    """Return a timm model, or the one in transformers' wrapper; for any other model raise a `ValueError`."""
    bare = bare_model(model)
    if not timm.is_model(architecture_of(bare)):
        raise ValueError(
            f"{type(model).__name__} is no timm model, so what is cut out of it could not be built again: give a "
            "student instead, such as student=resnet18."
        )
    return bare


def built_with(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of a timm model, as far as they are known, but for the numbers of classes and channels."""
    # timm notes them since about 1.0.30.
    noted = dict(getattr(model, "_model_args", {})) | dict(getattr(model, "model_args", {}))
    return {key: value for key, value in noted.items() if key not in ("num_classes", "in_chans")}


def build_cut(cut: nn.Module, teacher: nn.Module, removed: Collection[Place]) -> nn.Module:
    """Return a timm model with the shapes and weights of `cut`, which can be saved and built again.

    `cut` is a copy of `teacher`, a timm model, without the blocks `removed` and some channels. If timm builds a model
    of the teacher's name with other layers, raise a `ValueError`.
    """
    base, base_args = architecture_of(teacher), built_with(teacher)
    given: dict[str, Any] = {"num_classes": teacher.num_classes, "in_chans": _input_channels(teacher)}
    given["pretrained_cfg"] = pretrained_cfg_of(teacher)
    model = _resnet_like(cut, base, base_args | given) if isinstance(cut, ResNet) else None
    if model is None:
        whole = timm.create_model(base, **base_args | given)
        if shapes_of(whole) != shapes_of(teacher):
            raise ValueError(
                f"timm builds {base} with other layers than the teacher has, which was changed by hand: give a "
                "student, or the teacher as timm builds it."
            )
        model = whole
        if removed or shapes_of(whole) != shapes_of(cut):
            remove_blocks(whole, removed)
            given |= {"removed": [tuple(place) for place in removed], "sizes": _sizes(cut, whole)}
            model = timm.create_model(ARCHITECTURE, base=base, base_args=base_args, **given)
    model.load_state_dict(cut.state_dict())
    return model.eval()


def _input_channels(model: nn.Module) -> int:
    """Return the number of channels of a timm model's images."""
    return (declared_input_size(model) or (3,))[0]


def _resnet_like(cut: Any, base: str, base_args: Mapping[str, Any]) -> nn.Module | None:
    """Return a timm ResNet with the shapes of `cut`, or None if its arguments cannot describe them."""
    stages = [cut.layer1, cut.layer2, cut.layer3, cut.layer4]
    layers, channels = tuple(map(len, stages)), tuple(stage[0].conv1.out_channels for stage in stages)
    try:
        model = timm.create_model(base, **{**base_args, "layers": layers, "channels": channels})
    except (TypeError, ValueError, AssertionError):
        return None
    return model if shapes_of(model) == shapes_of(cut) else None


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of all parameters and buffers by name."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _sizes(cut: nn.Module, base: nn.Module) -> Sizes:
    """Return the sizes in which the modules of `cut` differ from those of the same names in `base`."""
    sizes: dict[str, dict[str, Any]] = {}
    others = dict(base.named_modules())
    for name, module in cut.named_modules():
        changed: dict[str, Any] = {}
        for key, value in (module._parameters | module._buffers | vars(module)).items():
            other = getattr(others[name], key, value)
            if isinstance(value, torch.Tensor) and value.shape != other.shape:
                changed[key] = list(value.shape)
            elif _is_size(value) and value != other:
                changed[key] = list(value) if isinstance(value, tuple) else value
        if changed:
            sizes[name] = changed
    return sizes


def _is_size(value: Any) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def _resize(model: nn.Module, sizes: Sizes) -> None:
    for name, changed in sizes.items():
        module = model.get_submodule(name)
        for key, value in changed.items():
            old = getattr(module, key)
            if isinstance(old, torch.Tensor):
                part = old.detach()[tuple(map(slice, value))].clone()
                setattr(module, key, nn.Parameter(part) if isinstance(old, nn.Parameter) else part)
            else:
                setattr(module, key, tuple(value) if isinstance(value, list) else value)
