"""The machine, versions and command of a training, fit to be published."""

import contextlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "timm", "transformers", "accelerate", "datasets", "huggingface-hub")


@dataclass(kw_only=True)
class Machine:
    """The processor, its usable cores, the threads of torch, and the accelerator if any."""

    processor: str | None = None
    cores: int | None = None
    threads: int | None = None
    accelerator: str | None = None

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        """Describe this machine, and the training device."""
        processor = platform.processor() or platform.machine()
        with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:  # of Linux
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        accelerator = None if device.type == "cpu" else device.type
        if device.type == "cuda":
            accelerator = torch.cuda.get_device_name(device)
        return cls(processor=processor, cores=usable_cores(), threads=torch.get_num_threads(), accelerator=accelerator)

    def __str__(self) -> str:
        """Return the accelerator, or the processor with its cores; empty if neither is known."""
        if self.accelerator or not self.processor:
            return self.accelerator or ""
        return f"{self.cores} core{'' if self.cores == 1 else 's'} of {self.processor}"


def usable_cores() -> int | None:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def command_line(argv: Sequence[str] | None = None) -> str | None:
    """Return the command of this process without tokens and folders, or None if it was no script."""
    first, *arguments = sys.argv if argv is None else argv
    script = Path(first)
    if script.name in ("noisekd", "noisekd.py") or script.parts[-3:] == ("hf_noisekd", "cli", "__main__.py"):
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
    """Return an option's value fit to be published: only the last part of a path, and no access token."""
    value = re.sub(r"hf_[A-Za-z0-9]{8,}", "REDACTED", value).removeprefix("local-dir:")
    is_path = value.startswith(("/", "~", ".")) or "\\" in value or (os.sep in value and Path(value).exists())
    return Path(value.replace("\\", "/")).name if is_path else value
