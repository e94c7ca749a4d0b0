"""`noisekd distill`: [`hf_noisekd.distill`] with every option of [`NoiseKDConfig`]."""

import argparse
import ast
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from . import options
from .parser import CommandParser, as_text
from .stopping import Terminated
from .text import scores_table

if TYPE_CHECKING:
    from hf_noisekd.record.schema import Record
    from hf_noisekd.training.noise_trainer import NoiseKDTrainer

LOW_AGREEMENT = 80.0  # percent, below which a student is worth more effort


def distill_options(parser: CommandParser) -> None:
    """Add what `HfArgumentParser` makes of the configuration, and the models and images."""
    from transformers import HfArgumentParser, TrainingArguments

    from hf_noisekd import NoiseKDConfig

    group = parser.add_argument_group("models, images and output")
    options.add_teacher(group, "trained model to learn from")
    help = "model to train: a timm name, for a new model that fits the teacher, or, to train one further,"
    options.add_model(group, help, "--student", required=False)
    options.add_images(
        group, "to choose what is cut, repair it and train it, at least 16, of which up to 512 are used", column=False
    )
    help = "where the student goes, and its checkpoints; new or empty, unless a run in it is resumed"
    group.add_argument("--output-dir", required=True, metavar="FOLDER", help=help)
    help = f"{options.DATASET}, to evaluate on (default: held-out images of --images, or noise)"
    group.add_argument("--eval-dataset", metavar="DATASET", help=help)
    group.add_argument("--eval-split", default="test", metavar="SPLIT", help="its split (default: test)")
    group.add_argument("--eval-label-column", metavar="NAME", help="its column of classes, where it has several")
    own = parser.add_argument_group("noise distillation", "Options of this package, or with a default of its own.")
    other = parser.add_argument_group("training", "Options of transformers' TrainingArguments.")
    declared, inherited = NoiseKDConfig.__dataclass_fields__, TrainingArguments.__dataclass_fields__
    actions = HfArgumentParser(NoiseKDConfig, add_help=False)._actions
    first, kinds = list(NoiseKDConfig.__annotations__), get_type_hints(NoiseKDConfig)
    for action in sorted(actions, key=lambda action: first.index(action.dest) if action.dest in first else len(first)):
        if action.dest not in ("output_dir", "debug"):  # the other `--debug` here is that of all commands
            is_own = declared[action.dest] is not inherited.get(action.dest)
            (own if is_own else other)._add_action(_shown(action, kinds[action.dest]))


def _shown(action: argparse.Action, kind: object) -> argparse.Action:
    """Return an action of `HfArgumentParser`, of a field of a type, as users write it and with its default."""
    from transformers.hf_argparser import string_to_bool

    action.option_strings = [option for option in action.option_strings if "_" not in option]
    if action.dest == "resume_from_checkpoint":
        # By its type it takes a folder, but the Trainer takes True as well.
        action.nargs, action.const, action.metavar = "?", "true", "FOLDER"
        action.help = "continue the run in --output-dir from its last checkpoint, or from the checkpoint FOLDER"
    elif action.dest == "model_init_kwargs":
        action.option_strings = ["--student-args"]
        action.nargs, action.type, action.metavar = "+", _argument, "NAME=VALUE"
    elif action.nargs == 0:  # `--no-...` of a switch that is on by default
        action.help = argparse.SUPPRESS
    else:
        action.metavar = "VALUE"
        if list[str] in (kind, *get_args(kind)):  # where it may be a text as well, HfArgumentParser sees that alone
            action.nargs = "+"
        if action.type is string_to_bool:  # of those that may also be None, HfArgumentParser wants a value
            action.nargs, action.const, action.metavar = "?", True, "true|false"
        if action.dest in ("max_macs", "max_params"):
            action.type = options.count
        default = "" if action.default in (None, "") else f" (default: {as_text(action.default)})"
        action.help = (action.help or "") + default
    return action


def _argument(text: str) -> tuple[str, object]:
    """Read `name=value`; what is no literal of Python is a text."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value, such as width=32")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of [`NoiseKDConfig`] among those of the command."""
    from hf_noisekd import NoiseKDConfig

    names = NoiseKDConfig.__dataclass_fields__.keys() - {"debug", "output_dir", "resume_from_checkpoint"}
    values = {name: value for name, value in vars(args).items() if name in names}
    if args.model_init_kwargs is not None:
        values["model_init_kwargs"] = dict(args.model_init_kwargs)
    return values


