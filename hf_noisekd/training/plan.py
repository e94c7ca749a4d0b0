"""What a distillation is to be, settled before its first step: models, arguments and data that fit each other."""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import set_seed
from transformers.trainer_utils import has_length

from hf_noisekd.batches import PixelsDataset, SizedDataset, collate_images
from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.models.batch_norm import check_leaves_stored_statistics
from hf_noisekd.models.classifier import (
    bare_model,
    declare_input_size,
    format_size,
)
from hf_noisekd.models.loading import has_weights, load_student, load_teacher
from hf_noisekd.models.memory import keep_freed_memory
from hf_noisekd.models.preprocessing import input_size_of, take_preprocessing
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.mixed import MixedDataset
from hf_noisekd.record.schema import Provenance, StartFacts
from hf_noisekd.shrinking.cutting import Budget, cut_to_budget, ranking_noise
from hf_noisekd.shrinking.initialisation import computing_like, initialise_from_teacher
from hf_noisekd.shrinking.repair import Cut
from hf_noisekd.shrinking.shrunk import timm_model_of
from hf_noisekd.training.checks import (
    check_bare,
    check_batch_norm_is_local,
    check_eval_datasets,
    check_last_batch,
    check_student,
    check_teacher,
    check_train_noise,
    check_trainer_arguments,
)
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.teacher import Teacher
from hf_noisekd.training.training_data import (
    HELD_OUT_GIVEN,
    at_size,
    breaks_bfloat16,
    calibration_of,
    eval_noise,
    made_before_training,
    mixed_noise,
    needs_stored_statistics,
    on_device,
    train_noise,
    trains_blocks,
)

logger = logging.getLogger(__name__)

RANDOM_LEARNING_RATE = 1e-2
# What is trained already has something to lose, and knows what small images teach. A teacher that is not on the batch
# knows images of full size alone: small ones have other features.
TRAINED_LEARNING_RATE = 3e-3
FROZEN_LEARNING_RATE = 3e-4  # of a repaired one, on images
FULL_SIZE = "1"


class InitialWeights(NamedTuple):
    """What a student was initialised with from its teacher: how that was cut, and its weights, on the CPU."""

    facts: StartFacts
    cut: Cut
    state: dict[str, torch.Tensor]


@dataclasses.dataclass
class Plan:
    """What [`plan_training`] settled."""

    model: nn.Module  # the student
    initial: InitialWeights | None  # what it was initialised with, if from its teacher
    images: CalibrationImages | None  # those that were given, or made without data, or both
    teacher: Teacher
    args: NoiseKDConfig
    train_dataset: Any
    eval_dataset: Any
    counts_steps: bool  # whether the noise needs the number of all steps, which its sizes are shares of
    seconds: float  # that it took to plan
    is_frozen: bool  # whether the student's statistics stay as they are


def plan_training(
    model: str | Path | nn.Module | None,
    teacher_model: str | Path | nn.Module | None,
    args: NoiseKDConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    collate_fn: Callable,
    images: SizedDataset | None = None,
) -> Plan:
    """Return what [`NoiseKDTrainer`] is to do with these arguments, which do not change, or raise its `ValueError`."""
    began_at = time.monotonic()
    check_trainer_arguments(args)
    if args.device.type == "cpu":
        keep_freed_memory()
    teacher_model, input_size = _teacher_and_size(teacher_model, args, train_dataset, collate_fn)
    given = None if images is None else calibration_of(images, teacher_model, args, input_size, collate_fn)
    by_stored = given is not None and needs_stored_statistics(args, teacher_model, given, train_dataset)
    if by_stored and given:
        given.say_problem()
    teacher = _teacher(args, teacher_model, input_size, 0.0 if by_stored else args.teacher_statistics)
    if eval_dataset is not None:
        check_eval_datasets(eval_dataset, teacher, collate_fn)
    set_seed(args.seed)  # before a student given by name gets its random weights
    is_settled = args.input_size or train_dataset is not None or collate_fn is not collate_images
    least_side = 1.0 if is_settled else args.min_side
    images_of = cache(partial(_calibration_images, args, teacher, given, train_dataset))
    student, initial = initial_student(model, teacher, args, images_of, min_side=least_side)
    calibration = None
    if initial and initial.facts.teacher_input_size:
        size = input_size_of(student)
        teacher_model = load_teacher(teacher_model, input_size=size)
        teacher = _teacher(args, teacher_model, size, teacher.statistics)
        check_teacher(teacher_model, size, explicit_size=True)
        args, calibration, eval_dataset = at_size(size, args, images_of(), eval_dataset, is_whole=initial.cut.is_whole)
    is_trained = initial is not None or _is_trained(model, student)
    is_frozen = by_stored and is_trained and _has_statistics_of_images(student, initial)
    if args.input_size is not None:
        declare_input_size(student, teacher.input_size)
    check_student(student, teacher, explicit_size=args.input_size is not None)
    take_preprocessing(student, teacher.model)
    calibration = calibration or images_of()  # after what would refuse the student, as they may take minutes to make
    args = _with_defaults(args, teacher, train_dataset, is_trained=is_trained, freezes=is_frozen)
    if train_dataset is None and calibration and (calibration.given or (initial and not calibration.problem)):
        train_dataset = mixed_noise(args, teacher, calibration, alone=by_stored)
    train_dataset, noise = _train_dataset(args, teacher, train_dataset, student)
    if eval_dataset is None:
        held_out = calibration and calibration.given and PixelsDataset(calibration.held_out.cpu(), HELD_OUT_GIVEN)
        eval_dataset = held_out or eval_noise(args, teacher, noise)
    return Plan(
        model=student,
        initial=initial,
        images=calibration,
        teacher=teacher,
        args=args,
        train_dataset=on_device(train_dataset, args, student, rank=args.process_index),
        eval_dataset=on_device(eval_dataset, args, student, rank=0),
        counts_steps=noise is not None and noise.total_steps is None,
        seconds=time.monotonic() - began_at,
        is_frozen=is_frozen,
    )


