import copy
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

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

from hf_noisekd.models.hub import class_names, load_student, load_teacher, replacing_files, save_model, teacher_identity


@pytest.fixture
def saved(digits_teacher, tmp_path):
    save_model(digits_teacher, tmp_path / "model")
    return tmp_path / "model"


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
    config = saved / "config.json"
    good = config.read_text()
    for broken, message in (
        ("{", "cannot be loaded"),
        ("[]", "no JSON object"),
        (json.dumps(json.loads(good) | {"architecture": "resnet10_cifra"}), "knows no architecture.*resnet10_cifar"),
        (json.dumps(json.loads(good) | {"num_classes": 7}), r"do not fit.*'fc.bias'.*\[7\], the file \[10\]"),
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
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
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
    with pytest.raises(ValueError, match=r"no model\.safetensors. It has model\.pth, pytorch_model\.bin"):
        load_teacher(saved)
    torch.save({"state_dict": Malicious(trace)}, tmp_path / "evil.pth")
    for file in (saved / "model.pth", tmp_path / "evil.pth"):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_teacher("resnet10_cifar", checkpoint=file)
        with pytest.raises(ValueError, match="is a file"):
            load_teacher(str(file))
    assert not trace.exists()


@pytest.mark.parametrize("wrapped", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_a_file_of_weights_is_read_where_the_user_points_at_one(tmp_path, wrapped):
    model = timm.create_model("resnet18", num_classes=7, in_chans=1).eval()
    torch.save(wrapped({f"module.{name}": tensor for name, tensor in model.state_dict().items()}), tmp_path / "w.pth")
    again = load_teacher("resnet18", checkpoint=tmp_path / "w.pth").eval()
    pixels = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels), model(pixels))
    with pytest.raises(ValueError, match="do not fit"):
        load_teacher("resnet34", checkpoint=tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no file"):
        load_teacher("resnet18", checkpoint=tmp_path / "nowhere.pth")


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


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail(folder):
        with replacing_files(folder) as staging:
            (staging / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "a" / "model")
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "old"]


def test_a_folder_that_another_process_makes_meanwhile_is_filled(tmp_path):
    """As with the checkpoint of several processes, of which each writes a file of its own."""
    with replacing_files(tmp_path / "checkpoint-1") as staging:
        (staging / "model.safetensors").write_text("weights")
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "rng_state_1.pth").write_text("rank 1")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-1", "model.safetensors", "rng_state_1.pth"]


def test_a_transformers_teacher_that_declares_no_size_gives_its_processor_on(tmp_path):
    save_model(FAMILIES[0], tmp_path / "teacher")
    BitImageProcessor(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1] * 3).save_pretrained(
        tmp_path / "teacher"
    )
    save_model(FAMILIES[1], tmp_path / "student", teacher_model=load_teacher(tmp_path / "teacher"))
    save_model(load_teacher(tmp_path / "student"), tmp_path / "again")  # as after a recalibration
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "again").image_mean) == [0.1] * 3


SAVES = """
import sys, timm, torch, hf_noisekd
from hf_noisekd.models.hub import save_model
model = timm.create_model("resnet18", num_classes=10)
for number in range(1_000_000):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(number % 100)
    save_model(model, sys.argv[1])
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path):
    """All tensors of a version are equal, so a mixture would show."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SAVES, str(tmp_path / "model")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            process.stdout.readline()
        time.sleep(random.random() / 5)
        process.send_signal(signal.SIGKILL)
    values = {tensor.flatten()[0].item() for tensor in load_teacher(tmp_path / "model").state_dict().values()}
    assert len(values) == 1
