"""The recipes run end to end, as a user starts them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import digest, write_images
from harness.presets import CIFAR10 as CIFAR10_PRESETS
from harness.presets import DISTILL_DEFAULTS

from hf_noisekd.models.loading import load_teacher

ROOT = Path(__file__).parents[1]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"


def run(name, *options, timeout, environment=None, launcher=()):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | (environment or {})
    launcher = ["-m", *launcher] if launcher else []
    command = [sys.executable, *launcher, str(ROOT / "recipes" / f"{name}.py"), *map(str, options)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


# What a stranger runs who has nothing but the id: digits as they are, and the student's own preprocessing.
CLASSIFY = """
import sys, timm, torch
from PIL import Image
from sklearn.datasets import load_digits
from hf_noisekd import batch_statistics

model = timm.create_model(f"hf-hub:{sys.argv[1]}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
digits = load_digits()
images = [Image.fromarray((image * 255 / 16).round().astype("uint8")) for image in digits.images]
inputs = torch.stack([transform(image) for image in images])
with torch.no_grad(), batch_statistics(model):
    answers = torch.cat([model(batch).argmax(-1) for batch in inputs.split(256)])
print(100 * (answers.numpy() == digits.target).mean())
"""


@pytest.mark.parametrize(
    ("steps", "expected"), [(3, 0), pytest.param(10_000, 90, marks=pytest.mark.slow)], ids=["smoke", "whole"]
)
def test_digits_are_classified_by_a_process_that_has_only_the_id(hub, tmp_path, steps, expected):
    folder = tmp_path / "run"
    options = ("--max-steps", steps, "--seed", 1, "--push-to", "alice/digits", "--output-dir", folder)
    output = run("digits", *options, timeout=1200, environment=hub.client_env(tmp_path / "pusher"))
    record = json.loads((folder / "results.json").read_text())
    names = [run["name"] for run in record["runs"]]
    assert names == [
        "teacher", "supervised student", "noise, running-statistics teacher", "noise, batch-statistics teacher"
    ]  # fmt: skip
    assert all(f"| {name} |" in output for name in names)
    assert [run["steps"] for run in record["runs"]] == [min(steps, own) for own in (400, 400, 1500, 1500)]
    assert record["seed"] == 1
    assert (folder / "curves.png").stat().st_size > 1000
    assert "| scikit-learn digits (450 images) | batch statistics" in (folder / "student" / "README.md").read_text()
    environment = os.environ | hub.client_env(tmp_path / "stranger", token=None)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", CLASSIFY, "alice/digits"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    # On all digits, where the recipe measures on those that the teacher was not trained on.
    accuracy = record["runs"][-1]["evaluations"][0]["batch"]["accuracy"]
    assert float(finished.stdout) == pytest.approx(accuracy, abs=8)
    assert float(finished.stdout) >= expected


def run_here(name, monkeypatch, *options):
    """Run a recipe in this process, which has imported what it needs, and return its results.

    Students have a quarter of the width, and few calibration images, which saves a minute of the tests.
    """
    monkeypatch.setitem(CIFAR10_PRESETS["cpu"]["model_args"], "width", 8)
    monkeypatch.setitem(DISTILL_DEFAULTS, "num_calibration_images", 32)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / f"{name}.py"), *map(str, options)])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    runpy.run_path(sys.argv[0], run_name="__main__")
    output_dir = Path(options[options.index("--output-dir") + 1])
    return json.loads((output_dir / "results.json").read_text())


def test_cifar10_has_the_five_rows_of_table_1(cifar10, hub, tmp_path, monkeypatch, capsys):
    options = ("--dataset", cifar10, "--max-steps", 1, "--push-to", "alice/student", "--output-dir", tmp_path)
    record = run_here("cifar10", monkeypatch, *options)
    paper = json.loads((ROOT / "recipes" / "paper.json").read_text())["cifar10"]["accuracy"]
    assert [run["name"] for run in record["runs"]] == list(paper)
    fractions = [run.get("noisekd", {}).get("teacher_batch_norm_fraction") for run in record["runs"]]
    assert fractions == [None, 1.0, 0.0, None, 0.0, 1.0]
    assert [("noise" in run.get("noisekd", {})) for run in record["runs"]] == [False, True, True, False, False, False]
    assert all(run["steps"] == 1 for run in record["runs"])
    assert capsys.readouterr().out.count("| resnet10_cifar, 0.08 M |") == 5
    assert (tmp_path / "curves.png").stat().st_size > 1000
    student = load_teacher(str(tmp_path / "noise-batch-statistics-teacher-resnet10-cifar"))
    pushed = load_teacher("alice/student")
    assert digest(pushed) == digest(student)
    assert (pushed.noisekd["teacher_batch_norm_fraction"], "noise" in pushed.noisekd) == (1.0, True)
    cards = [card.read_text() for card in tmp_path.glob("*/README.md")]
    assert len(cards) == 4
    assert sum("hf-hub:alice/student" in card for card in cards) == 1


@pytest.mark.slow
def test_students_are_deployed_and_their_agreement_is_weighed(cifar10, small_teacher, tmp_path, monkeypatch):
    # A teacher with random weights vouches for nothing, and students of 2 steps agree with nobody.
    monkeypatch.setattr(
        "hf_noisekd.calibration.calibration_images.CalibrationImages.measure_self_agreement", lambda *_: 100.0
    )
    monkeypatch.setattr("hf_noisekd.onnx.int8.MIN_AGREEMENT", 0)
    options = ("--dataset", cifar10, "--teacher", small_teacher, "--max-steps", 2, "--output-dir", tmp_path)
    record = run_here("deploy", monkeypatch, *options)
    calibration, accuracies, files = record["measurements"].values()
    assert [row["their steps"] for row in calibration] == [60]
    assert len(accuracies) == 7
    read = {row["read by"]: row["accuracy"] for row in files}
    assert len(read) == 6
    in_torch = next(row for row in accuracies if row["statistics of"] == "calibration images, 256")["accuracy"]
    assert read["onnxruntime, float32"] == pytest.approx(read["transformers' pipeline"], abs=1)
    assert read["onnxruntime, float32"] == pytest.approx(in_torch, abs=1)

    record = run_here("agreement", monkeypatch, *options)
    assert len(record["measurements"]["agreement with the teacher"]) == 6
    assert len(record["measurements"]["what it tells"]) == 2


def test_students_are_cut_out_of_their_teacher(cifar10, small_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_noisekd.calibration.calibration_images.CalibrationImages.measure_self_agreement", lambda *_: 100.0
    )
    monkeypatch.setattr(
        "hf_noisekd.calibration.calibration_images.match_statistics", lambda _, images, *args, **kwargs: (images, 0.0)
    )
    options = ("--dataset", cifar10, "--teacher", small_teacher, "--max-steps", 2, "--output-dir", tmp_path)
    record = run_here("shrink", monkeypatch, *options, "--starts", "keep 0.5")
    assert [run["name"] for run in record["runs"]] == [
        "teacher", "keep 0.5, time of 600", "keep 0.5, time of 2,000"
    ]  # fmt: skip
    assert record["runs"][1]["noisekd"]["start"]["macs"] <= 0.5
    rows = record["measurements"]["accuracy"]
    assert [(row["time"], row["steps"]) for row in rows] == [(0, 0), (600, 2), (2000, 2)]
    assert list(record["step_costs"]) == ["ResNet-10, random", "keep 0.5"]


@pytest.mark.slow
def test_students_are_repaired_on_images_of_all_kinds(cifar10, small_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_noisekd.calibration.calibration_images.CalibrationImages.measure_self_agreement", lambda *_: 100.0
    )
    options = ("--dataset", cifar10, "--teacher", small_teacher, "--output-dir", tmp_path)
    record = run_here("repair", monkeypatch, *options, "--students", "keep 0.5", "--images", 16)
    rows = record["measurements"]["accuracy"]
    assert [row["images"] for row in rows] == ["none, not repaired", "none", 16]
    assert all(row["multiply-adds (%)"] <= 50 for row in rows)
    assert [row["trained"] is None for row in rows] == [True, False, False]


@pytest.mark.slow
def test_a_large_teacher_is_cut_with_images(cifar10, small_teacher, tmp_path, monkeypatch):
    options = ("--dataset", cifar10, "--teacher", small_teacher, "--max-steps", 1, "--output-dir", tmp_path)
    record = run_here("large_teacher", monkeypatch, *options, "--images", 0, 16)
    rows = record["measurements"]["agreement with the teacher"]
    assert [row["images"] for row in rows[2:]] == ["none", "16"] * 2
    assert [row["after"] is None for row in rows] == [True, True, True, False, True, False]


@pytest.mark.slow
def test_the_cost_of_a_run_is_measured(tmp_path, monkeypatch):
    options = ("--networks", "test_resnet", "--pixels", 32, 64, "--output-dir", tmp_path)
    small, large = run_here("cost", monkeypatch, *options)["measurements"]["cost"]
    assert large["GiB a step"] > 2 * small["GiB a step"] > 0
    assert min(value for row in (small, large) for value in row.values() if value != "test_resnet") > 0


@pytest.mark.slow
def test_what_is_cut_of_a_family_is_read_by_three_libraries(tmp_path, monkeypatch):
    record = run_here("families", monkeypatch, "--members", "mobilenetv2_050", "--output-dir", tmp_path)
    (row,) = record["measurements"]["families"]
    assert row["groups left alone"].startswith("0 of ")
    assert (row["family"], row["read by"]) == ("efficientnet", "timm, transformers, onnxruntime")
    assert row["multiply-adds (%)"] <= 50


@pytest.mark.slow
def test_teachers_without_batch_norm_and_what_their_answers_tell(cifar10, tmp_path, monkeypatch):
    options = ("--dataset", cifar10, "--max-steps", 2, "--output-dir")
    record = run_here("no_batch_norm", monkeypatch, *options, tmp_path / "students", "--preset", "cpu-groupnorm")
    asked = [(run["noisekd"]["teacher_statistics"], "start" in run["noisekd"]) for run in record["runs"][1:]]
    assert asked == [(0, False), (0, True)]
    assert all(row["of its teacher's (%)"] > 0 for row in record["measurements"]["students"])
    convnext = run_here("no_batch_norm", monkeypatch, *options, tmp_path / "convnext")
    assert [run["model"]["architecture"] for run in convnext["runs"]] == [
        "convnext_atto", "resnet10_cifar", "convnext_atto"
    ]  # fmt: skip
    teacher = ("--teacher", tmp_path / "students" / "teacher", "--preset", "cpu-groupnorm")
    record = run_here("choice", monkeypatch, *options, tmp_path / "choice", *teacher)
    settings, told = record["measurements"].values()
    assert len(settings) == 6
    assert all(0 <= row["information"] <= 1 for row in settings)
    assert -1 <= told[0]["rank correlation with accuracy"] <= 1
    record = run_here("choice", monkeypatch, *options[2:], tmp_path / "digits", "--preset", "digits")
    assert [run["noisekd"]["teacher_statistics"] for run in record["runs"][1:]] == [1, 0.5, 0.1, 0, 1, 1]


@pytest.mark.slow
def test_every_kind_of_network_can_teach_whatever_its_normalisation(tmp_path, monkeypatch):
    rows = run_here("teachers", monkeypatch, "--output-dir", tmp_path)["measurements"]["teachers"]
    assert len(rows) > 100
    assert not [row for row in rows if "BatchNorm" in row["refused"] or "normalisation" in row["refused"]]
    assert {row["asked"] for row in rows if not row["refused"]} == {"on the batch", "as it is"}


@pytest.mark.slow
def test_tables_3_and_figures_5_and_6_and_few_images(cifar10, small_teacher, tmp_path, monkeypatch):
    options = ("--dataset", cifar10, "--teacher", small_teacher, "--max-steps", 2, "--output-dir", tmp_path)
    record = run_here("partial_batch_norm", monkeypatch, *options)
    shares = [run["noisekd"]["teacher_batch_norm_fraction"] for run in record["runs"][1:]]
    assert shares == [0, 0.1, 0.25, 0.5, 0.75, 1]
    paper = json.loads((ROOT / "recipes" / "paper.json").read_text())["partial_batch_norm"]["accuracy"]
    assert [run["name"] for run in record["runs"][1:]] == list(paper)
    record = run_here("batch_size", monkeypatch, *options)
    assert [run["noisekd"]["batch_size"] for run in record["runs"][1:]] == [16, 32, 64, 128, 256, 512]
    assert {run["evaluations"][0]["batch_size"] for run in record["runs"]} == {130}
    record = run_here("few_images", monkeypatch, *options, "--real-images", 20)
    assert [run["name"] for run in record["runs"]] == [
        "teacher", "noise alone", "20 images alone", "noise and 20 images"
    ]  # fmt: skip
    assert record["runs"][3]["noisekd"]["real_images"]["images"] == 20
    assert [row["taught with"] for row in record["measurements"]["accuracy"]] == ["images", "noise", "both"]
    record = run_here("student_handling", monkeypatch, *options, "--student", small_teacher)
    assert [run["name"] for run in record["runs"]] == ["student"]
    by_batch, by_images = record["measurements"].values()
    assert [row["batch size"] for row in by_batch] == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert [row["images"] for row in by_images] == [4, 16, 64]
    accuracy = record["runs"][0]["evaluations"][0]["batch"]["accuracy"]
    assert by_batch[-1]["accuracy (%)"] == pytest.approx(accuracy, abs=1e-4)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


@pytest.mark.slow
def test_noises_and_their_ablations(cifar10, small_teacher, tmp_path, monkeypatch):
    options = ("--dataset", cifar10, "--teacher", small_teacher, "--max-steps", 2)
    folder = tmp_path / "noises"
    noises = ("white", "spectrum", "pyramid", "low_resolution", "spectrum(1)", "dead_leaves|mixup:0.5")
    record = run_here("noise_distributions", monkeypatch, *options, "--output-dir", folder, "--noises", *noises)
    accuracies, fits, correlations = (
        record["measurements"][name]
        for name in ("accuracy", "what the teacher says", "rank correlation with the accuracy")
    )
    assert {row["noise"] for row in accuracies} == {fit["noise"] for fit in fits}
    named = [fit["distance"] for fit in fits[: len(noises)]]
    assert named == sorted(named)
    assert {f"{row['noise']}, equal steps" for row in accuracies} <= {run["name"] for run in record["runs"]}
    assert [row["of"] for row in correlations] == [f"all {len(accuracies)}", "the 5 without dead leaves"]
    assert all(row["distance"] is None or -1 <= row["distance"] <= 1 for row in correlations)
    assert all((folder / name).stat().st_size > 1000 for name in ("distance.png", "noises.png"))
    chosen = ("temperature 1", "centred logits", "teacher on running statistics")
    record = run_here(
        "noise_ablations", monkeypatch, *options, "--output-dir", tmp_path / "ablations", "--runs", *chosen
    )
    (rows,) = record["measurements"].values()
    runs = {run["name"]: run["noisekd"] for run in record["runs"][1:]}
    assert runs["white, equal steps"]["noise"]["distribution"] == "white"
    assert runs["white, equal steps"]["noise"]["image_sizes"] == [[[32, 32], 1.0]]
    assert runs["white, equal steps"]["learning_rate"] == 3e-3
    assert runs["the default, equal steps"]["learning_rate"] == 1e-2
    assert runs["the default, equal steps"]["temperature"] == 4
    assert runs["temperature 1, equal steps"]["temperature"] == 1
    assert runs["temperature 1, equal steps"]["learning_rate"] == 1e-2
    assert runs["centred logits, equal steps"]["loss_type"] == "centered_mse"
    assert runs["teacher on running statistics, equal steps"]["teacher_batch_norm_fraction"] == 0
    assert all(row["steps, equal steps"] == row["steps, equal seconds"] == 2 for row in rows)
    options_of_preset = (*options, "--output-dir", tmp_path / "speed", "--preset", "cpu-long")
    record = run_here("noise_speed", monkeypatch, *options_of_preset)
    (rows,) = record["measurements"].values()
    assert [(row["noise"], row["in the time of white steps"], row["steps"]) for row in rows] == [
        (name, 5400, 2) for name in ("white", "white, as the default", "structured, the default")
    ]
    assert run_here("noise_speed", monkeypatch, *options_of_preset, "--resume") == record


def test_the_rank_correlation_of_noises_is_spearmans():
    rank_correlation = runpy.run_path(str(ROOT / "recipes" / "noise_distributions.py"))["rank_correlation"]
    fits = {name: {"distance": distance} for name, distance in zip("abcd", (1.0, 2.0, 30.0, 4.0), strict=True)}
    accuracies = dict(zip("abcd", (0.1, 0.2, 0.9, 0.3), strict=True))
    assert rank_correlation("abcd", fits, accuracies, "distance") == pytest.approx(1)
    assert rank_correlation("abcd", fits, {name: -value for name, value in accuracies.items()}, "distance") == -1
    assert rank_correlation("abcd", fits, dict.fromkeys("abcd", 0.1), "distance") is None


def test_activations(cifar10, small_teacher, tmp_path, monkeypatch):
    options = ("--dataset", cifar10, "--teacher", small_teacher, "--output-dir", tmp_path)
    record = run_here("activations", monkeypatch, *options)
    assert record["measurements"]["hidden activations"][0]["layer"] == "bn1"
    assert len(record["measurements"]["pooled activations"]) == 3
    assert {path.name for path in tmp_path.glob("*.png")} == {"hidden.png", "pooled.png"}


def test_circles(tmp_path, monkeypatch):
    record = run_here("circles", monkeypatch, "--max-steps", 60, "--output-dir", tmp_path)
    assert record["runs"][0]["evaluations"][0]["running"]["accuracy"] > 90
    data, running, batch = record["measurements"]["embeddings"]
    assert running["mean of the embedding"] > 2 * batch["mean of the embedding"]
    assert data["answered the inner circle (%)"] == pytest.approx(50, abs=10)
    assert (tmp_path / "embeddings.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["cifar10", "svhn", "cifar100", "food101", "partial_batch_norm"])
def test_the_papers_preset_has_the_networks_of_the_papers_table(name):
    recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))
    preset = recipe.get("PRESETS", recipe.get("CIFAR10"))["paper"]
    rows = json.loads((ROOT / "recipes" / "paper.json").read_text())[name]["accuracy"]
    assert rows.pop("teacher", {preset["teacher"]: 0}).keys() == {preset["teacher"]}
    for values in rows.values():
        assert values.keys() <= set(preset["students"])
    assert all(timm.is_model(architecture) for architecture in (preset["teacher"], *preset["students"]))
    assert preset["distillation"] == {"max_steps": 196 * 200}


SMALL_TABLE = ("--rows", "noise-batch", "images-running", "--max-steps", 1)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("svhn", ["image", ("label", 10)]),
        ("cifar100", ["img", ("fine_label", 100), ("coarse_label", 20)]),
    ],
)
def test_small_images_in_the_schema_of_the_hub(name, columns, tmp_path, monkeypatch):
    data = write_images(tmp_path / name, columns, copies=2)
    record = run_here(name, monkeypatch, "--dataset", data, *SMALL_TABLE, "--output-dir", tmp_path / "run")
    assert [run["model"]["architecture"] for run in record["runs"]] == ["resnet18_cifar"] + 2 * ["resnet10_cifar"]
    student = load_teacher(str(tmp_path / "run" / "noise-batch-statistics-teacher-resnet10-cifar"))
    assert student.num_classes == columns[1][1]
    assert record["configuration"]["dataset"] == name


@pytest.mark.slow
def test_food101_on_two_processes(tmp_path):
    data = write_images(tmp_path / "food101", ["image", ("label", 101)], test_split="validation", photos=True, copies=1)
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    options = ("--dataset", data, *SMALL_TABLE, "--output-dir", tmp_path / "run")
    run("food101", *options, timeout=300, launcher=launcher)
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [run["processes"] for run in record["runs"]] == [2, 2, 2]
    assert [run["model"]["architecture"] for run in record["runs"]] == ["resnet18", "resnet10t", "resnet10t"]
    for run_ in record["runs"]:
        assert run_["model"]["input_size"] == [3, 64, 64]
        assert run_["evaluations"][0]["images"] == 101
    student = load_teacher(str(tmp_path / "run" / "noise-batch-statistics-teacher-resnet10t"))
    assert student(torch.randn(2, 3, 64, 64)).shape == (2, 101)


@pytest.mark.slow
def test_benchmark(tmp_path):
    output = run("benchmark_step_time", "--max-steps", 1, "--output-dir", tmp_path, timeout=120)
    assert "ratio" in output
    assert json.loads((tmp_path / "benchmark.json").read_text())["median_ratio"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"needs CIFAR-10 in {CIFAR10}")
def test_cifar10_with_and_without_a_teacher(tmp_path):
    options = ("--dataset", CIFAR10, "--max-steps", 4)
    run("cifar10", *options, "--output-dir", tmp_path / "first", timeout=600)
    teacher = tmp_path / "first" / "teacher"
    output = run("cifar10", *options, "--teacher", teacher, "--output-dir", tmp_path / "second", timeout=600)
    first, second = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("first", "second"))
    assert second["runs"][0]["steps"] == 0
    # The loaded teacher runs in another memory format; rounding may tip an image or two of the 10,000.
    reloaded, trained = (record["runs"][0]["evaluations"][0]["running"] for record in (second, first))
    assert reloaded == pytest.approx(trained, abs=0.05)
    assert output.count("| noise, ") == 2
    assert second["configuration"]["dataset"] == "cifar10"
