"""Options that several commands have, and what is done with them first."""

import argparse
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

MODEL = "a Hub id (org/name, org/name@revision) or a folder in timm's or transformers' layout"
DATASET = "data set of labelled images: a Hub id, or a folder that `datasets.load_dataset` reads"

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}  # of large numbers


def path(text: str) -> Path:
    """Read a path, in which `~` may stand for the home folder."""
    return Path(text).expanduser()


def at_least(minimum: int) -> Callable[[str], int]:
    """Return the reader of a whole number that is not below `minimum`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {minimum}")
        return int(text)

    return number


def count(text: str) -> float:
    """Read a number of parameters or multiply-adds, such as 180k or 2M, or a share below 1."""
    found = re.fullmatch(r"((?:\d{1,3}(?:[,_]\d{3})+|\d+)(?:\.\d+)?(?:e\d+)?|\.\d+)([kmgb]?)", text.strip().lower())
    number = Decimal(found[1].replace(",", "").replace("_", "")) * UNITS[found[2]] if found else None
    if number is None or (number >= 1 and number % 1):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no such number: write 180000, 180k or 2M, or 0.5 for half of what the teacher has"
        )
    return int(number) if number >= 1 else float(number)


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_switch(parser, name: str, help: str, **kwargs) -> None:
    """Add an option that is off unless it is given."""
    kwargs |= {"nargs": "?", "const": True, "default": False, "type": _switch, "metavar": "true|false"}
    parser.add_argument(name, help=help, **kwargs)


def add_batch_size(parser, help: str) -> None:
    help += ", at least 2 (default: 256)"
    parser.add_argument("--batch-size", type=at_least(2), default=256, metavar="N", help=help)


def add_trust_remote_code(parser, whose: str) -> None:
    help = f"run the Python code that a transformers {whose} on the Hub brings along (default: false)"
    add_switch(parser, "--trust-remote-code", help)


def add_input_size(parser) -> None:
    help = "channels, height and width of the images, such as 3 224 224 (default: what the model declares)"
    parser.add_argument("--input-size", nargs=3, type=at_least(1), metavar="N", help=help)


def add_calibration_steps(parser) -> None:
    help = "steps at most to make images without data; it ends where more would not do (default: 900)"
    parser.add_argument("--calibration-steps", type=at_least(1), default=900, metavar="N", help=help)


def add_model(parser, help: str, name: str = "--model", *, required: bool = True) -> None:
    parser.add_argument(name, required=required, metavar="MODEL", help=f"{help} {MODEL}")


def add_checkpoint(parser, of: str = "--model", name: str = "--checkpoint") -> None:
    help = f"file of weights for the timm architecture that {of} names: safetensors, or what `torch.save` wrote"
    parser.add_argument(name, metavar="FILE", help=help)


def add_teacher(parser, use: str) -> None:
    add_model(parser, f"{use}: a timm name,", "--teacher")
    add_checkpoint(parser, "--teacher", "--teacher-checkpoint")
    add_trust_remote_code(parser, "teacher")


def add_images(parser, use: str, *, column: bool = True) -> None:
    help = f"photos or other images of the teacher's task, without labels, {use}: a Hub id, or a folder of image files"
    parser.add_argument("--images", metavar="DATASET", help=help)
    parser.add_argument("--images-split", default="train", metavar="SPLIT", help="their split (default: train)")
    if column:
        parser.add_argument("--image-column", metavar="NAME", help="their column, where there are several")


def add_dataset(parser, *, split: str) -> None:
    parser.add_argument("--dataset", required=True, metavar="DATASET", help=DATASET)
    parser.add_argument("--split", default=split, help=f"its split (default: {split})")
    parser.add_argument("--image-column", metavar="NAME", help="its column of images, where it has several")
