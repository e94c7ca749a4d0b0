import copy

import pytest
import torch
from torch import nn

from hf_noisekd.shrinking import walk
from hf_noisekd.shrinking.walk import Walk


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x, scale=1.0):
        return x + scale * self.norm(self.conv(x)).tanh()


class Network(nn.Module):
    """Two blocks, something between them, and arguments that the second one may get."""

    def __init__(self, between, arguments=lambda x: ()):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc, self.arguments = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 10), arguments
        self.blocks, self.between = nn.ModuleList([Block(), Block()]), between

    def forward(self, x):
        x = self.between(self.blocks[0](self.stem(x)))
        return self.fc(self.blocks[1](x, *self.arguments(x)).mean((2, 3)))


def images_of(number=72):
    images = torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[number - 1] *= 10
    return images


@torch.no_grad()
def walked(model, names, images, **options):
    found = Walk(model.eval(), images, **options)
    for name in names[:-1]:
        found.enter(name)
        found.leave()
    found.enter(names[-1])
    return found


@pytest.mark.parametrize(
    ("between", "arguments", "is_alone"),
    [
        (nn.Identity(), lambda x: (), True),
        (nn.BatchNorm2d(8), lambda x: (), True),
        (nn.Hardtanh(-4, 4), lambda x: (), True),  # changes one image alone
        (nn.Identity(), lambda x: (x.abs().max().item(),), False),
        (nn.Identity(), lambda x: (x.mean((2, 3), keepdim=True),), False),
        (nn.Identity(), lambda x: (x.mean(),), False),
    ],
    ids=["nothing", "a layer", "a bound", "a number of the images", "two tensors", "a tensor without images"],
)
@pytest.mark.parametrize("order", [1, -1])
@torch.no_grad()
def test_a_block_gets_what_it_gets_in_the_network(monkeypatch, between, arguments, is_alone, order):
    model, images = Network(between, arguments).eval(), images_of()
    images = images.flip(0) if order < 0 else images
    found = walked(model, ["blocks.0", "blocks.1"], images)
    assert (found.block.is_alone, found.num_kept) == (is_alone, 72 if is_alone else 0)
    monkeypatch.setattr(walk, "MEMORY", 0)
    expected = walked(model, ["blocks.1"], images)
    assert len(found.chunks) == len(expected.chunks) == 3
    for index in found.chunks:
        assert torch.allclose(found.run(index)[0], expected.run(index)[0], atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_memory_bounds_the_images_whose_features_are_kept(monkeypatch, number):
    monkeypatch.setattr(walk, "MEMORY", number * 32 * 8 * 8 * 8 * 4)  # bytes
    found = walked(Network(nn.Identity()), ["blocks.0"], images_of(), mirrors=True)
    assert found.num_kept == 32 * (number // 2)  # and as many mirror images


@pytest.mark.parametrize("pixels", [2**21, 5 * 32 * 32])
@torch.no_grad()
def test_images_and_their_mirror_images_are_found(monkeypatch, pixels):
    monkeypatch.setattr(walk, "CHUNK_PIXELS", pixels)
    model, images = Network(nn.Identity()), images_of()
    found = walked(model, ["blocks.0"], images, mirrors=True)
    chosen = torch.cat([images[[70, 3]], images[[3, 33]].flip(-1)])
    assert torch.allclose(found.features_of([70, 3, 3, 33], [0, 0, 1, 1]), model.stem(chosen), atol=1e-5)


@torch.no_grad()
def test_statistics_are_those_of_the_images_alone():
    images, models = images_of(), []
    for names, options in ((["blocks.1"], {}), (["blocks.0", "blocks.1"], {"mirrors": True})):
        models.append(copy.deepcopy(Network(nn.Identity())))
        walked(models[-1], names, images, **options).store_statistics(["blocks.1.norm"])
    for name, expected in models[0].state_dict().items():
        assert torch.allclose(models[1].state_dict()[name].float(), expected.float(), atol=1e-5), name
    assert models[0].blocks[1].norm.running_mean.any()
    assert not models[0].blocks[0].norm.running_mean.any()
