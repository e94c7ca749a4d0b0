"""`noisekd distill`: [`NoiseKDTrainer`] with every option of [`NoiseKDConfig`]."""

import argparse
import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from .options import DATASET, add_model, add_teacher, check_unused
from .parser import CommandParser, as_text, in_one_line
from .stopping import Terminated
from .text import scores_table

if TYPE_CHECKING:
    from hf_noisekd.training.config import NoiseKDConfig
    from hf_noisekd.training.noise_trainer import NoiseKDTrainer


def distill_options(parser: CommandParser) -> None:
    """Add what `HfArgumentParser` makes of the configuration, and the models and images."""
    from transformers import HfArgumentParser, TrainingArguments

    from hf_noisekd.training.config import NoiseKDConfig

    group = parser.add_argument_group("models, images and output")
    add_teacher(group, "trained model to learn from")
    help = "model to train: a timm name, for a new model that fits the teacher, or, to train one further,"
    add_model(group, help, "--student", required=False)
    help = "where the student goes, and its checkpoints; new or empty, unless a run in it is resumed"
    group.add_argument("--output-dir", required=True, metavar="FOLDER", help=help)
    group.add_argument("--eval-dataset", metavar="DATASET", help=f"{DATASET}, to evaluate on (default: held-out noise)")
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
    elif action.dest == "student_args":
        action.nargs, action.type, action.metavar = "+", _argument, "NAME=VALUE"
    elif action.nargs == 0:  # `--no-...` of a switch that is on by default
        action.help = argparse.SUPPRESS
    else:
        action.metavar = "VALUE"
        if list[str] in (kind, *get_args(kind)):  # where it may be a text as well, HfArgumentParser sees that alone
            action.nargs = "+"
        if action.type is string_to_bool:  # of those that may also be None, HfArgumentParser wants a value
            action.nargs, action.const, action.metavar = "?", True, "true|false"
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


def noise_config(args: argparse.Namespace) -> "NoiseKDConfig":
    """Build the [`NoiseKDConfig`] of the options; a value that it refuses is wrong usage."""
    from hf_noisekd.training.config import NoiseKDConfig

    names = NoiseKDConfig.__dataclass_fields__.keys() - {"debug"}
    values = {name: value for name, value in vars(args).items() if name in names}
    if args.student_args is not None:
        values["student_args"] = dict(args.student_args)
    try:
        config = NoiseKDConfig(**values)
    except Exception as error:  # of transformers, whose refusals are of many kinds
        if args.debug:
            raise
        args.parser.error(in_one_line(error))
    if bool(config.limits) == bool(args.student):
        args.parser.error("give either --student, or --keep, --max-macs or --max-params to cut the teacher down.")
    return config


def distill(args: argparse.Namespace) -> int:
    resume = {"true": True, "false": None}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    if not resume:
        check_unused(args, " Or continue the run in it with --resume-from-checkpoint.")
    config = noise_config(args)

    from hf_noisekd.models.loading import load_teacher
    from hf_noisekd.training.noise_trainer import NoiseKDTrainer

    teacher = load_teacher(args.teacher, checkpoint=args.teacher_checkpoint, trust_remote_code=args.trust_remote_code)
    images = None
    if args.eval_dataset is not None:
        from hf_noisekd.image_datasets import load_images

        images = load_images(args.eval_dataset, teacher, split=args.eval_split, label_column=args.eval_label_column)
    try:
        trainer = NoiseKDTrainer(args.student, teacher, config, eval_dataset=images)
    except ValueError as error:  # nothing has been done, and nothing is to be done with these options
        if args.debug:
            raise
        args.parser.error(in_one_line(error))
    if trainer.is_world_process_zero():
        print(f"The student begins {_start_text(trainer, args.student)}.", file=sys.stderr)
    metrics = train_and_measure(trainer, resume)
    if trainer.is_world_process_zero():
        print(_summary(config, metrics, args.eval_dataset, _calibration_text(trainer)))
    return 0


