import copy

import pytest
import timm
import torch
from torch import nn

from hf_noisekd.calibration.given_images import given_images
from hf_noisekd.shrinking import reconstruction
from hf_noisekd.shrinking.blocks import Place, remove_blocks
from hf_noisekd.shrinking.channels import ChannelCutter
from hf_noisekd.shrinking.reconstruction import Reconstruction
from hf_noisekd.shrinking.repair import Cut, fit_to_teacher, repair
from hf_noisekd.shrinking.walk import BlockPair, Walk

SIZE = (3, 32, 32)


class Squares(nn.Module):
    """Layers whose product is the output: none of them reaches it linearly."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, *others):
        return x + torch.tanh(self.first(x)) * torch.tanh(self.second(x))


class Residual(nn.Module):
    """Of its layers only the last one reaches the output linearly."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        nn.init.normal_(self.second.weight, std=0.2)

    def forward(self, x):
        return x + self.second(self.norm(self.first(x)).relu())


class Gated(Residual):
    """One of its linear layers gets pooled features."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, x):
        return x + (super().forward(x) - x) * self.gate(x.mean((2, 3))).sigmoid()[..., None, None]


class Network(nn.Module):
    """Two blocks, which get `extra` of the features, too, if it is given."""

    def __init__(self, extra=None, block=Squares):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc, self.extra = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 10), extra
        self.blocks = nn.ModuleList([block(), block()])

    def features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, *(self.extra(x) if self.extra else ()))
        return x

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


REMOVED = [Place("blocks", "1")]


def cut(**kwargs):
    teacher = Network(**kwargs).eval()
    remove_blocks(student := copy.deepcopy(teacher), REMOVED)
    return student, teacher, torch.randn(64, *SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def error(student, teacher, images):
    return (student.features(images) - teacher.features(images)).square().mean().item()


def state_of(model):
    return copy.deepcopy(model.state_dict())


def are_equal(state, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.parametrize("block", [Squares, Gated])
def test_a_block_without_a_linear_end_is_trained(monkeypatch, block):
    monkeypatch.setattr(reconstruction, "STEPS", 100)
    student, teacher, images = cut(block=block)
    before, state = error(student, teacher, images[48:]), state_of(student)
    assert repair(student, teacher, Cut(REMOVED, {}), [images[:48]]) == 1
    assert error(student, teacher, images[48:]) < 0.95 * before
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed
    assert all(name.startswith("blocks.0.") for name in changed)


def test_training_goes_beyond_the_closed_form(monkeypatch):
    errors = []
    for steps in (0, 100):
        monkeypatch.setattr(reconstruction, "STEPS", steps)
        student, teacher, images = cut(block=Residual)
        statistics = {name: tensor.clone() for name, tensor in student.named_buffers()}
        assert repair(student, teacher, Cut(REMOVED, {}), [images[:48]]) == 1
        assert are_equal(statistics, dict(student.named_buffers()))
        errors.append(error(student, teacher, images[48:]))
    assert errors[1] < 0.95 * errors[0]


def test_channels_are_known_without_a_linear_end():
    torch.manual_seed(0)
    teacher = timm.create_model("resnet18_cifar", width=16, stem_stride=2, norm_groups=1, num_classes=10).eval()
    cutter = ChannelCutter(student := copy.deepcopy(teacher), SIZE)
    root = next(root for root, group in cutter.groups.items() if "layer2.1.conv2" in dict.fromkeys(names(group)))
    lost = [*range(0, cutter.groups[root].channels, 2)]
    assert cutter.cut({root: lost})
    images = torch.randn(8, *SIZE)
    pair = pair_of(student, teacher, images, "layer2.1", "layer2.1", cutter.kept)
    assert pair.channels == [channel for channel in range(cutter.groups[root].channels) if channel not in lost]
    with torch.no_grad():
        assert pair.of_student(pair.teacher.run(0)[0]).shape == pair.student.run(0)[0].shape


@torch.no_grad()
def pair_of(student, teacher, images, name, name_of_teacher, kept):
    walks = [Walk(model, images, mirrors=True) for model in (student, teacher)]
    for one, block in zip(walks, (name, name_of_teacher), strict=True):
        one.enter(block)
    return BlockPair.of(*walks, kept)


def names(group):
    return [name for name, *_ in group.writers]


def test_a_training_that_makes_held_out_images_worse_leaves_the_block(monkeypatch):
    monkeypatch.setattr(reconstruction, "LEARNING_RATE", 10.0)
    student, teacher, images = cut()
    state = state_of(student)
    assert repair(student, teacher, Cut(REMOVED, {}), [images]) == 0
    assert are_equal(state, student.state_dict())


def test_the_closed_form_alone_stays_where_training_spoils_the_predictions(monkeypatch):
    student, teacher, images = cut(block=Residual)
    state, given = state_of(student), given_images(teacher, images)
    with monkeypatch.context() as patches:
        patches.setattr(reconstruction, "STEPS", 0)
        before = fit_to_teacher(student, teacher, Cut(REMOVED, {}), given)
    solved = state_of(student)
    assert not are_equal(state, solved)
    student.load_state_dict(state)
    monkeypatch.setattr(reconstruction, "LEARNING_RATE", 10.0)
    monkeypatch.setattr(Reconstruction, "helps", lambda self: True)  # on features that the predictions do not need
    assert fit_to_teacher(student, teacher, Cut(REMOVED, {}), given) == before
    assert are_equal(solved, student.state_dict())


@pytest.mark.parametrize(
    "extra",
    [lambda x: (x * 2,), lambda x: (x.mean().item(),), lambda x: ([x],)],
    ids=["tensors", "other values", "tensors in a list"],
)
def test_a_block_that_cannot_be_called_alone_stays(extra):
    student, teacher, images = cut(extra=extra)
    state = state_of(student)
    assert repair(student, teacher, Cut(REMOVED, {}), [images]) == 0
    assert are_equal(state, student.state_dict())


def test_other_arguments_are_passed_on():
    student, teacher, images = cut(extra=lambda x: (None, (8, 8), "same"))
    assert repair(student, teacher, Cut(REMOVED, {}), [images]) == 1


def test_everything_but_the_weights_is_as_before():
    student, teacher, images = cut()
    student.train()
    student.blocks[0].eval()
    student.blocks[0].first.weight.requires_grad_(False)
    student.blocks[0].second.weight.grad = torch.ones_like(student.blocks[0].second.weight)
    calls = []
    student.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    generator = torch.get_rng_state()
    again = copy.deepcopy(student)
    assert repair(student, teacher, Cut(REMOVED, {}), [images]) == 1
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in student.modules()] == [module.training for module in again.modules()]
    assert [x.requires_grad for x in student.parameters()] == [x.requires_grad for x in again.parameters()]
    assert student.blocks[0].second.weight.grad.eq(1).all()
    assert student.stem.weight.grad is None
    assert [len(module._forward_hooks) for module in student.modules() if module._forward_hooks] == [1]
    # The same once more, in batches of another size.
    assert repair(again, teacher, Cut(REMOVED, {}), [*images.split(16)]) == 1
    assert are_equal(student.state_dict(), again.state_dict())


def test_too_few_images_to_hold_some_out_change_nothing():
    student, teacher, images = cut()
    assert repair(student, teacher, Cut(REMOVED, {}), [images[:3]]) == 0
