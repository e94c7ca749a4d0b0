"""The command `noisekd`.

Python imports a package before anything that is in it, and `hf_noisekd` imports torch, timm and transformers, which
takes seconds. Help and misspelt options are to be answered at once. So the entry point stands outside of the package,
and loads the folder `hf_noisekd/cli` as a package of its own, which imports `hf_noisekd` once a command has something
to run.
"""

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Run the command of this process, and return its exit code."""
    found = importlib.util.find_spec("hf_noisekd")  # finds the package, and runs nothing of it
    if found is None or found.origin is None:
        raise ModuleNotFoundError("hf_noisekd is not installed: run `pip install hf-noisekd`.")
    file = Path(found.origin).parent / "cli" / "__init__.py"
    spec = importlib.util.spec_from_file_location("noisekd_cli", file, submodule_search_locations=[str(file.parent)])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{file} cannot be loaded: install hf-noisekd again.")
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    return importlib.import_module(f"{spec.name}.__main__").main()


if __name__ == "__main__":
    sys.exit(main())
