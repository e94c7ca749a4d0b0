import re
from pathlib import Path

import timm

import hf_noisekd

PACKAGE = Path(hf_noisekd.__file__).parent
ROOT = PACKAGE.parent


def test_public_names():
    from hf_noisekd import (  # noqa: F401
        NoiseDataset,
        NoiseKDConfig,
        NoiseKDTrainer,
        batch_statistics,
        evaluate,
        recalibrate_batch_norm,
    )

    assert set(hf_noisekd.__all__) >= {
        "NoiseKDTrainer",
        "NoiseKDConfig",
        "NoiseDataset",
        "batch_statistics",
        "recalibrate_batch_norm",
        "evaluate",
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_noisekd.__version__)


def test_importing_registers_the_models():
    assert {"resnet18_cifar", "resnet34_cifar", "mobilenetv2_cifar", "wide_resnet28_10_cifar"} <= set(
        timm.list_models("*_cifar")
    )


def test_the_citation_and_the_licence_are_there():
    assert "Raikwar" in (ROOT / "CITATION.cff").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
