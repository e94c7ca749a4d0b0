import copy

import pytest
import torch
from conftest import digest
from harness.noise_fit import noise_fit
from torch import nn

from hf_noisekd.noise.spec import DISTRIBUTIONS, parse_noise


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


def test_the_information_is_all_or_none_for_answers_that_tell_all_or_nothing():
    class Sign(nn.Module):
        """Two classes, told apart by the sign of the mean pixel."""

        def __init__(self, certainty: float):
            super().__init__()
            self.bn, self.certainty = nn.BatchNorm2d(1), certainty

        def forward(self, x):
            mean = self.bn(x).mean((1, 2, 3)) * self.certainty
            return torch.stack([mean, -mean], 1)

    assert noise_fit(Sign(0.0), "white", **SIZE)["information"] == pytest.approx(0, abs=1e-6)
    assert noise_fit(Sign(1e6), "white", **SIZE)["information"] == pytest.approx(1, abs=0.02)


def test_the_distance_is_the_divergence_of_normal_distributions():
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


def test_a_layer_at_distance_zero_does_not_hide_the_others(taught_by):
    teacher = taught_by("dead_leaves")
    blank = nn.Sequential(nn.BatchNorm2d(1), teacher).eval()
    zeros = lambda generator, shape: torch.zeros(shape)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DISTRIBUTIONS, "zeros", zeros)
        blank[0].running_var.fill_(0.0)
        fit = noise_fit(blank, "zeros", **SIZE)
        behind = noise_fit(teacher, "zeros", **SIZE)
    # The geometric mean of 1e-6 and the three layers behind.
    assert fit["distance"] == pytest.approx(1e-6**0.25 * behind["distance"] ** 0.75, rel=0.01)


def test_says_what_cannot_be_measured(tiny_cnn):
    with pytest.raises(ValueError, match="'white'"):
        noise_fit(tiny_cnn, "wite", **SIZE)
    with pytest.raises(ValueError, match="input_size"):
        noise_fit(tiny_cnn, "white")
    with pytest.raises(ValueError, match=r"teacher .*3x8x8"):
        noise_fit(tiny_cnn, "white", input_size=(3, 8, 8))
    damaged = copy.deepcopy(tiny_cnn)
    damaged.fc.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"'fc\.weight' .*NaN"):
        noise_fit(damaged, "white", **SIZE)
    for layer in (tiny_cnn.bn1, tiny_cnn.bn2, tiny_cnn.bn3):
        layer.running_mean = layer.running_var = None
    with pytest.raises(ValueError, match="running statistics"):
        noise_fit(tiny_cnn, "white", **SIZE)
    with pytest.raises(ValueError, match="running statistics"):
        noise_fit(nn.Conv2d(1, 2, 1), "white", **SIZE)
