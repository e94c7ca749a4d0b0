"""What a command says is in the words of that command: its options, and not the arguments of a Python function."""

import logging
import re

import pytest
import timm
from conftest import pictures
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from hf_noisekd.cli.__main__ import main, parse_args
from hf_noisekd.models.saving import save_model

DISTILL = ["distill", "--teacher", "t", "--output-dir", "out"]


def in_options(message: str, *command: str) -> str:
    """A message as a command prints it, by default `distill`."""
    return parse_args(command or DISTILL).parser.in_options(message)


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("choose another output_dir.", "choose another --output-dir."),
        ("go on in full size with resolutions='1'.", "go on in full size with --resolutions 1."),
        ("Resume with max_steps=20, or", "Resume with --max-steps 20, or"),
        ("a student, or keep=0.5, max_macs or max_params", "a student, or --keep 0.5, --max-macs or --max-params"),
        ("keep is 2.0: use a number", "--keep is 2.0: use a number"),
        ("model_init_kwargs are for a student", "--student-args are for a student"),
        ("name the one to use with label_column.", "name the one to use with --eval-label-column."),
        # What is no option, or only looks like one.
        ("There is no folder 'runs/output_dir'.", None),
        ("There is no folder 'output_dir'.", None),
        ("Image 3 of output_dir/a.png cannot be read", None),
        ("The student is whole in out.", None),
        ("with num_classes=3", None),
        ("weights_only=True", None),
    ],
)
def test_arguments_become_options_and_nothing_else_does(message, printed):
    assert in_options(message) == (printed or message)


def test_a_command_without_the_option_leaves_the_word():
    assert in_options("choose another output_dir.", "info", "--teacher", "t") == "choose another output_dir."


@pytest.fixture
def undeclared(tmp_path):
    """A model of transformers that says nothing of its input size."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4, layer_type="basic")
    save_model(ResNetForImageClassification(config), tmp_path / "undeclared")
    return str(tmp_path / "undeclared")


@pytest.mark.parametrize(
    "words",
    [
        "info --teacher MODEL",
        "distill --teacher MODEL --student resnet10_cifar --output-dir out",
        "export --model MODEL --output out.onnx",
        "recalibrate --model MODEL --teacher MODEL --output-dir out",
    ],
)
def test_every_command_that_needs_an_input_size_has_the_option_that_it_asks_for(undeclared, capsys, words):
    command = words.replace("MODEL", undeclared).split()
    assert main(command) != 0
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--input-size" in line
    assert not re.search(r"\w_\w", line.replace(undeclared, "").replace("pretrained_cfg", "").replace("image_size", ""))
    assert parse_args([*command, "--input-size", "3", "32", "32"]).input_size == [3, 32, 32]


def test_a_teacher_that_cannot_be_cut_leads_to_a_student_by_name(undeclared, tmp_path, capsys):
    command = ["distill", "--teacher", undeclared, "--keep", "0.5", "--input-size", "3", "32", "32"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert re.search(r"no timm model.*--student \w+", capsys.readouterr().err)


def test_warnings_are_in_the_words_of_the_command_too(capsys, monkeypatch):
    def warn(*args, **kwargs):
        logging.getLogger("hf_noisekd.models.preprocessing").warning("%s: give input_size for another.", "ResNet")
        raise ValueError("enough")

    monkeypatch.setattr("hf_noisekd.workflows.teacher_report.describe_teacher", warn)
    assert main(["info", "--teacher", "t"]) == 1
    assert capsys.readouterr().err.splitlines()[0] == "ResNet: give --input-size for another."
    assert not logging.getLogger("hf_noisekd").handlers


def test_what_is_printed_of_a_start_names_options(saved, tmp_path, capsys):
    command = ["distill", "--teacher", str(saved), "--student", "resnet10_cifar", "--output-dir", str(tmp_path / "out")]
    command += ["--init-student", "random", "--max-steps", "1", "--per-device-train-batch-size", "4", "--disable-tqdm"]
    assert main([*command, "--num-calibration-images", "0", "--eval-noise-batches", "1"]) == 0
    assert "random weights, by --init-student random." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "recalibrate"])
def test_who_has_a_few_photos_without_labels_finds_that_in_the_help(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith(f"  noisekd {command}") and "--images" in line]
    assert all(words in line for words in ("photos", "few", "no labels"))
    options = line.removeprefix("  noisekd ").partition("  ")[0].split()
    assert parse_args(options).images == "FOLDER"


@pytest.mark.parametrize(
    ("words", "takes"),
    [
        ("export --int8 --output MODEL/new.onnx", "29 s on a CPU .*60 steps"),
        ("recalibrate --teacher MODEL --output-dir MODEL/new", "58 s on a CPU .*120 steps"),
    ],
)
def test_what_making_images_takes_is_said_before_it_begins(saved, capsys, monkeypatch, words, takes):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_noisekd.training.cost._seconds", lambda function, device: function() or 0.64)
    monkeypatch.setattr("hf_noisekd.workflows.inputs.calibration_images", stop)
    command, *options = words.replace("MODEL", str(saved)).split()
    assert main([command, "--model", str(saved), *options, "--num-images", "64"]) == 130
    # Of 64 images and 32 held out, with 5 ms a step and image.
    assert re.search(rf"^About {takes} .*96 images.*900", capsys.readouterr().err, flags=re.MULTILINE)


def test_twenty_photos_without_labels_recalibrate_and_lead_to_what_needs_no_labels(tmp_path, capsys):
    cfg = {"input_size": (3, 32, 32)}
    save_model(timm.create_model("test_resnet", num_classes=5, pretrained_cfg_overlay=cfg), tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for index in range(4):
        for name, picture in pictures(tmp_path / "originals").items():
            picture.rotate(90 * index).save(tmp_path / "photos" / f"{index}{name}")
    photos = str(tmp_path / "photos")
    command = ["recalibrate", "--model", str(tmp_path / "model"), "--images", photos]
    assert main([*command, "--output-dir", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "24 images" in printed
    (export,) = re.findall(r"^  noisekd (export .*)$", printed, flags=re.MULTILINE)
    assert main([word if "." not in word else f"{tmp_path}/{word}" for word in export.split()]) == 0
    evaluations = re.findall(r"noisekd evaluate .*", printed)
    assert not any(photos in line for line in evaluations), "which needs labels"
    command = ["evaluate", "--model", str(tmp_path / "new"), "--dataset", photos, "--split", "train"]
    assert main(command) == 1
    assert "--label-column" not in capsys.readouterr().err, "there is none to name"


def test_photos_have_the_size_that_is_given_and_are_not_too_few(tmp_path, capsys):
    cfg = {"input_size": (3, 64, 64)}
    save_model(timm.create_model("test_resnet", num_classes=5, pretrained_cfg_overlay=cfg), tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for index in range(16):
        Image.new("RGB", (40, 40), (index, 9, 9)).save(tmp_path / "photos" / f"{index}.png")
    export = ["export", "--model", str(tmp_path / "model"), "--int8", "--output", str(tmp_path / "int8.onnx")]
    with_photos = ["--images", str(tmp_path / "photos"), "--input-size", "3", "32", "32"]
    assert main([*export, *with_photos]) == 0
    (tmp_path / "photos" / "0.png").unlink()
    recalibrate = ["recalibrate", "--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "new")]
    capsys.readouterr()
    assert main([*recalibrate, *with_photos]) == 2
    assert "There are 15 images: give at least 16" in capsys.readouterr().err
