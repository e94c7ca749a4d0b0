import pytest
import torch
from torch import nn

from hf_noisekd.models.cpu_faults import layer_that_bfloat16_breaks, training_memory_format


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
