"""The CIFAR-size networks of the paper, registered with timm.

After `import hf_noisekd`, `timm.create_model("resnet18_cifar", num_classes=10)` builds them, as do the Hub loaders of
timm and transformers. Their shapes and parameter counts are those of the authors' networks for 32x32 images:

- ResNets: timm's ResNet with a 3x3 stem of stride 1 and no pooling. `width` (64) is the number of channels of the first
  stage; `stem_stride=2` makes a network for CPUs that costs a quarter. `resnet10_cifar` has one block a stage.
- MobileNetV2 as in the authors' code: stem and second stage of stride 1, ReLU instead of ReLU6, and a 1x1 convolution
  on the shortcut of each block that keeps the size and changes the channels.
- Wide ResNets (Zagoruyko & Komodakis, 2016): timm's pre-activation blocks. The classifier is timm's 1x1 convolution,
  which has the parameters of a linear layer.
"""

from collections import OrderedDict
from typing import TypeVar

import torch
from timm.layers import BatchNormAct2d, create_classifier, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 stem and no pooling, for small images `[B, in_chans, H, W]`.

    Args:
        layers: Basic blocks in each of the four stages.
        width: Channels of the stem and the first stage, even; each further stage doubles them.
        stem_stride: Stride of the stem.
        in_chans: Channels of the image.
        **kwargs: Anything else that timm's `ResNet` takes.

    Attributes:
        model_args: What a checkpoint has to record, beside the name, to build the same network again.

    Raises:
        ValueError: The width is not a positive even number.
    """

    def __init__(self, layers: tuple[int, ...], width: int = 64, stem_stride: int = 1, in_chans: int = 3, **kwargs):
        if width < 2 or width % 2:
            raise ValueError(f"width must be a positive even number, got {width}.")
        super().__init__(
            BasicBlock,
            layers,
            in_chans=in_chans,
            # timm builds stages narrower than 64 channels for deep stems only; the stem itself is replaced below.
            stem_type="deep",
            stem_width=width // 2,
            channels=tuple(width * 2**stage for stage in range(len(layers))),
            # The authors' networks start with all weights of a block in use.
            zero_init_last=False,
            **kwargs,
        )
        self.model_args = {"width": width, "stem_stride": stem_stride}
        self.conv1 = create_conv2d(in_chans, width, 3, stride=stem_stride)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for feature in self.feature_info:
            # timm counts a stem of stride 2 and a pooling of stride 2; the first entry lies before the pooling.
            feature["reduction"] = feature["reduction"] * stem_stride // (2 if feature["module"] == "act1" else 4)


class _CifarInvertedResidual(InvertedResidual):
    """timm's inverted residual with a projection on the shortcut where the channels change and the size does not."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, **kwargs):
        super().__init__(in_chs, out_chs, stride=stride, **kwargs)
        projects = stride == 1 and in_chs != out_chs
        self.shortcut = nn.Sequential(create_conv2d(in_chs, out_chs, 1), nn.BatchNorm2d(out_chs)) if projects else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if self.shortcut is None else out + self.shortcut(x)


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., 2018) for small images `[B, in_chans, H, W]`, in the shape the authors used."""

    # (expansion, channels, blocks, stride of the first block)
    stages = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = 1280
        self.conv_stem = create_conv2d(in_chans, 32, 3)
        self.bn1 = BatchNormAct2d(32)
        blocks, in_chs = [], 32
        for expansion, out_chs, depth, first_stride in self.stages:
            for index in range(depth):
                stride = first_stride if index == 0 else 1
                blocks.append(_CifarInvertedResidual(in_chs, out_chs, stride=stride, exp_ratio=expansion))
                in_chs = out_chs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = create_conv2d(in_chs, self.num_features, 1)
        self.bn2 = BatchNormAct2d(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the classifier by a new one with `num_classes` outputs."""
        self.num_classes = num_classes
        self.global_pool, self.classifier = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the feature map `[B, 1280, H / 8, W / 8]`."""
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
    """Wide ResNet of `depth = 6 * blocks + 4` layers for small images: timm's ResNetV2 with three stages.

    Args:
        blocks: Basic blocks in each stage.
        widen: Channels of a stage relative to 16, 32, 64.
        in_chans: Channels of the image.
        **kwargs: Anything else that timm's `ResNetV2` takes.
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
            # timm counts a stem of stride 2 and a pooling of stride 2; the first entry lies before the pooling.
            feature["reduction"] //= 2 if feature["module"] == "stem.conv" else 4


def _cfg(first_conv: str, classifier: str) -> dict:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet10_cifar": _cfg("conv1", "fc"),
        "resnet18_cifar": _cfg("conv1", "fc"),
        "resnet34_cifar": _cfg("conv1", "fc"),
        "mobilenetv2_cifar": _cfg("conv_stem", "classifier"),
        "wide_resnet28_10_cifar": _cfg("stem.conv", "head.fc"),
        "wide_resnet16_8_cifar": _cfg("stem.conv", "head.fc"),
        "wide_resnet16_2_cifar": _cfg("stem.conv", "head.fc"),
    }
)


def _build(model_cls: type[Network], variant: str, pretrained: bool, **kwargs) -> Network:
    return build_model_with_cfg(
        model_cls, variant, pretrained, feature_cfg={"flatten_sequential": issubclass(model_cls, ResNetV2)}, **kwargs
    )


@register_model
def resnet10_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-10 for 32x32 images, for CPUs: 4,903,242 parameters at width 64, and about `(width / 64) ** 2` of it."""
    return _build(CifarResNet, "resnet10_cifar", pretrained, layers=(1, 1, 1, 1), **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-18 for 32x32 images: 11,173,962 parameters with 10 classes."""
    return _build(CifarResNet, "resnet18_cifar", pretrained, layers=(2, 2, 2, 2), **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-34 for 32x32 images: 21,282,122 parameters with 10 classes."""
    return _build(CifarResNet, "resnet34_cifar", pretrained, layers=(3, 4, 6, 3), **kwargs)


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs) -> CifarMobileNetV2:
    """MobileNetV2 for 32x32 images: 2,296,922 parameters with 10 classes."""
    return _build(CifarMobileNetV2, "mobilenetv2_cifar", pretrained, **kwargs)


@register_model
def wide_resnet28_10_cifar(pretrained: bool = False, **kwargs) -> CifarWideResNet:
    """WRN-28-10 for 32x32 images: 36,479,194 parameters with 10 classes, 36,536,884 with 100."""
    return _build(CifarWideResNet, "wide_resnet28_10_cifar", pretrained, blocks=4, widen=10, **kwargs)


@register_model
def wide_resnet16_8_cifar(pretrained: bool = False, **kwargs) -> CifarWideResNet:
    """WRN-16-8 for 32x32 images: 10,961,370 parameters with 10 classes, 11,007,540 with 100."""
    return _build(CifarWideResNet, "wide_resnet16_8_cifar", pretrained, blocks=2, widen=8, **kwargs)


@register_model
def wide_resnet16_2_cifar(pretrained: bool = False, **kwargs) -> CifarWideResNet:
    """WRN-16-2 for 32x32 images, small enough for CPUs: 691,674 parameters with 10 classes."""
    return _build(CifarWideResNet, "wide_resnet16_2_cifar", pretrained, blocks=2, widen=2, **kwargs)
