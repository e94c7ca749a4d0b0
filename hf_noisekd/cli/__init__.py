"""The command line: `noisekd COMMAND`, or `python -m hf_noisekd.cli COMMAND`.

`noisekd distill` is [`NoiseKDTrainer`] with every option of [`NoiseKDConfig`]; the other commands are thin covers of a
function of the package each. For several processes: `accelerate launch -m hf_noisekd.cli distill ...`.

Options are read in two stages. The first, of [`hf_noisekd.cli.options`], imports neither torch nor transformers, so
that help and misspelt options are answered at once. The second, of `distill`, is transformers' `HfArgumentParser`,
which knows types and choices.

Every command takes `--config FILE`, a YAML mapping from option names to values. Its entries are put before the options
of the command line and read as if they had been typed: options go over the file, and the file over the defaults.

Exit codes: 0 for success; 1 if the run failed, and from `info` if the model cannot be a teacher; 2 for wrong usage: an
unknown option, a value out of range, a bad configuration file, an output folder that is in use.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hf_noisekd import __version__
from hf_noisekd.cli.options import CommandParser, ConfigOption, config_options, in_one_line

EPILOG = """\
examples:
  noisekd info --teacher resnet18.a1_in1k
  noisekd distill --teacher resnet18.a1_in1k --student resnet10t --output-dir student
  noisekd push --model student --repo-id organisation/student
  noisekd evaluate --model organisation/student --dataset FOLDER_OR_HUB_ID --split test

