import pytest
import timm
import torch
from torch import nn

from hf_noisekd.models.cifar import CifarMobileNetV2

PARAMETERS = {
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "mobilenetv2_cifar": 2_296_922,
    "wide_resnet28_10_cifar": 36_479_194,
    "wide_resnet16_8_cifar": 10_961_370,
    "wide_resnet16_2_cifar": 691_674,
    "resnet10_cifar": 4_903_242,
}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts_of_the_paper(name, count):
    assert parameters(timm.create_model(name)) == count


@pytest.mark.parametrize(
    ("name", "count"), [("wide_resnet28_10_cifar", 36_536_884), ("wide_resnet16_8_cifar", 11_007_540)]
)
def test_parameter_counts_with_100_classes(name, count):
    assert parameters(timm.create_model(name, num_classes=100)) == count


@pytest.mark.parametrize(
    ("name", "features"),
    [("resnet18_cifar", (512, 4, 4)), ("mobilenetv2_cifar", (1280, 4, 4)), ("wide_resnet16_8_cifar", (512, 8, 8))],
)
@torch.no_grad()
def test_shapes(name, features):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    pixels = torch.randn(2, 1, 32, 32)
    assert model(pixels).shape == (2, 7)
    assert model.forward_features(pixels).shape == (2, *features)
    model.reset_classifier(5)
    assert model(pixels).shape == (2, 5)
    assert model.forward_head(model.forward_features(pixels), pre_logits=True).shape == (2, features[0])


@pytest.mark.parametrize("name", ["resnet10_cifar", "wide_resnet16_8_cifar"])
@torch.no_grad()
def test_feature_maps_have_the_announced_reduction(name):
    model = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3))
    for features, info in zip(model(torch.randn(1, 3, 32, 32)), model.feature_info.get_dicts(), strict=False):
        assert features.shape[1:] == (info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])


@torch.no_grad()
def test_width_and_stem_stride_make_small_networks():
    small = timm.create_model("resnet18_cifar", width=32, stem_stride=2)
    assert parameters(small) < PARAMETERS["resnet18_cifar"] / 3.9
    assert small.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 256, 2, 2)
    mobilenet = timm.create_model("mobilenetv2_cifar", stem_stride=2)
    assert mobilenet.model_args == {"stem_stride": 2}
    assert mobilenet.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 1280, 2, 2)
    with pytest.raises(ValueError, match="even"):
        timm.create_model("resnet18_cifar", width=7)


def test_group_norm_takes_the_place_of_batch_norm():
    model = timm.create_model("resnet18_cifar", width=16, norm_groups=4)
    assert (model.layer3[0].bn1.num_groups, model.model_args["norm_groups"]) == (4, 4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_registration_names_the_first_convolution_and_the_classifier(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.input_size == (3, 32, 32)
    assert cfg.num_classes == 10
    modules = dict(timm.create_model(name).named_modules())
    assert modules[cfg.first_conv].in_channels == 3
    assert modules[cfg.classifier].weight.shape[0] == 10


def test_mobilenet_blocks_have_the_authors_shortcuts():
    blocks = CifarMobileNetV2().blocks
    projected = [index for index, block in enumerate(blocks) if block.shortcut is not None]
    assert projected == [0, 1, 10, 16]
    assert all(
        block.has_skip == (block.shortcut is None and index not in (3, 6, 13)) for index, block in enumerate(blocks)
    )
