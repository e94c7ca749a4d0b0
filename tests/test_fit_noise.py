import copy

import pytest
import torch
from conftest import digest
from torch import nn

from hf_noisekd.fit_noise import fit_noise, noise_fit
from hf_noisekd.mixture import DISTRIBUTIONS, parse_noise


@pytest.fixture
def taught_by(tiny_cnn):
    """Give a teacher the running statistics of a noise."""

    def teach(noise: str) -> nn.Module:
        model = copy.deepcopy(tiny_cnn).train()
        model.drop.p = 0.0
        for layer in (model.bn1, model.bn2, model.bn3):
            layer.momentum = None  # a plain average
            layer.reset_running_stats()
        with torch.no_grad():
            for seed in range(20):
                model(parse_noise(noise)(torch.Generator().manual_seed(1000 + seed), (256, 1, 8, 8)))
        return model.eval()

    return teach


SIZE = {"input_size": (1, 8, 8)}


def test_the_distance_is_small_to_what_the_teacher_was_trained_on(taught_by):
    teacher = taught_by("dead_leaves")
    before = digest(teacher)
    own, other = noise_fit(teacher, "dead_leaves", **SIZE), noise_fit(teacher, "white", **SIZE)
    assert own["distance"] < other["distance"] / 10
    assert digest(teacher) == before
    assert not any(module.training for module in teacher.modules())
    assert own["information"] == own["class_balance"] - own["flatness"]


def test_the_distance_is_the_divergence_of_normal_distributions(tiny_cnn):
    """Written out for the first layer alone."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(1)
            self.bn.running_mean.fill_(0.5)
            self.bn.running_var.fill_(4.0)

        def forward(self, x):
            return torch.cat([self.bn(x).mean((2, 3)), torch.zeros(len(x), 2)], 1)

    stored = torch.distributions.Normal(0.5, 2.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, 1.0), stored)
    assert noise_fit(First(), "white", **SIZE)["distance"] == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("noise", ["white", "spectrum(2)", "dead_leaves"])
def test_the_noise_that_the_teacher_knows_comes_first(taught_by, noise):
    candidates = ["white", "spectrum(2)", "dead_leaves", "low_resolution(4)"]
    ranking, choice = fit_noise(taught_by(noise), candidates, **SIZE)
    assert ranking[0]["noise"] == noise
    assert sorted(fit["noise"] for fit in ranking) == sorted(candidates)
    assert [fit["distance"] for fit in ranking] == sorted(fit["distance"] for fit in ranking)
    assert choice["distance"] <= ranking[0]["distance"]


def test_a_mixture_is_found_where_the_teacher_knows_one(taught_by):
    _, choice = fit_noise(taught_by("white,spectrum(2)"), ["white", "spectrum(2)"], **SIZE)
    assert set(parse_noise(choice["noise"]).weights) == {"white", "spectrum(2)"}


def test_the_standard_deviation_is_found(taught_by):
    """That of a layer that sees the noise as it is; behind a first convolution, BatchNorm would take it away."""
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3)).eval()
    teacher[0].running_var.fill_(2.0**2)
    _, choice = fit_noise(teacher, ["white"], **SIZE)
    assert choice["noise"].split("|")[0] == "white"
    assert 1.4 < choice["std"] < 2.8


def test_says_what_cannot_be_measured(tiny_cnn):
    with pytest.raises(ValueError, match="at least one candidate"):
        fit_noise(tiny_cnn, [], **SIZE)
    with pytest.raises(ValueError, match="Did you mean 'white'"):
        noise_fit(tiny_cnn, "wite", **SIZE)
    with pytest.raises(ValueError, match="input_size"):
        noise_fit(tiny_cnn, "white")
    with pytest.raises(ValueError, match="teacher does not take images of 3x8x8"):
        noise_fit(tiny_cnn, "white", input_size=(3, 8, 8))
    for layer in (tiny_cnn.bn1, tiny_cnn.bn2, tiny_cnn.bn3):
        layer.running_mean = layer.running_var = None
    with pytest.raises(ValueError, match="running statistics"):
        noise_fit(tiny_cnn, "white", **SIZE)
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        noise_fit(nn.Conv2d(1, 2, 1), "white", **SIZE)


def test_the_default_candidates_are_all_known():
    from hf_noisekd.fit_noise import CANDIDATES

    assert set(DISTRIBUTIONS) >= {name.split("(")[0] for name in CANDIDATES}
    for name in CANDIDATES:
        parse_noise(name)
