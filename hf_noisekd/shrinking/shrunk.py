"""Networks that were cut out of a timm model: how they are described, and built again from the description.

Where the arguments of the timm model describe them they are built by its name. For all others importing this module
registers the architecture `shrunk`, which timm and transformers then read as any other.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
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

    Args:
        pretrained: Load the weights that stand beside the configuration.
        base: timm's name of what it was cut out of.
        base_args: What that was built with.
        removed: The blocks that were left out, each as the name of its stage and its own.
        sizes: What changed its size then, by module: the shapes of tensors, and the numbers that go with them.
        **kwargs: What timm passes on to every model, such as `num_classes`.
    """
    base_args, sizes = dict(base_args or {}), {name: dict(values) for name, values in (sizes or {}).items()}
    removed = [list(place) for place in removed]
    model = timm.create_model(base, **base_args | kwargs)
    remove_blocks(model, [Place(*place) for place in removed])
    _resize(model, sizes)
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"architecture": ARCHITECTURE}
    if pretrained:
        load_pretrained(model, model.pretrained_cfg, model.num_classes, _input_channels(model))
    # What timm noted holds for the base; this is what a checkpoint has to record beside the name.
    model._model_args = {}
    model.model_args = {"base": base, "base_args": base_args, "removed": removed, "sizes": sizes}
    return model


def timm_model_of(model: nn.Module) -> nn.Module:
    """Return a timm model, or the one in transformers' wrapper.

    Raises:
        ValueError: It is neither.
    """
    bare = bare_model(model)
    if not timm.is_model(architecture_of(bare)):
        raise ValueError(
            f"{type(model).__name__} is no timm model, so what is cut out of it could not be built again: name a "
            "student instead."
        )
    return bare


def build_cut(cut: nn.Module, teacher: nn.Module, removed: Collection[Place]) -> nn.Module:
    """Return a timm model with the shapes and the weights of `cut`, which can be saved and built again.

    Args:
        cut: A copy of `teacher` from which blocks and channels were cut.
        teacher: A timm model.
        removed: The blocks that were, by their names in `teacher`.

    Raises:
        ValueError: timm does not build the teacher by its name.
    """
    cfg = pretrained_cfg_of(teacher)
    base, base_args = architecture_of(teacher), _arguments_of(teacher)

    def build(**kwargs) -> nn.Module:
        given = {"num_classes": teacher.num_classes, "in_chans": _input_channels(teacher), "pretrained_cfg": cfg}
        return timm.create_model(base, **base_args | given | kwargs)

    found = shapes_of(cut)
    model = None
    if isinstance(cut, ResNet):
        model = _if_it_fits(found, lambda: build(**_resnet_arguments(cut)))
    if model is None:
        whole = build()
        if shapes_of(whole) != shapes_of(teacher):
            raise ValueError(
                f"timm builds {base} with other layers than the teacher has, which was changed by hand: name a "
                "student, or give the teacher as timm builds it."
            )
        remove_blocks(whole, removed)
        model = timm.create_model(
            ARCHITECTURE,
            base=base,
            base_args=base_args,
            removed=[tuple(place) for place in removed],
            sizes=_sizes(cut, whole),
            num_classes=teacher.num_classes,
            in_chans=_input_channels(teacher),
            pretrained_cfg=cfg,
        )
    model.load_state_dict(cut.state_dict())
    return model.eval()


def _input_channels(model: nn.Module) -> int:
    """Return the number of channels of the images that a timm model takes."""
    return (declared_input_size(model) or (3,))[0]


def _arguments_of(model: nn.Module) -> dict[str, Any]:
    """Return what a timm model was built with beside its name, its classes and its channels."""
    # timm notes it since 1.0.30 or so, without what it takes for a matter of training.
    noted = dict(getattr(model, "_model_args", {})) | dict(getattr(model, "model_args", {}))
    return {key: value for key, value in noted.items() if key not in ("num_classes", "in_chans")}


def _resnet_arguments(cut: Any) -> dict[str, Any]:
    """Return the arguments of timm's ResNets that may describe `cut`."""
    stages = [cut.layer1, cut.layer2, cut.layer3, cut.layer4]
    return {"layers": tuple(map(len, stages)), "channels": tuple(stage[0].conv1.out_channels for stage in stages)}


def _if_it_fits(found: Mapping[str, torch.Size], build: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        model = build()
    except (TypeError, ValueError, AssertionError):
        return None
    return model if shapes_of(model) == found else None


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of all parameters and buffers by name."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _sizes(cut: nn.Module, base: nn.Module) -> Sizes:
    """Return what tells the modules of `cut` from those of the same names of `base`."""
    sizes: dict[str, dict[str, Any]] = {}
    others = dict(base.named_modules())
    for name, module in cut.named_modules():
        other = others[name]
        tensors = module._parameters | module._buffers
        changed = {
            key: list(tensor.shape)
            for key, tensor in tensors.items()
            if tensor is not None and tensor.shape != getattr(other, key).shape
        }
        for key, value in vars(module).items():
            if _is_size(value) and value != getattr(other, key, value):
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
