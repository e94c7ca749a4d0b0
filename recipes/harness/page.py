"""Collect the recipes' results files into one page: `PYTHONPATH=recipes python -m harness.page [RUN_FOLDER ...]`.

The page, `recipes/README.md`, has a part for each recipe: what it does and how to run it, from its docstring; for each
preset a table of its runs with the paper's value beside ours; its other measurements; and its figures. What was not run
yet says so. Several results files of a recipe and a preset are taken for repetitions with other seeds. The paper's
values are in `recipes/paper.json`, by recipe, run and architecture.

Output folders of recipes that are given are first copied to `recipes/results`, results and figures.
"""

import argparse
import ast
import shutil
import statistics
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from harness.results import mean_and_spread, measurements_table, model_cell, read_json, table_row
from hf_noisekd.record.environment import Machine
from hf_noisekd.record.plain import from_dict

MAX_ROWS = 30
# What cost more than it gave and went again, with a commit that has it. Its rows stay in the results and on the page.
REMOVED = {
    "noise_distributions": {"fitted": "9ce7308c2514"},
    "noise_ablations": {
        "one adversarial step": "9ce7308c2514",
        "balanced classes": "9ce7308c2514",
        "warped": "decef104710b",
        "mirrored and warped": "decef104710b",
    },
}
PAGE_NAME = "README.md"
INTRODUCTION = """# Recipes

Every table and figure of Raikwar & Mishra, *Discovering and Overcoming Limitations of Noise-engineered Data-free
Knowledge Distillation* (NeurIPS 2022), each by one command. `--preset cpu`, the default, is for two cores, with small
networks and few steps; `--preset paper` has the authors' networks, and their 39,200 steps for students that a teacher
teaches, for a GPU. `digits.py` and `circles.py` are small as they are. All take `--seed`, `--output-dir` and
`--max-steps`, to try one out; those on images `--dataset`, a Hub id or a local folder.

Accuracies are in percent on the test images. Students trained on noise are compared with the paper by the statistics
of batches of 256 (its Algorithm 2), all others by their running statistics. Where our network is another one than the
paper's, the paper's stands behind its value, and the difference says more about networks and steps than about us. Of
several seeds (`n`) there are mean ± standard deviation, which share a teacher unless it was trained for each; figures
show seed 0. *Not yet run* means what it says.

The authors' learning rate followed the test loss. In the recipes of the paper's tables and figures nothing looks at
test images: students that a teacher teaches have a cosine decay to zero over the steps, with Adam at 1e-3,
batches of 256 and temperature 1 as in the paper (`cpu`: at 3e-3, with a linear warm-up over a tenth of the steps);
training with labels is AdamW with a linear warm-up and decay, in `paper` over 100 epochs, not 200 (Food-101: 20).

The results on CIFAR-10 here are of a copy of it compressed to JPEG (quality 75), which costs some accuracy against the
lossless images. The processors had other work now and then, so the seconds of a run are a rough measure, in the paper's
tables and figures none. What goes beyond the paper, noises with structure and what they give, is at the end; its times
are numbers of steps by the cost of a step, which was measured in turns, for each seed anew: the seeds of a row have up
to a tenth more or fewer steps. A run that is both of equal steps and of equal seconds stands under the first name, and
counts for both in the table of accuracies. These recipes take hours: `--resume` goes on where one was stopped. This
page is made of the results files by `make tables`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy the given runs to the results, and write the page anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_FOLDER", help="output folders to copy first")
    parser.add_argument("--recipes", type=Path, default=Path("recipes"), help="folder of the recipes")
    options = parser.parse_args(arguments)
    for run in options.runs:
        copy_results(run, options.recipes / "results")
    (options.recipes / PAGE_NAME).write_text(render_page(options.recipes))


def copy_results(run: Path, results: Path) -> None:
    """Copy a recipe's results file under the name of recipe, preset and, if it is not 0, seed; of seed 0 also figures.

    Raises:
        ValueError: The folder has no results file, or only that of a trial, or it would replace runs that it lacks.
    """
    if not (run / "results.json").is_file():
        raise ValueError(f"{run} has no results.json: give the --output-dir of a recipe that ran.")
    record = read_json(run / "results.json")
    if record["configuration"].get("max_steps"):
        raise ValueError(f"{run} is a trial with --max-steps: its numbers are no results of the recipe.")
    name = f"{record['recipe']}_{record['preset']}" + (f"_seed{record['seed']}" if record["seed"] else "")
    results.mkdir(exist_ok=True)
    if (results / f"{name}.json").is_file():
        lost = _runs([read_json(results / f"{name}.json")]).keys() - _runs([record]).keys()
        if lost:
            names = ", ".join(" of ".join(key) for key in sorted(lost))
            raise ValueError(
                f"{results / name}.json has runs that {run} lacks, {names}: run the recipe with all its rows and "
                "students, or remove that file."
            )
    shutil.copy(run / "results.json", results / f"{name}.json")
    for figure in run.glob("*.png") if record["seed"] == 0 else ():
        shutil.copy(figure, results / f"{name}_{figure.name}")


def render_page(recipes: Path) -> str:
    """Return the page of all recipes in a folder, as Markdown."""
    paper = read_json(recipes / "paper.json")
    files = {path: read_json(path) for path in sorted((recipes / "results").glob("*.json"))}
    parts = [INTRODUCTION]
    for recipe, entry in paper.items():
        title, *text = ast.get_docstring(ast.parse((recipes / f"{recipe}.py").read_text())).split("\n")
        parts.append(f"## {entry['what']}: `{recipe}.py`\n\n{title}\n" + "\n".join(text))
        for preset in entry.get("presets", ("cpu", "paper")):
            found = {
                path: record
                for path, record in files.items()
                if (record["recipe"], record["preset"]) == (recipe, preset)
            }
            if found:
                parts.append(_results_part(preset, found, entry.get("accuracy", {})))
                parts += _removed_part(recipe, found.values())
            elif preset == "paper" and "accuracy" in entry:
                parts.append(f"`paper`:\n\n{_pending(entry['accuracy'])}")
            else:
                parts.append(f"`{preset}`: not yet run.")
    return "\n\n".join(parts) + "\n"


def _results_part(preset: str, files: Mapping[Path, Mapping], paper: Mapping[str, Mapping[str, float]]) -> str:
    path, first = next(iter(files.items()))
    links = ", ".join(
        f"[seed {record['seed']}](results/{file.name}) at `{record['commit']}`" for file, record in files.items()
    )
    parts = [f"`{preset}`, on {from_dict(Machine, first['machine'])}: {links}."]
    if first["runs"]:
        parts.append(_comparison(list(files.values()), paper, own_networks=preset != "paper"))
    if pending := _pending(paper, done=_runs(files.values())) if preset == "paper" else "":
        parts.append(pending)
    measurements = [record.get("measurements", {}) for record in files.values()]
    for name in dict.fromkeys(name for tables in measurements for name in tables):
        repetitions = [tables[name] for tables in measurements if name in tables]
        if len(repetitions[0]) <= MAX_ROWS:
            parts.append(f"{name[0].upper()}{name[1:]}:\n\n{measurements_table(*repetitions)}")
    figures = sorted(path.parent.glob(f"{path.stem}_*.png"))
    parts += [f"![{figure.stem.replace('_', ' ')}](results/{figure.name})" for figure in figures]
    return "\n\n".join(parts)


def _removed_part(recipe: str, records: Iterable[Mapping]) -> list[str]:
    """Return a sentence on each kind of runs of a recipe that nobody can make any more."""
    names = [name for name, _ in _runs(records)]
    return [
        f'Rows "{start} ...": tried and removed, the code is at commit `{commit}`.'
        for start, commit in REMOVED.get(recipe, {}).items()
        if any(name.startswith(start) for name in names)
    ]


def _runs(records: Iterable[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """Return the runs by name and architecture."""
    runs: dict[tuple[str, str], list[Mapping]] = {}
    for record in records:
        for run in record["runs"]:
            runs.setdefault((run["name"], run["model"]["architecture"]), []).append(run)
    return runs


def _comparison(
    records: Sequence[Mapping], paper: Mapping[str, Mapping[str, float]], *, own_networks: bool = False
) -> str:
    """Return the table of the runs, with mean and standard deviation over several seeds."""
    runs = _runs(records)
    header = ["", "model", "steps", "n", "running statistics", "batch statistics"]
    header += ["paper", "difference"] if paper else []
    lines = [table_row(header), f"|---|---|{'---:|' * (len(header) - 2)}"]
    for (name, architecture), repeated in runs.items():
        if not any(run["steps"] for run in repeated) and all(
            run["evaluations"] == repeated[0]["evaluations"] for run in repeated
        ):
            repeated = repeated[:1]  # the same model was given to all, and evaluated again
        values = {key: [run["evaluations"][0][key]["accuracy"] for run in repeated] for key in ("running", "batch")}
        steps = [run["steps"] for run in repeated]
        cells = [
            name,
            model_cell(repeated[0]),
            " to ".join(f"{number:,}" for number in sorted({min(steps), max(steps)})),
            str(len(repeated)),
            *map(mean_and_spread, values.values()),
        ]
        if paper:
            ours = values["batch" if "noise" in repeated[0].get("noisekd", {}) else "running"]
            cells += _paper_cells(paper.get(name, {}), None if own_networks else architecture, statistics.mean(ours))
        lines.append(table_row(cells))
    return "\n".join(lines)


def _paper_cells(values: Mapping[str, float], architecture: str | None, ours: float) -> list[str]:
    """Return the paper's value, for the same architecture or else for its first, and how much higher ours is."""
    if not values:
        return ["", ""]
    theirs = architecture if architecture in values else next(iter(values))
    other = "" if theirs == architecture else f" ({theirs})"
    return [f"{values[theirs]:.2f}{other}", f"{ours - values[theirs]:+.2f}"]


def _pending(paper: Mapping[str, Mapping[str, float]], done: Container[tuple[str, str]] = ()) -> str:
    """Return the table of what the paper has and we have not, if anything."""
    lines = [
        table_row([name, architecture, "not yet run", f"{value:.2f}"])
        for name, values in paper.items()
        for architecture, value in values.items()
        if (name, architecture) not in done
    ]
    return "\n".join(["| | model | ours | paper |", "|---|---|---|---:|", *lines]) if lines else ""


if __name__ == "__main__":
    main()
