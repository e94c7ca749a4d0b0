"""hf_noisekd: distil a CNN with noise, when its training data is gone, private or forbidden.

Importing the package registers its CIFAR-size models with timm.
"""

from . import models
from .batch_norm import batch_statistics, recalibrate_batch_norm
from .config import NoiseKDConfig
from .evaluation import evaluate
from .noise import NoiseDataset
from .trainer import NoiseKDTrainer

__version__ = "0.1.0"

__all__ = [
    "NoiseDataset",
    "NoiseKDConfig",
    "NoiseKDTrainer",
    "batch_statistics",
    "evaluate",
    "models",
    "recalibrate_batch_norm",
]
