import copy

import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import nn

from hf_noisekd.shrinking.channels import ChannelCutter, ChannelGroup, channel_importance, least_important
from hf_noisekd.shrinking.compensation import compensate
from hf_noisekd.shrinking.ranking import running_statistics, statistics_of_batch

SIZE = (3, 32, 32)


def resnet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("resnet10_cifar", width=8, num_classes=3, **kwargs).eval()


def test_layers_that_are_added_up_share_their_channels():
    groups = ChannelCutter(resnet(), SIZE).groups
    assert groups["conv1"].channels == 8
    assert {name for name, *_ in groups["conv1"].writers} == {"conv1", "layer1.0.conv2"}
    assert {name for name, *_ in groups["conv1"].readers} == {
        "layer1.0.conv1",
        "layer2.0.conv1",
        "layer2.0.downsample.0",
    }
    assert not any(name == "fc" for group in groups.values() for name, *_ in group.writers)


def test_a_channel_that_is_not_read_makes_no_difference_and_is_the_first_to_go():
    model = resnet()
    with torch.no_grad():
        model.layer1[0].conv2.weight[:, 5] = 0
    expected = model(images := torch.randn(4, *SIZE))
    cutter = ChannelCutter(cut := copy.deepcopy(model), SIZE)
    group = cutter.groups["layer1.0.conv1"]
    importance = channel_importance(cut, cutter.groups, [images], statistics_of_batch(cut))[group.root]
    assert importance[5] == 0
    assert (importance > 0).sum() == 7
    assert least_important(group, importance, 7) == [5]
    assert cutter.cut({group.root: [5]})
    assert cut.layer1[0].conv1.out_channels == 7
    torch.testing.assert_close(cut(images), expected)


def test_importance_is_the_second_order_change_of_the_answers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(2), Mean(), nn.Linear(16, 4)).eval()
    images = torch.randn(512, 3, 4, 4)
    model[3].weight.data *= 0.3
    groups = ChannelCutter(model, (3, 4, 4)).groups
    importance = channel_importance(model, groups, [images], statistics_of_batch(model))["0"] / len(images)
    log_probs = model(images).log_softmax(-1)
    changes = []
    for channel in range(16):
        without = copy.deepcopy(model)
        without[3].weight.data[:, channel] = 0
        changes.append((log_probs.exp() * (log_probs - without(images).log_softmax(-1))).sum(-1).mean())
    torch.testing.assert_close(importance, torch.stack(changes), rtol=0.25, atol=1e-4)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(-1)


def test_grouped_convolutions_lose_whole_groups():
    model = timm.create_model("regnetx_002", num_classes=3).eval()
    cutter = ChannelCutter(model, (3, 64, 64))
    group = next(
        group for group in cutter.groups.values() if "s2.b1.conv2.conv" in [name for name, *_ in group.writers]
    )
    assert group.unit == 8
    channels = least_important(group, torch.arange(float(group.channels)), group.channels - 16)
    assert channels == list(range(16))
    conv = model.s2.b1.conv2.conv
    groups, weight = conv.groups, conv.weight.detach().clone()
    assert cutter.cut({group.root: channels})
    assert conv.groups == groups - 2
    assert torch.equal(conv.weight, weight[16:])


def test_the_parts_of_group_norm_lose_as_many_channels_each():
    group = ChannelGroup("conv", channels=8, parts=2)
    removed = least_important(group, torch.tensor([4.0, 1, 3, 2, 9, 7, 8, 6]), 4)
    assert removed == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("group", "share", "width"),
    [
        (ChannelGroup("a", 64), 0.7, 48),
        (ChannelGroup("a", 64), 0.01, 8),
        (ChannelGroup("a", 30), 0.5, 15),
        (ChannelGroup("a", 6), 0.5, 6),
        (ChannelGroup("a", 48, unit=24), 0.6, 24),
    ],
)
def test_widths_are_multiples_of_eight_where_they_can_be(group, share, width):
    assert group.width(share) == width


def test_a_search_without_an_end_is_given_up(monkeypatch):
    monkeypatch.setattr("hf_noisekd.shrinking.dependency_graph.MAX_VISITS", 100)
    cutter = ChannelCutter(
        model := timm.create_model("rexnet_100", width_mult=0.5, depth_mult=0.5, num_classes=3).eval(), SIZE
    )
    assert "features.6.conv_pwl.conv" in cutter.left_alone
    root = "features.6.conv_exp.conv"
    outputs = model.get_submodule(root).out_channels
    assert cutter.cut({root: [0, 1]})
    assert model.get_submodule(root).out_channels == outputs - 2


def test_a_cut_that_the_forward_pass_does_not_bear_is_told():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Linear(8, 3)

        def forward(self, x):
            x = self.conv1(x)
            assert x.shape[1] == 16
            return self.fc(self.conv2(x).mean((2, 3)))

    assert not ChannelCutter(Fixed(), SIZE).cut({"conv1": [0, 1]})
    assert ChannelCutter(Fixed(), SIZE).cut({"conv2": [0, 1]})


