"""hf_noisekd: distill a CNN with noise, when its training data is gone, private or forbidden.

Importing the package registers its CIFAR-size models with timm, and the networks that it cuts out of others.
"""

from importlib.metadata import PackageNotFoundError, version

import hf_noisekd.models.cifar  # registers architectures
import hf_noisekd.shrinking.shrunk  # noqa: F401 - likewise
from hf_noisekd.calibration.calibration_images import calibration_images
from hf_noisekd.calibration.recalibration import recalibrate_batch_norm
from hf_noisekd.image_datasets import load_images
from hf_noisekd.models.batch_norm import batch_statistics
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.models.saving import save_model
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.mixed import MixedDataset
from hf_noisekd.noise.spec import register_noise
from hf_noisekd.shrinking.cutting import shrink
from hf_noisekd.training.classifier_trainer import ClassifierTrainer
from hf_noisekd.training.config import ClassifierConfig, NoiseKDConfig
from hf_noisekd.training.noise_trainer import NoiseKDTrainer
from hf_noisekd.workflows.conversion import convert
from hf_noisekd.workflows.distillation import distill
from hf_noisekd.workflows.evaluation import evaluate
from hf_noisekd.workflows.export import export
from hf_noisekd.workflows.recalibration import recalibrate

try:
    __version__ = version("hf-noisekd")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

__all__ = [
    "ClassifierConfig",
    "ClassifierTrainer",
    "MixedDataset",
    "NoiseDataset",
    "NoiseKDConfig",
    "NoiseKDTrainer",
    "batch_statistics",
    "calibration_images",
    "convert",
    "distill",
    "evaluate",
    "export",
    "load_images",
    "load_teacher",
    "recalibrate",
    "recalibrate_batch_norm",
    "register_noise",
    "save_model",
    "shrink",
]
