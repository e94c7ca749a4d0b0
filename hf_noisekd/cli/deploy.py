"""`noisekd recalibrate` and `noisekd export`: a student for single images, and for other runtimes."""

import argparse

from .options import (
    MODEL,
    add_batch_size,
    add_dataset,
    add_model,
    add_trust_remote_code,
    at_least,
    check_unused,
    load_dataset,
    load_model,
    path,
)
from .parser import Command, CommandParser


def add_recalibrate_options(parser: CommandParser) -> None:
    """Add the options of `noisekd recalibrate`."""
    add_model(parser, "the student")
    add_dataset(parser, split="train")
    parser.add_argument(
        "--num-images",
        type=at_least(2),
        default=256,
        metavar="N",
        help="images to use, drawn at random, at least 2; more are better (default: 256)",
    )
    add_batch_size(parser, "images in a batch; the result does not depend on it")
    parser.add_argument(
        "--output-dir", required=True, type=path, metavar="FOLDER", help="where the new model goes; new or empty"
    )
    add_trust_remote_code(parser, "model")


def recalibrate(args: argparse.Namespace) -> int:
    """Re-estimate the running statistics of a student; see [`recalibrate_batch_norm`]."""
    check_unused(args)
    from torch.utils.data import DataLoader

    from hf_noisekd.batches import collate_images
    from hf_noisekd.files import RECORD_NAME
    from hf_noisekd.models.loading import has_weights, model_folder
    from hf_noisekd.models.saving import save_model
    from hf_noisekd.release.card import write_model_card
    from hf_noisekd.release.record import Provenance, read_record
    from hf_noisekd.training.recalibration import recalibrate_batch_norm

    model = load_model(args.model, args)
    images = load_dataset(args, model, labels=False)
    loader = DataLoader(images, batch_size=args.batch_size, collate_fn=collate_images)
    recalibrate_batch_norm(model, loader, dataset=images.name, split=args.split)
    save_model(model, args.output_dir)
    if has_weights(args.model) and (folder := model_folder(args.model)[0]) and (folder / RECORD_NAME).is_file():
        write_model_card(read_record(folder).recalibrated(Provenance.of(model)), args.output_dir)
    print(
        f"{args.output_dir}: running statistics of {len(images):,} images. It answers single images as any network "
        f"does:\n  noisekd evaluate --model {args.output_dir} --dataset {args.dataset} --split test"
    )
    return 0


def add_export_options(parser: CommandParser) -> None:
    """Add the options of `noisekd export`."""
    parser.add_argument("--model", required=True, metavar="MODEL", help=f"the model: a timm name, {MODEL}")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="format of the file (default: onnx)")
    parser.add_argument("--output", required=True, type=path, metavar="FILE", help="the file, such as student.onnx")


def export(args: argparse.Namespace) -> int:
    """Write a model as an ONNX file; see [`hf_noisekd.release.onnx.export_onnx`]."""
    from hf_noisekd.release.onnx import export_onnx

    export_onnx(args.model, args.output)
    print(args.output)
    return 0


COMMANDS = (
    Command(
        recalibrate,
        add_recalibrate_options,
        "--model MODEL --dataset DATASET --output-dir FOLDER [options]",
        "re-estimate running statistics from some real images",
    ),
    Command(
        export,
        add_export_options,
        "--model MODEL --output FILE [options]",
        "write a model as one file for other runtimes",
    ),
)
