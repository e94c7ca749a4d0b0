"""What all recipes share: their options, their results file and their table.

A recipe writes `results.json` into its output folder, anew after each run, of this schema:

- `recipe`, `preset`, `seed`: which experiment this was; `configuration`: its constants and options.
- `commit`: the commit of the working tree, with `-dirty` behind it where files were changed, or null outside one.
- `machine`: processor, cores, accelerator; `versions`: Python and the packages that matter.
- `runs`: a list, each with `name`, `steps`, `seconds` from the first training step to the last, with the evaluations in
  between, `images_per_second` of training over these seconds, and, under `running` and `batch`, what [`evaluate`]
  measured on the test images with BatchNorm on running and on batch statistics: `accuracy` and so on in percent, `loss`
  and `kl` in nats. `curve` holds the training log.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from .evaluation import STATISTICS, evaluate

PACKAGES = ("torch", "timm", "transformers", "accelerate", "datasets", "huggingface-hub")


def recipe_parser(doc: str, name: str, presets: Mapping[str, Mapping]) -> argparse.ArgumentParser:
    """Return a parser with the options that every recipe has.

    Args:
        doc: The recipe's docstring, shown by `--help`.
        name: The recipe's name, for the default output folder `runs/NAME`.
        presets: Constants of the experiment by preset; the first is the default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs") / name, help="where results.json goes")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, images and noise (default: 0)")
    parser.add_argument("--max-steps", type=int, help="train nothing for more steps than this, to try the recipe out")
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)), help="size of the experiment")
    return parser


class Results:
    """The runs of one recipe, written to `results.json` after each.

    Args:
        recipe: The recipe's name.
        options: Its parsed options, from [`recipe_parser`].
        configuration: The constants of the preset.
    """

    def __init__(self, recipe: str, options: argparse.Namespace, configuration: Mapping):
        self.output_dir = options.output_dir
        self.record = {
            "recipe": recipe,
            "preset": options.preset,
            "seed": options.seed,
            "configuration": dict(configuration) | {"max_steps": options.max_steps},
            "commit": _commit(),
            "machine": machine(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "runs": [],
        }

    def train(
        self, name: str, trainer: Trainer, test_dataset: Dataset, teacher_model: nn.Module | None = None
    ) -> nn.Module:
        """Train, evaluate in float32 on the test images, and record the run.

        Args:
            name: Name of the run in the table.
            trainer: Ready to train.
            test_dataset: Images to evaluate the trained model on.
            teacher_model: Teacher to measure the agreement with.

        Returns:
            The trained model.
        """
        metrics = trainer.train().metrics
        self.add(
            name,
            trainer.model,
            test_dataset,
            teacher_model,
            steps=trainer.state.global_step,
            seconds=metrics["train_runtime"],
            images_per_second=metrics["train_samples_per_second"],
            curve=[entry for entry in trainer.state.log_history if "train_runtime" not in entry],
        )
        trainer.accelerator.wait_for_everyone()
        return trainer.model

    def add(
        self,
        name: str,
        model: nn.Module,
        test_dataset: Dataset,
        teacher_model: nn.Module | None = None,
        *,
        steps: int = 0,
        seconds: float = 0.0,
        images_per_second: float = 0.0,
        curve: Sequence[Mapping] = (),
    ) -> None:
        """Evaluate a model in float32 on the test images and record it; without steps it was not trained here."""
        if not PartialState().is_main_process:
            return
        scores = evaluate(model, test_dataset, teacher_model=teacher_model)
        run = {"name": name, "steps": steps, "seconds": round(seconds, 1)}
        run["images_per_second"] = round(images_per_second, 1)
        for statistics in STATISTICS:
            run[statistics] = {key: round(value, 4) for key, value in scores[statistics].items()}
        self.record["runs"].append(run | {"curve": list(curve)})
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "results.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def table(self) -> str:
        """Return the runs as a Markdown table."""
        return results_table(self.record)


def results_table(record: Mapping) -> str:
    """Return the runs of a results file as a Markdown table."""
    lines = [
        "| | steps | seconds | images/s | accuracy, running statistics (%) | accuracy, batch statistics (%) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {run['name']} | {run['steps']:,} | {run['seconds']:.0f} | {run['images_per_second']:,.0f} "
        f"| {run['running']['accuracy']:.2f} | {run['batch']['accuracy']:.2f} |"
        for run in record["runs"]
    ]
    return "\n".join(lines)


def machine() -> dict[str, str | int | None]:
    """Return the processor, its cores usable here, the threads torch uses and the accelerator of this machine."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    """Return the commit of the tree that the running script lies in."""
    folder = Path(sys.argv[0]).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
