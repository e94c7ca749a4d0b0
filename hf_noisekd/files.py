"""Files of a model folder: their names, JSON that people read, and writing them whole or not at all."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
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
    """Context in which to write to `folder`; what fails there for want of space is an `OSError` that says so.

    torch says "unexpected pos 64 vs 0" of a full disk, and safetensors raises an error of its own.
    """
    try:
        yield
    except Exception as error:
        if why := _want_of_space(error) or _why_nothing_is_written(Path(folder)):
            raise OSError(f"{why} while writing {folder}") from error
        raise


def _want_of_space(error: Exception) -> str | None:
    """Return what the system calls the want of space that an error tells of, if it does."""
    of_rust = re.search(r"\(os error (\d+)\)", str(error))  # as in safetensors
    number = int(of_rust[1]) if of_rust else getattr(error, "errno", None)
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def _why_nothing_is_written(folder: Path) -> str | None:
    """Return what the system says to a file of a megabyte in a folder or above it; None if it takes that."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def is_odd(path: Path) -> bool:
    """Whether something stands at a path that is neither a file nor a folder, such as a device or a named pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_output_file(path: Path) -> None:
    """Raise a `ValueError` if what stands at a path is not to be replaced by a file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write, such as {path / 'model.onnx'}.")
    if is_odd(path):
        raise ValueError(f"{path} is no ordinary file: name the file to write, such as model.onnx.")


def check_model_folder(folder: Path) -> None:
    """Raise a `ValueError` that says what was found instead, unless `folder` has the files of a model."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    for file in folder.iterdir():
        if is_odd(file):
            raise ValueError(f"{file} is no ordinary file, and reading it may have no end: take it away.")
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
    """Return a value as the text of a JSON file that people can compare: a log entry is a line, as is what is short.

    JSON knows no NaN and no infinity: they become null, as what is not known.
    """
    return _json_text(_without_nan(value), "") + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_text(value: Any, indent: str) -> str:
    text = json.dumps(value, allow_nan=False)
    if not isinstance(value, dict | list):
        return text
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    parts: list[Any] = list(value.values()) if isinstance(value, dict) else value
    is_list_of_entries = isinstance(value, list) and any(isinstance(part, dict) for part in value)
    if not any(_holds_more(part) for part in parts) or (len(text) <= 120 and not is_list_of_entries):
        return text
    inner = indent + " "
    lines: list[str] = []
    for index, (name, part) in enumerate(zip(names, parts, strict=True)):
        # Neighbours that are plain values share a line.
        shared = index > 0 and not _holds_more(part) and not _holds_more(parts[index - 1])
        lines.append(("" if not lines else ", " if shared else f",\n{inner}") + name + _json_text(part, inner))
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return f"{begin}\n{inner}{''.join(lines)}\n{indent}{end}"


def _holds_more(value: Any) -> bool:
    return isinstance(value, dict | list) and len(value) > 0
