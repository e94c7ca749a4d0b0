"""From the name of a teacher to a student in a folder, evaluated and with a card."""

import logging
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from hf_noisekd.batches import SizedDataset
from hf_noisekd.image_datasets import load_images
from hf_noisekd.models.classifier import count_parameters
from hf_noisekd.models.cost import count_macs
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.training.checkpoints import find_whole_checkpoint
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.noise_trainer import NoiseKDTrainer
from hf_noisekd.workflows.inputs import UsageError, check_unused, unlabelled_images

logger = logging.getLogger(__name__)

MAX_IMAGES = 512  # that are used of those given by name


def distill(
    teacher: str | Path | nn.Module,
    student: str | Path | nn.Module | None = None,
    *,
    output_dir: str | Path,
    teacher_checkpoint: str | Path | None = None,
    eval_dataset: str | Path | Dataset | None = None,
    eval_split: str = "test",
    eval_label_column: str | None = None,
    images: str | Path | SizedDataset | None = None,
    images_split: str = "train",
    resume_from_checkpoint: str | bool | None = None,
    trust_remote_code: bool = False,
    **options,
) -> NoiseKDTrainer:
    """Distill a teacher into a student with noise, without data: train, save, evaluate, write the card.

    Args:
        teacher: The trained classifier: a timm name, a Hub id, a folder or a module; see [`load_teacher`].
        student: What to train: a timm name, built to fit the teacher and initialised from it where their layers
            correspond, or a model to train further. None cuts the teacher to `keep`, `max_macs` or `max_params`.
        output_dir: Folder of the student, its card and checkpoints; new or empty, unless a run in it is resumed.
        teacher_checkpoint: File of weights for the timm architecture that `teacher` names.
        eval_dataset: Images with labels to evaluate on: a data set, or a name as [`load_images`] takes it. Default:
            held-out `images`, or noise, on which the agreement with the teacher is measured.
        eval_split: Its split.
        eval_label_column: Its column of classes, where it has several.
        images: Unlabelled images of the teacher's task, at least 16, see [`NoiseKDTrainer`]: a data set, or a name as
            [`load_images`] takes it, such as a folder of files, of which up to 512 are drawn. Default: none.
        images_split: Their split.
        resume_from_checkpoint: True, or a checkpoint folder, to go on with an interrupted run.
        trust_remote_code: Run the Python code that a transformers teacher on the Hub brings along.
        **options: Those of [`NoiseKDConfig`], such as `keep=0.5, max_steps=2000`.

    Returns:
        The trainer, with the student in `model`.

    Raises:
        UsageError: Options, models or data sets do not fit, or the folder is in use. It is a `ValueError`.
        ValueError: There is no such teacher or data set.
    """
    if not resume_from_checkpoint:
        check_unused(output_dir, " Or continue the run in it with resume_from_checkpoint.")
    try:
        args = NoiseKDConfig(str(output_dir), **options)
    except Exception as error:  # of transformers, whose refusals are of many kinds
        raise UsageError(str(error) or type(error).__name__) from error
    if bool(args.limits) == (student is not None):
        raise UsageError("Give either a student, or keep=0.5, max_macs or max_params to cut the teacher down.")
    loading: dict = {"checkpoint": teacher_checkpoint, "trust_remote_code": trust_remote_code}
    teacher_model = load_teacher(teacher, input_size=args.input_size, **loading)
    if isinstance(eval_dataset, str | Path):
        eval_dataset = load_images(eval_dataset, teacher_model, split=eval_split, label_column=eval_label_column)
    if isinstance(images, str | Path):
        images = unlabelled_images(images, teacher_model, split=images_split, at_most=MAX_IMAGES)
    try:
        trainer = NoiseKDTrainer(student, teacher_model, args, eval_dataset=eval_dataset, images=images)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return _train(trainer, resume_from_checkpoint)


def _sizes(trainer: NoiseKDTrainer) -> str:
    """Return how large teacher and student are, as a sentence."""
    size = trainer.teacher.input_size
    smaller_of = trainer.start.facts.teacher_input_size if trainer.start else None
    channels, height, width = smaller_of or size
    of_teacher, own = count_parameters(trainer.teacher_model), count_parameters(trainer.model)
    macs, own_macs = (
        count_macs(model, taken)[""]
        for model, taken in ((trainer.teacher_model, (channels, height, width)), (trainer.model, size))
    )
    return (
        f"The teacher has {of_teacher:,} parameters and {macs / 1e6:.4g} M multiply-adds for an image, the student "
        f"{own:,} ({100 * own / of_teacher:.0f} %) and {own_macs / 1e6:.4g} M ({100 * own_macs / max(macs, 1):.0f} %)."
    )


def _train(trainer: NoiseKDTrainer, resume_from_checkpoint: str | bool | None) -> NoiseKDTrainer:
    """Train, evaluate, write the card and push; an interruption carries the way to go on in its message."""
    logger.info("%s", _sizes(trainer))
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        if trainer.stopped_by_signal:
            return trainer
        try:
            trainer.evaluate()
        finally:
            trainer.save_model(_internal_call=True)  # without a push
            trainer.create_model_card()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
    except Exception:
        if trainer.is_saved and trainer.is_world_process_zero():
            logger.warning("The student is trained: it is whole in %s.", trainer.args.output_dir)
        raise
    except BaseException as stop:  # of Ctrl-C, and of a scheduler
        stop.args = (how_to_go_on(trainer),)
        raise
    return trainer


def how_to_go_on(trainer: NoiseKDTrainer) -> str:
    """Return the rest of the sentence that begins with "interrupted"."""
    folder = trainer.args.output_dir
    if trainer.is_saved:
        return f" after the training: the student is whole in {folder}, and `noisekd evaluate` measures it."
    text = f" at step {trainer.state.global_step:,}: "
    if checkpoint := find_whole_checkpoint(folder, trainer.model):
        return f"{text}the same command with --resume-from-checkpoint goes on from {checkpoint}."
    deleting = f" after deleting {folder}" if any(Path(folder).iterdir()) else ""
    return f"{text}there is no checkpoint yet. Start again with the same command{deleting}."