def _teacher_and_size(
    source: str | Path | nn.Module | None, args: NoiseKDConfig, train_dataset: Any, collate_fn: Callable
) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the teacher and the size of the training images, once it is known that it can teach on them."""
    if source is None:
        raise ValueError("There is no teacher: give teacher_model, a timm name, a Hub id, a folder or a module.")
    model = load_teacher(source, input_size=args.input_size)
    check_bare(model, "teacher")
    input_size = _training_input_size(args, model, train_dataset, collate_fn)
    check_teacher(model, input_size, explicit_size=args.input_size is not None)
    return model, input_size


def _calibration_images(
    args: NoiseKDConfig, teacher: Teacher, given: CalibrationImages | None, train_dataset: Any
) -> CalibrationImages | None:
    """Return those that were given, or, for a training on noise alone, others, made without data."""
    on_noise = train_dataset is None or isinstance(train_dataset, NoiseDataset)
    if given or not on_noise or isinstance(train_dataset, MixedDataset):
        return given
    return made_before_training(args, teacher)


def _train_dataset(
    args: NoiseKDConfig, teacher: Teacher, train_dataset: Any, model: nn.Module
) -> tuple[Any, NoiseDataset | None]:
    """Return the training data, twice if it is noise, and turn off bfloat16 where that would spoil a training on it."""
    noise = train_noise(args, teacher, train_dataset, (model, teacher.model))
    train_dataset = train_dataset if noise is None else noise
    check_train_noise(train_dataset, args, teacher)
    if breaks_bfloat16(args, model, noise, teacher.input_size):
        args.bf16, args.mixed_precision = False, "no"
    check_last_batch(train_dataset, args)
    return train_dataset, noise


def _teacher(
    args: NoiseKDConfig, model: nn.Module, input_size: tuple[int, int, int], statistics: float | None
) -> Teacher:
    options: dict[str, Any] = {"batch_norm_fraction": args.batch_norm_fraction, "seed": args.seed}
    teacher = Teacher(model, input_size=input_size, statistics=statistics, **options)
    if args.teacher_statistics != 0:
        check_leaves_stored_statistics(model, input_size)
    check_batch_norm_is_local(model, args.world_size)
    return teacher


def initial_student(
    source: str | Path | nn.Module | None,
    teacher: Teacher,
    args: NoiseKDConfig,
    images: Callable[[], CalibrationImages | None] = lambda: None,
    *,
    min_side: float = 1.0,
) -> tuple[nn.Module, InitialWeights | None]:
    """Return a student, and what it was initialised with if that is its teacher.

    `source` is a model, or the name of one, as [`load_student`] takes them; None for the teacher cut down. What is
    initialised from the teacher is repaired on `images`, which are asked for last, as they may have to be made; for
    `min_side` see [`shrink`]. There is a `ValueError` if there is no such model, or nothing determines the student, or
    two things do.
    """
    teacher.model.to(args.device)  # where its logits are compared

    def good() -> CalibrationImages | None:
        some = images()
        return None if some is None or (some.problem and not some.given) else some

    found: Any
    trains = trains_blocks(args)
    if source is None:
        if not args.limits:
            raise ValueError("There is no student: give one, or cut the teacher: keep=0.5, max_macs or max_params.")
        if args.model_init_kwargs:
            raise ValueError("model_init_kwargs are for a student given by its timm name, and there is none.")
        sizes: Any = {"input_size": teacher.input_size, "min_side": min_side}
        Budget.of(timm_model_of(teacher.model), teacher.input_size, **args.limits)  # what it refuses comes first
        student, *found = cut_to_budget(teacher.model, **args.limits, **sizes, images=good(), trains_blocks=trains)
    elif args.limits:
        raise ValueError(f"There is a student, and {next(iter(args.limits))} to cut the teacher: give one of the two.")
    else:
        build = partial(load_student, source, num_classes=teacher.num_classes, input_size=teacher.input_size)
        given = args.model_init_kwargs or {}
        student = build(model_args=given)
        if isinstance(source, nn.Module) or has_weights(str(source)):
            logger.info("The student has the weights that it was given with.")
            return student, None
        if args.init_student == "random":
            logger.info("The student has random weights, by init_student='random'.")
            return student, None
        some = good() or ranking_noise(teacher.model, teacher.input_size, seed=args.seed)
        original = bare_model(teacher.model)
        like = computing_like(original, student, lambda model_args: build(model_args=model_args), given)
        if found := initialise_from_teacher(like, original, teacher.input_size, some, trains_blocks=trains):
            student = like
    if not found:
        logger.info("The student has random weights: its layers do not correspond to those of the teacher.")
        return student, None
    facts, cut = found
    logger.info("The student is initialised from its teacher: %s.", facts)
    return student, InitialWeights(
        facts, cut, {name: tensor.cpu().clone() for name, tensor in student.state_dict().items()}
    )


def _has_statistics_of_images(student: nn.Module, initial: InitialWeights | None) -> bool:
    """Return whether the stored statistics of a trained student hold for images: all of its teacher's, or its own."""
    if initial is None:
        return Provenance.has_statistics_of_images(student)
    return initial.facts.from_teacher == initial.facts.tensors


