"""The README's Python runs as it stands, and its numbers are those of the committed results files."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest
import timm
from harness.results import mean_and_spread, results_table, table_row

from hf_noisekd.models.saving import save_model

ROOT = Path(__file__).parents[1]
DEMO_TEACHER = "runs/digits/teacher"
README = (ROOT / "README.md").read_text()
UNWRAPPED = " ".join(README.split())
RESULTS = ROOT / "recipes" / "results"


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def accuracy_rows(recipe: str, preset: str) -> list[dict]:
    """Return the rows of a recipe's table of accuracies, of one seed after the other."""
    records = (results(file.stem) for file in sorted(RESULTS.glob(f"{recipe}_*.json")))
    return [row for record in records if record["preset"] == preset for row in record["measurements"]["accuracy"]]


def test_python_blocks_run_as_they_stand(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    # What `make demo` leaves behind.
    cfg = {"input_size": (1, 8, 8)}
    save_model(timm.create_model("resnet10_cifar", width=16, in_chans=1, pretrained_cfg_overlay=cfg), DEMO_TEACHER)
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "student" / "config.json").is_file()


@pytest.mark.parametrize("name", ["digits_cpu", "cifar10_cpu"])
def test_tables_are_those_of_the_results_files(name):
    record = results(name)
    assert results_table(record) in README
    assert record["commit"] in README
    assert not record["commit"].endswith("-dirty")


def test_the_speed_of_the_default_is_that_of_the_results_files():
    """The table has a line for each teacher and time, and a column for each noise: means over the seeds."""
    lines = []
    for preset, teacher in {"cpu": "ResNet-18", "cpu-long": "ResNet-18", "cpu-wrn": "WRN-16-2"}.items():
        accuracies = {}
        for row in accuracy_rows("noise_speed", preset):
            noises = accuracies.setdefault(row["in the time of white steps"], {})
            noises.setdefault(row["noise"], []).append(row["accuracy"])
        lines += [
            table_row([teacher, f"{steps:,}", *map(mean_and_spread, noises.values())])
            for steps, noises in accuracies.items()
        ]
    header = ["teacher", "in the time of white steps", "white", "white, as the default", "structured, the default"]
    assert "\n".join([table_row(header), "|---|---:|---:|---:|---:|", *lines]) in README


@pytest.fixture(scope="module")
def ablations():
    """Rows of the default taken apart by run, one for each seed that has it, by preset."""
    rows = {}
    for preset in ("cpu", "cpu-wrn", "cpu-long"):
        rows[preset] = {}
        for row in accuracy_rows("noise_ablations", preset):
            rows[preset].setdefault(row["run"], []).append(row)
    return rows


def equal_seconds(rows):
    return [row["accuracy, equal seconds"] for row in rows]


def test_the_default_taken_apart_is_that_of_the_results_files(ablations):
    """The table has a line for each run, and a column for each preset: means over the seeds that have the run."""
    of_one_seed = (
        "white noise, small sizes first",
        "full size throughout",
        "half size only",
        "teacher on running statistics",
        "one adversarial step",
        "balanced classes",
    )
    header = table_row(["in the time of white steps", "500, ResNet-18", "500, WRN-16-2", "1,800, ResNet-18"])
    lines = [
        table_row([run, *(mean_and_spread(equal_seconds(of[run])) if run in of else "" for of in ablations.values())])
        for run, rows in ablations["cpu"].items()
        if len(rows) == 3 or run in of_one_seed
    ]
    assert "\n".join([header, "|---|---:|---:|---:|", *lines]) in README


def test_what_is_said_of_the_defaults_neighbours_is_so(ablations):
    def leads(preset, run):
        seeds = zip(equal_seconds(ablations[preset]["the default"]), equal_seconds(ablations[preset][run]), strict=True)
        return [other - own for own, other in seeds]

    in_longer_runs = ("learning rate 2e-2", "batches of 128")
    for preset, runs in {"cpu": ("two sizes", "cut and paste", *in_longer_runs), "cpu-long": in_longer_runs}.items():
        for run in runs:
            assert len(leads(preset, run)) == 3
            assert abs(mean(leads(preset, run))) < 0.4
            assert min(leads(preset, run)) < 0 < max(leads(preset, run))
    smaller, pasted = (leads("cpu-wrn", run) for run in ("batches of 128", "cut and paste"))
    assert len(smaller) == len(pasted) == 3
    assert min(*smaller, *pasted) > 0
    words = "by {:.1f} points in the mean, and cutting and pasting by {:.1f}."
    assert words.format(mean(smaller), mean(pasted)) in UNWRAPPED
    at_equal_steps = [
        mean(row["accuracy, equal steps"] for row in ablations["cpu-wrn"][run])
        for run in ("batches of 128", "the default")
    ]
    assert "({:.2f} against {:.2f} with the WRN-16-2)".format(*at_equal_steps) in UNWRAPPED


def test_the_costs_of_a_step_are_those_of_the_results_files():
    costs = {"resnet18_cifar": [], "wide_resnet16_2_cifar": []}
    for file in (*RESULTS.glob("noise_ablations_*.json"), *RESULTS.glob("noise_speed_*.json")):
        record = results(file.stem)
        for run, cost in record["step_costs"].items():
            if run in ("the default", "structured, the default"):
                costs[record["runs"][0]["model"]["architecture"]].append(cost)
    ranges = [bound for of_teacher in costs.values() for bound in (min(of_teacher), max(of_teacher))]
    words = "it was {:.2f} to {:.2f} of a white one with the ResNet-18 and {:.2f} to {:.2f} with the WRN-16-2"
    assert words.format(*ranges) in UNWRAPPED


def test_commands_are_make_targets():
    targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    targets = {target for line in targets for target in line.split()}
    assert set(re.findall(r"`?make ([a-z-]+)`?", README)) <= targets
