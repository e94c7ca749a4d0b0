import ast
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
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_noisekd.__version__)


def test_importing_registers_the_models():
    assert {"resnet18_cifar", "resnet34_cifar", "mobilenetv2_cifar", "wide_resnet28_10_cifar"} <= set(
        timm.list_models("*_cifar")
    )


def imports(path: Path) -> set[str]:
    """Modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def reached(module: str) -> set[str]:
    """Everything that a module of this package imports, directly or through another one."""
    seen, queue = set(), [f"hf_noisekd.{module}"]
    while queue:
        name = queue.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name not in seen and path.is_file():
            queue += imports(path)
        seen.add(name)
    return {name if name.startswith("hf_noisekd.") else name.partition(".")[0] for name in seen}


@pytest.mark.parametrize("module", ["noise.dataset", "training.losses", "models.batch_norm", "training.noise_trainer"])
def test_what_distils_reaches_no_real_image(module):
    assert not reached(module) & {"datasets", "torchvision", "PIL", "sklearn", "hf_noisekd.images"}


def test_the_citation_and_the_licence_are_there():
    assert "Raikwar" in (ROOT / "CITATION.cff").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
