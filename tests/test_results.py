import json

import pytest
import torch
from conftest import TinyCNN
from harness.figures import plot_curves
from harness.results import Results, recipe_parser
from torch.utils.data import TensorDataset

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.release.hub import HubError


@pytest.fixture
def results(tiny_cnn, tmp_path):
    parser = recipe_parser("doc", "tiny", {"cpu": {}})
    parser.add_argument("--teacher")
    parser.add_argument("--unused")
    options = parser.parse_args(["--output-dir", str(tmp_path), "--seed", "3", "--teacher", "/private/place/teacher"])
    results = Results("tiny", options, {"width": 4, "teacher": "resnet"})
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 3)
    results.add("teacher", tiny_cnn, data)
    args = NoiseKDConfig(
        str(tmp_path / "student"),
        max_steps=10,
        per_device_train_batch_size=8,
        input_size=[1, 8, 8],
        num_calibration_images=0,
        eval_strategy="steps",
        eval_steps=5,
        logging_steps=5,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = NoiseKDTrainer(TinyCNN(), tiny_cnn, args, eval_dataset={"twenty": data})
    assert results.train("student", trainer) is trainer.model
    return results


def test_options_that_every_recipe_has():
    parser = recipe_parser("doc", "tiny", {"cpu": {}, "paper": {}})
    options = parser.parse_args(["--max-steps", "7", "--preset", "paper"])
    assert (options.max_steps, options.preset, options.seed) == (7, "paper", 0)
    assert str(options.output_dir) == "runs/tiny"
    for wrong in (["--preset", "huge"], ["--max-steps", "0"], ["--max-steps", "-5"], ["--seed", "-1"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(wrong)
        assert stop.value.code == 2


def test_results_file_has_the_documented_schema(results, tmp_path):
    record = json.loads((tmp_path / "results.json").read_text())
    assert record == results.record
    assert set(record) == {
        "recipe", "preset", "seed", "configuration", "commit", "machine", "versions", "runs", "measurements"
    }  # fmt: skip
    assert record["seed"] == 3
    assert record["configuration"] == {"width": 4, "teacher": "teacher"}
    assert {"python", "torch", "timm", "transformers"} <= set(record["versions"])
    teacher, student = record["runs"]
    assert set(teacher) == {"name", "model", "steps", "processes", "evaluations", "curve"}
    assert set(student) >= set(teacher) | {"seconds", "images_per_second", "noisekd", "class_frequencies"}
    assert set(student) & set(record) == set()
    assert teacher["evaluations"][0]["running"].keys() == {"accuracy", "loss"}
    evaluation = student["evaluations"][0]
    assert evaluation["batch"].keys() == {"accuracy", "loss", "agreement", "kl"}
    assert (evaluation["dataset"], evaluation["images"], evaluation["step"]) == ("twenty", 20, 10)


def test_results_that_could_be_gone_on_with_are_not_overwritten(results, tmp_path):
    parser = recipe_parser("doc", "tiny", {"cpu": {}}, resumes=True)
    with pytest.raises(ValueError, match=r"results\.json .*--resume .*--output-dir"):
        Results("tiny", parser.parse_args(["--output-dir", str(tmp_path)]), {})
    Results("tiny", parser.parse_args(["--output-dir", str(tmp_path / "other")]), {})


def test_a_kill_while_results_are_written_leaves_the_old_ones(results, tmp_path, monkeypatch):
    before = (tmp_path / "results.json").read_text()

    def write_half(path, text):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        results.measure("more", [{"accuracy": 1.0}])
    assert (tmp_path / "results.json").read_text() == before


def test_table_has_a_row_for_each_run(results, capsys):
    results.print_table()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    student = results.record["runs"][1]
    assert lines[2].startswith("| teacher | TinyCNN, 0.00 M | 0 | 0 | 0 |")
    assert lines[3].startswith(f"| student | TinyCNN, 0.00 M | 10 | {student['seconds']:.0f} |")
    assert lines[3].endswith(f"{student['evaluations'][0]['batch']['accuracy']:.2f} |")
    assert len({line.count("|") for line in lines}) == 1


def test_measurements_are_recorded_and_printed(results, tmp_path, capsys):
    rows = [
        {"images": 4096, "input": "noise|flip", "accuracy": 12.345678, "density": [0.1]},
    ]
    results.measure("reading", rows)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["measurements"] == {"reading": [rows[0] | {"accuracy": 12.3457}]}
    results.print_table()
    printed = capsys.readouterr().out
    assert "| images | input | accuracy |\n|---:|---|---:|\n| 4,096 | noise\\|flip | 12.35 |" in printed


def test_a_student_that_cannot_be_pushed_is_not_trained(hub, tmp_path):
    options = recipe_parser("doc", "tiny", {"cpu": {}}, pushes=True).parse_args(["--push-to", "somebody/student"])
    with pytest.raises(HubError, match="somebody/student"):
        Results("tiny", options, {})


def test_curves_are_drawn(results, tmp_path):
    plot_curves(results.runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
