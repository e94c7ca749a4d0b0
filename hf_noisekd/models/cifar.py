"""The paper's networks for 32x32 images, registered with timm; shapes and parameter counts are the authors'."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, GroupNorm, create_classifier, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 stem and no pooling, for small images `[B, in_chans, H, W]`.

    The stem and the first stage have `width` channels, an even number, and each further stage twice as many, unless
    `channels` gives the number for each stage. With `stem_stride=2` the network costs a quarter, for CPUs.
    `norm_groups` replaces BatchNorm by GroupNorm with that number of groups, which must divide the channels. A
    `width` that does not fit is a `ValueError`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int = 64,
        stem_stride: int = 1,
        in_chans: int = 3,
        channels: Sequence[int] | None = None,
        norm_groups: int | None = None,
        **kwargs,
    ):
        doubling = tuple(width * 2**stage for stage in range(len(layers)))
        channels = tuple(channels or doubling)
        width = channels[0]
        if min(channels) < 2 or width % 2:
            raise ValueError(f"width must be a positive even number, got {width}.")
        if norm_groups is not None:
            kwargs["norm_layer"] = partial(GroupNorm, num_groups=norm_groups)
        super().__init__(
            BasicBlock,
            layers,
            in_chans=in_chans,
            # timm narrows the first stage with deep stems only; the stem itself is replaced below.
            stem_type="deep",
            stem_width=width // 2,
            channels=channels,
            # The authors' networks start with all weights of a block in use.
            zero_init_last=False,
            **kwargs,
        )
        # A checkpoint records these to build the same network again.
        self.model_args: dict[str, Any] = {"width": width, "stem_stride": stem_stride}
        if channels != doubling:
            self.model_args["channels"] = channels
        if norm_groups is not None:
            self.model_args["norm_groups"] = norm_groups
        self.conv1 = create_conv2d(in_chans, width, 3, stride=stem_stride)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for feature in self.feature_info:
            # timm counts a stem and a pooling of stride 2 each; the first entry is before the pooling.
            feature["reduction"] = feature["reduction"] * stem_stride // (2 if feature["module"] == "act1" else 4)


class _CifarInvertedResidual(InvertedResidual):
    """timm's inverted residual with a 1x1 convolution on the shortcut where only the number of channels changes."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, **kwargs):
        super().__init__(in_chs, out_chs, stride=stride, **kwargs)
        projects = stride == 1 and in_chs != out_chs
        self.shortcut = nn.Sequential(create_conv2d(in_chs, out_chs, 1), nn.BatchNorm2d(out_chs)) if projects else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if self.shortcut is None else out + self.shortcut(x)


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., 2018) as in the paper: stem and second stage of stride 1, ReLU instead of ReLU6."""

    # (expansion, channels, blocks, stride of the first block)
    stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        stem_stride: int = 1,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.model_args = {"stem_stride": stem_stride}  # as in CifarResNet
        self.num_features = self.head_hidden_size = 1280
        self.conv_stem = create_conv2d(in_chans, 32, 3, stride=stem_stride)
        self.bn1 = BatchNormAct2d(32)
        blocks, in_chs = [], 32
        for expansion, out_chs, depth, first_stride in self.stages:
            for stride in [first_stride] + [1] * (depth - 1):
                blocks.append(_CifarInvertedResidual(in_chs, out_chs, stride=stride, exp_ratio=expansion))
                in_chs = out_chs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = create_conv2d(in_chs, self.num_features, 1)
        self.bn2 = BatchNormAct2d(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the classifier by a new one with `num_classes` outputs."""
        self.num_classes = num_classes
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the feature map `[B, 1280, h, w]`, 8 times smaller (16 with a stem of stride 2)."""
        x = self.blocks(self.bn1(self.conv_stem(x)))
        return self.bn2(self.conv_head(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return the logits `[B, num_classes]` of a feature map, or the pooled features `[B, 1280]`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, num_classes]` of images `[B, in_chans, H, W]`."""
        return self.forward_head(self.forward_features(x))


class CifarWideResNet(ResNetV2):
    """Wide ResNet (Zagoruyko & Komodakis, 2016) of `6 * blocks + 4` layers for small images, as a timm ResNetV2.

    Each of the three stages has `blocks` basic blocks of 16, 32 or 64 times `widen` channels.
    """

    def __init__(self, blocks: int, widen: int, in_chans: int = 3, **kwargs):
        super().__init__(
            (blocks,) * 3,
            channels=(16 * widen, 32 * widen, 64 * widen),
            stem_chs=16,
            in_chans=in_chans,
            basic=True,
            bottle_ratio=1.0,
            norm_layer=BatchNormAct2d,
            conv_layer=create_conv2d,
            **kwargs,
        )
        conv = create_conv2d(in_chans, 16, 3)
        self.stem = nn.Sequential(OrderedDict(conv=conv))
        nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
        for feature in self.feature_info:
            # As in CifarResNet.
            feature["reduction"] //= 2 if feature["module"] == "stem.conv" else 4


def _cfg(first_conv: str, classifier: str) -> dict:
    shape = {"num_classes": 10, "input_size": (3, 32, 32), "first_conv": first_conv, "classifier": classifier}
    return shape | {"crop_pct": 1.0, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


default_cfgs = generate_default_cfgs(
    {f"resnet{depth}_cifar": _cfg("conv1", "fc") for depth in (10, 18, 34)}
    | {"mobilenetv2_cifar": _cfg("conv_stem", "classifier")}
    | {f"wide_resnet{shape}_cifar": _cfg("stem.conv", "head.fc") for shape in ("28_10", "16_8", "16_2")}
)


def _register(name: str, network: type[nn.Module], **architecture) -> Callable[..., nn.Module]:
    """Register with timm, and return, a function `name` that builds a network."""

    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        feature_cfg = {"flatten_sequential": issubclass(network, ResNetV2)}
        model = build_model_with_cfg(network, name, pretrained, feature_cfg=feature_cfg, **architecture | kwargs)
        changed = {key: kwargs[key] for key in architecture if key in kwargs}
        model.model_args = getattr(model, "model_args", {}) | changed
        return model

    build.__name__ = name
    return register_model(build)


# With the number of parameters for 10 classes; ResNets have it at width 64.
resnet10_cifar = _register("resnet10_cifar", CifarResNet, layers=(1, 1, 1, 1))  # 4,903,242, for CPUs
resnet18_cifar = _register("resnet18_cifar", CifarResNet, layers=(2, 2, 2, 2))  # 11,173,962
resnet34_cifar = _register("resnet34_cifar", CifarResNet, layers=(3, 4, 6, 3))  # 21,282,122
mobilenetv2_cifar = _register("mobilenetv2_cifar", CifarMobileNetV2)  # 2,296,922
wide_resnet28_10_cifar = _register("wide_resnet28_10_cifar", CifarWideResNet, blocks=4, widen=10)  # 36,479,194
wide_resnet16_8_cifar = _register("wide_resnet16_8_cifar", CifarWideResNet, blocks=2, widen=8)  # 10,961,370
wide_resnet16_2_cifar = _register("wide_resnet16_2_cifar", CifarWideResNet, blocks=2, widen=2)  # 691,674, for CPUs
