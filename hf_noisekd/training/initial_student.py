"""What a student is before its first step: random, a trained model, or its teacher cut down."""

import copy
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from hf_noisekd.models.classifier import bare_model
from hf_noisekd.models.loading import has_weights, load_student
from hf_noisekd.record.schema import StartFacts
from hf_noisekd.shrinking.cutting import ranking_noise, shrink
from hf_noisekd.shrinking.initialisation import initialise_from_teacher
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)

RANDOM_LEARNING_RATE = 1e-2
# A cut teacher has something to lose, and knows already what small images teach. A teacher that is not on the batch
# knows images of full size alone: small ones have other features.
CUT_LEARNING_RATE = 3e-3
FULL_SIZE = "1"


class CutTeacher(NamedTuple):
    """A student that began as its teacher: what was cut, and its weights then, on the CPU."""

    facts: StartFacts
    state: dict[str, torch.Tensor]


def initial_student(
    source: str | Path | nn.Module | None, teacher: Teacher, args: NoiseKDConfig
) -> tuple[nn.Module, CutTeacher | None]:
    """Return a student, and what it began as if that is its teacher.

    Args:
        source: A model, or the name of one, as [`load_student`] takes them; None for the teacher cut down.
        teacher: The teacher.
        args: What may be cut, and whether a student given by name may begin as the teacher.

    Raises:
        ValueError: There is no such model, or nothing says what student is wanted, or two things do.
    """
    teacher.model.to(args.device)  # where its answers are compared
    if source is None:
        if not args.limits:
            raise ValueError("There is no student: name one, or give keep, max_macs or max_params to cut the teacher.")
        if args.student_args:
            raise ValueError("student_args are for a student given by its timm name, and there is none.")
        student, facts = shrink(teacher.model, **args.limits, input_size=teacher.input_size)
    elif args.limits:
        raise ValueError(f"There is a student, and {next(iter(args.limits))} to cut the teacher: give one of the two.")
    else:
        student = load_student(
            source, num_classes=teacher.num_classes, input_size=teacher.input_size, model_args=args.student_args
        )
        if isinstance(source, nn.Module) or has_weights(str(source)) or args.init_student == "random":
            return student, None
        images = ranking_noise(teacher.model, teacher.input_size, seed=args.seed)
        begun = initialise_from_teacher(student, bare_model(teacher.model), teacher.input_size, images)
        if begun is None:
            logger.info("The student begins at random: its layers do not correspond to those of the teacher.")
            return student, None
        facts = begun
    logger.info("The student begins as its teacher: %s.", facts)
    return student, CutTeacher(facts, {name: tensor.cpu().clone() for name, tensor in student.state_dict().items()})


def with_defaults_of(
    start: CutTeacher | None, teacher: Teacher, args: NoiseKDConfig, train_dataset: object
) -> NoiseKDConfig:
    """Return arguments with what goes by start and teacher: the learning rate, the sizes, and the metric of the best.

    A data set of the user's own, `train_dataset`, has sizes of its own.
    """
    args = copy.copy(args)
    if args.metric_is_default and not teacher.weight_of_batch:
        args.metric_for_best_model = "running_agreement"
    if args.learning_rate is None:
        args.learning_rate = RANDOM_LEARNING_RATE if start is None else CUT_LEARNING_RATE
    if (start or not teacher.weight_of_batch) and args.resolutions is None and train_dataset is None:
        args.resolutions = FULL_SIZE
    return args
