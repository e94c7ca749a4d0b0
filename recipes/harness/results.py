"""What all recipes share: their options, their results file and their table.

A recipe writes `results.json` into its output folder, anew after each run, of this schema:

- `recipe`, `preset`, `seed`: which experiment this was; `configuration`: its constants, and the options that were given
  in their place, folders without the path to them.
- `commit`: the commit of the working tree, with `-dirty` behind it where files were changed, or null outside one.
- `machine` and `versions`, as in [`hf_noisekd.record.schema`].
- `runs`: a list of records with names, see there. Of a model that was not trained here only
  the evaluation is known.
- `measurements`: what was measured beside, a list of mappings by the name of its table; the first has all keys.
- `step_costs`: where runs are compared at equal seconds, the seconds of a step of each, relative to those of the first.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset

from harness.threads import IdleCores
from hf_noisekd import ClassifierConfig, ClassifierTrainer
from hf_noisekd.cli.options import at_least
from hf_noisekd.files import json_text, replacing_files
from hf_noisekd.record.environment import Machine, versions, without_path
from hf_noisekd.record.plain import from_dict, to_dict
from hf_noisekd.record.schema import STATISTICS, Record
from hf_noisekd.release.hub import check_hub_access


def recipe_parser(
    doc: str, name: str, presets: Mapping[str, Mapping], *, pushes: bool = False, resumes: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options that every recipe has.

    Args:
        doc: The recipe's docstring, shown by `--help`.
        name: The recipe's name, for the default output folder `runs/NAME`.
        presets: Constants of the experiment by preset; the first is the default.
        pushes: Whether the recipe has a student to push to the Hub.
        resumes: Whether the recipe passes over the runs that [`Results.find`] finds.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs") / name, help="where results.json goes")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of weights, images and noise (default: 0)")
    parser.add_argument(
        "--max-steps", type=at_least(1), help="train nothing for more steps than this, to try the recipe out"
    )
    if pushes:
        parser.add_argument("--push-to", metavar="REPO_ID", help="push the student to this repository of the Hub")
    if resumes:
        parser.add_argument("--resume", action="store_true", help="go on with the finished runs in --output-dir")
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)), help="size of the experiment")
    return parser


class Results:
    """The runs of one recipe, written to `results.json` after each.

    Args:
        recipe: The recipe's name.
        options: Its parsed options, from [`recipe_parser`].
        configuration: The constants of the preset.

    Raises:
        ValueError: The results to go on with are not there, or of other options, or of another commit or machine; or
            there are some, and nobody said to go on with them.
    """

    def __init__(self, recipe: str, options: argparse.Namespace, configuration: Mapping):
        if getattr(options, "push_to", None):
            check_hub_access(options.push_to)  # before hours of training
        self.output_dir = options.output_dir
        self.record = {
            "recipe": recipe,
            "preset": options.preset,
            "seed": options.seed,
            "configuration": dict(configuration) | _chosen(options),
            "commit": _commit(),
            "machine": to_dict(Machine.of(PartialState().device)),
            "versions": versions(),
            "runs": [],
            "measurements": {},
        }
        path = self.output_dir / "results.json"
        resume = getattr(options, "resume", None)
        if resume:
            self._resume(path)
        elif resume is not None and path.exists():
            raise ValueError(
                f"{path} holds results already: pass --resume to go on with them, or another --output-dir."
            )

    def _resume(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"There is no {path} to go on with: leave --resume out.")
        found = read_json(path)
        wanted = json.loads(json.dumps(self.record))
        for key in wanted.keys() - {"runs", "measurements"}:
            if found.get(key) != wanted[key]:
                raise ValueError(
                    f"Cannot go on with {path}: its {key} is {found.get(key)}, and now it is {wanted[key]}. Make it "
                    "the same, or begin anew in another --output-dir."
                )
        self.record = found

    @property
    def runs(self) -> list[Record]:
        """The records of the runs that are finished."""
        return [from_dict(Record, run) for run in self.record["runs"]]

    def find(self, name: str) -> Record | None:
        """Return the record of a run that is finished, or None."""
        return next((run for run in self.runs if run.name == name), None)

    def train(self, name: str, trainer: ClassifierTrainer) -> nn.Module:
        """Train, save, evaluate in float32 on the trainer's evaluation images, record the run, and return the model.

        Args:
            name: Name of the run in the table.
            trainer: Ready to train.
        """
        trainer.add_callback(IdleCores())
        trainer.train()
        trainer.save_model()  # before what may fail
        trainer.evaluate()
        if trainer.is_world_process_zero():
            self._write(name, trainer.record())
        trainer.accelerator.wait_for_everyone()
        return trainer.model

    def add(self, name: str, model: nn.Module, test_dataset: Dataset, **arguments) -> None:
        """Evaluate a model that was not trained here, in float32 on the test images, and record it.

        Args:
            name: Name of the run in the table.
            model: The model.
            test_dataset: Images with labels.
            **arguments: Arguments of [`ClassifierConfig`] for the evaluation.
        """
        trainer = ClassifierTrainer(model, ClassifierConfig(self.output_dir, **arguments), eval_dataset=test_dataset)
        trainer.evaluate()
        if trainer.is_world_process_zero():
            self._write(name, trainer.record())
        trainer.accelerator.wait_for_everyone()

    def _write(self, name: str, record: Record) -> None:
        # The machine and the versions stand in the file once.
        self.record["runs"].append(to_dict(replace(record, name=name, machine=None, versions={})))
        self._save()

    def measure(self, name: str, rows: Sequence[Mapping]) -> None:
        """Record measurements as the table `name`, on process 0."""
        if PartialState().is_main_process:
            self.record["measurements"][name] = [
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
                for row in rows
            ]
            self._save()

    def record_step_costs(self, costs: Mapping[str, float]) -> None:
        """Record the cost of a step of each run, on process 0."""
        self.record["step_costs"] = dict(costs)
        if PartialState().is_main_process:
            self._save()

    def _save(self) -> None:
        with replacing_files(self.output_dir) as staging:
            (staging / "results.json").write_text(json_text(self.record))

    def plot(self, name: str, plot: Callable[[Sequence[Record], Path], object]) -> None:
        """Draw the runs into a file of the output folder, on process 0."""
        if PartialState().is_main_process:
            plot(self.runs, self.output_dir / name)

    def print_table(self) -> None:
        """Print the runs and the measurements as Markdown tables, on process 0."""
        if PartialState().is_main_process:
            tables = [results_table(self.record)] if self.record["runs"] else []
            print("\n\n".join([*tables, *map(measurements_table, self.record["measurements"].values())]))


def read_json(path: Path) -> Any:
    """Return what a results file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def results_table(record: Mapping) -> str:
    """Return the runs of a results file as a Markdown table."""
    lines = [
        "| | model | steps | seconds | images/s | accuracy, running statistics (%) | accuracy, batch statistics (%) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in record["runs"]:
        cells = [run["name"], model_cell(run), f"{run['steps']:,}"]
        cells += [f"{run.get('seconds', 0):.0f}", f"{run.get('images_per_second', 0):,.0f}"]
        lines.append(table_row(cells + [f"{run['evaluations'][0][kind]['accuracy']:.2f}" for kind in STATISTICS]))
    return "\n".join(lines)


def table_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table; a bar in a cell, such as those in the names of noises, stays in it."""
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column on the left and all others on the right."""
    return "\n".join([table_row(header), f"|---|{'---:|' * (len(header) - 1)}", *map(table_row, rows)])


def model_cell(run: Mapping) -> str:
    """Return how a table names the model of a run: its architecture and its parameters in millions."""
    return f"{run['model']['architecture']}, {run['model']['parameters'] / 1e6:.2f} M"


def measurements_table(rows: Sequence[Mapping], *repetitions: Sequence[Mapping]) -> str:
    """Return measurements as a Markdown table; what is a list, such as a histogram, is left to the figures.

    A column has two decimals, or four where all of its numbers are below 0.1.

    Args:
        rows: Measurements.
        *repetitions: The same ones with other seeds, perhaps of other rows; a row is known by its texts. Numbers that
            are not the same in all become mean and standard deviation.
    """
    columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
    lines = [table_row(columns)]
    lines.append(f"|{''.join('---|' if isinstance(rows[0][column], str) else '---:|' for column in columns)}")
    decimals = {column: 4 if all(_is_small(row.get(column)) for row in rows) else 2 for column in columns}
    seeds = [_rows_by_texts(repetition) for repetition in (rows, *repetitions)]
    for key in dict.fromkeys(key for seed in seeds for key in seed):
        same = [seed[key] for seed in seeds if key in seed]
        lines.append(table_row(_cell([one.get(column) for one in same], decimals[column]) for column in columns))
    return "\n".join(lines)


def mean_and_spread(values: Sequence[float], decimals: int = 2) -> str:
    """Return the mean of several values and their standard deviation, or the only one."""
    spread = f" ± {statistics.stdev(values):,.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{decimals}f}{spread}"


def _rows_by_texts(rows: Sequence[Mapping]) -> dict[tuple, Mapping]:
    """Return the rows by their texts; where several have the same, by the place among them too."""
    found = {}
    for row in rows:
        texts = tuple(value for value in row.values() if isinstance(value, str))
        place = sum(key[0] == texts for key in found)
        found[texts, place] = row
    return found


def _is_small(value: float | str | None) -> bool:
    return isinstance(value, float) and abs(value) < 0.1


def _cell(values: Sequence[float | str | None], decimals: int) -> str:
    value, *others = values
    if any(other != value for other in others):
        return mean_and_spread([value for value in values if value is not None], decimals)
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals}f}"


def _chosen(options: argparse.Namespace) -> dict:
    """Return the options that were given and decide the results, in a form that can be published."""
    chosen = {key: value for key, value in vars(options).items() if value is not None}
    for key in ("output_dir", "preset", "seed", "push_to", "resume"):
        chosen.pop(key, None)
    return {key: without_path(value) if isinstance(value, str) else value for key, value in chosen.items()}


def _commit() -> str | None:
    """Return the commit of the tree that the running script lies in."""
    folder = Path(sys.argv[0]).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
