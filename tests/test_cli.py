"""The command line, in this process as far as it goes: `main` returns the exit code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BitConfig,
    BitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import hf_noisekd
from hf_noisekd import NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.cli import __main__ as cli
from hf_noisekd.cli.__main__ import main
from hf_noisekd.cli.distill import config_options
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.models.saving import save_model
from hf_noisekd.record.schema import ImagesFacts, Provenance

THREE = ["--teacher", "t", "--student", "s", "--output-dir", "out"]


def config_of(*options: str) -> NoiseKDConfig:
    """The configuration of a distillation with these options beside the three that are required."""
    return NoiseKDConfig("out", **config_options(cli.parse_args(["distill", *THREE, "--use-cpu", *options])))


def usage_error(capsys, *argv: str) -> str:
    """The message of wrong usage, which must say the usage and how the command is called."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    output, message = capsys.readouterr()
    assert output == ""
    assert "usage: noisekd" in message
    command = next(word for word in argv if not str(word).startswith("-"))
    assert re.search(rf"^noisekd {command}: error: ", message, flags=re.MULTILINE)
    return message.split("error: ", 1)[1]


def run_error(capsys, *argv: str) -> str:
    """The one line of a run that failed."""
    assert main([str(word) for word in argv]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"noisekd {argv[0]}: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


# Start-up


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("", 2),
        ("distll", 2),
        *((f"{command.name} --help", 0) for command in cli.COMMANDS if command.name != "distill"),
        ("info --teachr x", 2),
        ("push --model m", 2),
    ],
)
def test_help_and_wrong_options_import_nothing_heavy(arguments, code):
    """As the installed command does it, which loads the command line without the package."""
    command = [sys.executable, "-X", "importtime", "-m", "noisekd", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(hf_noisekd.__file__).parents[1])
    assert done.returncode == code
    assert "usage: noisekd" in done.stdout + done.stderr or arguments == "--version"
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "noisekd_cli" in imported
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "timm", "numpy", "datasets", "huggingface_hub", "yaml"}


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_help(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: noisekd {command} " in text
    assert "--config FILE" in text
    assert "_" not in "".join(re.findall(r"^  (--\S+)", text, flags=re.MULTILINE))


def test_help_of_distill_begins_with_what_is_this_packages_own(capsys):
    main(["distill", "--help"])
    text = capsys.readouterr().out
    order = ["--teacher MODEL", "--output-dir", "noise distillation:", "--loss-type", "--learning-rate", "training:"]
    places = [text.index(f"  {words}" if words.startswith("-") else f"\n{words}") for words in order]
    assert places == sorted(places)
    assert text.index("  --max-steps") > places[-1]
    assert text.index("  --bf16") > text.index("  --loss-type")
    assert "~20% slower" in text


def test_help_lists_the_commands_a_line_each(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("distill", "evaluate", "recalibrate", "push", "card", "info", "export"):
        assert len(re.findall(rf"^    {command} +\S.*$", text, flags=re.MULTILINE)) == 1
        assert command in {"recalibrate", "card", "export"} or f"noisekd {command} --" in text


# Options


def test_both_spellings_and_all_kinds_of_values():
    config = config_of(
        *("--max_steps", "5", "--learning-rate", "1e-3", "--warmup_steps=0", "--input-size", "1", "8", "8", "--bf16"),
        *(
            "--no-dataloader-in-order",
            "--lr_scheduler_kwargs",
            '{"num_cycles": 2}',
            "--lr-scheduler-type",
            "cosine",
            "--label-names",
            "a_b",
            "c",
        ),
        *("--run-name=a_b", "--include-for-metrics", "loss", "--tf32", "false", "--no_skip_memory_metrics"),
    )
    assert (config.max_steps, config.learning_rate, config.warmup_steps) == (5, 1e-3, 0)
    assert (config.input_size, config.bf16, config.dataloader_in_order) == ([1, 8, 8], True, False)
    assert (config.lr_scheduler_kwargs, config.label_names) == ({"num_cycles": 2}, ["a_b", "c"])
    assert (config.run_name, config.include_for_metrics, config.tf32) == ("a_b", ["loss"], False)
    assert config.skip_memory_metrics is False


def test_arguments_of_the_student(file):
    expected = {"width": 32, "drop_path_rate": 0.1, "act_layer": "silu", "layers": [1, 1]}
    typed = config_of("--student-args", "width=32", "drop_path_rate=0.1", "act_layer=silu", "layers=[1, 1]")
    path = file("student_args: {width: 32, drop_path_rate: 0.1, act_layer: silu, layers: [1, 1]}")
    assert typed.model_init_kwargs == config_of("--config", path).model_init_kwargs == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("180000", 180_000),
        ("180k", 180_000),
        ("180_000", 180_000),
        ("180,000", 180_000),
        ("2M", 2_000_000),
        ("1.5m", 1_500_000),
        ("1e6", 1_000_000),
        ("4.1G", 4_100_000_000),
        ("0.5", 0.5),
    ],
)
def test_numbers_of_parameters_and_multiply_adds_are_written_as_people_do(text, number):
    assert config_of("--max-params", text, "--max-macs", text).limits == {"max_params": number, "max_macs": number}


