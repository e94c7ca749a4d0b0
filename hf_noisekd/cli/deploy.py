"""`noisekd recalibrate` and `noisekd export`: a student for single images, and for other runtimes."""

import argparse
import tempfile
from pathlib import Path

from . import options
from .parser import CommandParser
from .text import table


def recalibrate_options(parser: CommandParser) -> None:
    options.add_model(parser, "the student:")
    help = "its teacher, from whose stored statistics images are made without data: a timm name,"
    options.add_model(parser, help, "--teacher", required=False)
    options.add_dataset(parser, split="train", required=False)
    help = "images to use, made or drawn at random, at least 2 (default: 256)"
    parser.add_argument("--num-images", type=options.at_least(2), default=256, metavar="N", help=help)
    add_calibration_steps(parser)
    options.add_batch_size(parser, "real images that are read at a time")
    help = "where the new model goes; new or empty"
    parser.add_argument("--output-dir", required=True, type=options.path, metavar="FOLDER", help=help)
    options.add_trust_remote_code(parser, "model")


def add_calibration_steps(parser: CommandParser) -> None:
    help = "steps at most to make images without data; large inputs and many classes need more (default: 900)"
    parser.add_argument("--calibration-steps", type=options.at_least(1), default=900, metavar="N", help=help)


def check_same_kind(student, teacher) -> None:
    """Raise a `ValueError` if what the models say of their inputs and classes differs."""
    from hf_noisekd.models.classifier import declared_input_size, declared_num_classes, format_size

    for what, found in (
        ("images of {}", [size and format_size(size) for size in map(declared_input_size, (student, teacher))]),
        ("{} classes", [declared_num_classes(student), declared_num_classes(teacher)]),
    ):
        if None not in found and found[0] != found[1]:
            student_has, teacher_has = map(what.format, found)
            raise ValueError(
                f"The student has {student_has} and the teacher {teacher_has}: give the teacher that taught it."
            )


def recalibrate(args: argparse.Namespace) -> int:
    """Re-estimate the running statistics of a student; see [`recalibrate_batch_norm`]."""
    if (args.teacher is None) == (args.dataset is None):
        args.parser.error("give either --teacher, for images made without data, or --dataset, for real ones.")
    options.check_unused(args)
    from hf_noisekd.calibration.calibration_images import calibration_images
    from hf_noisekd.calibration.recalibration import check_recalibration, recalibrate_batch_norm
    from hf_noisekd.files import RECORD_NAME
    from hf_noisekd.models.loading import has_weights, model_folder
    from hf_noisekd.models.preprocessing import known_input_size
    from hf_noisekd.models.saving import save_model
    from hf_noisekd.record.schema import Provenance, read_record
    from hf_noisekd.release.card import write_model_card

    model = options.load_model(args.model, args)
    check_recalibration(model)
    if args.teacher is not None:
        teacher = options.load_model(args.teacher, args)
        check_same_kind(model, teacher)
        size = known_input_size(model)
        made = calibration_images(teacher, args.num_images, input_size=size, max_steps=args.calibration_steps)
        recalibrate_batch_norm(model, made)
        of = f"{len(made):,} images made without data (self-agreement of the teacher: {made.self_agreement:.1f} %)"
    else:
        from torch.utils.data import DataLoader

        from hf_noisekd.batches import collate_images

        images = options.load_dataset(args, model, labels=False)
        loader = DataLoader(images, batch_size=args.batch_size, collate_fn=collate_images)
        recalibrate_batch_norm(model, loader, dataset=images.name, split=args.split)
        of = f"{len(images):,} images"
    save_model(model, args.output_dir)
    if has_weights(args.model) and (folder := model_folder(args.model)[0]) and (folder / RECORD_NAME).is_file():
        write_model_card(read_record(folder).recalibrated(Provenance.of(model)), args.output_dir)
    print(
        f"{args.output_dir}: running statistics of {of}. It answers single images as any network does:\n"
        f"  noisekd evaluate --model {args.output_dir} --dataset {args.dataset or 'FOLDER_OR_HUB_ID'} --split test"
    )
    return 0


