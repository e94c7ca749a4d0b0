"""The recipes run end to end, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_noisekd.hub import load_teacher

ROOT = Path(__file__).parents[1]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"


def run(name, *options, timeout):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *map(str, options)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_digits(tmp_path):
    output = run("digits", "--max-steps", 3, "--seed", 1, "--output-dir", tmp_path, timeout=120)
    record = json.loads((tmp_path / "results.json").read_text())
    names = [run["name"] for run in record["runs"]]
    assert names == [
        "teacher", "supervised student", "noise, running-statistics teacher", "noise, batch-statistics teacher"
    ]  # fmt: skip
    assert all(run["steps"] == 3 and f"| {run['name']} |" in output for run in record["runs"])
    assert record["seed"] == 1
    assert (tmp_path / "curves.png").stat().st_size > 1000
    student = load_teacher(str(tmp_path / "student"))
    assert student(torch.randn(2, 1, 8, 8)).shape == (2, 10)


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
    assert second["runs"][0]["running"] == pytest.approx(first["runs"][0]["running"], abs=0.05)
    assert output.count("| noise, ") == 2
    assert second["configuration"]["dataset"] == "cifar10"