class Net(nn.Module):
    """A network of three convolutions, with a function behind the first that halves its channels or none."""

    def __init__(self, function, outputs, transposed=False):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv1 = nn.Conv2d(3, 16, 3)
        self.conv2 = nn.ConvTranspose2d(outputs, 16, 2, 2) if transposed else nn.Conv2d(outputs, 16, 3)
        self.norm = nn.GroupNorm(2, 16)
        self.conv3, self.fc = nn.Conv2d(16, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.conv2(self.function(self.conv1(x)).relu()))
        return self.fc(self.conv3(x.relu()).mean((2, 3)))


def gate(x):
    return x[:, :8] * x[:, 8:].sigmoid()


def gate_of_chunks(x):
    value, scale = x.chunk(2, dim=1)
    return value * scale.tanh()


def part(x):
    return torch.cat([x[:, :8] + x[:, 4:12], x[:, 12:]], 1)


def shuffled(x):
    return x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)


def sums_of_parts(x):
    return torch.stack(torch.split(x, [8, 8], dim=1)).sum(0)


@pytest.mark.parametrize(
    ("function", "outputs", "loose"),
    [
        (gate, 8, {"conv1"}),
        (gate_of_chunks, 8, {"conv1"}),
        (part, 12, {"conv1"}),
        (shuffled, 16, {"conv1"}),
        (sums_of_parts, 8, {"conv1"}),
        (torch.square, 16, set()),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_channels_that_nothing_reads_can_be_cut_or_are_left_alone(function, outputs, loose, transposed):
    whole = Net(function, outputs, transposed).eval()
    groups = ChannelCutter(copy.deepcopy(whole), SIZE).groups
    assert groups.keys() == {"conv1", "conv2", "conv3"} - loose
    images = torch.randn(2, *SIZE)
    for root, group in groups.items():
        silenced, cut = copy.deepcopy(whole), copy.deepcopy(whole)
        if root == "conv2":  # cut in both halves alike, so that the statistics of GroupNorm stay
            silenced.norm.register_forward_pre_hook(
                lambda _, args: (args[0][:, [*range(4)] * 2 + [*range(8, 12)] * 2],)
            )
            removed = [4, 5, 6, 7, 12, 13, 14, 15]
            for tensor in (silenced.norm.weight, silenced.norm.bias):
                tensor.data[removed] = 0
        else:
            removed = [0, 3, 6]
            reader = {"conv1": silenced.conv2, "conv3": silenced.fc}[root]
            weight = (
                reader.weight.data.transpose(0, 1) if reader is silenced.conv2 and transposed else reader.weight.data
            )
            weight[:, removed] = 0
        assert group.channels == {"conv1": 16, "conv2": 16, "conv3": 8}[root]
        assert ChannelCutter(cut, SIZE).cut({root: removed})
        with torch.no_grad():
            torch.testing.assert_close(cut(images), silenced(images))


def test_what_a_transposed_convolution_reads_has_importance_and_is_compensated_for():
    whole = Net(torch.square, 16, transposed=True).eval()
    whole.conv1.weight.data[5] = whole.conv1.bias.data[5] = 0
    whole.conv1.weight.data[9], whole.conv1.bias.data[9] = whole.conv1.weight.data[8], whole.conv1.bias.data[8]
    images = torch.randn(8, *SIZE)
    cutter = ChannelCutter(cut := copy.deepcopy(whole), SIZE)
    importance = channel_importance(cut, cutter.groups, [images], running_statistics(cut))["conv1"]
    assert (importance > 0).tolist() == [channel != 5 for channel in range(16)]
    removed = {"conv1": [5, 9]}
    compensate(cut, cutter.groups, removed, [images], running_statistics(cut))
    assert cutter.cut(removed)
    with torch.no_grad():
        torch.testing.assert_close(cut(images), whole(images), rtol=1e-3, atol=1e-3)


def test_a_constant_behind_a_transposed_convolution_goes_into_its_bias():
    whole = Net(torch.square, 16, transposed=True).eval()
    whole.conv1.weight.data[5], whole.conv1.bias.data[5] = 0, 2.0
    whole.conv2.weight.data[5] = torch.randn(16, 1, 1)  # the same for each position of the kernel
    cutter = ChannelCutter(cut := copy.deepcopy(whole), SIZE)
    images = torch.randn(8, *SIZE)
    compensate(cut, cutter.groups, {"conv1": [5]}, [images], running_statistics(cut))
    assert cutter.cut({"conv1": [5]})
    with torch.no_grad():
        torch.testing.assert_close(cut(images), whole(images), rtol=1e-3, atol=1e-3)


def test_convolutions_that_standardise_their_weights_can_be_cut():
    whole = Net(torch.square, 16).eval()
    whole.conv2 = StdConv2d(16, 16, 3)
    cutter = ChannelCutter(whole, SIZE)
    assert cutter.groups.keys() == {"conv1", "conv2", "conv3"}
    assert isinstance(whole.conv2, StdConv2d)
    whole = Net(gate, 8).eval()
    whole.conv2 = StdConv2d(8, 16, 3)
    assert ChannelCutter(whole, SIZE).left_alone == {"conv1": ["conv1"]}
