"""Tables and the figure of README and docs, out of the results files: `PYTHONPATH=recipes python -m harness.summary`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; `make tables` writes it anew.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.figures import ACCURACY_LABEL, Panel, plot_panels
from harness.results import markdown_table, mean_and_spread, read_json, results_table
from harness.shrink_tables import REPAIRED, headline_table, shrunk_table

WHITE, DEFAULT = "white", "structured, the default"
# Of `deploy.py`: the students by preset, and what the README shows of them.
STATISTICS_TABLE, FILES_TABLE = "running statistics", "onnxruntime"
DEPLOYED = {
    "cpu": "ResNet-10 of ResNet-18",
    "cpu-wrn": "ResNet-10 of WRN-16-2",
    "cpu-mobilenetv2": "MobileNetV2 of ResNet-18",
    "cpu-wrn-mobilenetv2": "MobileNetV2 of WRN-16-2",
}
SHOWN = {
    "the training noise, as trained": "a student, with the statistics of its noise",
    "calibration images, 256": "**the same without data, as `distill` leaves it**",
    "onnxruntime, int8, ranges of calibration images": "**without data, as an int8 file in onnxruntime**",
    "real images, 2,560": "the same with the statistics of 2,560 real images",
}
# Of `no_batch_norm.py` and `choice.py`: the teachers by preset.
NO_BATCH_NORM = {"cpu-convnext": "ConvNeXt", "cpu-groupnorm": "ResNet-18 with GroupNorm"}
CHOICE = NO_BATCH_NORM | {
    "cpu": "ResNet-18",
    "cpu-wrn": "WRN-16-2",
    "digits": "ResNet-10 (digits, gray)",
    "digits-groupnorm": "ResNet-10 with GroupNorm (digits, gray)",
}
PRESETS = {"cpu": "ResNet-18", "cpu-long": "ResNet-18", "cpu-wrn": "WRN-16-2"}
# Rows of the ablations that one seed is enough for.
CLEAR_CUT = (
    "white noise, small sizes first",
    "full size throughout",
    "half size only",
    "teacher on running statistics",
)


def main(root: Path = Path(__file__).parents[2]) -> None:
    """Write the tables and the figure of a checkout anew."""
    results = root / "recipes" / "results"
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        page.write_text(fill(page.read_text(), results))
    draw_speed(results, root / "docs" / "speed.png")


def fill(text: str, results: Path) -> str:
    """Return a Markdown text with its tables written anew.

    Raises:
        ValueError: The text names a table that there is not.
    """

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"There is no table {match[2]!r}, only {', '.join(TABLES)}.")
        return f"{match[1]}\n{TABLES[match[2]](results)}\n\n{match[3]}"

    return re.sub(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", table, text, flags=re.DOTALL)


def draw_speed(results: Path, path: Path) -> None:
    """Draw accuracy against minutes of one core, for white and for structured noise, with the teacher as a line."""
    lines: dict[str, list[tuple[float, ...]]] = {"structured noise": [], "white noise": []}
    for times in _speed(results, ("cpu", "cpu-long")).values():
        for name, noise in zip(lines, (DEFAULT, WHITE), strict=True):
            accuracies, seconds = zip(*times[noise], strict=True)
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            lines[name].append((round(statistics.mean(seconds) / 60, 1), statistics.mean(accuracies), spread))
    accuracy = _teacher_accuracy(results)
    ends = [point[0] for points in lines.values() for point in points]
    lines["the teacher"] = [(min(ends), accuracy), (max(ends), accuracy)]
    panel = Panel(lines, xlabel="minutes of one core", ylabel=ACCURACY_LABEL)
    plot_panels([panel], path)


def _all_speeds_table(results: Path) -> str:
    """All times and both teachers."""
    rows = []
    for preset, teacher in PRESETS.items():
        for white_steps, times in _speed(results, (preset,)).items():
            accuracies = [mean_and_spread([accuracy for accuracy, _ in runs]) for runs in times.values()]
            rows.append([teacher, f"{white_steps:,}", *accuracies])
    header = ["teacher", "in the time of white steps", "white", "white, as the default", "structured, the default"]
    return markdown_table(header, rows)


def _ablations_table(results: Path) -> str:
    """The default taken apart, at equal seconds; a row has three seeds, or stands for itself."""
    presets = ("cpu", "cpu-wrn", "cpu-long")
    found: list[dict[str, list[float]]] = []
    for preset in presets:
        found.append({})
        for row in _measured(results, "noise_ablations", preset):
            found[-1].setdefault(row["run"], []).append(row["accuracy, equal seconds"])
    rows = [
        [run, *(mean_and_spread(of[run]) if run in of else "" for of in found)]
        for run, accuracies in found[0].items()
        if len(accuracies) == 3 or run in CLEAR_CUT
    ]
    return markdown_table(["in the time of white steps", "500, ResNet-18", "500, WRN-16-2", "1,800, ResNet-18"], rows)


def _augmentations_table(results: Path) -> str:
    """Augmentations of the default, at equal seconds."""
    columns = [
        {row["run"]: row["accuracy, equal seconds"] for row in _measured(results, "noise_ablations", preset)}
        for preset in ("cpu-augmentations-short", "cpu-augmentations")
    ]
    rows = [[run, *(f"{of[run]:.2f}" for of in columns)] for run in columns[0] if run != "white"]
    return markdown_table(["in the time of white steps", "250", "500"], rows)


def _step_costs_table(results: Path) -> str:
    """The seconds of a step of the default, relative to one of white noise."""
    names = {"resnet18_cifar": "ResNet-18", "wide_resnet16_2_cifar": "WRN-16-2"}
    costs: dict[str, list[float]] = {name: [] for name in names}
    for file in sorted([*results.glob("noise_ablations_*.json"), *results.glob("noise_speed_*.json")]):
        record = read_json(file)
        of_default = {name: cost for name, cost in record["step_costs"].items() if name in ("the default", DEFAULT)}
        costs[record["runs"][0]["model"]["architecture"]] += of_default.values()
    rows = [[names[name], f"{min(values):.2f} to {max(values):.2f}"] for name, values in costs.items()]
    return markdown_table(["teacher", "cost of a step, white noise: 1"], rows)


def _deployed_table(results: Path) -> str:
    """ResNet-10s in evaluation mode, as they are deployed."""
    shown = ("cpu", "cpu-wrn")
    teachers = [_deploy_records(results, preset)[0]["runs"][0]["evaluations"][0]["running"] for preset in shown]
    accuracies = [
        _column(results, preset, STATISTICS_TABLE, "statistics of") | _column(results, preset, FILES_TABLE, "read by")
        for preset in shown
    ]
    rows = [["the teacher, which was trained on 50,000 images", *(f"{of['accuracy']:.2f}" for of in teachers)]]
    rows += [[name, *(mean_and_spread(of[row]) for of in accuracies)] for row, name in SHOWN.items()]
    return markdown_table(["test accuracy (%), single images", *(DEPLOYED[preset] for preset in shown)], rows)


def _statistics_table(results: Path) -> str:
    """Students by what their running statistics are of."""
    columns = [_column(results, preset, STATISTICS_TABLE, "statistics of") for preset in DEPLOYED]
    rows = [[kind, *(mean_and_spread(column[kind]) for column in columns)] for kind in columns[0]]
    return markdown_table(["running statistics of", *DEPLOYED.values()], rows)


def _files_table(results: Path) -> str:
    """ONNX files of the students of the ResNet-18."""
    rows = []
    for preset in ("cpu", "cpu-mobilenetv2"):
        accuracies, sizes, times = (
            _column(results, preset, FILES_TABLE, "read by", value) for value in ("accuracy", "MB", "ms an image")
        )
        for reader, values in accuracies.items():
            cells = [f"{statistics.median(of[reader]):.2f}" if of[reader] else "" for of in (sizes, times)]
            rows.append([DEPLOYED[preset].split()[0], reader, mean_and_spread(values), *cells])
    return markdown_table(["student", "run by", "accuracy (%)", "MB", "ms an image"], rows)


def _agreement_table(results: Path) -> str:
    """What the agreement without data tells, for each teacher."""
    rows = []
    for path in sorted(results.glob("agreement_*.json")):
        record = read_json(path)
        teacher = record["runs"][0]
        name = f"{teacher['model']['architecture']}, {teacher['evaluations'][0]['running']['accuracy']:.1f} %"
        for row in record["measurements"]["what it tells"]:
            told = [f"{row[key]:.2f}" for key in ("rank correlation with accuracy", "mean error")]
            rows.append([name, row["agreement"], *told])
    return markdown_table(["teacher", "agreement", "rank correlation with accuracy", "mean error"], rows)


def _shrunk_table(results: Path) -> str:
    random = _column(results, "cpu", STATISTICS_TABLE, "statistics of")["calibration images, 256"]
    return shrunk_table(results, random)


def _repaired_table(results: Path, presets: Sequence[str] = ("cpu", "cpu-wrn")) -> str:
    """Students that were cut and repaired, and then trained for a short time, by the images that were used."""
    students: dict[str, dict[str, list[Mapping]]] = {}
    for preset in presets:
        for row in _measured(results, "repair", preset):
            runs = students.setdefault(f"{row['student']} of {REPAIRED[preset]}", {})
            runs.setdefault(str(row["images"]), []).append(row)
    columns = list(dict.fromkeys(images for runs in students.values() for images in runs))
    rows = []
    for student, runs in students.items():
        share = runs[columns[0]][0]["multiply-adds (%)"]  # about the same for all images
        rows.append([student, f"{share:.0f}", *(_repaired_cell(runs.get(images, [])) for images in columns)])
    return markdown_table(["accuracy (%) by images", "multiply-adds (%)", *columns], rows)


def _repaired_cell(runs: Sequence[Mapping]) -> str:
    """The accuracy of some seeds, and that after a training, if there was one."""
    found = [[run[key] for run in runs if run.get(key) is not None] for key in ("accuracy", "trained")]
    return " / ".join(mean_and_spread(accuracies, 1) for accuracies in found if accuracies)


def _large_teacher_table(results: Path) -> str:
    """An ImageNet teacher cut with images: agreement with it before and after the training."""
    rows = []
    for row in _measured(results, "large_teacher", "cpu", "agreement with the teacher"):
        after = ["", ""] if row["after"] is None else [f"{row['after']:.1f}", f"{row['seconds'] / 60:.0f} min"]
        cells = [f"{row['multiply-adds (%)']:.0f} %", row["images"], str(row["pixels"])]
        rows.append([*cells, f"{row['before training']:.1f}", *after])
    return markdown_table(["multiply-adds", "images", "pixels", "before training", "trained on them", "a core"], rows)


def _cost_table(results: Path) -> str:
    """What a training step of 256 images takes, by network and pixels."""
    cells: dict[str, dict[int, str]] = {}
    for row in _measured(results, "cost", "cpu", "cost"):
        cell = f"{row['seconds a step']:.1f} s, {row['GiB a step']:.1f} GiB"
        cells.setdefault(row["network"], {})[row["pixels"]] = cell
    columns = list(dict.fromkeys(pixels for of in cells.values() for pixels in of))
    header = ["a step of 256 images", *(f"{pixels} pixels" for pixels in columns)]
    return markdown_table(header, [[name, *(of[pixels] for pixels in columns)] for name, of in cells.items()])


def _families_table(results: Path) -> str:
    """How many members of timm's families can be cut and loaded by all, and which cannot."""
    groups: dict[str, list[str]] = {}
    for row in read_json(results / "families_cpu.json")["measurements"]["families"]:
        group = f"cut, and loaded by {row['read by']}" if row["read by"] else f"not cut: {row['cut']}"
        groups.setdefault(group, []).append(row["member"])
    most = max(groups.values(), key=len)
    return markdown_table(
        ["what came of it", "networks", "which"],
        [[group, str(len(names)), "" if names is most else ", ".join(names)] for group, names in groups.items()],
    )