def _is_trained(source: str | Path | nn.Module | None, model: nn.Module) -> bool:
    """Return whether a student that was given comes with weights, or, as a module, looks like that.

    In new networks the biases of normalisation layers are 0, as every library initialises them.
    """
    if not isinstance(source, nn.Module):
        return source is not None and has_weights(str(source))
    norms = (layer for layer in model.modules() if "norm" in type(layer).__name__.lower())
    return any(bias.any() for layer in norms if torch.is_tensor(bias := getattr(layer, "bias", None)))


def _training_input_size(
    args: NoiseKDConfig, teacher_model: nn.Module, train_dataset: Any, collate_fn: Callable
) -> tuple[int, int, int]:
    """Return the size of the training images: the arguments', the training data's, or the teacher's own."""
    given = None if args.input_size is None else tuple(args.input_size)
    if isinstance(train_dataset, NoiseDataset):
        if given not in (None, train_dataset.input_size):
            raise ValueError(
                f"The NoiseDataset has images of {format_size(train_dataset.input_size)}, and input_size is "
                f"{format_size(given)}: leave input_size out."
            )
        given = train_dataset.input_size
    elif not given and has_length(train_dataset) and not isinstance(train_dataset, IterableDataset):
        given = tuple(collate_fn([train_dataset[0]])["pixel_values"].shape[1:])
    return input_size_of(teacher_model, given)


def _with_defaults(
    args: NoiseKDConfig, teacher: Teacher, train_dataset: Any, *, is_trained: bool, freezes: bool
) -> NoiseKDConfig:
    """Return a copy of the arguments in which the student's initial weights and the teacher decide what nobody did."""
    args = copy.copy(args)
    if args.metric_is_default and not teacher.weight_of_batch:
        args.metric_for_best_model = "running_agreement"
    if args.learning_rate is None:
        of_trained = FROZEN_LEARNING_RATE if freezes else TRAINED_LEARNING_RATE
        args.learning_rate = of_trained if is_trained else RANDOM_LEARNING_RATE
    # A data set of the user's own has sizes of its own.
    if (is_trained or not teacher.weight_of_batch) and args.resolutions is None and train_dataset is None:
        args.resolutions = FULL_SIZE
    return args
