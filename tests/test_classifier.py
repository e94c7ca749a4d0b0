import pytest
import timm
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_noisekd.models.classifier import (
    compute_logits,
    declared_input_size,
    evaluation_mode,
    layer_that_bfloat16_breaks,
    nonfinite_tensor,
    training_memory_format,
)


def test_logits_of_both_kinds_of_model(tiny_cnn):
    pixels = torch.randn(2, 1, 8, 8)
    assert compute_logits(tiny_cnn, pixels).shape == (2, 3)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4, layer_type="basic")
    assert compute_logits(ResNetForImageClassification(config), torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_declared_input_sizes(tiny_cnn):
    assert declared_input_size(timm.create_model("resnet10_cifar", width=4)) == (3, 32, 32)
    assert declared_input_size(timm.create_model("resnet10_cifar", width=4, in_chans=1)) == (1, 32, 32)
    assert declared_input_size(tiny_cnn) is None
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=48)
    assert declared_input_size(ViTForImageClassification(vit)) == (3, 48, 48)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    assert declared_input_size(ResNetForImageClassification(config)) is None


def test_finds_the_first_tensor_that_is_not_finite(tiny_cnn):
    assert nonfinite_tensor(tiny_cnn) is None
    tiny_cnn.bn2.running_var[3] = float("inf")
    assert nonfinite_tensor(tiny_cnn) == "bn2.running_var"


def test_evaluation_mode_gives_each_module_its_mode_back(tiny_cnn):
    tiny_cnn.train()
    tiny_cnn.bn2.eval()
    modes = [module.training for module in tiny_cnn.modules()]
    with evaluation_mode(tiny_cnn):
        assert not any(module.training for module in tiny_cnn.modules())
    assert [module.training for module in tiny_cnn.modules()] == modes
    with pytest.raises(KeyError), evaluation_mode(tiny_cnn):
        raise KeyError
    assert [module.training for module in tiny_cnn.modules()] == modes


@pytest.mark.parametrize(
    ("layer", "device", "expected"),
    [
        (nn.Conv2d(16, 32, 1, stride=2), "cpu", torch.channels_last),
        (nn.Conv2d(8, 16, 3, stride=2), "cpu", torch.channels_last),
        (nn.Conv2d(8, 16, 1), "cpu", torch.channels_last),
        # Channels last corrupts the heap here.
        (nn.Conv2d(8, 16, 1, stride=2), "cpu", torch.contiguous_format),
        (nn.Conv2d(32, 32, 1, stride=2, groups=4), "cpu", torch.contiguous_format),
        (nn.Conv2d(8, 16, 1, stride=2), "cuda", torch.channels_last),
    ],
)
def test_memory_format_avoids_broken_convolutions(layer, device, expected):
    assert training_memory_format(nn.Sequential(layer), torch.device(device)) == expected


@pytest.mark.parametrize(
    ("kernel", "options", "size", "broken"),
    [
        (3, {"stride": 2, "padding": 1}, 1, True),
        (3, {"stride": 2, "padding": 1}, 2, False),
        (3, {"stride": 1, "padding": 1}, 1, False),
        (3, {"stride": 3, "padding": 1}, 2, True),
        (5, {"stride": 1, "padding": 2}, 1, True),
        (5, {"stride": 1, "padding": "same"}, 2, False),
        (3, {"stride": 1, "padding": 2, "dilation": 2}, 1, False),
        (1, {"stride": 2}, 1, False),
        (3, {"stride": 2, "padding": 1, "groups": 32}, 1, False),
    ],
)
def test_finds_the_layers_that_bfloat16_breaks(kernel, options, size, broken):
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, kernel, bias=False, **options)
    model = nn.Sequential(nn.Identity(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert layer_that_bfloat16_breaks(model, (32, size, size)) == ("1" if broken else None)
    if broken:
        return
    images = torch.randn(64, 32, size, size)
    gradients = []
    for enabled in (False, True):
        del_me = [torch.full((count,), float("nan")) for count in (9_216, 36_864, 147_456)]
        del del_me  # so that memory which nobody writes is not zero
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images).float().square().mean()
        gradients += torch.autograd.grad(loss, layer.weight)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1, atol=0.02 * gradients[0].abs().max().item())
