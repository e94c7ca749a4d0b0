import json

import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_noisekd.hub import class_names, load_student, load_teacher, save_model


@pytest.fixture
def saved(digits_teacher, tmp_path):
    save_model(digits_teacher, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.26"), reason="timm 1.0.25 unpickles local folders")
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


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_loads_a_folder_of_either_library(digits_teacher, saved, tmp_path, form):
    again = load_teacher(form.format(saved)).eval()
    pixels = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels), digits_teacher(pixels), rtol=1e-5, atol=1e-5)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4)
    save_model(ResNetForImageClassification(config), tmp_path / "transformers")
    assert isinstance(load_student(str(tmp_path / "transformers")), ResNetForImageClassification)


def test_a_student_named_by_architecture_fits_the_teacher():
    student = load_student("resnet10_cifar", num_classes=7, input_size=(1, 16, 16))
    assert (student.num_classes, student.in_chans) == (7, 1)
    assert student.pretrained_cfg["input_size"] == (1, 16, 16)


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


@pytest.mark.network
def test_pulls_a_teacher_from_the_hub():
    assert load_teacher("timm/resnet10t.c3_in1k").num_classes == 1000
    assert load_teacher("resnet10t.c3_in1k").num_classes == 1000
    assert isinstance(load_teacher("microsoft/resnet-18"), ResNetForImageClassification)


def test_class_names_are_never_guessed():
    assert class_names(timm.create_model("resnet10_cifar", width=4), 10) == [str(index) for index in range(10)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18_cifra", "Unknown model 'resnet18_cifra'.*Did you mean resnet18_cifar"),
        ("xyzzy", "Unknown model 'xyzzy'"),
        ("./nowhere", "There is no folder"),
        ("runs/nowhere", "no folder 'runs/nowhere', and no such model could be had from the Hub"),
        ("runs/too/deep", "no folder 'runs/too/deep', and no such model could be had from the Hub"),
        (7, "got int"),
    ],
)
def test_refuses_what_is_no_model(source, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(source)


def test_refuses_folders_that_are_no_models(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_teacher(str(tmp_path / "empty"))
    with open(saved / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(str(saved))
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_teacher(str(saved))
