import pytest
import torch
from torch import nn

from hf_noisekd.models.cpu_faults import fast_depthwise, layer_that_bfloat16_breaks, training_memory_format


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


def test_depthwise_convolutions_with_slow_gradients_compute_in_float32():
    torch.manual_seed(0)
    layers = {
        "strided": nn.Conv2d(16, 16, 3, stride=2, groups=16),
        "large": nn.Conv2d(16, 16, 5, padding=2, groups=16),
        "small": nn.Conv2d(16, 16, 3, groups=16),
        "dense": nn.Conv2d(16, 16, 3, stride=2),
    }
    model = nn.ModuleDict(layers)
    images = torch.randn(2, 16, 8, 8)
    with fast_depthwise(model, torch.device("cpu")), torch.autocast("cpu", torch.bfloat16):
        within = {name: layer(images) for name, layer in layers.items()}
    for name, layer in layers.items():
        exact = torch.equal(within[name], layer(images))
        assert exact == (name in ("strided", "large"))
        assert within[name].dtype == (torch.float32 if exact else torch.bfloat16)
        assert "forward" not in vars(layer)
    with fast_depthwise(model, torch.device("cuda")):
        assert "forward" not in vars(layers["strided"])
