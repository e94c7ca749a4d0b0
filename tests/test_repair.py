import copy

import pytest
import timm
import torch
from torch import nn

from hf_noisekd import shrink
from hf_noisekd.calibration.given_images import given_images
from hf_noisekd.shrinking import walk
from hf_noisekd.shrinking.blocks import Place, remove_blocks
from hf_noisekd.shrinking.channels import ChannelCutter
from hf_noisekd.shrinking.compensation import compensate
from hf_noisekd.shrinking.ranking import running_statistics
from hf_noisekd.shrinking.repair import Cut, Pair, fit_to_teacher, pairs_of, repair

SIZE = (3, 32, 32)
# A network of each kind of block, and a block of it that can be left out.
NETWORKS = {
    "resnet18_cifar": ({"width": 8, "stem_stride": 2}, "layer2.1"),
    "wide_resnet16_2_cifar": ({"widen": 1}, "stages.1.blocks.1"),  # no bias, no BatchNorm behind
    "mobilenetv2_050": ({}, "blocks.3.1"),
    "convnext_atto": ({"patch_size": 2, "depths": (2, 2, 2, 2), "dims": (16, 16, 32, 32)}, "stages.2.blocks.1"),
    "regnetx_002": ({}, "s4.b5"),
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48}, "blocks.1"),
}


def place(name):
    stage, _, key = name.rpartition(".")
    return Place(stage, key)


def build(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
        if hasattr(layer, "gamma"):
            nn.init.ones_(layer.gamma)  # as small as it begins, no block would matter
    images = torch.randn(64, *SIZE)
    with torch.no_grad():
        for _ in range(20):
            model.train()(images)  # for running statistics
    return model.eval(), images


def error(student, teacher, images):
    with torch.no_grad():
        return (student(images.clone()) - teacher(images.clone())).square().mean().item()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_a_block_comes_closer_to_its_teacher(name):
    kwargs, block = NETWORKS[name]
    teacher, images = build(name, **kwargs)
    removed = [place(block)]
    remove_blocks(student := copy.deepcopy(teacher), removed)
    before, state = error(student, teacher, images[48:]), copy.deepcopy(teacher.state_dict())
    assert repair(student, teacher, Cut(removed, {}), [images[:48]]) > 0
    assert error(student, teacher, images[48:]) < 0.9 * before
    assert all(torch.equal(tensor, teacher.state_dict()[key]) for key, tensor in state.items())


@pytest.mark.parametrize("recalibrates", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_run_on_what_is_kept_are_repaired_as_those_run_on_images(monkeypatch, name, recalibrates):
    kwargs, block = NETWORKS[name]
    teacher, images = build(name, **kwargs)
    removed, students, seen = [place(block)], [], []
    for memory in (0, 2**29):
        monkeypatch.setattr(walk, "MEMORY", memory)
        remove_blocks(student := copy.deepcopy(teacher), removed)
        first, count = next(layer for layer in student.modules() if isinstance(layer, nn.Conv2d)), []
        first.register_forward_hook(lambda _, args, __, count=count: count.append(len(args[0])))
        cut = Cut(removed, {})
        assert repair(student, teacher, cut, [images], recalibrates=recalibrates, trains_blocks=False) > 0
        students.append(student)
        seen.append(sum(count))
    assert seen[1] < 0.7 * seen[0]
    expected, found = (student(images.clone()) for student in students)
    assert torch.allclose(expected, found, rtol=0, atol=1e-3 * expected.std().item())


def test_what_a_linear_layer_can_mend_is_mended():
    teacher, images = build("resnet18_cifar", width=8, stem_stride=2)
    student = copy.deepcopy(teacher)
    nn.init.normal_(student.layer2[1].conv2.weight)
    before = error(student, teacher, images)
    assert repair(student, teacher, Cut([], {}), [images]) >= 1
    assert error(student, teacher, images) < 0.05 * before


def test_a_network_that_is_its_teacher_stays_so():
    teacher, images = build("resnet18_cifar", width=8, stem_stride=2)
    student = copy.deepcopy(teacher)
    assert repair(student, teacher, Cut([], {}), [images]) == 0
    assert all(torch.equal(tensor, teacher.state_dict()[key]) for key, tensor in student.state_dict().items())


def test_a_block_answers_for_those_left_out_behind_it():
    teacher, _ = build("resnet18_cifar", width=8, layers=(3, 1, 1, 3))
    removed = [place("layer1.1"), place("layer4.1"), place("layer4.2")]
    pairs = pairs_of(teacher, removed)
    assert pairs == [
        Pair("layer1.0", "layer1.1", ["layer1.0"]),
        Pair("layer1.1", "layer1.2", []),
        Pair("layer4.0", "layer4.2", ["layer4.0", "layer4.1"]),
    ]


@pytest.mark.parametrize(
    ("name", "kwargs"), [("resnet18_cifar", {"width": 16, "stem_stride": 2}), ("mobilenetv2_050", {})]
)
def test_channels_that_stay_stand_for_those_removed(name, kwargs):
    teacher, images = build(name, **kwargs)
    outputs, errors = [], []
    for compensates in (False, True):
        cut = copy.deepcopy(teacher)
        cutter = ChannelCutter(cut, SIZE)
        readers = {root: cut.get_submodule(group.readers[0][0]) for root, group in cutter.groups.items()}
        root = next(
            root for root, reader in readers.items() if isinstance(reader, nn.Conv2d) and reader.in_channels > 8
        )
        removed = {root: list(range(0, cutter.groups[root].channels, 2))}
        if compensates:
            compensate(cut, cutter.groups, removed, [images[:48]], running_statistics(cut))
        assert cutter.cut(removed)
        for layer in (teacher.get_submodule(cutter.groups[root].readers[0][0]), readers[root]):
            layer.register_forward_hook(lambda *args: outputs.append(args[-1]))
        with torch.no_grad():
            teacher(images[48:].clone()), cut(images[48:].clone())
        # A constant is for BatchNorm.
        errors.append((outputs[-2] - outputs[-1]).var((0, 2, 3)).mean().item())
    assert errors[1] < 0.95 * errors[0]


def test_the_best_on_held_out_images_stays():
    teacher, images = build("resnet18_cifar", width=8, stem_stride=2)
    removed = [place("layer2.1")]
    remove_blocks(student := copy.deepcopy(teacher), removed)
    before = error(student, teacher, images)
    _, solved = fit_to_teacher(student, teacher, Cut(removed, {}), given_images(teacher, images))
    assert solved > 0
    assert error(student, teacher, images) < before
    # A student that is its teacher already cannot become better.
    twin = copy.deepcopy(teacher)
    assert fit_to_teacher(twin, teacher, Cut([], {}), given_images(teacher, images)) == (False, 0)
    assert error(twin, teacher, images) == 0


def test_images_make_a_better_cut():
    teacher, images = build("resnet18_cifar", width=8, stem_stride=2)
    plain, _ = shrink(teacher, 0.5, images=[images[:48]])
    assert shrink(teacher, 0.5)[1].repaired_blocks == 0
    without, _ = shrink(teacher, 0.5)
    assert error(plain, teacher, images[48:]) < error(without, teacher, images[48:])
