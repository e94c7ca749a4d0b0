"""Files of a model folder: their names, JSON that people read, and writing them whole or not at all."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
RECORD_NAME = "noisekd.json"
CURVES_NAME = "curves.png"
CLASS_BALANCE_NAME = "class_balance.png"


@contextlib.contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """Context that gives an empty folder to write files to, which go to `folder` once all of them are written.

    If `folder` is new it appears whole or, after an exception or a kill, not at all. Otherwise each file is replaced
    whole, one after another; other files stay.
    """
    folder = Path(folder)
    exists = folder.exists()
    staging = folder / ".saving" if exists else folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with naming_full_disk(folder):
            yield staging
            for file in staging.iterdir():
                file.chmod(staging.stat().st_mode & 0o666)  # as the user's umask has it; safetensors writes 0600
                with open(file, "r+b") as written:  # Windows synchronises no file that is open for reading
                    os.fsync(written.fileno())
        if not exists:
            # Another process may have made the folder meanwhile, for its own files.
            with contextlib.suppress(OSError):
                staging.rename(folder)
                return
        # The configuration last: it tells what the weights are.
        for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def naming_full_disk(folder: str | Path) -> Iterator[None]:
    """Context in which to write to `folder`; what fails there for want of space is an `OSError` that says so."""
    try:
        yield
    except Exception as error:
        of_rust = re.search(r"\(os error (\d+)\)", str(error))  # as in safetensors
        number = int(of_rust[1]) if of_rust else getattr(error, "errno", None)
        if re.search("unexpected pos|iostream error", str(error)):  # all that torch says of a write that fell short
            number = errno.ENOSPC
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"{os.strerror(number)} while writing {folder}") from error
        raise


def check_output_file(path: Path) -> None:
    """Raise a `ValueError` if what stands at a path is not to be replaced by a file."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no ordinary file"
        raise ValueError(f"{path} is {kind}: name the file to write, such as model.onnx.")


def check_model_folder(folder: Path) -> None:
    """Raise a `ValueError` that says what was found instead, unless `folder` has the files of a model."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    for name, pattern in ((CONFIG_NAME, "config.json"), (WEIGHTS_NAME, "model*.safetensors")):
        if not any(folder.glob(pattern)):
            message = f"{folder} is not a model folder: it has no {name}."
            pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
            if pickles:
                message += (
                    f" It has {', '.join(pickles)}, which may run code when it is read: convert it to safetensors, or "
                    "name its timm architecture and pass it as checkpoint, to be read with weights_only=True."
                )
            raise ValueError(message)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; an `OSError` if it cannot be read, and a `ValueError` if it is no JSON.

    A NaN or an infinity, which Python would write, is null.
    """
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda constant: None)


def json_text(value: Any) -> str:
    """Return a value as the text of a JSON file, with NaN and infinity, which JSON does not know, as null."""
    known = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    return json.dumps(known, indent=1, allow_nan=False) + "\n"