def train_and_measure(trainer: "NoiseKDTrainer", resume: str | bool | None) -> dict[str, float]:
    """Train a student, save it before anything else is done with it, evaluate it, and save what is known then.

    Whatever fails after the training tells where the student is.
    """
    from transformers import TrainerCallback

    class SaveStudent(TrainerCallback):
        """Saves the student after its last step; it will be saved again when more is known of it."""

        done = False

        def on_train_end(self, args, state, control, **kwargs):
            if state.global_step < state.max_steps and args.enable_jit_checkpoint:
                raise Terminated  # whose signal transformers took, to save a checkpoint
            trainer.save_model(_internal_call=True)
            self.done = True

    saving = SaveStudent()
    trainer.add_callback(saving)
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(_internal_call=True)  # without a push
        try:
            metrics = trainer.evaluate()
        finally:
            trainer.save_model(_internal_call=True)
            trainer.create_model_card()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
    except (KeyboardInterrupt, Terminated) as stop:
        stop.args = (_how_to_go_on(trainer, saving.done),)
        raise
    except Exception:
        if saving.done and trainer.is_world_process_zero():
            print(f"The student is trained: it is whole in {trainer.args.output_dir}.", file=sys.stderr)
        raise
    return metrics


def _how_to_go_on(trainer: "NoiseKDTrainer", is_trained: bool) -> str:
    """Return the rest of the sentence that begins with "interrupted"."""
    from hf_noisekd.training.checkpoints import find_whole_checkpoint

    folder = trainer.args.output_dir
    if is_trained:
        return f" after the training: the student is whole in {folder}, and `noisekd evaluate` measures it."
    text = f" at step {trainer.state.global_step:,}: "
    if checkpoint := find_whole_checkpoint(folder, trainer.model):
        return f"{text}the same command with --resume-from-checkpoint goes on from {checkpoint}."
    deleting = f" after deleting {folder}" if any(Path(folder).iterdir()) else ""
    return f"{text}there is no checkpoint yet. Begin anew with the same command{deleting}."


def _start_text(trainer: "NoiseKDTrainer", student: str) -> str:
    from hf_noisekd.models.loading import has_weights

    if trainer.start:
        return f"as its teacher: {trainer.start.facts}"
    if has_weights(student):
        return "as it was trained"
    wanted = trainer.args.init_student == "random"
    return "at random" if wanted else "at random: its layers do not correspond to those of the teacher"


def _calibration_text(trainer: "NoiseKDTrainer") -> str:
    """Return what the student's running statistics are of, and the agreement that was measured without data."""
    from hf_noisekd.models.batch_norm import has_batch_norm
    from hf_noisekd.training.ending import HELD_OUT

    images, made = trainer.calibration_images, trainer.provenance()
    if not has_batch_norm(trainer.model):
        return "It has no BatchNorm layers, and reads single images."
    if images is None and made.start and not made.start.healed:
        return "Its running statistics are its teacher's, so it answers single images."
    if images is None and made.batch_norm == "running":
        return (
            "Its running statistics are those of the training noise. They hold for images as well, as far as its "
            "teacher answered noise by its own, so it answers single images."
        )
    if images is None:
        return (
            "Its running statistics are those of the training noise. Read it in batches, by their own statistics, or "
            "re-estimate them with `noisekd recalibrate`."
        )
    measured = next(one for one in trainer.record().evaluations if one.dataset == HELD_OUT)
    return (
        f"Its running statistics are of {len(images):,} images made without data, so it answers single images. To "
        f"{measured.running['agreement']:.1f} % of {measured.images:,} other such images it gives its teacher's answer."
    )


def _summary(config: "NoiseKDConfig", metrics: dict[str, float], eval_dataset: str | None, calibration: str) -> str:
    """Return what a distillation came to, and what can be done with it."""
    scores = {
        statistics: {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        for statistics, prefix in (("running", "eval_running_"), ("batch", "eval_batch_"))
    }
    folder = config.output_dir
    text = (
        f"The student is in {folder}. On {eval_dataset or 'held-out noise'}:\n{scores_table(scores)}\n{calibration}\n"
        f"Next:\n  noisekd evaluate --model {folder} --dataset FOLDER_OR_HUB_ID --split test"
    )
    return text if config.push_to_hub else f"{text}\n  noisekd push --model {folder} --repo-id ORGANISATION/NAME"
