import timm
import torch
from torch import nn

from hf_noisekd.shrinking.blocks import Place, removable_blocks, remove_blocks, stages_of

SIZE = (3, 32, 32)


class Chain(nn.Module):
    """Blocks of one class as children of a module that runs them in turn, as timm's RegNet stages are."""

    def __init__(self, widths=((4, 4), (4, 4), (4, 6), (6, 6))):
        super().__init__()
        for index, (inputs, outputs) in enumerate(widths, start=1):
            self.add_module(f"b{index}", nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.Conv2d(outputs, outputs, 1)))

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.stage = Chain()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.stage(self.stem(x)).mean((2, 3)))


def test_the_blocks_that_keep_the_shape_can_go_but_the_first_of_a_stage():
    names = [place.name for place in removable_blocks(timm.create_model("resnet34_cifar", width=4), SIZE)]
    assert names == [f"layer{stage}.{block}" for stage, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(1, n)]
    names = [place.name for place in removable_blocks(timm.create_model("efficientnet_lite0"), (3, 64, 64))]
    assert names == [f"blocks.{s}.{b}" for s, n in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 4)) for b in range(1, n)]


def test_a_block_that_changes_its_shape_stays_wherever_it_stands():
    assert [place.name for place in removable_blocks(Network(), SIZE)] == ["stage.b2", "stage.b4"]


def test_a_block_whose_output_others_read_too_stays():
    class Aggregation(Chain):
        def forward(self, x):
            seen = [x]
            for block in self.children():
                seen.append(block(seen[-1]))
            return torch.cat(seen, dim=1)

    model = Network()
    model.stage, model.fc = Aggregation([(4, 4)] * 3), nn.Linear(16, 3)
    assert removable_blocks(model, SIZE) == []


def test_blocks_behind_a_removed_one_take_its_name():
    model = Network()
    last = model.stage.b4
    x = torch.randn(2, *SIZE)
    expected = model.fc(last(model.stage.b3(model.stage.b1(model.stem(x)))).mean((2, 3)))
    remove_blocks(model, [Place("stage", "b2")])
    assert stages_of(model) == {"stage": ["b1", "b2", "b3"]}
    assert model.stage.b3 is last
    assert torch.equal(model(x), expected)


def test_several_blocks_of_a_stage_and_blocks_within_blocks():
    model = timm.create_model("regnety_002", num_classes=3).eval()
    places = [place for place in removable_blocks(model, (3, 64, 64)) if place.name in ("s4.b2", "s4.b4", "s3.b3")]
    remove_blocks(model, places)
    assert list(dict(model.s4.named_children())) == [f"b{index}" for index in range(1, 6)]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_a_model_in_training_mode_comes_back_in_it():
    model = timm.create_model("resnet18_cifar", width=4).train()
    before = model.bn1.running_mean.clone()
    removable_blocks(model, SIZE)
    assert model.training
    assert torch.equal(model.bn1.running_mean, before)
