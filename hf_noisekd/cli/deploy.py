"""`noisekd recalibrate`, `export` and `convert`: a model for single images, for other runtimes, and as a folder."""

import argparse
import shlex

from . import options
from .parser import CommandParser

RECALIBRATE_EXAMPLES = """\
examples:
  noisekd recalibrate --model student --teacher MODEL --output-dir new    without data
  noisekd recalibrate --model student --images FOLDER --output-dir new    from a few photos, 16 or more, no labels
"""
EXPORT_EXAMPLES = """\
examples:
  noisekd export --model student --output student.onnx                          in float32
  noisekd export --model student --int8 --output student.onnx                   in int8, without data
  noisekd export --model student --int8 --images FOLDER --output student.onnx   from a few photos, 16 or more, no labels
"""


def recalibrate_options(parser: CommandParser) -> None:
    options.add_model(parser, "the student: a timm name,")
    options.add_checkpoint(parser)
    help = "its teacher, from whose stored statistics images are made without data: a timm name,"
    options.add_model(parser, help, "--teacher", required=False)
    options.add_images(parser, "to use in place of images made without data")
    help = "images to make, or to draw from those given, of which there may be fewer (default: 256)"
    parser.add_argument("--num-images", type=options.at_least(2), default=256, metavar="N", help=help)
    options.add_calibration_steps(parser)
    options.add_input_size(parser)
    help = "where the new model goes; new or empty"
    parser.add_argument("--output-dir", required=True, type=options.path, metavar="FOLDER", help=help)
    options.add_trust_remote_code(parser, "model")


def recalibrate(args: argparse.Namespace) -> int:
    """Re-estimate the running statistics of a student; see [`hf_noisekd.recalibrate`]."""
    from hf_noisekd import recalibrate

    used = recalibrate(
        args.model,
        args.output_dir,
        checkpoint=args.checkpoint,
        teacher_model=args.teacher,
        images=args.images,
        images_split=args.images_split,
        image_column=args.image_column,
        num_images=args.num_images,
        calibration_steps=args.calibration_steps,
        input_size=args.input_size,
        trust_remote_code=args.trust_remote_code,
    )
    made = getattr(used, "self_agreement", None)
    of = "images" if made is None else f"images made without data (self-agreement of the teacher: {made:.1f} %)"
    folder = shlex.quote(str(args.output_dir))
    images = f" --images {shlex.quote(args.images)} --images-split {args.images_split}" if args.images else ""
    print(
        f"{folder}: running statistics of {used.images:,} {of}. It classifies single images as any network does.\n"
        f"Next:\n  noisekd export --model {folder} --int8{images} --output student.onnx\n"
        f"  noisekd evaluate --model {folder} --dataset LABELLED_IMAGES --split test"
    )
    return 0


def export_options(parser: CommandParser) -> None:
    options.add_model(parser, "the model: a timm name,")
    options.add_checkpoint(parser)
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="format of the file (default: onnx)")
    help = "the file, such as student.onnx"
    parser.add_argument("--output", required=True, type=options.path, metavar="FILE", help=help)
    help = "quantise to int8, with ranges of images that are made without data (default: false)"
    options.add_switch(parser, "--int8", help)
    options.add_switch(parser, "--fp16", "write weights in float16 (default: false)")
    options.add_input_size(parser)
    help = "for --int8: the model from whose stored statistics the images are made (default: --model): a timm name,"
    options.add_model(parser, help, "--teacher", required=False)
    options.add_images(parser, "for --int8, in place of images made without data", column=False)
    help = "for --int8: images to make, or to draw from those given, of which there may be fewer (default: 256)"
    parser.add_argument("--num-images", type=options.at_least(2), default=256, metavar="N", help=help)
    options.add_calibration_steps(parser)
    options.add_trust_remote_code(parser, "model")


def export(args: argparse.Namespace) -> int:
    """Write a model as an ONNX file; see [`hf_noisekd.export`]."""
    if args.int8 and args.fp16:
        args.parser.error("give either --int8 or --fp16.")
    from hf_noisekd import export

    file = export(
        args.model,
        args.output,
        checkpoint=args.checkpoint,
        precision="int8" if args.int8 else "float16" if args.fp16 else "float32",
        input_size=args.input_size,
        teacher_model=args.teacher,
        images=args.images,
        images_split=args.images_split,
        num_images=args.num_images,
        calibration_steps=args.calibration_steps,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"{file.path}: {file.precision}, {file.megabytes:.2f} MB")
    if file.agreement is not None:
        of = "given" if args.images else "other made"
        cpu = {True: ", on a CPU with VNNI", False: ", on a CPU without VNNI", None: ""}[file.vnni]
        print(f"int8 and float32 agree on {file.agreement:.1f} % of {file.num_compared:,} {of} images{cpu}.")
    print(f"Next:\n  noisekd evaluate --model {file.path} --dataset FOLDER_OR_HUB_ID --split test")
    return 0


def convert_options(parser: CommandParser) -> None:
    options.add_model(parser, "the model: a timm name,")
    options.add_checkpoint(parser)
    options.add_input_size(parser)
    help = "where the model goes; new or empty"
    parser.add_argument("--output-dir", required=True, type=options.path, metavar="FOLDER", help=help)
    options.add_trust_remote_code(parser, "model")


def convert(args: argparse.Namespace) -> int:
    """Save a model as a folder; see [`hf_noisekd.convert`]."""
    from hf_noisekd import convert

    convert(
        args.model,
        args.output_dir,
        checkpoint=args.checkpoint,
        input_size=args.input_size,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"{args.output_dir} is a model. Next:\n  noisekd info --teacher {args.output_dir}")
    return 0