def _no_batch_norm_table(results: Path) -> str:
    """Students of teachers that store no statistics."""
    rows = []
    for path in sorted(results.glob("no_batch_norm_*.json")):
        record = read_json(path)
        teacher = NO_BATCH_NORM[record["preset"]]
        accuracy = record["runs"][0]["evaluations"][0]["running"]["accuracy"]
        for row in record["measurements"]["students"]:
            share = row["of its teacher's (%)"]
            numbers = [f"{row['steps']:,}", f"{row['accuracy']:.2f}", f"{share:.0f}"]
            weights = {"as its teacher": "teacher's", "at random": "random"}[row["begins"]]
            rows.append([f"{teacher}, {accuracy:.2f} %", row["student"], weights, *numbers])
    header = ["teacher", "student", "initial weights", "steps", "accuracy (%)", "of the teacher's (%)"]
    return markdown_table(header, rows)


def _teachers_table(results: Path) -> str:
    """How many networks can teach in which way, and which were not tried or refused."""
    ways = {"on the batch": "BatchNorm on the statistics of the batch", "as it is": "without BatchNorm, as it is"}
    groups: dict[str, list[str]] = {way: [] for way in ways.values()} | {"refused": []}
    for row in read_json(results / "teachers_cpu.json")["measurements"]["teachers"]:
        group = ways.get(row["asked"]) or ("refused" if row["member"] else "not tried, as no member is small enough")
        groups.setdefault(group, []).append(row["member"] or row["file"])
    return markdown_table(
        ["teacher", "networks", "which"],
        [
            [group, str(len(names)), "" if group in ways.values() else ", ".join(names)]
            for group, names in groups.items()
        ],
    )


