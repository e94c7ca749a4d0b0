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
    import hf_noisekd.models.cifar  # noqa: F401

    from .models.batch_norm import batch_statistics, recalibrate_batch_norm
    from .noise.dataset import NoiseDataset
    from .noise.mixed import MixedDataset
    from .noise.spec import register_noise
    from .training.config import NoiseKDConfig
    from .training.evaluation import evaluate
    from .training.noise_trainer import NoiseKDTrainer
else:
    _MODULE_OF = {
        "MixedDataset": "noise.mixed",
        "NoiseDataset": "noise.dataset",
        "NoiseKDConfig": "training.config",
        "NoiseKDTrainer": "training.noise_trainer",
        "batch_statistics": "models.batch_norm",
        "evaluate": "training.evaluation",
        "recalibrate_batch_norm": "models.batch_norm",
        "register_noise": "noise.spec",
    }

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module(".models.cifar", __name__)
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
