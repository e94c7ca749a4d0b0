"""What a student is before its first step: random, a trained model, or its teacher cut down."""

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


class InitialWeights(NamedTuple):
    """What a student was initialised with from its teacher: what was cut, and its weights, on the CPU."""

    facts: StartFacts
    state: dict[str, torch.Tensor]


def initial_student(
    source: str | Path | nn.Module | None, teacher: Teacher, args: NoiseKDConfig
) -> tuple[nn.Module, InitialWeights | None]:
    """Return a student, and what it was initialised with if that is its teacher.

    Args:
        source: A model, or the name of one, as [`load_student`] takes them; None for the teacher cut down.
        teacher: The teacher.
        args: What may be cut, and whether a student given by name may be initialised from the teacher.

    Raises:
        ValueError: There is no such model, or nothing determines the student, or two things do.
    """
    teacher.model.to(args.device)  # where its logits are compared
    facts: StartFacts | None
    if source is None:
        if not args.limits:
            raise ValueError("There is no student: give one, or keep, max_macs or max_params to cut the teacher down.")
        if args.model_init_kwargs:
            raise ValueError("model_init_kwargs are for a student given by its timm name, and there is none.")
        student, facts = shrink(teacher.model, **args.limits, input_size=teacher.input_size)
    elif args.limits:
        raise ValueError(f"There is a student, and {next(iter(args.limits))} to cut the teacher: give one of the two.")
    else:
        student = load_student(
            source, num_classes=teacher.num_classes, input_size=teacher.input_size, model_args=args.model_init_kwargs
        )
        if isinstance(source, nn.Module) or has_weights(str(source)):
            logger.info("The student has the weights that it was given with.")
            return student, None
        if args.init_student == "random":
            logger.info("The student has random weights, by init_student='random'.")
            return student, None
        images = ranking_noise(teacher.model, teacher.input_size, seed=args.seed)
        facts = initialise_from_teacher(student, bare_model(teacher.model), teacher.input_size, images)
    if facts is None:
        logger.info("The student has random weights: its layers do not correspond to those of the teacher.")
        return student, None
    logger.info("The student is initialised from its teacher: %s.", facts)
    return student, InitialWeights(facts, {name: tensor.cpu().clone() for name, tensor in student.state_dict().items()})