`noisekd COMMAND --help` lists the options of a command.
"""
MODEL = "a Hub id (org/name, org/name@revision) or a folder in timm's or transformers' layout"
DATASET = "data set of labelled images: a Hub id, or a folder that `datasets.load_dataset` reads"


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {minimum}")
        return int(text)

    return number


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _add_switch(parser, name: str, help: str) -> None:
    parser.add_argument(name, nargs="?", const=True, default=False, type=_switch, metavar="true|false", help=help)


def _add_batch_size(parser, help: str) -> None:
    parser.add_argument(
        "--batch-size", type=_at_least(2), default=256, metavar="N", help=f"{help}, at least 2 (default: 256)"
    )


def _add_trust_remote_code(parser, whose: str) -> None:
    _add_switch(
        parser,
        "--trust-remote-code",
        f"run the Python code that a transformers {whose} on the Hub brings along (default: false)",
    )


def _add_teacher(parser, use: str) -> None:
    parser.add_argument("--teacher", required=True, metavar="MODEL", help=f"{use}: a timm name, {MODEL}")
    parser.add_argument(
        "--teacher-checkpoint",
        metavar="FILE",
        help="file of weights for the timm architecture that --teacher names: safetensors, or what `torch.save` wrote",
    )
    _add_trust_remote_code(parser, "teacher")


def _add_config_option(group, option: ConfigOption) -> None:
    name = option.name.replace("_", "-")
    default = "" if option.default is None else f" (default: {option.default})"
    arguments = {"default": argparse.SUPPRESS, "help": option.help + default}
    if option.is_switch:
        arguments |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif option.is_list:
        arguments |= {"nargs": "+", "metavar": "VALUE"}
    elif option.name == "resume_from_checkpoint":
        # By its type it takes a folder, but the Trainer takes True as well.
        arguments |= {"nargs": "?", "const": "true", "metavar": "FOLDER"}
        arguments["help"] = "continue the run in --output-dir from its last checkpoint, or from the checkpoint FOLDER"
    else:
        arguments["metavar"] = "VALUE"
    group.add_argument(f"--{name}", **arguments)
    if option.is_switch and option.default == "true":
        # HfArgumentParser has this spelling too.
        group.add_argument(
            f"--no-{name}",
            dest=option.name,
            action="store_const",
            const="false",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _add_model(parser, help: str) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help=f"{help}: {MODEL}")


def _add_dataset(parser, *, split: str) -> None:
    parser.add_argument("--dataset", required=True, help=DATASET)
    parser.add_argument("--split", default=split, help=f"its split (default: {split})")
    parser.add_argument("--image-column", metavar="NAME", help="its column of images, where it has several")


def _add_input_size(parser) -> None:
    parser.add_argument(
        "--input-size",
        nargs="+",
        type=_at_least(1),
        metavar="N",
        help="channels, height and width of the noise images (default: what the model declares)",
    )


def _load_for_noise(args: argparse.Namespace):
    """Load the teacher that the options name, once it is clear how large noise images are."""
    if args.input_size is not None and len(args.input_size) != 3:
        args.parser.error(f"--input-size takes channels, height and width, such as 3 32 32, found {args.input_size}.")
    from hf_noisekd.models.classifier import declared_input_size

    model = _load(args.teacher, args, checkpoint=args.teacher_checkpoint)
    if args.input_size is None and declared_input_size(model) is None:
        args.parser.error(
            f"{args.teacher} does not declare its input size: give it as --input-size CHANNELS HEIGHT WIDTH."
        )
    return model


def _load_dataset(args: argparse.Namespace, model, **kwargs):
    """Load what the options of [`_add_dataset`] name, as `model` wants it."""
    from hf_noisekd.images import load_images

    columns = {"image_column": args.image_column} | kwargs
    return load_images(args.dataset, model, split=args.split, num_images=args.num_images, **columns)


def noise_config(args: argparse.Namespace):
    """Build the [`NoiseKDConfig`] of the options that were given; a value that it refuses is wrong usage."""
    from transformers import HfArgumentParser

    from hf_noisekd.training.config import NoiseKDConfig

    tokens = []
    for name in config_options():
        value = getattr(args, name, None)
        if value is not None:
            tokens += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    parser = HfArgumentParser(NoiseKDConfig, prog=args.parser.prog, usage=args.parser.usage, allow_abbrev=False)
    try:
        (config,) = parser.parse_args_into_dataclasses(tokens, look_for_args_file=False)
    except (ValueError, FileNotFoundError) as error:
        args.parser.error(in_one_line(error))
    return config


# Commands


def _add_distill_options(parser: CommandParser) -> None:
    group = parser.add_argument_group("models, images and output")
    _add_teacher(group, "trained model to learn from")
    group.add_argument(
        "--student",
        required=True,
        metavar="MODEL",
        help=f"model to train: a timm name, for a new model that fits the teacher; or, to train one further, {MODEL}",
    )
    group.add_argument(
        "--output-dir",
        required=True,
        metavar="FOLDER",
        help="where the student goes, and its checkpoints; new or empty, unless a run in it is resumed",
    )
    group.add_argument("--eval-dataset", metavar="DATASET", help=f"{DATASET}, to evaluate on (default: held-out noise)")
    group.add_argument("--eval-split", default="test", metavar="SPLIT", help="its split (default: test)")
    group.add_argument("--eval-label-column", metavar="NAME", help="its column of classes, where it has several")
    groups = {
        True: parser.add_argument_group("noise distillation", "Options of this package, or with a default of its own."),
        False: parser.add_argument_group("training", "Options of transformers' TrainingArguments."),
    }
    for option in sorted(config_options().values(), key=lambda option: option.class_name != "NoiseKDConfig"):
        if option.name != "output_dir":
            _add_config_option(groups[option.class_name != "TrainingArguments"], option)


def distill(args: argparse.Namespace) -> int:
    """Train a student; see [`NoiseKDTrainer`]."""
    checkpoint = getattr(args, "resume_from_checkpoint", None)
    resume = {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)
    if not resume:
        _check_unused(args)
    config = noise_config(args)

    import hf_noisekd.models.cifar  # noqa: F401 - registers architectures
    from hf_noisekd.models.loading import load_teacher
    from hf_noisekd.training.noise_trainer import NoiseKDTrainer

    teacher = load_teacher(args.teacher, checkpoint=args.teacher_checkpoint, trust_remote_code=args.trust_remote_code)
    eval_dataset = None
    if args.eval_dataset is not None:
        from hf_noisekd.images import load_images

        eval_dataset = load_images(
            args.eval_dataset, teacher, split=args.eval_split, label_column=args.eval_label_column
        )
    trainer = NoiseKDTrainer(args.student, teacher, config, eval_dataset=eval_dataset)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    if config.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        scores = {
            statistics: {
                name.removeprefix(f"eval_{statistics}_"): value
                for name, value in metrics.items()
                if name.startswith(f"eval_{statistics}_")
            }
            for statistics in ("running", "batch")
        }
        print(_summary(config, scores, args.eval_dataset))
    return 0


def _add_evaluate_options(parser: CommandParser) -> None:
    _add_model(parser, "the model")
    _add_dataset(parser, split="test")
    parser.add_argument("--label-column", metavar="NAME", help="its column of classes, where it has several")
    parser.add_argument(
        "--teacher", metavar="MODEL", help="teacher to measure the agreement with: a timm name, or as --model"
    )
    _add_batch_size(parser, "images in a batch; under batch statistics the accuracy depends on it")
    parser.add_argument(
        "--num-images", type=_at_least(2), metavar="N", help="evaluate on N images, drawn at random (default: all)"
    )
    parser.add_argument("--output", type=_path, metavar="FILE", help="write the numbers to this JSON file")
    _add_switch(
        parser, "--update-card", "put the result into the card of the student in folder --model (default: false)"
    )
    _add_trust_remote_code(parser, "model")


def evaluate(args: argparse.Namespace) -> int:
    """Measure a model on labelled images; see [`hf_noisekd.evaluate`]."""
    from hf_noisekd.release.card import read_record, write_model_card
    from hf_noisekd.training import evaluation

    if args.update_card and not Path(args.model).is_dir():
        args.parser.error(f"--update-card needs a local folder as --model, found {args.model}.")
    record = read_record(args.model) if args.update_card else None
    model = _load(args.model, args)
    dataset = _load_dataset(args, model, label_column=args.label_column)
    teacher = None if args.teacher is None else _load(args.teacher, args)
    scores = evaluation.evaluate(model, dataset, teacher_model=teacher, batch_size=args.batch_size)
    print(f"{args.model} on {len(dataset):,} images of {args.dataset}, {args.split}, in batches of {args.batch_size}")
    print(scores_table(scores))
    if args.output is not None:
        result = {"model": args.model, "dataset": args.dataset, "split": args.split, "images": len(dataset)}
        result |= {"batch_size": args.batch_size, "teacher": args.teacher}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result | scores, indent=1) + "\n")
    if record is not None:
        facts = {
            "dataset": dataset.name,
            "split": args.split,
            "images": len(dataset),
            "batch_size": min(args.batch_size, len(dataset)),
            "precision": "float32",
            "step": record["steps"],
        }
        # What the training measured has no split, and the prefix of its entries in the log.
        others = []
        for entry in record["evaluations"]:
            if entry["dataset"] != dataset.name or entry.get("split", args.split) != args.split:
                others.append(entry)
            elif "log_prefix" in entry:
                facts["log_prefix"] = entry["log_prefix"]
        write_model_card(record | {"evaluations": [*others, facts | scores]}, args.model)
    return 0


def _add_recalibrate_options(parser: CommandParser) -> None:
    _add_model(parser, "the student")
    _add_dataset(parser, split="train")
    parser.add_argument(
        "--num-images",
        type=_at_least(2),
        default=256,
        metavar="N",
        help="images to use, drawn at random, at least 2; more are better (default: 256)",
    )
    _add_batch_size(parser, "images in a batch; the result does not depend on it")
    parser.add_argument(
        "--output-dir", required=True, type=_path, metavar="FOLDER", help="where the new model goes; new or empty"
    )
    _add_trust_remote_code(parser, "model")


def recalibrate(args: argparse.Namespace) -> int:
    """Re-estimate the running statistics of a student; see [`recalibrate_batch_norm`]."""
    _check_unused(args)
    from torch.utils.data import DataLoader

    from hf_noisekd.batches import collate_images
    from hf_noisekd.files import RECORD_NAME
    from hf_noisekd.models.batch_norm import recalibrate_batch_norm
    from hf_noisekd.models.classifier import noisekd_section
    from hf_noisekd.models.loading import has_weights, model_folder
    from hf_noisekd.models.saving import save_model
    from hf_noisekd.release.card import read_record, write_model_card

    model = _load(args.model, args)
    images = _load_dataset(args, model, labels=False)
    recalibrate_batch_norm(model, DataLoader(images, batch_size=args.batch_size, collate_fn=collate_images))
    if noisekd_section(model):
        model.noisekd["recalibration"] |= {"dataset": images.name, "split": args.split}
    save_model(model, args.output_dir)
    if has_weights(args.model) and (model_folder(args.model)[0] / RECORD_NAME).is_file():
        # What was measured before does not hold for the new statistics; nor is the student at its old address.
        record = {key: value for key, value in read_record(args.model).items() if key != "repo_id"}
        write_model_card(record | {"noisekd": model.noisekd, "evaluations": [], "curve": []}, args.output_dir)
    print(
        f"{args.output_dir}: running statistics of {len(images):,} images. It answers single images as any network "
        f"does:\n  noisekd evaluate --model {args.output_dir} --dataset {args.dataset} --split test"
    )
    return 0


def _add_push_options(parser: CommandParser) -> None:
    parser.add_argument("--model", required=True, type=_path, metavar="FOLDER", help="folder of the student")
    parser.add_argument(
        "--repo-id", required=True, metavar="ORGANISATION/NAME", help="where to push; made if it is not there"
    )
    _add_switch(parser, "--private", "make a new repository private (default: as the organisation says)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: the main one)")
    parser.add_argument(
        "--commit-message",
        default="Upload student",
        metavar="TEXT",
        help="title of the commit (default: Upload student)",
    )


def push(args: argparse.Namespace) -> int:
    """Push a student; see [`hf_noisekd.release.push.push_model`]."""
    import hf_noisekd.models.cifar  # noqa: F401 - registers architectures
    from hf_noisekd.release.push import push_model

    url = push_model(
        args.model,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
    )
    print(f"{url}\nAnybody who may read it can run:\n  noisekd evaluate --model {args.repo_id} --dataset DATASET")
    return 0


def _add_card_options(parser: CommandParser) -> None:
    parser.add_argument(
        "source", type=_path, metavar="SOURCE", help="folder of a student, or the results file (JSON) of a recipe"
    )
    parser.add_argument(
        "--output-dir", type=_path, metavar="FOLDER", help="where the card goes (default: SOURCE, if it is a folder)"
    )
    parser.add_argument(
        "--repo-id", metavar="ORGANISATION/NAME", help="where the student is on the Hub (default: as recorded)"
    )
    parser.add_argument(
        "--run", dest="run_name", metavar="NAME", help="which run of a results file (default: the last one)"
    )


def card(args: argparse.Namespace) -> int:
    """Write a model card; see [`hf_noisekd.release.card.write_model_card`]."""
    from hf_noisekd.release.card import write_model_card

    print(write_model_card(args.source, args.output_dir, repo_id=args.repo_id, run=args.run_name))
    return 0


def _add_info_options(parser: CommandParser) -> None:
    _add_teacher(parser, "the model")
    _add_batch_size(parser, "noise images in a batch")
    _add_input_size(parser)
    _add_switch(parser, "--json", "print JSON (default: false)")


def info(args: argparse.Namespace) -> int:
    """Say whether a model can be a teacher."""
    model = _load_for_noise(args)
    from hf_noisekd.training.teacher_check import describe_teacher

    facts = {"teacher": args.teacher} | describe_teacher(model, args.input_size, batch_size=args.batch_size)
    print(json.dumps(facts, indent=1) if args.json else _teacher_text(facts))
    return 0 if facts["can_teach"] else 1


def _add_export_options(parser: CommandParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help=f"the model: a timm name, {MODEL}")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="format of the file (default: onnx)")
    parser.add_argument("--output", required=True, type=_path, metavar="FILE", help="the file, such as student.onnx")


def export(args: argparse.Namespace) -> int:
    """Write a model as an ONNX file; see [`hf_noisekd.release.onnx.export_onnx`]."""
    import hf_noisekd.models.cifar  # noqa: F401 - registers architectures
    from hf_noisekd.release.onnx import export_onnx

    export_onnx(args.model, args.output)
    print(args.output)
    return 0


class Command(NamedTuple):
    """What `noisekd` knows of a command; its name is that of the function."""

    run: Callable[[argparse.Namespace], int]
    add_options: Callable[[CommandParser], None]
    usage: str
    help: str


COMMANDS = (
    Command(
        distill,
        _add_distill_options,
        "--teacher MODEL --student MODEL --output-dir FOLDER [options]",
        "train a student with noise",
    ),
    Command(
        evaluate,
        _add_evaluate_options,
        "--model MODEL --dataset DATASET [options]",
        "measure a model on labelled images",
    ),
    Command(
        recalibrate,
        _add_recalibrate_options,
        "--model MODEL --dataset DATASET --output-dir FOLDER [options]",
        "re-estimate running statistics from some real images",
    ),
    Command(
        push,
        _add_push_options,
        "--model FOLDER --repo-id ORGANISATION/NAME [options]",
        "push a student to the Hub",
    ),
    Command(card, _add_card_options, "SOURCE [options]", "write the model card of a student anew"),
    Command(
        info,
        _add_info_options,
        "--teacher MODEL [options]",
        "say whether a model can be a teacher; if not, exit code 1",
    ),
    Command(
        export,
        _add_export_options,
        "--model MODEL --output FILE [options]",
        "write a model as one file for other runtimes",
    ),
)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command, as far as the first stage knows them, with its `run` and its `parser`.

    Options of [`NoiseKDConfig`] are in it as text, and only if they were given.

    Raises:
        SystemExit: The usage is wrong, or help was asked for; it has been printed.
    """
    parser = CommandParser(
        prog="noisekd",
        usage="noisekd COMMAND [options]",
        description="Distil a CNN into a smaller one with pure noise: no images, no labels, no generator network.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"hf_noisekd {__version__}", help="print the version")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND [options]", required=True, title="commands", prog="noisekd"
    )
    for command in COMMANDS:
        name = command.run.__name__.replace("_", "-")
        subparser = subparsers.add_parser(
            name,
            usage=f"noisekd {name} {command.usage}",
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
        )
        subparser.set_defaults(run=command.run, parser=subparser)
        subparser.add_argument(
            "--config",
            metavar="FILE",
            help="YAML file of options, such as `output_dir: student`; those of the command line go over it",
        )
        command.add_options(subparser)
    tokens = list(argv)
    if tokens and tokens[0] in subparsers.choices:
        tokens[1:] = subparsers.choices[tokens[0]].expand(tokens[1:])
    args, rest = parser.parse_known_args(tokens)
    if rest:
        args.parser.error(f"unexpected: {' '.join(rest)}")
    return args


