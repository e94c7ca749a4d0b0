"""Files of a model folder: their names, JSON, and writing them completely or not at all."""

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
    """Context with an empty folder to write to; its files are moved to `folder` once all of them are written.

    A new `folder` appears with all files or, after an exception or a kill, not at all. In an existing one the files
    are replaced one by one, each atomically; other files stay.
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
                file.chmod(staging.stat().st_mode & 0o666)  # by the user's umask; safetensors writes 0600
                with open(file, "r+b") as written:  # not "rb", for Windows
                    os.fsync(written.fileno())
        if not exists:
            # Another process may have created the folder meanwhile, for its own files.
            with contextlib.suppress(OSError):
                staging.rename(folder)
                return
        # config.json last: it describes the weights.
        for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_NAME):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def naming_full_disk(folder: str | Path) -> Iterator[None]:
    """Context for writing to `folder`, in which a write that fails for lack of space is a clear `OSError`."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # safetensors hides the system's error number in its text, and torch the cause altogether.
        if re.search(r"\(os error (27|28|122)\)|unexpected pos|iostream error", str(error)):
            number = errno.ENOSPC
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"{os.strerror(number)} while writing {folder}: free some space.") from error
        raise


def check_output_file(path: Path) -> None:
    """Raise a `ValueError` if `path` is a folder, a pipe or a device, which no file may replace."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file: name the file to write, such as model.onnx.")


def check_model_folder(folder: Path) -> None:
    """Raise a `ValueError` with what was found, unless `folder` has the files of a model."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    for name, pattern in ((CONFIG_NAME, "config.json"), (WEIGHTS_NAME, "model*.safetensors")):
        if not any(folder.glob(pattern)):
            message = f"{folder} is not a model folder: it has no {name}."
            if pickles := [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]:
                message += (
                    f" It has {', '.join(pickles)}, and unpickling may run code: convert it to safetensors, or name "
                    "its timm architecture and pass it as checkpoint, which is loaded with weights_only=True."
                )
            raise ValueError(message)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, with NaN and infinity as None; a `ValueError` if it is no JSON."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda constant: None)


def json_text(value: Any) -> str:
    """Return a value as the text of a JSON file, with NaN and infinity as null."""
    known = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    return json.dumps(known, indent=1, allow_nan=False) + "\n"