@pytest.mark.parametrize("text", ["180x", "half", "50%", "k", "", "nan", "inf", "1.5"])
def test_a_number_that_cannot_be_read_is_refused_with_how_to_write_it(text, capsys):
    message = usage_error(capsys, "distill", *THREE, f"--max-params={text}")
    assert all(words in message for words in ("180k", "2M", "0.5", repr(text)))


def test_defaults_are_those_of_the_configuration():
    assert config_of().to_dict() == NoiseKDConfig("out", use_cpu=True).to_dict()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["distill", *THREE, "--learning-rte", "3"], "--learning-rte.*--learning-rate"),
        (["distill", *THREE, "--max_step=3"], "--max-step.*--max-steps"),
        (["distill", "--teachr", "x"], "--teachr.*--teacher"),
        (["distill", *THREE, "--zzzz"], "--zzzz.*distill --help"),
        (["evaluate", "--modl", "x"], "--modl.*--model"),
        (["distill", *THREE, "--learning-rate", "fast"], "learning-rate.*'fast'"),
        (["distill", *THREE, "--max-steps"], "--max-steps"),
        (["distill", *THREE, "--loss-type", "mse"], "'mse'"),
        (["distill", *THREE, "--fp16", "maybe"], "maybe"),
        (["distill", *THREE, "--temperature", "-1"], "temperature is -1.0"),
        (["distill", *THREE, "--gradient-accumulation-steps", "-1"], "gradient-accumulation-steps is -1"),
        (["distill", *THREE, "--max-steps", "0"], "--max-steps is 0"),
        (["distill", *THREE, "--batch-norm-fraction", "2"], "batch-norm-fraction is 2.0"),
        (["distill", *THREE, "--lr-scheduler-type", "cosin"], "cosin"),
        (["distill", *THREE, "--lr-scheduler-kwargs", "{broken"], "lr-scheduler-kwargs|property name"),
        (["distill", "--teacher", "t"], "required: --output-dir"),
        (["distill", *THREE, "more"], "unexpected: more"),
        (["distill", *THREE, "--keep", "0.5"], "student, or --keep"),
        (["distill", "--teacher", "t", "--output-dir", "o"], "student, or --keep"),
        (["distill", *THREE, "--student-args", "width"], "'width'"),
        (["--bogus", "push", "--model", "m", "--repo-id", "a/b"], "unexpected: --bogus"),
        (["evaluate", "--model", "m", "--dataset", "d", "--batch-size", "1"], "'1'"),
        (["info", "--teacher", "t", "--input-size", "3", "32"], "--input-size"),
        (["card", "s", "--repo-id", "a/b'); x"], "--repo-id: .*repository"),
        (["info", "--teacher", "t", "--json", "perhaps"], "'perhaps'"),
        (["export", "--model", "m", "--output", "o", "--format", "tflite"], "'tflite'"),
    ],
)
def test_wrong_usage(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, usage_error(capsys, *argv))
    assert not list(tmp_path.iterdir())


def test_an_unknown_command_is_wrong_usage(capsys):
    assert main(["distll"]) == 2
    assert "'distll'" in capsys.readouterr().err


# Configuration files


