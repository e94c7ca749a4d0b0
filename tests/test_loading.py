import argparse
import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_noisekd.models.classifier import bare_model
from hf_noisekd.models.loading import load_student, load_teacher
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.models.saving import save_model


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


@pytest.mark.network
def test_pulls_a_teacher_from_the_hub():
    assert load_teacher("timm/resnet10t.c3_in1k").num_classes == 1000
    assert load_teacher("resnet10t.c3_in1k").num_classes == 1000
    assert isinstance(load_teacher("microsoft/resnet-18"), ResNetForImageClassification)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18_cifra", "'resnet18_cifra'.*resnet18_cifar"),
        ("xyzzy", "'xyzzy'"),
        ("./nowhere", "no folder .*nowhere"),
        ("runs/nowhere", "'runs/nowhere'.*Hub"),
        ("runs/too/deep", "'runs/too/deep'.*Hub"),
        (7, "'7'"),
    ],
)
def test_refuses_what_is_no_model(source, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(source)


def test_refuses_folders_that_are_no_models(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_teacher(str(tmp_path / "empty"))
    config = saved / "config.json"
    good = config.read_text()
    for broken, message in (
        ("{", "cannot be loaded"),
        ("[]", "cannot be loaded"),
        (json.dumps(json.loads(good) | {"architecture": "resnet10_cifra"}), "'resnet10_cifra'.*resnet10_cifar"),
        (json.dumps(json.loads(good) | {"num_classes": 7}), r"'fc\.bias'.*\[7\].*\[10\]"),
        (json.dumps({"hidden_sizes": [8]}), "cannot be loaded"),
    ):
        config.write_text(broken)
        with pytest.raises(ValueError, match=message):
            load_teacher(saved)
    config.write_text(good)
    with open(saved / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(str(saved))
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_teacher(str(saved))


class Malicious:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickled_code_runs(saved, digits_teacher, tmp_path):
    trace = tmp_path / "trace"
    for name in ("pytorch_model.bin", "model.pth"):
        (saved / name).write_bytes(pickle.dumps(Malicious(trace)))
    load_teacher(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors.* model\.pth, pytorch_model\.bin"):
        load_teacher(saved)
    torch.save({"state_dict": Malicious(trace)}, tmp_path / "evil.pth")
    for file in (saved / "model.pth", tmp_path / "evil.pth"):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_teacher("resnet10_cifar", checkpoint=file)
        with pytest.raises(ValueError, match=f"{file.name} .*checkpoint"):
            load_teacher(str(file))
    assert not trace.exists()


def below(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"net": state, "acc": 93.1, "epoch": torch.tensor(3)},
        lambda state: {"epoch": 3, "model_state_dict": state, "optimizer": {"state": {0: {"step": torch.tensor(1)}}}},
        lambda state: {"model": "resnet18", "args": argparse.Namespace(lr=1), "weights": {"net": below("net.")(state)}},
        lambda state: {"state_dict": below("model.")(state) | {"loss.weight": torch.ones(3)}},
        lambda state: {"model": below("fc.")({}) | dict.fromkeys(state, torch.zeros(1)), "model_ema": state},
        lambda state: {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name},
    ],
)
def test_a_file_of_weights_is_read_where_the_user_points_at_one(tmp_path, wrapped):
    model = timm.create_model("resnet18", num_classes=7, in_chans=1).eval()
    torch.save(wrapped({f"module.{name}": tensor for name, tensor in model.state_dict().items()}), tmp_path / "w.pth")
    again = load_teacher("resnet18", checkpoint=tmp_path / "w.pth").eval()
    pixels = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels), model(pixels))
    with pytest.raises(ValueError, match="tensors differ"):
        load_teacher("resnet34", checkpoint=tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"nowhere\.pth"):
        load_teacher("resnet18", checkpoint=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(saved, digits_teacher, tmp_path, value):
    """Wherever they lie: as a folder of timm's or transformers' layout, or as a file."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4, layer_type="basic")
    save_model(ResNetForImageClassification(config), tmp_path / "transformers")
    for folder, name in ((saved, "fc.bias"), (tmp_path / "transformers", "classifier.1.bias")):
        weights = load_file(folder / "model.safetensors")
        weights[name][-1] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for load in (load_teacher, load_student):
            with pytest.raises(ValueError, match=f"'{name}' .*NaN"):
                load(str(folder))
    weights = timm.create_model("resnet10_cifar").state_dict()
    weights["bn1.running_var"][3] = value
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"'bn1\.running_var' .*NaN"):
        load_teacher("resnet10_cifar", checkpoint=tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "content", [{}, [], torch.ones(3), {"net": {"a": 1}}, {"net": {"conv1.weight": torch.ones(3)}}, "text", {1: {}}]
)
def test_a_file_that_holds_no_weights_of_the_architecture(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"checkpoint .*w\.pth"):
        load_teacher("resnet18", checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize(
    "key", ["architecture", "num_classes", "pretrained_cfg", "model_args", "label_names", "noisekd"]
)
@pytest.mark.parametrize("value", [5, None, [], {}, "x", [None]], ids=str)
def test_a_configuration_that_holds_anything(saved, key, value):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    try:
        load_teacher(saved)
    except ValueError as error:
        assert "cannot be loaded" in str(error)  # noqa: PT017 - or it is read


def test_batches_need_not_be_counted(saved, tmp_path):
    save_model(ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])), tmp_path)
    for folder in (saved, tmp_path):
        weights = load_file(folder / "model.safetensors")
        uncounted = {name: tensor for name, tensor in weights.items() if "num_batches_tracked" not in name}
        assert len(uncounted) < len(weights)
        save_file(uncounted, folder / "model.safetensors", metadata={"format": "pt"})
        load_teacher(folder)


def test_an_input_size_is_declared_by_a_copy_of_either_library(saved):
    wrapped = AutoModelForImageClassification.from_pretrained(saved)
    for model in (load_teacher(saved), wrapped):
        changed = load_teacher(model, input_size=(1, 24, 24))
        assert input_size_of(changed) == input_size_of(bare_model(changed)) == (1, 24, 24)
        assert input_size_of(model) == input_size_of(bare_model(model)) == (1, 32, 32)
        assert next(changed.parameters()).data_ptr() == next(model.parameters()).data_ptr()


def test_whatever_timm_says_to_arguments_is_one_error():
    with pytest.raises(ValueError, match=r"swin_tiny.*num_heads=\(2, 4\)"):
        load_student("swin_tiny_patch4_window7_224", model_args={"num_heads": (2, 4)})
