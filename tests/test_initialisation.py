import copy

import pytest
import timm
import torch
from conftest import digest

from hf_noisekd.shrinking.initialisation import initialise_from_teacher

SIZE = (3, 32, 32)
NOISE = [torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(0))]


def build(name, **kwargs):
    torch.manual_seed(len(name) + len(kwargs))
    return timm.create_model(name, num_classes=3, **kwargs).eval()


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (("resnet34_cifar", {"width": 4}), ("resnet18_cifar", {"width": 4})),
        (("resnet18_cifar", {"width": 8}), ("resnet10_cifar", {"width": 8})),
        (("wide_resnet16_2_cifar", {}), ("wide_resnet16_2_cifar", {"blocks": 1})),
    ],
)
def test_a_shallower_student_has_whole_tensors_of_its_teacher(teacher, student):
    teacher, student = build(teacher[0], **teacher[1]), build(student[0], **student[1])
    start, _ = initialise_from_teacher(student, teacher, SIZE, NOISE)
    assert (start.from_teacher, start.cut) == (start.tensors, 0)
    assert len(start.removed_blocks) == len(block_names(teacher)) - len(block_names(student))
    held = {tensor.numpy().tobytes() for tensor in teacher.state_dict().values()}
    assert all(tensor.numpy().tobytes() in held for tensor in student.state_dict().values())


def block_names(model):
    return {name for name, module in model.named_modules() if type(module).__name__ in ("BasicBlock", "PreActBasic")}


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (("resnet18_cifar", {"width": 16}), ("resnet18_cifar", {"width": 8})),
        (("wide_resnet16_2_cifar", {}), ("wide_resnet16_2_cifar", {"widen": 1})),
    ],
)
def test_a_narrower_student_answers_more_like_its_teacher_than_a_random_one(teacher, student):
    teacher, student = build(teacher[0], **teacher[1]), build(student[0], **student[1])
    teacher.get_classifier().weight.data *= 100
    expected = answers(teacher)
    before = digest(teacher)
    at_random = (expected - answers(student)).abs().mean()
    start, _ = initialise_from_teacher(student, teacher, SIZE, NOISE)
    assert start.from_teacher == start.tensors > start.cut > 0
    assert (expected - answers(student)).abs().mean() < at_random
    assert digest(teacher) == before
    assert all(parameter.requires_grad for parameter in student.parameters())


def answers(model):
    return copy.deepcopy(model).train()(NOISE[0]).softmax(-1)


def test_layers_of_all_kinds_are_narrowed():
    teacher, student = build("mobilenetv2_100"), build("mobilenetv2_050")
    start, _ = initialise_from_teacher(student, teacher, SIZE, NOISE)
    assert start.from_teacher == start.tensors > start.cut > 0


def test_blocks_that_matter_the_least_are_left_out():
    teacher = build("resnet34_cifar", width=8)
    for block in (1, 2, 4, 5):  # these give back what they take in
        teacher.layer3[block].bn2.weight.data.zero_()
        teacher.layer3[block].bn2.bias.data.zero_()
    student = build("resnet34_cifar", width=8, layers=(3, 4, 2, 3))
    start, _ = initialise_from_teacher(student, teacher, SIZE, NOISE)
    assert start.removed_blocks == [f"layer3.{block}" for block in (1, 2, 4, 5)]
    assert torch.equal(student.layer3[1].conv1.weight, teacher.layer3[3].conv1.weight)


def test_a_stage_that_is_deeper_in_the_student_keeps_its_random_blocks():
    teacher, student = build("regnety_008"), build("regnety_006")
    own = student.s4.b3.conv1.conv.weight.detach().clone()
    start, _ = initialise_from_teacher(student, teacher, SIZE, NOISE)
    assert start.tensors > start.from_teacher > start.cut > 0
    assert torch.equal(student.s4.b3.conv1.conv.weight, own)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("resnet26", "resnet18"),
        ("resnet18", "mobilenetv2_050"),
        ("resnet18", "resnet34"),
        ("mobilenetv2_050", "mobilenetv2_100"),
    ],
)
def test_a_student_of_another_kind_or_a_larger_one_is_left_alone(teacher, student):
    student = build(student)
    before = digest(student)
    assert initialise_from_teacher(student, build(teacher), SIZE, NOISE) is None
    assert digest(student) == before


def test_a_student_that_computes_otherwise_than_its_teacher_is_warned_of(caplog):
    torch.manual_seed(0)
    sizes = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 3}
    teacher = timm.create_model("resnet18", act_layer="silu", **sizes).eval()
    noise = [torch.randn(8, 3, 32, 32)]
    for act_layer, warned in (("relu", True), ("silu", False)):
        caplog.clear()
        student = timm.create_model("resnet18", act_layer=act_layer, **sizes)
        assert initialise_from_teacher(student, teacher, (3, 32, 32), noise)
        assert ("silu" in caplog.text) == warned


def test_layers_of_one_name_and_two_kinds():
    teacher = timm.create_model("resnet26", num_classes=3).eval()
    student = timm.create_model("resnet26d", num_classes=3)
    found = initialise_from_teacher(student, teacher, (3, 32, 32), NOISE)  # `downsample.1` is BatchNorm in one
    assert found is None or found[0].from_teacher < found[0].tensors
