"""Tables of students that are initialised from their teacher, for README and docs."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from harness.results import markdown_table, mean_and_spread, read_json

# Of `shrink.py` and of `repair.py`: the teachers of the presets that README and docs show.
SHRUNK = {"gpu": "ResNet-34", "cpu-leaders": "ResNet-18", "cpu-wrn-leaders": "WRN-16-2"}
REPAIRED = {"cpu": "ResNet-18", "cpu-leaders": "ResNet-18", "cpu-wrn": "WRN-16-2"}
HEADLINE = ("cpu-leaders", "cpu-wrn")  # of the latter


def headline_table(results: Path) -> str:
    """What the README shows first: students that were cut out of their teacher, with all costs in minutes."""
    rows = []
    for preset in HEADLINE:
        records = [one for one in map(read_json, sorted(results.glob("repair_*.json"))) if one["preset"] == preset]
        students: dict[str, list[dict]] = {}
        for row in (row for record in records for row in record["measurements"]["accuracy"]):
            if "keep" in row["student"] and row["images"] == "none":
                facts = {"accuracy": row["trained"], "minutes": row["seconds, trained"] / 60}
                facts["of teacher"] = records[0]["runs"][0]["evaluations"][0]["running"]["accuracy"]
                students.setdefault(f"`--{row['student']}`", []).append(row | facts)
        rows += [
            _headline_row(REPAIRED[preset], name, runs, "a slow core, AVX2 alone") for name, runs in students.items()
        ]
    for (preset, name, time), runs in shrink_runs(results).items():
        if preset == "gpu" and time:
            rows.append(_headline_row(SHRUNK[preset], name.partition(",")[0], runs, "one H100"))
    return markdown_table(["teacher, its accuracy", "student", "multiply-adds", "accuracy", "time"], rows)


def _headline_row(teacher: str, name: str, runs: Sequence[dict], machine: str) -> list[str]:
    minutes = statistics.mean(run["minutes"] for run in runs)
    return [
        f"{teacher}, {runs[0]['of teacher']:.1f} %",
        name,
        f"{runs[0]['multiply-adds (%)']:.0f} %",
        f"{mean_and_spread([run['accuracy'] for run in runs], 1)} %",
        f"{minutes:.0f} min, {machine}",
    ]


def shrink_runs(results: Path) -> dict[tuple[str, str, int], list[dict]]:
    """Return the measured students of `shrink.py`, of all seeds, by preset, name and time.

    The minutes are those of the training and, by the cost of a step, of what is paid beside it.
    """
    found: dict[tuple[str, str, int], list[dict]] = {}
    for record in map(read_json, sorted(results.glob("shrink_*.json"))):
        teacher, *runs = record["runs"]
        seconds = {run["name"]: run["seconds"] for run in runs}
        (beside,) = record["measurements"]["what is paid beside the steps"]
        for row in record["measurements"]["accuracy"]:
            time, run = row["time"], dict(row)
            if time and "minutes" not in row:
                share = 1 - beside["in steps of the first student"] / time
                run["minutes"] = seconds[f"{row['student']}, time of {time:,}"] / share / 60
            run["of teacher"] = teacher["evaluations"][0]["running"]["accuracy"]
            found.setdefault((record["preset"], row["student"], time), []).append(run)
    return found


def shrunk_table(results: Path, random: Sequence[float]) -> str:
    """Students initialised from their teacher, and others with random weights, by the steps that fit into a time.

    `random` are the accuracies of ResNet-10s of another recipe, `deploy.py`, with random initial weights.
    """
    rows: dict[tuple[str, ...], list[float]] = {}
    for (preset, name, time), runs in shrink_runs(results).items():
        if preset not in SHRUNK:
            continue
        student, _, start = name.partition(", ")
        size = f"{runs[0]['multiply-adds (%)']:.0f}"
        if preset == "cpu-leaders" and not any(key[1] == "random" for key in rows if SHRUNK[preset] in key[0]):
            rows[f"{student} of {SHRUNK[preset]}", "random", size, "2,400 and calibration"] = list(random)
        if not time and ", " in start:
            continue  # the same as with other sizes
        weights = start.replace("from the teacher", "teacher's") if time else "teacher's, no training"
        key = (f"{student} of {SHRUNK[preset]}", weights, size, f"{time:,}")
        rows.setdefault(key, []).extend(run["accuracy"] for run in runs)
    header = ["student", "initial weights", "multiply-adds (%)", "time (steps)", "accuracy (%)"]
    order = list(SHRUNK.values())
    ordered = sorted(rows.items(), key=lambda row: order.index(row[0][0].rpartition(" of ")[2]))
    return markdown_table(header, [[*key, mean_and_spread(accuracies)] for key, accuracies in ordered])