NARROW = ["--student", "resnet10_cifar", "--student-args", "width=16"]


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file and returns its path."""

    def write(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return write


def test_options_go_over_the_file_and_the_file_over_the_defaults(file):
    path = file(
        "learning_rate: 1e-2\nmax-steps: 7\ninput_size: [1, 8, 8]\nbf16: false\nuse_cpu: true\nrun_name: ~\n"
        "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}\ntemperature: 2\n"
        "skip_memory_metrics: false\nhub_model_id: 12\n"
    )
    config = config_of("--config", path, "--max_steps", "9", "--input-size", "3", "8", "8", "--skip-memory-metrics")
    assert (config.learning_rate, config.temperature, config.bf16) == (1e-2, 2.0, False)
    assert (config.max_steps, config.input_size, config.skip_memory_metrics) == (9, [3, 8, 8], True)
    assert (config.lr_scheduler_kwargs, config.run_name, config.hub_model_id) == ({"num_cycles": 2}, None, "12")
    assert config.loss_type == "kl"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr_scheduler_kwargs: {min_lr: 1e-5, a: .5}", ["--lr-scheduler-kwargs", '{"min_lr": 1e-05, "a": 0.5}']),
        ("lr_scheduler_kwargs: {a: '1', on: no}", ["--lr-scheduler-kwargs", '{"a": "1", "on": "no"}']),
        ("report_to: [tensorboard, wandb]", ["--report-to", "tensorboard", "wandb"]),
        ("label_names: [0012, 1e3, no]", ["--label-names", "0012", "1e3", "no"]),
        ("run_name: 2024_01_01", ["--run-name", "2024_01_01"]),
        ("run_name: 1_000", ["--run-name", "1_000"]),
        ("learning_rate: &x 1e-3\nadam_beta1: *x", ["--learning-rate", "1e-3", "--adam-beta1", "1e-3"]),
        ("bf16: False\nseed: 017", ["--bf16", "False", "--seed", "017"]),
        ("student_args: {width: 32, name: 1e-2, a: [1]}", ["--student-args", "width=32", "name=1e-2", "a=[1]"]),
    ],
)
def test_what_a_file_says_is_as_if_typed(file, text, words):
    from_file, typed = (vars(cli.parse_args(["distill", *THREE, *more])) for more in (["--config", file(text)], words))
    assert {key for key in typed if from_file[key] != typed[key]} == {"config", "parser"}


def test_a_file_has_what_is_required_of_any_command(file):
    args = cli.parse_args(["distill", "--config", file("teacher: t\nstudent: s\noutput_dir: -out-\n")])
    assert (args.teacher, args.student, args.output_dir) == ("t", "s", "-out-")
    args = cli.parse_args(["push", "--config", file("model: m\nrepo_id: a/b\nprivate: true\n"), "--repo-id", "c/d"])
    assert (args.model, args.repo_id, args.private) == (Path("m"), "c/d", True)
    args = cli.parse_args(["info", f"--config={file('teacher: t')}", "--json"])
    assert (args.teacher, args.json) == ("t", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 3", "unknown option 'learning_rte'. Did you mean --learning-rate?"),
        ("no_skip_memory_metrics: true", "unknown option 'no_skip_memory_metrics'"),
        ("help: true", "unknown option 'help'"),
        ("config: other.yaml", "unknown option 'config'"),
        ("3: 4", "unknown option '3'"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("learning_rate: true", "invalid float value: 'true'"),
        ("temperature: 0", "temperature is 0.0: use a number above 0"),
        ("trust_remote_code: 3", "'3' is neither true nor false"),
        ("- learning_rate", "must map options to values"),
        ("", "must map options to values"),
        ("learning_rate: [1", "config.yaml: while parsing"),
        ("max_steps: 3\nlearning_rate: 1\nmax-steps: 4", "found 'max-steps' twice in \"<unicode string>\", line 3"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "found 'a' twice"),
        ("lr_scheduler_kwargs: &a {b: *a}", "recursive"),
        ("student_args: &a [*a]", "recursive"),
        ("[a]: 3", "unhashable key"),
    ],
)
def test_bad_files_are_wrong_usage(capsys, file, text, message):
    assert re.search(message, usage_error(capsys, "distill", *THREE, "--config", file(text)))


def test_a_file_that_is_not_there_is_wrong_usage(capsys, tmp_path):
    message = usage_error(capsys, "distill", *THREE, "--config", tmp_path / "no.yaml")
    assert "cannot read the configuration file" in message
    assert "No such file" in message
    assert "cannot read the configuration file" in usage_error(capsys, "info", "--config", tmp_path)


# Exit codes


@pytest.mark.parametrize("command", ["distill", "recalibrate"])
def test_an_output_folder_in_use_is_left_alone(capsys, tmp_path, command):
    (tmp_path / "precious").write_text("")
    required = ["--model", "m", "--images", "d"] if command == "recalibrate" else THREE[:4]
    for folder, message in ((tmp_path, "is not empty"), (tmp_path / "precious", "is a file")):
        assert message in usage_error(capsys, command, *required, "--output-dir", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_later_processes_may_find_what_the_first_one_wrote(monkeypatch, capsys, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.setenv("RANK", "1")
    assert "'/no'" in run_error(
        capsys, "distill", "--teacher", "/no", "--student", "s", "--output-dir", tmp_path, "--use-cpu"
    )


def test_a_run_that_fails_says_so_in_a_line(capsys, tmp_path):
    assert re.search(r"resnet_18.* resnet18\b", run_error(capsys, "info", "--teacher", "resnet_18"))
    assert "nobody/nothing" in run_error(capsys, "evaluate", "--model", "nobody/nothing", "--dataset", "d")
    assert "noisekd.json" in run_error(capsys, "card", tmp_path)
    assert str(tmp_path / "no") in run_error(capsys, "push", "--model", tmp_path / "no", "--repo-id", "a/b")


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (OSError("No space left\n on device"), True),
        (ConnectionError(), True),
        (ValueError("not enough values to unpack"), False),
        (RuntimeError("shapes differ"), False),
        (KeyError("labels"), False),
    ],
)
def test_what_is_not_expected_is_named_and_shown_on_demand(capsys, monkeypatch, tmp_path, error, explained):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_noisekd.release.card.write_model_card", fail)
    line = run_error(capsys, "card", tmp_path)
    if explained:
        assert line == f"noisekd card: error: {' '.join(str(error).split()) or 'ConnectionError'}"
    else:
        assert f"{type(error).__name__}: {error} (--debug" in line
    with pytest.raises(type(error)):
        main(["card", str(tmp_path), "--debug"])


# The commands


@pytest.fixture(scope="module")
def teacher(digits_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "teacher"
    save_model(digits_teacher, folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(digits, tmp_path_factory):
    """A folder with a training and a test split of digits, as `datasets` reads it."""
    folder = tmp_path_factory.mktemp("digits")
    for split, data in zip(("train", "test"), digits, strict=True):
        columns = {"image": [Image.fromarray(image[0].numpy()) for image in data.images], "label": data.labels.tolist()}
        columns["parity"] = [label % 2 for label in columns["label"]]
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=data.label_names)}
        features["parity"] = datasets.ClassLabel(names=["even", "odd"])
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def student(teacher, images, tmp_path_factory):
    """A student of a few steps, and what its distillation printed."""
    folder = tmp_path_factory.mktemp("cli") / "student"
    (folder.parent / "config.yaml").write_text(
        "max_steps: 3\nper_device_train_batch_size: 16\nlogging_steps: 1\nsave_steps: 2\ndisable_tqdm: true\n"
        "num_calibration_images: 0\n"
    )
    command = ["distill", "--teacher", teacher, *NARROW, "--output-dir", str(folder)]
    command += ["--config", str(folder.parent / "config.yaml"), "--max_steps", "4"]
    command += ["--eval-dataset", images, "--eval-label-column", "label"]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
        assert main(command) == 0
    return str(folder), printed[-1]


def test_distill_leaves_a_student_with_its_card(student, teacher):
    folder, printed = student
    assert {"config.json", "model.safetensors", "README.md", "noisekd.json"} <= {p.name for p in Path(folder).iterdir()}
    assert (load_teacher(folder).num_classes, load_teacher(folder).in_chans) == (10, 1)
    made = Provenance.of(load_teacher(folder))
    assert (made.steps, made.batch_size) == (4, 16)
    assert f"The student is in {folder}" in printed
    assert re.search(r"running statistics +\d+\.\d\d", printed)
    assert "accuracy (%)" in printed
    assert f"noisekd push --model {folder}" in printed


def test_a_distillation_says_how_good_its_student_is_and_what_raises_that(teacher, tmp_path, capsys):
    def end_of(name, *options):
        command = ["distill", "--teacher", teacher, "--output-dir", tmp_path / name, "--disable-tqdm", "--max-steps", 1]
        command += ["--per-device-train-batch-size", 8, "--num-calibration-images", 32, "--eval-noise-batches", 1]
        assert main(list(map(str, [*command, *options]))) == 0
        printed, logged = capsys.readouterr()
        (agreement,) = re.findall(r"the class of its teacher for (\d+\.\d) % of \d+ ", printed)
        return float(agreement), printed, logged

    agreement, printed, logged = end_of("cut", "--max-params", "0.15")
    assert agreement < 80
    (advice,) = [line for line in printed.splitlines() if "--max-steps" in line]
    assert "--max-params" in advice
    assert "--images" in advice
    own, of_teacher = (sum(p.numel() for p in load_teacher(m).parameters()) for m in (tmp_path / "cut", teacher))
    assert own <= 0.15 * of_teacher
    sizes = rf"teacher has {of_teacher:,} parameters and [\d.]+ M multiply-adds.*student {own:,} \(\d+ %\) and [\d.]+ M"
    assert re.search(sizes, logged)
    agreement, printed, _ = end_of("same", "--student", teacher)
    assert agreement > 90
    assert "--max-steps" not in printed


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (BitForImageClassification, BitConfig(embedding_size=8, hidden_sizes=[32], depths=[1], num_groups=8)),
        (
            ConvNextForImageClassification,
            ConvNextConfig(num_stages=2, hidden_sizes=[8, 8], depths=[1, 1], patch_size=2),
        ),
    ],
)
def test_teachers_of_transformers_without_batch_norm(model_class, config, tmp_path, capsys):
    save_model(model_class(config), tmp_path / "teacher")
    command = ["distill", "--teacher", str(tmp_path / "teacher"), "--output-dir", str(tmp_path / "student")]
    command += ["--student", "resnet10_cifar", "--student-args", "width=4", "--input-size", "3", "32", "32"]
    command += ["--max-steps", "1", "--per-device-train-batch-size", "8", "--per-device-eval-batch-size", "8"]
    assert main([*command, "--eval-noise-batches", "1", "--disable-tqdm"]) == 0
    assert "hold for images" in capsys.readouterr().out
    assert "as it is, in evaluation mode" in (tmp_path / "student" / "README.md").read_text()


def test_where_there_are_no_statistics_commands_that_need_them_say_so_first(teacher, tmp_path, capsys):
    save_model(timm.create_model("test_convnext", num_classes=10), model := tmp_path / "convnext")
    out = ["--output-dir", tmp_path / "out"]
    for other in (["--images", "no/such"], ["--teacher", teacher]):
        error = run_error(capsys, "recalibrate", "--model", model, *other, *out)
        assert "no BatchNorm" in error
    error = run_error(capsys, "export", "--model", model, "--int8", "--output", tmp_path / "int8.onnx")
    assert "stored BatchNorm statistics" in error
    assert [path.name for path in tmp_path.iterdir()] == ["convnext"]


def test_distill_without_images_resumes_and_reports_agreement(teacher, tmp_path, capsys):
    command = ["distill", "--teacher", teacher, *NARROW, "--output-dir", str(tmp_path / "out")]
    command += ["--per-device-train-batch-size", "8", "--eval-noise-batches", "1", "--save_steps", "1"]
    command += ["--per-device-eval-batch-size", "8", "--disable-tqdm", "--bf16", "false"]
    command += ["--max-steps", "2", "--num-calibration-images", "0"]
    assert main(command) == 0
    assert "is not empty" in usage_error(capsys, *command)
    for spelling in (["True"], []):
        shutil.rmtree(tmp_path / "out" / "checkpoint-2")
        assert main([*command, "--resume-from-checkpoint", *spelling]) == 0
    summary = capsys.readouterr().out.split("The student is in")[1]
    assert "agreement (%)" in summary
    assert "noisekd export" not in summary  # which refuses a student on batch statistics
    assert "accuracy" not in summary
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    assert "no.pt" in run_error(capsys, *command, "--resume-from-checkpoint", tmp_path / "no.pt")


def test_a_distillation_that_diverges_leaves_no_card(teacher, tmp_path, capsys):
    command = ["distill", "--teacher", teacher, *NARROW, "--output-dir", str(tmp_path / "out")]
    command += ["--per-device-train-batch-size", "8", "--eval-noise-batches", "1", "--disable-tqdm", "--max-steps", "6"]
    command += ["--learning-rate", "1e20", "--max-grad-norm", "0", "--warmup-steps", "0", "--logging-steps", "2"]
    command += ["--num-calibration-images", "0"]
    assert re.search(r"(nan|inf) .*step \d", run_error(capsys, *command))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("failing", ["evaluate", pytest.param("create_model_card", marks=pytest.mark.slow), "_end"])
def test_a_trained_student_is_not_lost_to_what_fails_after_it(teacher, tmp_path, capsys, caplog, monkeypatch, failing):
    def fail(*args, **kwargs):
        raise OSError("image file is truncated")

    monkeypatch.setattr(f"hf_noisekd.training.noise_trainer.NoiseKDTrainer.{failing}", fail)
    command = ["distill", "--teacher", teacher, *NARROW, "--output-dir", str(tmp_path / "out")]
    command += ["--per-device-train-batch-size", "8", "--eval-noise-batches", "1", "--disable-tqdm", "--max-steps", "2"]
    command += ["--save-strategy", "no", "--num-calibration-images", "0"]
    capsys.readouterr()
    assert main(command) == 1
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert "truncated" in error
    assert f"whole in {tmp_path / 'out'}" in caplog.text
    assert Provenance.of(load_teacher(str(tmp_path / "out"))).steps == 2
    assert (tmp_path / "out" / "noisekd.json").is_file() == (failing == "evaluate")


@pytest.fixture
def interruptible():
    """The handler of a terminal: what a script starts in the background ignores SIGINT, these tests included."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "by",
    [
        "SIGTERM",
        "SIGINT in a save",
        *(
            pytest.param(by, marks=pytest.mark.slow)
            for by in ("SIGINT", "SIGTERM with a checkpoint", "SIGTERM at the end")
        ),
    ],
)
def test_an_interrupted_distillation_says_in_a_line_how_to_go_on(teacher, tmp_path, capsys, monkeypatch, by):
    def interrupt(method, call):
        calls = []

        def interrupted(self, *args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), getattr(signal, by.split()[0]))
            return original(self, *args, **kwargs)

        original = getattr(NoiseKDTrainer, method)
        monkeypatch.setattr(NoiseKDTrainer, method, interrupted)

    command = ["distill", "--teacher", teacher, *NARROW, "--output-dir", str(tmp_path / "out")]
    command += ["--per-device-train-batch-size", "8", "--eval-noise-batches", "1", "--disable-tqdm", "--max-steps", "6"]
    command += ["--save-steps", "2", "--num-calibration-images", "0"]
    if "save" in by:
        interrupt("_save_rng_state", 1)
        words, left = "step 2: .*no checkpoint", set()
    elif "end" in by:
        interrupt("evaluate", 1)
        words, left = str(tmp_path / "out"), {"config.json", "model.safetensors"}
    elif "checkpoint" in by:
        monkeypatch.setattr("threading.Timer.start", lambda timer: timer.function())  # transformers waits for seconds
        interrupt("compute_loss", 4)
        command += ["--enable-jit-checkpoint"]
        words, left = r"step \d: .*--resume-from-checkpoint .*checkpoint-\d", {"checkpoint-2"}
    else:
        interrupt("compute_loss", 4)
        words, left = "step 3: .*--resume-from-checkpoint .*checkpoint-2", {"checkpoint-2"}
    capsys.readouterr()
    assert main(command) == {"SIGINT": 130, "SIGTERM": 143}[by.split()[0]]
    output, message = capsys.readouterr()
    assert "The student is in" not in output
    assert re.search(rf"^noisekd distill: interrupted.*{words}", message.splitlines()[-1])
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found >= left
    assert "README.md" not in found or "end" in by
    assert "checkpoint-2" in found or "save" in by
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    if "end" not in by:
        assert main([*command, *(["--resume-from-checkpoint"] if left else [])]) == 0


