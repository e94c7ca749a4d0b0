import copy
import json
import os

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperForImageClassification,
)

from hf_noisekd.models.classifier import class_names, teacher_identity
from hf_noisekd.models.loading import load_student, load_teacher
from hf_noisekd.models.saving import save_model


def test_timm_reads_what_was_saved(digits_teacher, saved):
    again = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    for name, tensor in digits_teacher.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert tuple(again.pretrained_cfg["input_size"]) == (1, 32, 32)


def test_transformers_reads_what_was_saved(digits_teacher, saved):
    again = AutoModelForImageClassification.from_pretrained(saved).eval()
    pixels = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, digits_teacher(pixels), rtol=1e-5, atol=1e-5)
    assert again.config.id2label == {index: str(index) for index in range(10)}
    assert "num_classes" not in json.loads((saved / "config.json").read_text())["model_args"]
    assert AutoImageProcessor.from_pretrained(saved) is not None


def test_a_student_takes_preprocessing_and_class_names_from_its_teacher(digits, digits_teacher, tmp_path):
    names = [f"digit {index}" for index in range(10)]
    teacher = timm.create_model(
        "resnet10_cifar",
        width=4,
        in_chans=1,
        pretrained_cfg_overlay=digits[0].pretrained_cfg | {"label_names": names},
    )
    save_model(load_student("resnet10_cifar", num_classes=10, input_size=(1, 32, 32)), tmp_path, teacher_model=teacher)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == names
    assert config["pretrained_cfg"]["mean"] == list(digits[0].mean)


def test_saves_modules_that_share_a_weight(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_model(model, tmp_path)
    again = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again[1].weight, model[0].weight)


def test_class_names_are_never_guessed():
    assert class_names(timm.create_model("resnet10_cifar", width=4), 10) == [str(index) for index in range(10)]


SMALL = {"num_labels": 4, "image_size": 32}
FAMILIES = [
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=4)),
    RegNetForImageClassification(
        RegNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], groups_width=8, num_labels=4)
    ),
    MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, **SMALL)),
    EfficientNetForImageClassification(
        EfficientNetConfig(width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256, **SMALL)
    ),
]


@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: type(model).__name__)
def test_transformers_families_keep_their_logits_and_say_how_they_were_made(model, tmp_path):
    model.noisekd = {"batch_norm": "batch"}
    save_model(model.eval(), tmp_path / "model")
    again = load_teacher(tmp_path / "model").eval()
    assert type(again) is type(model)
    assert again.noisekd == {"batch_norm": "batch"}
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_weights_in_half_precision_are_read_in_float32(tmp_path):
    save_model(copy.deepcopy(FAMILIES[0]).bfloat16(), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["classifier.1.weight"].dtype == torch.bfloat16
    assert {parameter.dtype for parameter in load_teacher(tmp_path).parameters()} == {torch.float32}


def test_a_card_that_cannot_be_read_is_no_obstacle(tmp_path):
    save_model(FAMILIES[0], tmp_path)
    (tmp_path / "README.md").write_text("---\ntitle: a: b\n---\n")
    assert load_teacher(tmp_path).origin == {"license": None}


def test_transformers_weights_that_are_missing_are_not_made_up(tmp_path):
    save_model(FAMILIES[0], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit.*classifier\.1\.weight"):
        load_teacher(tmp_path)


def test_a_wrapped_timm_model_is_saved_as_timms(saved, digits_teacher, tmp_path):
    wrapped = AutoModelForImageClassification.from_pretrained(saved)
    assert isinstance(wrapped, TimmWrapperForImageClassification)
    save_model(wrapped, tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    assert teacher_identity(again)["sha256"] == teacher_identity(digits_teacher)["sha256"]
    assert again.pretrained_cfg["mean"] == list(digits_teacher.pretrained_cfg["mean"])


def test_a_transformers_student_gets_the_preprocessing_of_a_timm_teacher(tmp_path):
    cfg = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8}
    teacher = timm.create_model("resnet10_cifar", width=4, num_classes=4, pretrained_cfg_overlay=cfg)
    save_model(FAMILIES[0], tmp_path, teacher_model=teacher)
    image = Image.fromarray(torch.randint(0, 256, (50, 60, 3), dtype=torch.uint8).numpy())
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    expected = timm.data.create_transform(**timm.data.resolve_data_config({}, model=teacher))(image)
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().mean() < 0.02  # they resize by different libraries


def test_a_timm_student_gets_the_preprocessing_of_a_transformers_teacher(tmp_path):
    save_model(FAMILIES[0], tmp_path / "teacher")
    BitImageProcessor(
        size={"shortest_edge": 40}, crop_size=32, resample=2, image_mean=[0.1] * 3, image_std=[0.2] * 3
    ).save_pretrained(tmp_path / "teacher")
    student = load_student("resnet10_cifar", num_classes=4, input_size=(3, 32, 32))
    save_model(student, tmp_path / "student", teacher_model=load_teacher(tmp_path / "teacher"))
    cfg = json.loads((tmp_path / "student" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"], cfg["crop_pct"], cfg["interpolation"]) == ([0.1] * 3, [0.2] * 3, 0.8, "bilinear")


def test_a_student_claims_nothing_of_published_weights(digits_teacher, tmp_path):
    save_model(timm.create_model("resnet18", in_chans=1, num_classes=10), tmp_path, teacher_model=digits_teacher)
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert not {"license", "tag", "origin_url", "test_input_size", "hf_hub_id"} & set(cfg)


def test_files_can_be_read_by_others(saved):
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in saved.iterdir()} == {0o666 & ~umask}


def test_a_transformers_teacher_that_declares_no_size_gives_its_processor_on(tmp_path):
    save_model(FAMILIES[0], tmp_path / "teacher")
    BitImageProcessor(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1] * 3).save_pretrained(
        tmp_path / "teacher"
    )
    save_model(FAMILIES[1], tmp_path / "student", teacher_model=load_teacher(tmp_path / "teacher"))
    save_model(load_teacher(tmp_path / "student"), tmp_path / "again")  # as after a recalibration
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "again").image_mean) == [0.1] * 3