def export_options(parser: CommandParser) -> None:
    options.add_model(parser, "the model: a timm name,")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="format of the file (default: onnx)")
    help = "the file, such as student.onnx"
    parser.add_argument("--output", required=True, type=options.path, metavar="FILE", help=help)
    help = "quantise to int8, with ranges of images that are made without data (default: false)"
    options.add_switch(parser, "--int8", help)
    options.add_switch(parser, "--fp16", "write weights in float16 (default: false)")
    help = "for --int8: the model from whose stored statistics the images are made (default: --model): a timm name,"
    options.add_model(parser, help, "--teacher", required=False)
    help = "for --int8: images to make, at least 2 (default: 256)"
    parser.add_argument("--num-images", type=options.at_least(2), default=256, metavar="N", help=help)
    add_calibration_steps(parser)
    parser.add_argument("--eval-dataset", metavar="DATASET", help=f"{options.DATASET}, to measure the file on")
    parser.add_argument("--eval-split", default="test", metavar="SPLIT", help="its split (default: test)")
    parser.add_argument("--eval-label-column", metavar="NAME", help="its column of classes, where it has several")
    options.add_trust_remote_code(parser, "model")


def export(args: argparse.Namespace) -> int:
    """Write a model as an ONNX file; see [`export_onnx`] and [`quantize_onnx`]."""
    if args.int8 and args.fp16:
        args.parser.error("give either --int8 or --fp16.")
    if args.teacher is not None and not args.int8:
        args.parser.error("--teacher is for --int8, which needs images.")
    if args.output.exists() and not args.output.is_file():
        kind = "a folder" if args.output.is_dir() else "no ordinary file"
        args.parser.error(f"--output {args.output} is {kind}: name the file, such as model.onnx.")
    from hf_noisekd.calibration.calibration_images import calibration_images
    from hf_noisekd.image_datasets import load_images
    from hf_noisekd.models.batch_norm import stored_statistics
    from hf_noisekd.models.preprocessing import known_input_size
    from hf_noisekd.onnx.floats import export_onnx, halve_onnx
    from hf_noisekd.onnx.int8 import quantize_onnx

    model = options.load_model(args.model, args)
    if args.int8:
        teacher = model if args.teacher is None else options.load_model(args.teacher, args)
        check_same_kind(model, teacher)
        if not stored_statistics(teacher):
            raise ValueError(
                f"--int8 makes images of stored BatchNorm statistics, and {args.teacher or args.model} has none: give "
                "a --teacher that has, or quantise with real images by hf_noisekd.onnx.int8 in Python."
            )
    labelled = None
    if args.eval_dataset is not None:
        labelled = load_images(args.eval_dataset, model, split=args.eval_split, label_column=args.eval_label_column)
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float32": Path(folder) / "float32.onnx" if args.int8 or args.fp16 else args.output}
        export_onnx(model, paths["float32"], name=args.model)
        agreement = None
        if args.fp16:
            paths["float16"] = args.output
            halve_onnx(paths["float32"], args.output)
        elif args.int8:
            size = known_input_size(model)
            images = calibration_images(teacher, args.num_images, input_size=size, max_steps=args.calibration_steps)
            paths["int8"] = args.output
            agreement = quantize_onnx(paths["float32"], args.output, images)
        print(f"{args.output}\n{files_table(paths, labelled)}")
    if agreement is not None:
        print(f"int8 gives the answer of float32 to {agreement:.1f} % of {len(images.held_out):,} other images.")
    return 0


def files_table(paths: dict[str, Path], labelled) -> str:
    """Return the size, the latency and, on images with labels, the accuracy of ONNX files as a table."""
    from hf_noisekd.onnx.floats import onnx_accuracy, onnx_latency

    latency = onnx_latency(paths)
    header = ["", "MB", "ms an image"]
    rows = [[name, f"{path.stat().st_size / 1e6:.2f}", f"{latency[name]:.2f}"] for name, path in paths.items()]
    if labelled is not None:
        header.append("accuracy (%)")
        for row, path in zip(rows, paths.values(), strict=True):
            row.append(f"{onnx_accuracy(path, labelled):.2f}")
    return table(header, rows)
