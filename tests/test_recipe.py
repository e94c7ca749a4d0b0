import json

import pytest
import torch
from torch.utils.data import TensorDataset

from hf_noisekd.figures import plot_curves
from hf_noisekd.recipe import Results, machine, recipe_parser


@pytest.fixture
def results(tiny_cnn, tmp_path):
    options = recipe_parser("doc", "tiny", {"cpu": {}}).parse_args(["--output-dir", str(tmp_path), "--seed", "3"])
    results = Results("tiny", options, {"width": 4})
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 3)
    curve = [{"step": 5, "eval_running_accuracy": 30.0, "eval_batch_accuracy": 40.0}, {"step": 6, "loss": 1.0}]
    results.add("teacher", tiny_cnn, data)
    results.add("student", tiny_cnn, data, tiny_cnn, steps=10, seconds=2.0, images_per_second=1234.5, curve=curve)
    return results


def test_options_that_every_recipe_has():
    parser = recipe_parser("doc", "tiny", {"cpu": {}, "paper": {}})
    options = parser.parse_args(["--max-steps", "7", "--preset", "paper"])
    assert (options.max_steps, options.preset, options.seed) == (7, "paper", 0)
    assert str(options.output_dir) == "runs/tiny"
    with pytest.raises(SystemExit):
        parser.parse_args(["--preset", "huge"])


def test_results_file_has_the_documented_schema(results, tmp_path):
    record = json.loads((tmp_path / "results.json").read_text())
    assert record == results.record
    assert set(record) == {
        "recipe", "preset", "seed", "configuration", "commit", "machine", "versions", "runs"
    }  # fmt: skip
    assert record["seed"] == 3
    assert record["configuration"] == {"width": 4, "max_steps": None}
    assert {"python", "torch", "timm", "transformers"} <= set(record["versions"])
    teacher, student = record["runs"]
    assert set(student) == {"name", "steps", "seconds", "images_per_second", "running", "batch", "curve"}
    assert set(teacher["running"]) == {"accuracy", "loss"}
    assert set(student["batch"]) == {"accuracy", "loss", "agreement", "kl"}
    assert student["running"]["agreement"] == 100


def test_table_has_a_row_for_each_run(results):
    lines = results.table().splitlines()
    assert len(lines) == 4
    accuracy = results.record["runs"][1]["batch"]["accuracy"]
    assert lines[3].startswith("| student | 10 | 2 | 1,234 |")
    assert lines[3].endswith(f"{accuracy:.2f} |")
    assert len({line.count("|") for line in lines}) == 1


def test_machine_is_named():
    assert machine()["processor"]
    assert machine()["cores"] >= 1


def test_curves_are_drawn(results, tmp_path):
    plot_curves(results.record, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
