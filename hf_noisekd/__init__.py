"""hf_noisekd: distil a CNN with noise, when its training data is gone, private or forbidden.

Importing the package registers its CIFAR-size models with timm.
"""

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "MixedDataset",
    "NoiseDataset",
    "NoiseKDConfig",
    "NoiseKDTrainer",
    "batch_statistics",
    "evaluate",
    "fit_noise",
    "models",
    "recalibrate_batch_norm",
    "register_noise",
]


def _is_command_line() -> bool:
    """Whether this process is `noisekd` or `python -m hf_noisekd.cli`."""
    script = Path(sys.argv[0]).name if sys.argv else ""
    return script in ("noisekd", "noisekd.exe", "noisekd-script.py") or (
        ("-m", "hf_noisekd.cli") in pairwise(sys.orig_argv)
    )


# torch, timm and transformers take seconds to import. The command line, which answers `--help` and misspelt options at
# once, imports them when it has something to run; for everybody else the models get registered here.
if TYPE_CHECKING or not _is_command_line():
    from . import models
    from .batch_norm import batch_statistics, recalibrate_batch_norm
    from .config import NoiseKDConfig
    from .evaluation import evaluate
    from .fitting import fit_noise
    from .mixed import MixedDataset
    from .mixture import register_noise
    from .noise import NoiseDataset
    from .trainer import NoiseKDTrainer
else:
    _MODULE_OF = {
        "MixedDataset": "mixed",
        "NoiseDataset": "noise",
        "NoiseKDConfig": "config",
        "NoiseKDTrainer": "trainer",
        "batch_statistics": "batch_norm",
        "evaluate": "evaluation",
        "fit_noise": "fitting",
        "recalibrate_batch_norm": "batch_norm",
        "register_noise": "mixture",
    }

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        models = import_module(".models", __name__)
        return models if name == "models" else getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
