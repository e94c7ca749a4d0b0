import harness.noises  # noqa: F401 - registers those of the recipes
import pytest
import torch
from conftest import DEVICES

from hf_noisekd.noise.spec import DISTRIBUTIONS

SHAPES = [(64, 3, 32, 32), (64, 1, 28, 28), (8, 3, 224, 224), (9, 2, 7, 33), (2, 4, 1, 5)]


def draw(name: str, shape, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return DISTRIBUTIONS[name](torch.Generator(device).manual_seed(seed), shape)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_finite_images_of_any_shape(name, shape):
    x = draw(name, shape)
    assert x.shape == shape
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_is_a_function_of_the_generator_alone(name, device):
    shape = (16, 3, 16, 16)
    first = draw(name, shape, device=device)
    torch.randn(7, device=device)
    assert torch.equal(first, draw(name, shape, device=device))
    other = draw(name, shape, seed=1, device=device)
    assert not torch.equal(first, other)
    # No image recurs, neither in a batch nor in another one.
    assert len(torch.unique(torch.cat([first, other]).flatten(1), dim=0)) == 32


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_has_about_zero_mean_and_unit_variance(name, channels):
    x = torch.cat([draw(name, (128, channels, 32, 32), seed) for seed in range(8)])
    assert abs(x.mean()) < 0.1
    assert 0.9 < x.std() < 1.1


def neighbour_correlation(x: torch.Tensor) -> float:
    x = x - x.mean((-2, -1), keepdim=True)
    return ((x[..., 1:] * x[..., :-1]).mean() / x.square().mean()).item()


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "white"])
def test_all_but_white_noise_are_smooth(name):
    assert abs(neighbour_correlation(draw("white", (64, 3, 32, 32)))) < 0.01
    assert neighbour_correlation(draw(name, (64, 3, 32, 32))) > 0.2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(32, 32), (15, 24)])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_spectrum_falls_by_its_exponent_alike_in_all_directions(exponent, size, device):
    height, width = size
    x = DISTRIBUTIONS["spectrum"](torch.Generator(device).manual_seed(0), (512, 1, *size), exponent).cpu()
    assert x.var((1, 2, 3)).mean() == pytest.approx(1, abs=0.1)
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    fy = torch.fft.fftfreq(height)[:, None].expand(size)
    fx = torch.fft.fftfreq(width).expand(size)
    expected = (fy**2 + fx**2).clamp(min=1e-9) ** -exponent
    ratio = (power / expected).flatten()[1:]  # without the mean
    assert (ratio / ratio.mean()).std() < 0.1
    rows, columns = power[1 : height // 2, 0], power[0, 1 : width // 2]
    if height == width:
        assert (rows / columns).log().mean().abs() < 0.1


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 7), (1, 5), (5, 1), (2, 2)])
def test_spectrum_transforms_what_is_the_half_spectrum_of_real_images(size, monkeypatch):
    """On a GPU the transform of any other one is not defined."""
    transformed = []
    irfft2 = torch.fft.irfft2
    monkeypatch.setattr(torch.fft, "irfft2", lambda x, **kwargs: transformed.append(x) or irfft2(x, **kwargs))
    x = draw("spectrum", (4, 3, *size))
    assert torch.allclose(torch.fft.rfft2(x, norm="ortho"), transformed[0], atol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 10.0])
def test_spectrum_has_unit_variance_at_its_limits_in_large_images(exponent):
    x = DISTRIBUTIONS["spectrum"](torch.Generator().manual_seed(0), (64, 1, 224, 224), exponent)
    assert x.std() == pytest.approx(1, abs=0.2)


def test_low_resolution_has_the_resolution_that_was_asked_for():
    for factor in (2, 4, 8):
        x = DISTRIBUTIONS["low_resolution"](torch.Generator().manual_seed(0), (64, 1, 32, 32), factor)
        power = torch.fft.fft2(x).abs().square().mean((0, 1))[0, :17]
        half = 16 // factor
        assert power[1 : half + 1].mean() > 20 * power[min(2 * half + 1, 16) :].mean()


def test_dead_leaves_have_edges_that_gaussian_fields_lack():
    def kurtosis_of_differences(x: torch.Tensor) -> float:
        difference = x.diff(dim=-1)
        return (difference.pow(4).mean() / difference.square().mean().square()).item()

    shape = (256, 1, 32, 32)
    fixed = DISTRIBUTIONS["spectrum"](torch.Generator().manual_seed(0), shape, 1.0)
    assert kurtosis_of_differences(fixed) == pytest.approx(3, abs=0.3)
    assert kurtosis_of_differences(draw("dead_leaves", shape)) > 6
