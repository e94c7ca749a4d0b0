import math
from contextlib import suppress

import pytest
import torch
from conftest import DEVICES
from hypothesis import example, given
from hypothesis import strategies as st

from hf_noisekd import NoiseDataset, register_noise
from hf_noisekd.noise.spec import (
    AUGMENTATIONS,
    BUILT_IN,
    DISTRIBUTIONS,
    Mixture,
    noise_name,
    parse_noise,
    parse_resolutions,
)


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def constants(monkeypatch):
    """Distributions of images that are 0, 1 and 2 throughout."""
    for value, name in enumerate(("zeros", "ones", "twos")):
        monkeypatch.setitem(DISTRIBUTIONS, name, lambda generator, shape, value=value: torch.full(shape, float(value)))


def test_one_distribution_is_drawn_as_by_itself():
    shape = (8, 3, 16, 16)
    assert torch.equal(parse_noise("white")(generator(), shape), DISTRIBUTIONS["white"](generator(), shape))


def test_weights_are_shares_of_the_images(constants):
    x = parse_noise("zeros:3,ones,twos:4")(generator(), (80, 1, 2, 2))
    assert x[:, 0, 0, 0].long().bincount().tolist() == [30, 10, 40]


def test_a_number_in_brackets_is_the_parameter():
    shape = (8, 3, 16, 16)
    steep, flat = (parse_noise(f"spectrum({a})")(generator(), shape) for a in ("2", "0.0"))
    assert torch.equal(steep, DISTRIBUTIONS["spectrum"](generator(), shape, 2.0))
    assert not torch.equal(steep, flat)


def test_small_batches_meet_every_distribution_in_proportion(constants):
    mixture = parse_noise("zeros:1,ones:1,twos:6")
    counts = sum(mixture(generator(seed), (2, 1, 1, 1)).flatten().long().bincount(minlength=3) for seed in range(400))
    assert counts.sum() == 800
    assert torch.allclose(counts / 800, torch.tensor([1, 1, 6]) / 8, atol=0.04)


def test_augmentations_are_applied_with_their_probability(constants):
    for probability in (0.2, 0.8):
        x = parse_noise(f"zeros,ones|cutmix:{probability}")(generator(), (2000, 1, 8, 8))
        # A pasted rectangle shows if it comes from the other half of the images; few are empty or hide all.
        assert (x.flatten(1).std(1) > 0).float().mean() == pytest.approx(probability / 2, rel=0.15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_keep_mean_and_variance(name, device):
    x = DISTRIBUTIONS["white"](generator(device=device), (256, 3, 16, 16))
    y = AUGMENTATIONS[name](generator(1, device), x, 1.0)
    assert y.shape == x.shape
    assert not torch.equal(x, y)
    assert abs(y.mean()) < 0.02
    assert y.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(AUGMENTATIONS[name](generator(1, device), x, 0.0), x)


def test_cutmix_pastes_pixels_of_one_other_image():
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 1, 16, 16)
    y = AUGMENTATIONS["cutmix"](generator(), x, 1.0)
    for index, image in enumerate(y):
        values = set(image.unique().tolist())
        assert len(values) <= 2
        assert len(values - {index}) <= 1


@pytest.mark.parametrize("width", [8, 9])
def test_mirror_makes_the_right_half_of_some_images_like_their_left_one(width):
    x = parse_noise("white")(generator(), (400, 3, 4, width))
    y = AUGMENTATIONS["mirror"](generator(1), x, 0.25)
    symmetric = (y == y.flip(-1)).all((1, 2, 3))
    assert torch.equal(y[..., : (width + 1) // 2], x[..., : (width + 1) // 2])
    assert torch.equal(y[~symmetric], x[~symmetric])
    assert symmetric.float().mean() == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (7, 33)])
def test_augmentations_take_images_of_any_size(name, size):
    y = AUGMENTATIONS[name](generator(), torch.ones(2, 1, *size), 1.0)
    assert y.shape == (2, 1, *size)
    assert 0.5 < y.mean() < 1.5


