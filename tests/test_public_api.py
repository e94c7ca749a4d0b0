import re
from pathlib import Path

import pytest
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
        "load_teacher",
        "load_images",
        "save_model",
        "ClassifierTrainer",
        "ClassifierConfig",
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_noisekd.__version__)


@pytest.mark.parametrize("page", ["README.md", "docs", "recipes"])
def test_recipes_and_docs_use_public_names_alone(page):
    files = [ROOT / page] if page.endswith(".md") else [*(ROOT / page).glob("*.py"), *(ROOT / page).glob("*.md")]
    inner = {file.name: re.findall(r"^\s*(?:from|import) hf_noisekd\..*", file.read_text(), re.M) for file in files}
    assert not {name: found for name, found in inner.items() if found}
    imported = re.findall(
        r"^from hf_noisekd import (\([^)]*\)|.*)", "\n".join(file.read_text() for file in files), re.M
    )
    assert {name for names in imported for name in re.findall(r"\w+", names)} <= set(hf_noisekd.__all__)


def test_importing_registers_the_models():
    assert {"resnet18_cifar", "resnet34_cifar", "mobilenetv2_cifar", "wide_resnet28_10_cifar"} <= set(
        timm.list_models("*_cifar")
    )


def test_the_citation_and_the_licence_are_there():
    assert "Raikwar" in (ROOT / "CITATION.cff").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