def _choice_table(results: Path) -> str:
    """How well the information of a teacher's answers ranks settings."""
    rows = []
    for path in sorted(results.glob("choice_*.json")):
        record = read_json(path)
        teacher, settings = record["runs"][0], record["measurements"]["settings"]
        best, foretold = (max(settings, key=lambda row: row[key]) for key in ("accuracy", "information"))
        told = record["measurements"]["what it tells"][0]["rank correlation with accuracy"]
        name = f"{CHOICE[record['preset']]}, {teacher['evaluations'][0]['running']['accuracy']:.1f} %"
        cells = [f"{row['setting']}: {row['accuracy']:.1f}" for row in (foretold, best)]
        rows.append([name, f"{told:.2f}", *cells])
    return markdown_table(["teacher", "rank correlation", "most information: accuracy", "best: accuracy"], rows)


def _deploy_records(results: Path, preset: str) -> list[Mapping]:
    return [record for record in map(read_json, sorted(results.glob("deploy_*.json"))) if record["preset"] == preset]


def _column(results: Path, preset: str, table: str, key: str, value: str = "accuracy") -> dict[str, list[float]]:
    """Return the values in a table of `deploy.py`, of all seeds, by the text of their row."""
    found: dict[str, list[float]] = {}
    for record in _deploy_records(results, preset):
        for row in record["measurements"][table]:
            found.setdefault(row[key], []).extend([row[value]] if value in row else [])
    return found


