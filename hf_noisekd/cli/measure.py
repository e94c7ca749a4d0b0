"""`noisekd info` and `noisekd evaluate`: what a model can do."""

import argparse
import json
from collections.abc import Mapping

from . import options
from .parser import CommandParser
from .text import scores_table, table


def info_options(parser: CommandParser) -> None:
    options.add_teacher(parser, "the model")
    options.add_input_size(parser)
    options.add_switch(parser, "--json", "print JSON (default: false)")


def info(args: argparse.Namespace) -> int:
    """Say whether a model can be a teacher; see [`describe_teacher`]."""
    from hf_noisekd.workflows.teacher_report import describe_teacher

    facts = describe_teacher(
        args.teacher,
        args.input_size,
        checkpoint=args.teacher_checkpoint,
        trust_remote_code=args.trust_remote_code,
    )
    facts = {"teacher": args.teacher} | facts
    print(json.dumps(facts, indent=1) if args.json else _teacher_text(facts))
    return 0 if facts["can_teach"] else 1


def _teacher_text(facts: Mapping) -> str:
    names = ", ".join(facts["class_names"]) + (", ..." if len(facts["class_names"]) < facts["num_classes"] else "")
    layers = ", ".join(f"{count} {kind}" for kind, count in facts["batch_norm"].items()) or "none"
    header = ["BatchNorm on", "class balance", "flatness", "top class (%)", "classes predicted"]
    rows = [
        [
            f"{statistics} statistics" if facts["batch_norm"] else "it has none",
            f"{predictions['class_balance']:.3f}",
            f"{predictions['flatness']:.3f}",
            f"{predictions['top_class_share']:.1f}",
            f"{predictions['classes_predicted']:,} of {facts['num_classes']:,}",
        ]
        for statistics, predictions in facts["predictions"].items()
    ]
    return (
        f"{facts['teacher']}: {facts['architecture']}, {facts['parameters']:,} parameters, input "
        f"{'x'.join(map(str, facts['input_size']))}, {facts['num_classes']:,} classes ({names})\n"
        f"BatchNorm layers: {layers}\n\nPredictions for {facts['noise_images']:,} noise images:\n"
        f"{table(header, rows)}\n"
        "Class balance: 1 if noise reaches all classes alike, 0 if only one. Flatness: 1 if all classes are equally "
        "probable for an image, 0 if one is certain.\n\n"
        f"{facts['teacher']} {facts['verdict']}"
    )


def evaluate_options(parser: CommandParser) -> None:
    options.add_model(parser, "the model: an ONNX file, a timm name,")
    options.add_checkpoint(parser)
    options.add_dataset(parser, split="test")
    add = parser.add_argument
    add("--label-column", metavar="NAME", help="its column of classes, where it has several")
    add("--teacher", metavar="MODEL", help="teacher to measure the agreement with: a timm name, or as --model")
    options.add_batch_size(parser, "images in a batch; under batch statistics the accuracy depends on it")
    help = "evaluate on N images, drawn at random (default: all)"
    add("--num-images", type=options.at_least(2), metavar="N", help=help)
    add("--output", type=options.path, metavar="FILE", help="write the numbers to this JSON file")
    help = "put the result into the card of the student in folder --model (default: false)"
    options.add_switch(parser, "--update-card", help)
    options.add_trust_remote_code(parser, "model")


def evaluate(args: argparse.Namespace) -> int:
    """Measure a model on labelled images; see [`hf_noisekd.evaluate`]."""
    from hf_noisekd import evaluate
    from hf_noisekd.files import json_text

    scores = evaluate(
        args.model,
        args.dataset,
        checkpoint=args.checkpoint,
        split=args.split,
        image_column=args.image_column,
        label_column=args.label_column,
        num_images=args.num_images,
        teacher_model=args.teacher,
        batch_size=args.batch_size,
        update_card=args.update_card,
        trust_remote_code=args.trust_remote_code,
    )
    model = args.checkpoint or args.model
    print(f"{model} on {scores.images:,} images of {args.dataset}, {args.split}, in batches of {args.batch_size}")
    print(scores_table(scores))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "model": args.model,
            "checkpoint": args.checkpoint,
            "dataset": args.dataset,
            "split": args.split,
            "images": scores.images,
        }
        facts |= {"batch_size": args.batch_size, "teacher": args.teacher}
        args.output.write_text(json_text(facts | scores))
    return 0
