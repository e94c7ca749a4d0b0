"""Options that several commands have, and what is done with them first."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

MODEL = "a Hub id (org/name, org/name@revision) or a folder in timm's or transformers' layout"
DATASET = "data set of labelled images: a Hub id, or a folder that `datasets.load_dataset` reads"


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


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_switch(parser, name: str, help: str) -> None:
    """Add an option that is off unless it is given."""
    parser.add_argument(name, nargs="?", const=True, default=False, type=_switch, metavar="true|false", help=help)


def add_batch_size(parser, help: str) -> None:
    help += ", at least 2 (default: 256)"
    parser.add_argument("--batch-size", type=at_least(2), default=256, metavar="N", help=help)


def add_trust_remote_code(parser, whose: str) -> None:
    help = f"run the Python code that a transformers {whose} on the Hub brings along (default: false)"
    add_switch(parser, "--trust-remote-code", help)


def add_model(parser, help: str, name: str = "--model", *, required: bool = True) -> None:
    parser.add_argument(name, required=required, metavar="MODEL", help=f"{help} {MODEL}")


def add_teacher(parser, use: str) -> None:
    add_model(parser, f"{use}: a timm name,", "--teacher")
    help = "file of weights for the timm architecture that --teacher names: safetensors, or what `torch.save` wrote"
    parser.add_argument("--teacher-checkpoint", metavar="FILE", help=help)
    add_trust_remote_code(parser, "teacher")


def add_dataset(parser, *, split: str, required: bool = True) -> None:
    parser.add_argument("--dataset", required=required, metavar="DATASET", help=DATASET)
    parser.add_argument("--split", default=split, help=f"its split (default: {split})")
    parser.add_argument("--image-column", metavar="NAME", help="its column of images, where it has several")


def load_dataset(args: argparse.Namespace, model, **kwargs):
    """Load what the options of [`add_dataset`] name, as `model` wants it."""
    from hf_noisekd.image_datasets import load_images

    columns = {"image_column": args.image_column} | kwargs
    return load_images(args.dataset, model, split=args.split, num_images=args.num_images, **columns)


def load_model(source: str, args: argparse.Namespace, **kwargs):
    """Load a trained model, in evaluation mode on the accelerator if there is one."""
    import torch

    from hf_noisekd.models.loading import load_teacher

    model = load_teacher(source, trust_remote_code=args.trust_remote_code, **kwargs).eval()
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def check_unused(args: argparse.Namespace, advice: str = "") -> None:
    """Refuse an output folder that holds something, before anything is loaded."""
    # Other processes may be late, and find what the first one has written.
    if os.environ.get("RANK", "0") != "0":
        return
    folder = Path(args.output_dir).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        args.parser.error(f"the output folder {folder} is not empty: choose another --output-dir.{advice}")
    if folder.is_file():
        args.parser.error(f"the output folder {folder} is a file: choose another --output-dir.")