# What the commands measure and print


def _summary(config, scores: Mapping[str, Mapping[str, float]], eval_dataset: str | None) -> str:
    """Return what a distillation came to, and what can be done with it."""
    folder = config.output_dir
    lines = [
        f"The student is in {folder}. On {eval_dataset or 'held-out noise'}:",
        scores_table(scores),
        "Next:",
        f"  noisekd evaluate --model {folder} --dataset FOLDER_OR_HUB_ID --split test",
        f"  noisekd recalibrate --model {folder} --dataset FOLDER_OR_HUB_ID --split train --output-dir FOLDER",
    ]
    if not config.push_to_hub:
        lines.append(f"  noisekd push --model {folder} --repo-id ORGANISATION/NAME")
    return "\n".join(lines)


def _teacher_text(facts: Mapping) -> str:
    from hf_noisekd.models.classifier import format_size

    names = ", ".join(facts["class_names"]) + (", ..." if len(facts["class_names"]) < facts["num_classes"] else "")
    layers = ", ".join(f"{count} {kind}" for kind, count in facts["batch_norm"].items()) or "none"
    header = ["BatchNorm on", "class balance", "flatness", "top class (%)", "classes answered"]
    rows = [
        [
            f"{statistics} statistics",
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
        f"BatchNorm layers: {layers}\n\n"
        f"Answers to {facts['noise_images']:,} noise images:\n"
        f"{_table(header, rows)}\n"
        "Class balance: 1 if noise reaches all classes alike, 0 if only one. Flatness: 1 if an answer is all classes "
        "alike, 0 if it is one class.\n\n"
        f"{facts['teacher']} {facts['verdict']}"
    )


def scores_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Return what [`hf_noisekd.evaluate`] measured as a table for the terminal."""
    units = {
        "accuracy": "accuracy (%)",
        "top5_accuracy": "top-5 (%)",
        "loss": "loss",
        "agreement": "agreement (%)",
        "kl": "KL from teacher",
    }
    columns = [name for name in units if name in scores["running"]]
    rows = [
        [
            f"{statistics} statistics",
            *(f"{values[name]:.2f}" if "%" in units[name] else f"{values[name]:.4f}" for name in columns),
        ]
        for statistics, values in scores.items()
    ]
    return _table(["BatchNorm on", *(units[name] for name in columns)], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (header, *rows)
    )


def _load(source: str, args: argparse.Namespace, **kwargs):
    """Load a trained model, in evaluation mode on the accelerator if there is one."""
    import torch

    import hf_noisekd.models.cifar  # noqa: F401 - registers architectures
    from hf_noisekd.models.loading import load_teacher

    model = load_teacher(source, trust_remote_code=args.trust_remote_code, **kwargs).eval()
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def _check_unused(args: argparse.Namespace) -> None:
    """Refuse an output folder that holds something, before anything is loaded."""
    folder = Path(args.output_dir).expanduser()
    # Other processes may be late, and find what the first one has written.
    if os.environ.get("RANK", "0") != "0":
        return
    if folder.is_dir() and any(folder.iterdir()):
        advice = " Or continue the run in it with --resume-from-checkpoint." if args.command == "distill" else ""
        args.parser.error(f"the output folder {folder} is not empty: choose another --output-dir.{advice}")
    if folder.is_file():
        args.parser.error(f"the output folder {folder} is a file: choose another --output-dir.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: The words after `noisekd`. Default: those of this process.
    """
    prog = "noisekd"
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        prog = args.parser.prog
        return args.run(args)
    except SystemExit as stop:  # of argparse, which has said why
        return stop.code
    except Exception as error:
        if not _says_all(error):
            raise
        print(f"{prog}: error: {in_one_line(error)}", file=sys.stderr)
        return 1


def _says_all(error: Exception) -> bool:
    """Whether the message of an error tells the user enough: of the system, of the Hub, or raised by this package."""
    if isinstance(error, OSError) or type(error).__module__.startswith(("huggingface_hub", "httpx")):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = str(frame.f_globals.get("__package__")).partition(".")[0] == "hf_noisekd"
    return ours and isinstance(error, ValueError | RuntimeError | ImportError)
