import pytest
import torch
from torch import nn

from hf_noisekd.shrinking.blocks import Place
from hf_noisekd.shrinking.ranking import Comparison, order_of_removal

IMAGES = [torch.randn(16, 6, 4, 4, generator=torch.Generator().manual_seed(0))]


class Block(nn.Module):
    """Adds a multiple of what the classifier reads; two layers, so that it counts as a block."""

    def __init__(self, scale):
        super().__init__()
        self.conv1, self.conv2, self.scale = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), scale

    def forward(self, x):
        return x + self.scale * x


def network(*scales):
    torch.manual_seed(0)
    stage = nn.Sequential(*map(Block, scales))
    return nn.Sequential(stage, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()


def removal(model, savings=None, **kwargs):
    places = [Place("0", str(index)) for index in range(len(model[0]))]
    savings = dict(zip(places, savings or [1.0] * len(places), strict=True))
    return [int(place.key) for place in order_of_removal(model, places, savings, Comparison.on(IMAGES), **kwargs)]


def test_the_block_that_is_missed_the_least_goes_first():
    assert removal(network(4.0, 0.0, 9.0, 1.0)) == [1, 3, 0, 2]


def test_what_a_block_is_worth_counts():
    assert removal(network(1.0, 1.1), savings=[1.0, 10.0]) == [1, 0]


def test_blocks_that_undo_each_other_stay_together():
    # The second and the third undo each other: without one of them the other is in the way.
    assert removal(network(0.6, -0.75, 3.0))[0] == 0


def test_it_ends_where_there_is_enough():
    assert removal(network(4.0, 0.0, 9.0, 1.0), enough=2.0) == [1, 3]
    assert removal(network(4.0, 0.0), enough=-1.0) == []
    assert removal(network(4.0, 0.0, 9.0, 1.0), at_most={"0": 3}) == [1, 3, 0]


def test_the_change_is_a_divergence():
    model = network(1.0)
    compared = Comparison.on(IMAGES)
    expected = compared.log_probs(model)
    assert expected.exp().sum(-1) == pytest.approx(torch.ones(16).tolist())
    assert compared.divergence(expected, model) == 0
    assert compared.divergence(expected, network(2.0)) > 0
