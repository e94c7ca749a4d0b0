"""What strangers type and bring along: each is refused in one line within seconds, and nothing is written."""

import json
import time

import pytest
import timm
import torch
from conftest import TinyCNN
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_noisekd import (
    MixedDataset,
    NoiseDataset,
    NoiseKDConfig,
    NoiseKDTrainer,
    batch_statistics,
    calibration_images,
    evaluate,
    recalibrate_batch_norm,
    shrink,
)
from hf_noisekd.cli.__main__ import main
from hf_noisekd.models.loading import load_teacher

SECONDS = 20  # many times what it takes, for a busy machine


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Runs a command that must fail, with an exit code and in one line, and leave the folder as it was."""
    monkeypatch.chdir(tmp_path)

    def run(code: int, *argv: object) -> str:
        before, start = sorted(tmp_path.rglob("*")), time.monotonic()
        assert main([str(word) for word in argv]) == code, capsys.readouterr().err
        assert time.monotonic() - start < SECONDS
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith(f"noisekd {argv[0]}: error: ")
        assert not any("Traceback" in line for line in lines)
        assert sorted(tmp_path.rglob("*")) == before
        return lines[-1]

    return run


OPTIONS = """
--seed -1 | --seed 1.5 | --seed 99999999999 | --learning-rate -1 | --learning-rate nan
--learning-rate fast | --weight-decay -1 | --weight-decay nan
--report-to foo | --report-to wandb,foo | --max-steps 9000000 | --max-steps 0
--gradient-accumulation-steps -1 | --gradient-accumulation-steps 0 | --logging-steps 0 | --max-steps -5
--lr-scheduler-type foo | --lr-scheduler-kwargs {broken | --optim foo
--noise wite | --noise structured,white | --noise white:-1 | --noise dead_leaves(x) | --noise white|cutmix:2
--resolutions 2:1 | --resolutions 0.5:nan | --noise-std 0 | --temperature 0 | --temperature inf | --loss-type mse
--batch-norm-fraction 2 | --per-device-train-batch-size 1 | --num-calibration-images 1 | --eval-noise-batches 0
--dataloader-num-workers -1 | --keep 0.5 | --max-macs 0
--student-args width | --student-args width=x
--input-size 3 32 | --input-size 3 32 0 | --label-smoothing-factor 0.1 | --fp16-full-eval
--unknown 3 | --max-steps | --bf16 perhaps | --student resnet_18
""".replace("\n", " | ").split(" | ")


@pytest.mark.parametrize("words", [words.strip() for words in OPTIONS if words.strip()])
def test_options(refused, saved, words):
    refused(2, "distill", "--teacher", saved, "--student", "resnet10_cifar", "--output-dir", "out", *words.split())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, "--adam-beta1 2"), (2, "--adam-epsilon -1"), (2, '--lr-scheduler-kwargs {"foo":1}'),
        (2, "--optim adamw_bnb_8bit"), (2, "--lr-scheduler-type warmup_stable_decay"), (1, "--gradient-checkpointing"),
        (1, "--torch-compile --torch-compile-mode foo"),
    ],
)  # fmt: skip
def test_options_that_torch_or_transformers_refuse(refused, saved, tmp_path, monkeypatch, code, words):
    (tmp_path / "out").mkdir()
    command = ["distill", "--teacher", saved, "--student", "resnet10_cifar", "--output-dir", "out", "--max-steps", "9"]
    if "checkpointing" in words or "compile" in words:  # which the student has to be ready for
        command += ["--num-calibration-images", "0"]
    else:
        monkeypatch.setattr("hf_noisekd.training.plan.made_before_training", lambda *_: pytest.fail("images were made"))
    refused(code, *command, *words.split())


def test_budgets(refused, saved):
    for words in (
        "--keep 2",
        "--keep 0",
        "--max-macs 0",
        "--max-params 99999999",
        "--max-params 180x",
        "--max-macs k",
        "--max-params 1,5M",
    ):
        refused(2, "distill", "--teacher", saved, "--output-dir", "out", *words.split())


@pytest.mark.parametrize(
    "text",
    [
        "seed: -1\nseed: 1", "max-steps: 3\nmax_steps: 4", "lr_scheduler_kwargs: &a {a: *a}", "- seed", "seed", "",
        "a: [1", "? [seed]\n: 1", "seed: {a: 1}", "learning_rate: [1, 2]", "config: b.yaml", "help: true", "\x00",
        "a: !!python/none b",
    ],
)  # fmt: skip
def test_configuration_files(refused, saved, tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    refused(2, "distill", "--config", "config.yaml", "--teacher", saved, "--output-dir", "out", "--keep", "0.5")


def truncated(path):
    path.write_bytes(path.read_bytes()[:50])


def with_nan(path):
    weights = load_file(path)
    weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, path)


def configured(**values):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("command", ["info", "evaluate"])
@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        ("model.safetensors", truncated),
        ("model.safetensors", with_nan),
        ("model.safetensors", lambda path: path.unlink()),
        ("model.safetensors", lambda path: path.rename(path.with_name("pytorch_model.bin"))),
        ("config.json", lambda path: path.write_text("{")),
        ("config.json", lambda path: path.write_text("[]")),
        ("config.json", lambda path: path.unlink()),
        ("config.json", configured(architecture=5)),
        ("config.json", configured(architecture="resnet_of_nobody")),
        ("config.json", configured(num_classes="many")),
        ("config.json", configured(model_args=[1])),
    ],
)
def test_models(refused, saved, name, break_it, command):
    break_it(saved / name)
    options = ["--teacher", saved] if command == "info" else ["--model", saved, "--dataset", "nowhere"]
    refused(1, command, *options)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x04K\x01.", b"PK\x03\x04", None])
def test_checkpoints_of_others(refused, tmp_path, content):
    if content is None:
        torch.save({"a": print}, tmp_path / "w.pth")
    else:
        (tmp_path / "w.pth").write_bytes(content)
    refused(1, "info", "--teacher", "resnet10_cifar", "--teacher-checkpoint", "w.pth")


@pytest.mark.parametrize("said", [{"arch": "resnet18"}, {"args": {"mean": "many"}}, {"args": {"model_kwargs": {1: 2}}}])
@pytest.mark.parametrize(
    "words",
    [
        "evaluate --model resnet10_cifar --checkpoint w.pth --dataset nowhere",
        "export --model resnet10_cifar --checkpoint w.pth --output model.onnx",
        "convert --model resnet10_cifar --checkpoint w.pth --output-dir out",
        "convert --model FOLDER --checkpoint w.pth --output-dir out",
    ],
)
def test_files_of_trainings_that_do_not_fit(refused, saved, tmp_path, words, said):
    torch.save({"state_dict": load_file(saved / "model.safetensors")} | said, tmp_path / "w.pth")
    refused(1, *words.replace("FOLDER", str(saved)).split())


def pictures_of(folder, classes, break_it=None):
    for name in classes:
        (folder / "test" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (32, 32), index).save(folder / "test" / name / f"{index}.png")
    if break_it:
        break_it(folder / "test" / classes[0] / "0.png")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder / "nowhere",
        lambda folder: pictures_of(folder, ["0", "zero"]),
        lambda folder: pictures_of(folder, ["0", "1"], truncated),
        lambda folder: pictures_of(folder, [str(index) for index in range(11)]),
        lambda folder: pictures_of(folder, ["0", "1"], lambda path: path.write_text("no image")),
        lambda folder: [folder.mkdir(), folder][1],
        lambda folder: [folder.write_text("no parquet"), folder][1],
    ],
)
def test_images(refused, saved, tmp_path, make):
    dataset = make(tmp_path / "data")
    refused(1, "evaluate", "--model", saved, "--dataset", dataset, "--output", "scores.json")


@pytest.mark.parametrize(
    "words",
    [
        "card nowhere", "card .", "push --model nowhere --repo-id a/b", "info --teacher resnet_18",
        "export --model nowhere --output m.onnx",
    ],
)  # fmt: skip
def test_what_is_not_there(refused, words):
    refused(1, *words.split())


def tiny():
    return TinyCNN().eval()


def tied():
    model = tiny()
    return {"model": model, "teacher_model": model}


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: NoiseKDTrainer(**tied(), args=NoiseKDConfig(folder, input_size=[1, 8, 8])),
        lambda folder: NoiseKDTrainer(tiny(), "/nowhere", NoiseKDConfig(folder)),
        lambda folder: NoiseKDTrainer(tiny(), tiny(), NoiseKDConfig(folder)),
        lambda folder: NoiseKDTrainer(tiny(), timm.create_model("vit_tiny_patch16_224"), NoiseKDConfig(folder)),
        lambda folder: NoiseKDConfig(folder, weight_decay=-1),
        lambda folder: NoiseDataset((3, 0, 8)),
        lambda folder: NoiseDataset((3, 8, 8), resolutions={1.5: 1}),
        lambda folder: NoiseDataset((3, 8, 8), std=float("nan")),
        lambda folder: MixedDataset(NoiseDataset((3, 8, 8)), []),
        lambda folder: batch_statistics(tiny(), 1.5),
        lambda folder: batch_statistics(torch.nn.Linear(2, 2)),
        lambda folder: calibration_images(tiny(), 1, input_size=(1, 8, 8)),
        lambda folder: evaluate(tiny(), [(torch.zeros(1, 8, 8), 0)]),
        lambda folder: recalibrate_batch_norm(tiny(), [torch.zeros(1, 1, 8, 8)]),
        lambda folder: shrink(tiny(), 1.5, input_size=(1, 8, 8)),
        lambda folder: shrink(tiny(), max_params=1, input_size=(1, 8, 8)),
        lambda folder: load_teacher(3),
        lambda folder: load_teacher(folder),
    ],
)
def test_calls(tmp_path, call):
    with pytest.raises((ValueError, TypeError)) as raised:
        call(str(tmp_path / "out"))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