def test_any_other_command_ends_in_a_line_too(capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_noisekd.workflows.inputs.load_teacher", stop)
    assert main(["info", "--teacher", "resnet18"]) == 130
    assert capsys.readouterr().err == "noisekd info: interrupted.\n"


def test_weights_that_are_not_finite_are_not_measured(student, teacher, images, tmp_path, capsys):
    shutil.copytree(student[0], tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["fc.weight"][:] = torch.nan
    save_file(weights, tmp_path / "damaged" / "model.safetensors")
    damaged, on, to = tmp_path / "damaged", ["--dataset", images], ["--output-dir", tmp_path / "new"]
    for command in (
        ["evaluate", "--model", damaged, *on, "--label-column", "label"],
        ["evaluate", "--model", student[0], "--teacher", damaged, *on, "--label-column", "label"],
        ["recalibrate", "--model", damaged, "--images", images, *to],
        ["recalibrate", "--model", damaged, "--teacher", teacher, *to],
        ["export", "--model", damaged, "--output", tmp_path / "new"],
        ["info", "--teacher", damaged],
    ):
        assert re.search(r"'fc\.weight' .*NaN", run_error(capsys, *command))
    distilling = ["distill", "--student", damaged, "--teacher", teacher, *to]
    assert re.search(r"'fc\.weight' .*NaN", usage_error(capsys, *distilling))
    assert not (tmp_path / "new").exists()


def test_evaluate(teacher, student, images, tmp_path, capsys):
    output = tmp_path / "new" / "scores.json"
    command = ["evaluate", "--model", teacher, "--teacher", student[0], "--output", str(output)]
    command += ["--dataset", images, "--label-column", "label"]
    assert main([*command, "--num-images", "300", "--batch_size", "100"]) == 0
    scores = json.loads(output.read_text())
    assert scores["running"]["accuracy"] > 90
    assert scores["batch"]["agreement"] < 90
    assert (scores["images"], scores["batch_size"], scores["split"]) == (300, 100, "test")
    table = capsys.readouterr().out
    for statistics in ("running", "batch"):
        assert re.search(rf"{statistics} statistics +{scores[statistics]['accuracy']:.2f}", table)
    assert "validation" in run_error(capsys, *command, "--split", "validation")


def test_recalibrate(student, images, tmp_path, capsys):
    command = ["recalibrate", "--model", student[0], "--images", images, "--output-dir", str(tmp_path / "new")]
    assert main([*command, "--num-images", "64"]) == 0
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (student[0], tmp_path / "new"))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean", "running_var"}
    made = Provenance.of(load_teacher(str(tmp_path / "new")))
    assert made.batch_norm == "running"
    assert made.recalibration == ImagesFacts(dataset=Path(images).name, split="train", images=64)
    assert str(tmp_path / "new") in capsys.readouterr().out
    card = (tmp_path / "new" / "README.md").read_text()
    assert f"64 real images of {Path(images).name}" in card
    assert "pipeline(" in card
    assert "## Results" not in card, "what was measured does not hold for the new statistics"

    record = json.loads((tmp_path / "new" / "noisekd.json").read_text())
    in_training = {"dataset": Path(images).name, "images": 9, "batch_size": 9, "step": 4, "precision": "float32"}
    in_training |= {"log_prefix": "eval", "running": {"accuracy": 1.0}, "batch": {"accuracy": 2.0}}
    (tmp_path / "new" / "noisekd.json").write_text(json.dumps(record | {"evaluations": [in_training]}))
    command = ["evaluate", "--model", str(tmp_path / "new"), "--update-card"]
    command += ["--dataset", images, "--label-column", "label"]
    assert main([*command, "--num-images", "50"]) == 0
    assert main([*command, "--num-images", "100"]) == 0
    card = (tmp_path / "new" / "README.md").read_text()
    assert card.count("(100 images)") == 2
    assert "(50 images)" not in card
    (evaluation,) = json.loads((tmp_path / "new" / "noisekd.json").read_text())["evaluations"]
    assert (evaluation["images"], evaluation["log_prefix"]) == (100, "eval")


def test_recalibrating_needs_no_data(student, teacher, tmp_path, capsys):
    command = ["recalibrate", "--model", student[0], "--teacher", teacher, "--num-images", "64"]
    assert main([*command, "--output-dir", str(tmp_path / "new")]) == 0
    made = Provenance.of(load_teacher(str(tmp_path / "new")))
    assert (made.batch_norm, made.recalibration) == ("running", None)
    assert (made.calibration.images, made.calibration.held_out) == (64, 32)
    assert "64 images made without data" in capsys.readouterr().out
    assert "without data, from 64 images" in (tmp_path / "new" / "README.md").read_text()

    message = run_error(capsys, *command, "--output-dir", tmp_path / "poor", "--calibration-steps", "1")
    assert "calibration images" in message
    assert not (tmp_path / "poor").exists()
    save_model(timm.create_model("resnet10_cifar", width=8), tmp_path / "rgb")
    other = ["recalibrate", "--model", student[0], "--teacher", tmp_path / "rgb", "--output-dir", tmp_path / "other"]
    assert re.search("1 channels .*3 channels", run_error(capsys, *other))
    wrong = ["recalibrate", "--model", "m", "--output-dir", tmp_path / "wrong"]
    for options in ([], ["--teacher", "t", "--images", "d"]):
        assert re.search("either a teacher.* real images", usage_error(capsys, *wrong, *options))


def test_recalibrating_needs_no_labels(teacher, images, tmp_path):
    table = datasets.load_dataset(images, split="train").remove_columns("label")
    (tmp_path / "images").mkdir()
    table.to_parquet(tmp_path / "images" / "train.parquet")
    command = ["recalibrate", "--model", teacher, "--images", str(tmp_path / "images")]
    assert main([*command, "--output-dir", str(tmp_path / "new"), "--num-images", "16"]) == 0
    assert Provenance.of(load_teacher(tmp_path / "new")) is None


def test_a_folder_of_images_helps_to_cut_and_to_quantise(teacher, digits, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for index in range(40):
        Image.fromarray(digits[0].images[index, 0].numpy()).save(tmp_path / "photos" / f"{index}.png")
    with_images = ["--images", tmp_path / "photos"]
    command = ["distill", "--teacher", teacher, "--keep", "0.6", "--output-dir", tmp_path / "student", *with_images]
    command += ["--max-steps", "1", "--per-device-train-batch-size", "8", "--disable-tqdm", "--eval-noise-batches", "1"]
    command += ["--num-calibration-images", "0"]
    assert main([*map(str, command)]) == 0
    made = Provenance.of(load_teacher(tmp_path / "student"))
    printed = capsys.readouterr().out
    assert ("of the given images" in printed) == bool(made.recalibration)
    assert "On held-out given images:" in printed
    assert made.given_images == ImagesFacts(images=40, dataset="photos")
    assert (made.is_data_free, made.calibration) == (False, None)
    assert made.recalibration is None or made.recalibration.images == 30  # the others are held out
    card = (tmp_path / "student" / "README.md").read_text()
    assert "40 real images of photos" in card
    assert "data-free\n" not in card
    command = ["export", "--model", tmp_path / "student", "--int8", "--output", tmp_path / "int8.onnx", *with_images]
    assert main([*map(str, command)]) == 0
    assert "of 40 given images" in capsys.readouterr().out
    for index in range(15, 40):
        (tmp_path / "photos" / f"{index}.png").unlink()
    command = ["distill", "--teacher", teacher, "--keep", "0.6", "--output-dir", tmp_path / "few", *with_images]
    assert "at least 16" in usage_error(capsys, *command)


def test_info_of_a_teacher(teacher, digits_teacher, capsys):
    assert main(["info", "--teacher", teacher, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["architecture"], facts["input_size"], facts["num_classes"]) == ("resnet10_cifar", [1, 32, 32], 10)
    assert facts["parameters"] == sum(parameter.numel() for parameter in digits_teacher.parameters())
    assert facts["class_names"] == ["0", "1", "2", "3", "4"]
    layers = [m for m in digits_teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert facts["batch_norm"] == {"BatchNorm2d": len(layers)}
    assert facts["verdict"].startswith("can be a teacher")

    assert main(["info", "--teacher", teacher]) == 0
    text = capsys.readouterr().out
    assert facts["verdict"] in text
    for statistics, answers in facts["predictions"].items():
        assert re.search(rf"{statistics} statistics +{answers['class_balance']:.3f}", text)


def test_info_of_a_teacher_without_batch_norm_and_of_what_cannot_be_one(tmp_path, capsys):
    save_model(timm.create_model("test_convnext", num_classes=7), tmp_path / "convnext")
    assert main(["info", "--teacher", str(tmp_path / "convnext")]) == 0
    text = capsys.readouterr().out
    assert "without BatchNorm" in text
    assert "7 classes" in text
    save_model(timm.create_model("test_convnext", num_classes=1), tmp_path / "one")
    assert main(["info", "--teacher", str(tmp_path / "one")]) == 1
    assert "one class" in capsys.readouterr().out


def test_info_asks_for_an_input_size_that_is_not_declared(tmp_path, capsys):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4, layer_type="basic")
    save_model(ResNetForImageClassification(config), tmp_path)
    command = ["info", "--teacher", str(tmp_path)]
    assert "--input-size" in run_error(capsys, *command)
    assert main([*command, "--input-size", "3", "32", "32"]) == 0
    assert "5x32x32" in run_error(capsys, *command, "--input-size", "5", "32", "32")


@pytest.fixture
def weights(digits_teacher, tmp_path):
    """The digits teacher in a file as timm's training script writes it, and the options that name it."""
    cfg = digits_teacher.pretrained_cfg
    args = {"in_chans": 1, "img_size": 32, "mean": cfg["mean"], "std": cfg["std"], "interpolation": "", "gp": None}
    args |= {"model_kwargs": {"width": 8, "stem_stride": 2}, "num_classes": 10}
    content = {"arch": "resnet10_cifar", "args": Namespace(**args), "state_dict": digits_teacher.state_dict()}
    torch.save(content, tmp_path / "weights.pth")
    return ["--model", "resnet10_cifar", "--checkpoint", str(tmp_path / "weights.pth")]


def test_a_file_of_weights_is_evaluated_and_exported_like_a_folder(weights, teacher, images, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["export", *weights, "--output", str(tmp_path / "w.onnx")]) == 0
    scores = []
    for model in (weights, ["--model", teacher], ["--model", str(tmp_path / "w.onnx")]):
        command = ["evaluate", *model, "--dataset", images, "--label-column", "label", "--num-images", "100"]
        assert main([*command, "--output", str(tmp_path / "scores.json")]) == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
        told, log = capsys.readouterr()
        assert ("weights.pth" in told) == ("weights.pth" in log) == (model is weights)
    assert scores[0]["checkpoint"] == weights[-1]
    assert scores[0]["running"]["accuracy"] == scores[1]["running"]["accuracy"] == scores[2]["running"]["accuracy"]


def test_a_file_of_weights_becomes_a_folder(weights, digits_teacher, images, tmp_path, capsys):
    assert main(["convert", *weights, "--output-dir", str(tmp_path / "folder")]) == 0
    command = ["recalibrate", *weights, "--images", images, "--num-images", "16"]
    assert main([*command, "--output-dir", str(tmp_path / "recalibrated")]) == 0
    for folder in ("folder", "recalibrated"):
        model = load_teacher(tmp_path / folder)
        assert tuple(model.pretrained_cfg["mean"]) == digits_teacher.pretrained_cfg["mean"]
        same = torch.equal(model.bn1.running_mean, digits_teacher.bn1.running_mean)
        assert same == (folder == "folder")
    assert "is not empty" in usage_error(capsys, "convert", *weights, "--output-dir", tmp_path / "folder")
    size = ["--input-size", "1", "16", "16"]
    assert main(["convert", "--model", str(tmp_path / "folder"), "--output-dir", str(tmp_path / "small"), *size]) == 0
    assert load_teacher(tmp_path / "small").pretrained_cfg["input_size"] == (1, 16, 16)
    size = ["--input-size", "3", "16", "16"]
    error = run_error(capsys, "convert", "--model", tmp_path / "folder", "--output-dir", tmp_path / "none", *size)
    assert "does not take images of 3x16x16" in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["evaluate --dataset d", "export --output m.onnx", "convert --output-dir out"])
def test_a_file_of_weights_needs_the_name_of_its_architecture(weights, teacher, tmp_path, capsys, command):
    for model in (teacher, tmp_path / "weights.onnx"):
        name, *options = command.split()
        assert "timm name" in run_error(capsys, name, "--model", model, *weights[2:], *options)


def test_card_and_push(student, hub, tmp_path, capsys):
    assert main(["card", student[0], "--output-dir", str(tmp_path / "card"), "--repo-id", "alice/other"]) == 0
    assert "alice/other" in (tmp_path / "card" / "README.md").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "card" / "README.md")

    assert main(["push", "--model", student[0], "--repo-id", "alice/student", "--commit-message", "A student"]) == 0
    assert "model.safetensors" in hub.repo("alice/student").head["files"]
    assert "--model alice/student" in capsys.readouterr().out


def test_export(teacher, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", "--model", teacher, "--format", "onnx", "--output", str(tmp_path / "teacher.onnx")]) == 0
    assert onnxruntime.InferenceSession(tmp_path / "teacher.onnx").get_outputs()[0].name == "logits"


def test_export_in_fewer_bits(teacher, images, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    capabilities = {"architecture": "x86_64", "avx512_vnni": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for precision in ("int8", "fp16"):
        path = str(tmp_path / f"{precision}.onnx")
        command = ["export", "--model", teacher, "--output", path, f"--{precision}"]
        assert main([*command, *(["--num-images", "64"] if precision == "int8" else [])]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"(int8|float16), \d\.\d\d MB\n", printed), printed
        assert ("of 32 other" in printed) == ("without VNNI" in printed) == (precision == "int8")
        assert main(["evaluate", "--model", path, "--dataset", images, "--label-column", "label"]) == 0
        assert re.search(r"running statistics +\d\d\.\d\d", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"int8.onnx", "fp16.onnx"}
    command = ["export", "--model", "m", "--output", "o"]
    assert "--int8 or --fp16" in usage_error(capsys, *command, "--int8", "--fp16")
    assert "for int8" in usage_error(capsys, *command, "--teacher", "t")
