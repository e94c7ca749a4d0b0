"""`noisekd info` and `noisekd evaluate`: what a model can do."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from . import options
from .parser import CommandParser
from .text import scores_table, table


def info_options(parser: CommandParser) -> None:
    options.add_teacher(parser, "the model")
    options.add_batch_size(parser, "noise images in a batch")
    help = "channels, height and width of the noise images (default: what the model declares)"
    parser.add_argument("--input-size", nargs="+", type=options.at_least(1), metavar="N", help=help)
    options.add_switch(parser, "--json", "print JSON (default: false)")


def info(args: argparse.Namespace) -> int:
    if args.input_size is not None and len(args.input_size) != 3:
        args.parser.error(f"--input-size takes channels, height and width, such as 3 32 32, found {args.input_size}.")
    from hf_noisekd.models.preprocessing import known_input_size
    from hf_noisekd.training.teacher_report import describe_teacher

    model = options.load_model(args.teacher, args, checkpoint=args.teacher_checkpoint)
    if args.input_size is None and known_input_size(model) is None:
        args.parser.error(
            f"{args.teacher} does not declare its input size: give it as --input-size CHANNELS HEIGHT WIDTH."
        )
    facts = {"teacher": args.teacher} | describe_teacher(model, args.input_size, batch_size=args.batch_size)
    print(json.dumps(facts, indent=1) if args.json else _teacher_text(facts))
    return 0 if facts["can_teach"] else 1


def _teacher_text(facts: Mapping) -> str:
    from hf_noisekd.models.classifier import format_size

    names = ", ".join(facts["class_names"]) + (", ..." if len(facts["class_names"]) < facts["num_classes"] else "")
    layers = ", ".join(f"{count} {kind}" for kind, count in facts["batch_norm"].items()) or "none"
    header = ["asked", "class balance", "flatness", "top class (%)", "classes answered"]
    rows = [
        [
            f"on {statistics} statistics" if facts["batch_norm"] else "as it is",
            f"{answers['class_balance']:.3f}",
            f"{answers['flatness']:.3f}",
            f"{answers['top_class_share']:.1f}",
            f"{answers['classes_answered']:,} of {facts['num_classes']:,}",
        ]
        for statistics, answers in facts["answers"].items()
    ]
    return (
        f"{facts['teacher']}: {facts['architecture']}, {facts['parameters']:,} parameters, input "
        f"{format_size(facts['input_size'])}, {facts['num_classes']:,} classes ({names})\n"
        f"BatchNorm layers: {layers}\n\nAnswers to {facts['noise_images']:,} noise images:\n{table(header, rows)}\n"
        "Class balance: 1 if noise reaches all classes alike, 0 if only one. Flatness: 1 if an answer is all classes "
        "alike, 0 if it is one class.\n\n"
        f"{facts['teacher']} {facts['verdict']}"
    )


def evaluate_options(parser: CommandParser) -> None:
    options.add_model(parser, "the model:")
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
    from hf_noisekd.files import json_text
    from hf_noisekd.record.schema import Evaluation, read_record
    from hf_noisekd.release.card import write_model_card
    from hf_noisekd.training import evaluation

    if args.update_card and not Path(args.model).is_dir():
        args.parser.error(f"--update-card needs a local folder as --model, found {args.model}.")
    record = read_record(args.model) if args.update_card else None
    model = options.load_model(args.model, args)
    dataset = options.load_dataset(args, model, label_column=args.label_column)
    teacher = None if args.teacher is None else options.load_model(args.teacher, args)
    scores = evaluation.evaluate(model, dataset, teacher_model=teacher, batch_size=args.batch_size)
    print(f"{args.model} on {len(dataset):,} images of {args.dataset}, {args.split}, in batches of {args.batch_size}")
    print(scores_table(scores))
    if args.output is not None:
        result = {"model": args.model, "dataset": args.dataset, "split": args.split, "images": len(dataset)}
        result |= {"batch_size": args.batch_size, "teacher": args.teacher}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json_text(result | scores))
    if record is not None:
        measured = Evaluation(
            dataset=dataset.name,
            split=args.split,
            images=len(dataset),
            batch_size=min(args.batch_size, len(dataset)),
            precision="float32",
            step=record.steps,
            running=scores["running"],
            batch=scores["batch"],
        )
        write_model_card(record.measured(measured), args.model)
    return 0