def distill(args: argparse.Namespace) -> int:
    """Train a student; see [`hf_noisekd.distill`]."""
    from hf_noisekd import distill
    from hf_noisekd.workflows.distillation import how_to_go_on

    resume = {"true": True, "false": None}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    trainer = distill(
        args.teacher,
        args.student,
        output_dir=args.output_dir,
        teacher_checkpoint=args.teacher_checkpoint,
        eval_dataset=args.eval_dataset,
        eval_split=args.eval_split,
        eval_label_column=args.eval_label_column,
        images=args.images,
        images_split=args.images_split,
        resume_from_checkpoint=resume,
        trust_remote_code=args.trust_remote_code,
        **config_options(args),
    )
    if trainer.stopped_by_signal:
        raise Terminated(how_to_go_on(trainer))
    if trainer.is_world_process_zero():
        print(_summary(trainer, args.eval_dataset))
    return 0


def _statistics_text(record: "Record") -> str:
    """Return what the student's running statistics are of, and whether it is for single images."""
    made: Any = record.noisekd
    if not record.model.has_batch_norm:
        return "It has no BatchNorm layers, and classifies single images."
    if made.batch_norm == "batch":
        advice = "Use it in batches, with batch statistics, or re-estimate them with `noisekd recalibrate --images`."
        return f"Its running statistics are those of the training noise. {advice}"
    of = "those of the training noise, which hold for images as well"
    if made.noise is None:
        of = "its teacher's" if made.start else "those of the images that it was trained on"
    without_data = f"{made.calibration.images:,} images made without data" if made.calibration else ""
    if made.recalibration:
        of = f"of the given images{' and ' * bool(without_data)}{without_data}"
    elif made.calibration:
        of = f"of {without_data}"
    elif made.start and not made.start.training_helped:
        of = "its teacher's"
    size = ""
    if made.start and made.start.teacher_input_size:
        taken = "x".join(map(str, record.model.input_size or ()))
        size = (
            f" It takes images of {taken}, smaller than its teacher's, on which that keeps "
            f"{made.start.size_agreement:.0f} % of its predictions."
        )
    return f"Its running statistics are {of}: it is for single images.{size}"


def _quality_text(trainer: "NoiseKDTrainer", record: "Record") -> str:
    """Return how often the student agrees with its teacher, and, where that is seldom, what raises it."""
    made: Any = record.noisekd
    start = made.start
    if start and start.teacher_input_size and not (start.cut or start.removed_blocks):
        return "It is its whole teacher otherwise, so agreement with that on such images says nothing."
    held_out = [one for one in record.evaluations if one.dataset.startswith("held-out")]
    measured = (held_out or record.evaluations)[-1]  # the last is that of the end of the training
    agreement = measured.scores(made.batch_norm)["agreement"]
    text = (
        f"It predicts the class of its teacher for {agreement:.1f} % of {measured.images:,} images "
        f"({measured.dataset})."
    )
    if agreement >= LOW_AGREEMENT:
        return text
    args, length = trainer.args, f"more --max-steps (now {made.steps:,})"
    if args.max_hours:
        length = f"more --max-hours (now {args.max_hours:g})"
    other = "a larger student" if trainer.start else "a student of its teacher's kind"
    share = next((f"a larger --{name.replace('_', '-')}" for name in args.limits), other)
    images = "more unlabelled images" if made.given_images else "unlabelled images of its task (--images FOLDER)"
    return f"{text} That is low. What raises it: {length}, {share}, or {images}."


def _summary(trainer: "NoiseKDTrainer", eval_dataset: str | None) -> str:
    """Return what a distillation came to, and what can be done with it."""
    folder = trainer.args.output_dir
    record = trainer.record()
    made: Any = record.noisekd
    scores, default = record.evaluations[0], "held-out given images" if made.given_images else "held-out noise"
    text = (
        f"The student is in {folder}. On {eval_dataset or default}:\n"
        f"{scores_table({'running': scores.running, 'batch': scores.batch})}\n{_statistics_text(record)}\n"
        f"{_quality_text(trainer, record)}\n"
        f"Next:\n  noisekd evaluate --model {folder} --dataset FOLDER_OR_HUB_ID --split test"
    )
    if record.noisekd and record.noisekd.batch_norm == "running":  # an ONNX file has no others
        text += f"\n  noisekd export --model {folder} --output student.onnx"
    return text if trainer.args.push_to_hub else f"{text}\n  noisekd push --model {folder} --repo-id ORGANISATION/NAME"
