"""The command `noisekd`: loads the folder `hf_noisekd/cli` as a package of its own; its `__init__.py` says why."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path


def main() -> int:
    """Run the command of this process, and return its exit code."""
    found = importlib.util.find_spec("hf_noisekd")  # finds the package, and runs nothing of it
    if found is None or found.origin is None:
        raise ModuleNotFoundError("hf_noisekd is not installed: run `pip install hf-noisekd`.")
    package = types.ModuleType("noisekd_cli")
    package.__path__ = [str(Path(found.origin).parent / "cli")]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.__main__").main()


if __name__ == "__main__":
    sys.exit(main())
