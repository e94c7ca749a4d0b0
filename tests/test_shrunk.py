import copy

import pytest
import timm
import torch
from transformers import AutoModelForImageClassification

from hf_noisekd.models.loading import load_teacher
from hf_noisekd.models.saving import save_model
from hf_noisekd.shrinking.blocks import Place, remove_blocks
from hf_noisekd.shrinking.channels import ChannelCutter
from hf_noisekd.shrinking.shrunk import build_cut, shapes_of, timm_model_of

IMAGES = torch.randn(2, 3, 64, 64)


def cut_of(teacher, removed, channels, size=(3, 64, 64)):
    cut = copy.deepcopy(teacher)
    remove_blocks(cut, removed)
    cutter = ChannelCutter(cut, size)
    assert cutter.cut({root: list(range(number)) for root, number in channels.items()})
    return cut


def test_what_no_timm_name_describes_is_built_again_by_timm_and_transformers(tmp_path):
    teacher = timm.create_model("efficientnet_lite0", num_classes=3).eval()
    removed = [Place("blocks.4", "1")]
    cut = cut_of(teacher, removed, {"blocks.1.0.conv_pw": 8, "conv_head": 640})
    student = build_cut(cut, teacher, removed)
    assert student.pretrained_cfg["architecture"] == "shrunk"
    expected = cut.eval()(IMAGES)
    assert torch.equal(student(IMAGES), expected)
    save_model(student, tmp_path)
    for load in (load_teacher, lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True)):
        assert torch.equal(load(tmp_path).eval()(IMAGES), expected)
    logits = AutoModelForImageClassification.from_pretrained(tmp_path).eval()(IMAGES).logits
    torch.testing.assert_close(logits, expected)


def test_what_is_cut_twice_is_built_again(tmp_path):
    teacher = timm.create_model("mobilenetv2_050", num_classes=3).eval()
    once = build_cut(cut_of(teacher, [], {"blocks.1.0.conv_pw": 8}), teacher, [])
    removed = [Place("blocks.2", "1")]
    twice = build_cut(cut_of(once, removed, {"blocks.1.0.conv_pw": 8}), once, removed)
    save_model(twice, tmp_path)
    again = load_teacher(tmp_path).eval()
    assert again.blocks[1][0].conv_pw.out_channels == teacher.blocks[1][0].conv_pw.out_channels - 16
    assert torch.equal(again(IMAGES), twice(IMAGES))


@pytest.mark.parametrize(("name", "kwargs"), [("resnet18_cifar", {"width": 16}), ("resnet26", {})])
def test_what_the_arguments_of_a_resnet_describe_keeps_its_name(tmp_path, name, kwargs):
    teacher = timm.create_model(name, num_classes=3, **kwargs).eval()
    removed = [Place("layer3", "1"), Place("layer1", "1")]
    student = build_cut(cut_of(teacher, removed, {}), teacher, removed)
    assert student.pretrained_cfg["architecture"] == name
    save_model(student, tmp_path)
    assert torch.equal(load_teacher(tmp_path).eval()(IMAGES), student(IMAGES))


def test_a_teacher_that_was_changed_by_hand_cannot_be_cut():
    teacher = timm.create_model("mobilenetv2_050", num_classes=3)
    teacher.bn2.drop = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="mobilenetv2_050"):
        build_cut(copy.deepcopy(teacher), teacher, [])


def test_only_timm_models_can_be_cut():
    with pytest.raises(ValueError, match=r"Sequential .*timm"):
        timm_model_of(torch.nn.Sequential(torch.nn.Linear(3, 3)))


def test_a_network_built_by_its_description_has_random_weights_of_its_shapes():
    teacher = timm.create_model("mobilenetv2_050", num_classes=3)
    student = build_cut(cut_of(teacher, [], {"blocks.1.0.conv_pw": 8}), teacher, [])
    again = timm.create_model("shrunk", num_classes=3, **student.model_args)
    assert shapes_of(again) == shapes_of(student)
    assert again.blocks[1][0].conv_pw.weight.std() > 0
