"""`noisekd recalibrate` and `noisekd export`: a student for single images, and for other runtimes."""

import argparse

from . import options
from .parser import CommandParser


def recalibrate_options(parser: CommandParser) -> None:
    options.add_model(parser, "the student:")
    options.add_dataset(parser, split="train")
    help = "images to use, drawn at random, at least 2; more are better (default: 256)"
    parser.add_argument("--num-images", type=options.at_least(2), default=256, metavar="N", help=help)
    options.add_batch_size(parser, "images in a batch; the result does not depend on it")
    help = "where the new model goes; new or empty"
    parser.add_argument("--output-dir", required=True, type=options.path, metavar="FOLDER", help=help)
    options.add_trust_remote_code(parser, "model")


def recalibrate(args: argparse.Namespace) -> int:
    """Re-estimate the running statistics of a student; see [`recalibrate_batch_norm`]."""
    options.check_unused(args)
    from torch.utils.data import DataLoader

    from hf_noisekd.batches import collate_images
    from hf_noisekd.calibration.recalibration import recalibrate_batch_norm
    from hf_noisekd.files import RECORD_NAME
    from hf_noisekd.models.loading import has_weights, model_folder
    from hf_noisekd.models.saving import save_model
    from hf_noisekd.release.card import write_model_card
    from hf_noisekd.release.record import Provenance, read_record

    model = options.load_model(args.model, args)
    images = options.load_dataset(args, model, labels=False)
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


def export_options(parser: CommandParser) -> None:
    options.add_model(parser, "the model: a timm name,")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="format of the file (default: onnx)")
    help = "the file, such as student.onnx"
    parser.add_argument("--output", required=True, type=options.path, metavar="FILE", help=help)


def export(args: argparse.Namespace) -> int:
    """Write a model as an ONNX file; see [`hf_noisekd.release.onnx.export_onnx`]."""
    from hf_noisekd.release.onnx import export_onnx

    export_onnx(args.model, args.output)
    print(args.output)
    return 0
