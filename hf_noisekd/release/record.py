"""What is known of a training run, as plain data that its results file, its student's folder and its card share.

A record is a mapping of this schema; what is not known is left out:

- `model`: `architecture`; `library`, which can build it: `timm`, `transformers` or else `torch`; `parameters`;
  `input_size`; of a distilled student `label_names`.
- `steps` of training, `seconds` from the first to the last, with the evaluations in between, and `images_per_second`
  over these seconds. A resumed run has no `seconds`. `processes`: how many trained.
- `evaluations`: a list, for each data set its name as `dataset`, its `split`, the number of `images`, the `batch_size`,
  the `precision`, the `step` after which, the `log_prefix` of its entries in the curve, and under `running` and `batch`
  what [`evaluate`] measured: `accuracy` and so on in percent, `loss` and `kl` in nats. On noise there are only
  `agreement` with the teacher and `kl`.
- `curve`: the training log, entries with `step`.
- `noisekd`: of a distilled student, see [`noisekd_section`], and `class_frequencies`: the teacher's mean answer to the
  training noise, a probability for each class; of a resumed run, to that since then.
- `machine`: processor, cores, accelerator; `versions`: Python and the packages that matter; `command`.
"""

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hf_noisekd.models.classifier import declared_input_size, pretrained_cfg_of
from hf_noisekd.models.hub import architecture_of

PACKAGES = ("torch", "timm", "transformers", "accelerate", "datasets", "huggingface-hub")


def describe_model(model: nn.Module) -> dict:
    """Return the part `model` of a record."""
    description = {"architecture": architecture_of(model), "library": "torch"}
    if pretrained_cfg_of(model).get("architecture"):
        description["library"] = "timm"
    elif isinstance(model, PreTrainedModel):
        description["library"] = "transformers"
    description["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    input_size = declared_input_size(model)
    if input_size is not None:
        description["input_size"] = list(input_size)
    return description


def current_evaluations(evaluations: Sequence[Mapping], step: int) -> list[dict]:
    """Return the evaluations that tell how good a model is now, one for each data set.

    Those made after the training count before those made in it, and later ones before earlier ones.

    Args:
        evaluations: All that were made, in order, each with `in_training` beside the entries of a record.
        step: The step that the weights are of: what was measured in the training after it does not count.
    """
    current = {}
    for in_training in (True, False):
        for evaluation in evaluations:
            if evaluation["in_training"] == in_training and evaluation["step"] <= step:
                current[evaluation["dataset"]] = evaluation
    return [{key: value for key, value in entry.items() if key != "in_training"} for entry in current.values()]


def dataset_name(dataset: Dataset, default: str | None = "evaluation images") -> str | None:
    """Return the name that a data set has (`name`, or that of `datasets`), or else `default`."""
    for name in (getattr(dataset, "name", None), getattr(getattr(dataset, "info", None), "dataset_name", None)):
        if isinstance(name, str):
            return name
    return default


def machine(device: torch.device) -> dict[str, str | int | None]:
    """Return the processor, its cores usable here, the threads torch uses, and `device` unless it is the processor."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux
    accelerator = None if device.type == "cpu" else device.type
    if device.type == "cuda":
        accelerator = torch.cuda.get_device_name(device)
    return {
        "processor": processor,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
    }


def usable_cores() -> int | None:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def describe_machine(machine: Mapping) -> str | None:
    """Return what trained, for people: the accelerator, or the processor with its cores. None where it is not known."""
    if not machine.get("processor"):
        return machine.get("accelerator")
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return machine["accelerator"] or f"{cores} of {machine['processor']}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def command_line(argv: Sequence[str] | None = None) -> str | None:
    """Return the command that started this process, or None where it was no script, as in a notebook.

    It is made to be published: folders are named without the path to them, and access tokens are left out.
    """
    script, *arguments = sys.argv if argv is None else argv
    script = Path(script)
    if script.name == "noisekd" or script.parts[-3:] == ("hf_noisekd", "cli", "__main__.py"):
        words = ["noisekd"]
    elif script.suffix == ".py" and script.name not in ("__main__.py", "ipykernel_launcher.py"):
        words = ["python", script.name if script.is_absolute() or ".." in script.parts else str(script)]
    else:
        return None
    option = ""
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else (option, "", argument)
        value = "REDACTED" if value and "token" in option else without_path(value)
        words.append(option + equals + value if argument.startswith("-") else value)
    return shlex.join(words).replace("`", "")


def without_path(value: str) -> str:
    """Return what of an option's value may be published: of a folder its name, and no access token."""
    value = re.sub(r"hf_[A-Za-z0-9]{8,}", "REDACTED", value).removeprefix("local-dir:")
    is_path = value.startswith(("/", "~", ".")) or "\\" in value or (os.sep in value and Path(value).exists())
    return Path(value.replace("\\", "/")).name if is_path else value
