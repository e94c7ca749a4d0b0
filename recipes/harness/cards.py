"""Write the cards of the released students, out of results files: `PYTHONPATH=recipes python -m harness.cards`.

A card has the curves of all runs of the results file. The student's own record is not beside it, as the file has it.
"""

from pathlib import Path

from harness.figures import plot_curves
from harness.results import read_json
from hf_noisekd.files import CURVES_NAME, RECORD_NAME
from hf_noisekd.record.plain import from_dict
from hf_noisekd.record.schema import Record
from hf_noisekd.release.card import write_model_card

ROOT = Path(__file__).parents[2]
# By the folder in `model_cards`: the results file, and the run.
RELEASED = {
    "digits_cpu": ("digits_cpu", "noise, batch-statistics teacher"),
    "cifar10_cpu": ("noise_speed_cpu-long", "structured, the default, time of 5,400"),
}


def main() -> None:
    """Write all of them anew."""
    for name, (results, run) in RELEASED.items():
        print(write_card(ROOT / "recipes" / "results" / f"{results}.json", run, ROOT / "model_cards" / name))


def write_card(results: Path, name: str, folder: Path) -> Path:
    """Write the card of the first run of a name in a results file, and return its path."""
    runs = read_runs(results)
    card = write_model_card(next(run for run in runs if run.name == name), folder)
    (folder / RECORD_NAME).unlink()
    if (folder / CURVES_NAME).exists():
        plot_curves(runs, folder / CURVES_NAME)
    return card


def read_runs(results: Path) -> list[Record]:
    """Return the runs of a results file, each with what the file says of all of them."""
    content = read_json(results)
    shared = {key: content[key] for key in ("machine", "versions", "commit")}
    return [from_dict(Record, shared | run) for run in content["runs"]]


if __name__ == "__main__":
    main()