def _runs_table(name: str, results: Path) -> str:
    return results_table(read_json(results / f"{name}.json"))


TABLES = {
    "repaired": _repaired_table,
    "repaired-seeds": lambda results: _repaired_table(results, ["cpu-leaders"]),
    "large-teacher": _large_teacher_table,
    "cost": _cost_table,
    "deployed": _deployed_table,
    "statistics": _statistics_table,
    "files": _files_table,
    "agreement": _agreement_table,
    "headline": headline_table,
    "shrunk": _shrunk_table,
    "families": _families_table,
    "no-batch-norm": _no_batch_norm_table,
    "teachers": _teachers_table,
    "choice": _choice_table,
    "all-speeds": _all_speeds_table,
    "ablations": _ablations_table,
    "augmentations": _augmentations_table,
    "step-costs": _step_costs_table,
    "digits": lambda results: _runs_table("digits_cpu", results),
    "cifar10": lambda results: _runs_table("cifar10_cpu", results),
}


def _speed(results: Path, presets: tuple[str, ...]) -> dict[int, dict[str, list[tuple[float, float]]]]:
    """Return accuracy and seconds of each seed, by the time in white steps and by noise."""
    times: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for preset in presets:
        for row in _measured(results, "noise_speed", preset):
            noises = times.setdefault(row["in the time of white steps"], {})
            noises.setdefault(row["noise"], []).append((row["accuracy"], row["seconds"]))
    return times


def _measured(results: Path, recipe: str, preset: str, table: str = "accuracy") -> list[Mapping]:
    """Return the rows of a recipe's table, of one seed after the other."""
    records = [read_json(file) for file in sorted(results.glob(f"{recipe}_*.json"))]
    return [row for record in records if record["preset"] == preset for row in record["measurements"][table]]


def _teacher_accuracy(results: Path) -> float:
    return read_json(results / "noise_speed_cpu.json")["runs"][0]["evaluations"][0]["batch"]["accuracy"]


if __name__ == "__main__":
    main()