POSITIVE = st.floats(0, 1e300, exclude_min=True)


@given(st.dictionaries(st.sampled_from(BUILT_IN), POSITIVE, min_size=1))
def test_any_weights_read_back(weights):
    assert parse_noise(str(Mixture("any", weights, {"mirror": 1 / 3}))).weights == weights


@given(st.dictionaries(st.floats(0, 1, exclude_min=True), POSITIVE, min_size=1))
def test_any_resolutions_read_back_and_are_within_the_full_size(resolutions):
    text = ",".join(f"{scale}:{share}" for scale, share in resolutions.items())
    assert parse_resolutions(text) == resolutions
    sizes = NoiseDataset((1, 24, 40), 2, resolutions=resolutions).image_sizes()
    assert math.isclose(sum(share for _, share in sizes), 1)
    assert all(16 <= height <= 24 and 16 <= width <= 40 for (height, width), _ in sizes)


@given(st.text("white,spectrum|mirror:(0.5)", max_size=20) | st.text())
@example("white:nan")
@example("spectrum(1e3)")
def test_any_text_is_a_mixture_or_refused(text):
    with suppress(ValueError):
        images = parse_noise(text)(torch.Generator(), (2, 1, 8, 8))
        assert images.shape == (2, 1, 8, 8)
        assert images.isfinite().all()


def test_text_of_a_mixture_reads_back():
    text = "dead_leaves:3,spectrum|cutmix:0.5,mirror"
    assert str(parse_noise(text)) == text
    assert parse_noise(str(parse_noise("structured"))).weights == parse_noise("structured").weights
    assert noise_name(parse_noise("white:1")) == "white"
    assert noise_name(parse_noise("structured")).startswith("structured (")
    assert noise_name(DISTRIBUTIONS["white"]) == "white"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wite", "'white'"),
        ("", "names"),
        ("white:-1", "above 0"),
        ("white:nan", "above 0"),
        ("white:inf", "above 0"),
        ("white:x", "above 0"),
        ("white,white", "once"),
        ("white|cutmix:2", r"\(0, 1\]"),
        ("white|dead_leaves", "none of cutmix"),
        ("white|", "names"),
        ("white|cutmix(2)", "none of cutmix"),
        ("white(2)", "white .*parameter 2"),
        ("low_resolution(0.5)", "at least 1"),
        ("fractal(0)", "at least 1"),
        ("fractal(1000000000)", "at most 20"),
        ("dead_leaves(2.7)", "whole"),
        ("dead_leaves(0)", "at least 1"),
        ("spectrum(11)", r"\[0, 10\]"),
        ("spectrum(x)", "plain number"),
        ("spectrum(-1)", "plain number"),
        ("spectrum(1.2.3)", "plain number"),
        ("wite(x)", "none of"),
        ("white|mirror|cutmix", "one '|'"),
        ("structured,white", "stands alone"),
        ("structured|cutmix", "stands alone"),
    ],
)
def test_refuses_a_text_that_means_nothing(text, message):
    with pytest.raises(ValueError, match=message):
        parse_noise(text)


def test_a_registered_distribution_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr("hf_noisekd.noise.spec.DISTRIBUTIONS", dict(DISTRIBUTIONS))
    register_noise("sevens", lambda generator, shape: torch.full(shape, 7.0))
    noise = NoiseDataset((1, 2, 2), 4, distribution="sevens,white")
    assert (noise.draw(0).flatten(1) == 7).all(1).sum() == 2
    register_noise("sevens", lambda generator, shape: torch.full(shape, 8.0))  # as a notebook's cell that is run again
    assert (noise.draw(0).flatten(1) == 8).all(1).sum() == 2
    for name in ("white", "structured", "cutmix", "a:b", ""):
        with pytest.raises(ValueError, match=f"{name!r} .*identifier"):
            register_noise(name, lambda generator, shape: torch.zeros(shape))
