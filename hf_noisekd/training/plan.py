"""What a distillation is to be, settled before its first step: models, arguments and data that fit each other."""

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import set_seed
from transformers.trainer_utils import has_length

from hf_noisekd.batches import PixelsDataset, SizedDataset, dataset_name
from hf_noisekd.calibration.calibration_images import CalibrationImages, given_images
from hf_noisekd.models.batch_norm import check_leaves_stored_statistics, stored_statistics
from hf_noisekd.models.classifier import bare_model, format_size, logits_of_blanks
from hf_noisekd.models.cpu_faults import layer_that_bfloat16_breaks, training_memory_format
from hf_noisekd.models.loading import has_weights, load_student, load_teacher
from hf_noisekd.models.memory import keep_freed_memory
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.mixed import MixedDataset
from hf_noisekd.record.schema import StartFacts
from hf_noisekd.shrinking.cutting import cut_to_budget, ranking_noise
from hf_noisekd.shrinking.initialisation import initialise_from_teacher
from hf_noisekd.shrinking.repair import Cut
from hf_noisekd.training.checks import (
    check_batch_norm_is_local,
    check_eval_datasets,
    check_last_batch,
    check_models,
    check_train_noise,
)
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)

RANDOM_LEARNING_RATE = 1e-2
# A cut teacher has something to lose, and knows already what small images teach. A teacher that is not on the batch
# knows images of full size alone: small ones have other features.
CUT_LEARNING_RATE = 3e-3
FROZEN_LEARNING_RATE = 3e-4  # of a repaired one, on images
IMAGES_SHARE = 0.5  # of the steps, where images are given
FULL_SIZE = "1"
EVAL_PIXELS = 2**21  # of the noise to evaluate on
MIN_IMAGES = 16  # that a user gives
HELD_OUT_GIVEN = "held-out given images"


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
    images: CalibrationImages | None  # those that were given
    teacher: Teacher
    args: NoiseKDConfig
    train_dataset: Any
    eval_dataset: Any
    counts_steps: bool  # whether the noise needs the number of all steps, which its sizes are shares of
    began_at: float  # of `time.monotonic`
    frozen_cut: Cut | None  # how the student was cut, if its statistics stay as they are: its teacher's


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
    if args.device.type == "cpu":
        keep_freed_memory()
    if teacher_model is None:
        raise ValueError("There is no teacher: give teacher_model, a timm name, a Hub id, a folder or a module.")
    teacher_model = load_teacher(teacher_model)
    input_size = _training_input_size(args, teacher_model, train_dataset, collate_fn)
    given = None if images is None else _given(images, teacher_model, input_size, collate_fn)
    by_stored = given is not None and _needs_stored_statistics(args, teacher_model, given, train_dataset)
    teacher = Teacher(
        teacher_model,
        input_size=input_size,
        statistics=0.0 if by_stored else args.teacher_statistics,
        batch_norm_fraction=args.batch_norm_fraction,
        seed=args.seed,
    )
    if args.teacher_statistics != 0:
        check_leaves_stored_statistics(teacher_model, teacher.input_size)
    check_batch_norm_is_local(teacher_model, args.world_size)
    set_seed(args.seed)  # before a student given by name gets its random weights
    model, initial = initial_student(model, teacher, args, given)
    frozen_cut = initial.cut if by_stored and initial else None
    check_models(model, teacher, explicit_size=args.input_size is not None)
    args = _with_defaults(args, teacher, initial, train_dataset, freezes=frozen_cut is not None)
    if train_dataset is None and given is not None:
        train_dataset = _mixed(args, teacher, given, share=1.0 if by_stored else IMAGES_SHARE)
    noise = _train_noise(args, teacher, train_dataset, (model, teacher_model))
    train_dataset = train_dataset if noise is None else noise
    check_train_noise(train_dataset, args, teacher)
    if _breaks_bfloat16(args, model, noise, teacher.input_size):
        args.bf16, args.mixed_precision = False, "no"
    check_last_batch(train_dataset, args)
    if eval_dataset is None:
        held_out = given and PixelsDataset(given.held_out.cpu(), HELD_OUT_GIVEN)
        eval_dataset = held_out or _eval_noise(args, teacher, noise)
    check_eval_datasets(eval_dataset, teacher, collate_fn)
    memory_format = training_memory_format(model, args.device)
    return Plan(
        model=model,
        initial=initial,
        images=given,
        teacher=teacher,
        args=args,
        train_dataset=_on_device(train_dataset, args, memory_format, rank=args.process_index),
        eval_dataset=_on_device(eval_dataset, args, memory_format, rank=0),
        counts_steps=noise is not None and noise.total_steps is None,
        began_at=began_at,
        frozen_cut=frozen_cut,
    )


def initial_student(
    source: str | Path | nn.Module | None,
    teacher: Teacher,
    args: NoiseKDConfig,
    images: CalibrationImages | None = None,
) -> tuple[nn.Module, InitialWeights | None]:
    """Return a student, and what it was initialised with if that is its teacher.

    `source` is a model, or the name of one, as [`load_student`] takes them; None for the teacher cut down. What is
    initialised from the teacher is repaired on `images`, if some are given. There is a `ValueError` if there is no such
    model, or nothing determines the student, or two things do.
    """
    teacher.model.to(args.device)  # where its logits are compared
    found: Any
    if source is None:
        if not args.limits:
            raise ValueError("There is no student: give one, or keep, max_macs or max_params to cut the teacher down.")
        if args.model_init_kwargs:
            raise ValueError("model_init_kwargs are for a student given by its timm name, and there is none.")
        student, *found = cut_to_budget(teacher.model, **args.limits, input_size=teacher.input_size, images=images)
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
        some = images or ranking_noise(teacher.model, teacher.input_size, seed=args.seed)
        found = initialise_from_teacher(student, bare_model(teacher.model), teacher.input_size, some)
    if not found:
        logger.info("The student has random weights: its layers do not correspond to those of the teacher.")
        return student, None
    facts, cut = found
    logger.info("The student is initialised from its teacher: %s.", facts)
    return student, InitialWeights(
        facts, cut, {name: tensor.cpu().clone() for name, tensor in student.state_dict().items()}
    )


def pixels_of(images: SizedDataset, input_size: tuple[int, int, int], collate_fn: Callable) -> torch.Tensor:
    """Return unlabelled images of a user as pixels `[N, C, H, W]`, or raise a `ValueError` where they do not fit."""
    if len(images) < MIN_IMAGES:
        raise ValueError(f"There are {len(images)} images: give at least {MIN_IMAGES}, better some hundreds.")
    pixel_values = collate_fn([images[index] for index in range(len(images))])["pixel_values"]
    if (found := tuple(pixel_values.shape[1:])) != input_size:
        raise ValueError(
            f"The images have the size {format_size(found)}, and the student is to take {format_size(input_size)}: "
            "preprocess them as for it."
        )
    return pixel_values


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


def _given(
    images: SizedDataset, teacher_model: nn.Module, input_size: tuple[int, int, int], collate_fn: Callable
) -> CalibrationImages:
    """Return unlabelled images of a user as calibration images."""
    return given_images(teacher_model, pixels_of(images, input_size, collate_fn), dataset_name(images))


def _needs_stored_statistics(
    args: NoiseKDConfig, teacher_model: nn.Module, given: CalibrationImages, train_dataset: Any
) -> bool:
    """Return whether to train on the given images alone, with the BatchNorm statistics that the teacher stores.

    So it is where those of the images spoil the teacher itself. Those of noise do so even more.
    """
    decides = train_dataset is None and args.teacher_statistics is None and args.batch_norm_fraction == 1
    return decides and bool(stored_statistics(teacher_model)) and given.problem is not None


def _mixed(args: NoiseKDConfig, teacher: Teacher, given: CalibrationImages, *, share: float) -> NoiseDataset:
    """Return noise as of the arguments, and the given images, without those held out, in a share of the steps."""
    name = given.given.dataset if given.given else None
    images = PixelsDataset(given.pixel_values.cpu(), name, augments=True)
    return MixedDataset.for_model(
        teacher.model, images=images, share=share, **_noise_batches(args), **_noise_arguments(args, teacher)
    )


def _noise_batches(args: NoiseKDConfig) -> dict[str, Any]:
    return {
        "resolutions": args.resolutions,
        "batch_size": args.per_device_train_batch_size,
        "num_steps": args.steps_per_epoch,
    }


def _with_defaults(
    args: NoiseKDConfig, teacher: Teacher, initial: InitialWeights | None, train_dataset: Any, *, freezes: bool
) -> NoiseKDConfig:
    """Return a copy of the arguments in which the student's initialisation and the teacher decide what nobody did."""
    args = copy.copy(args)
    if args.metric_is_default and not teacher.weight_of_batch:
        args.metric_for_best_model = "running_agreement"
    if args.learning_rate is None:
        of_cut = FROZEN_LEARNING_RATE if freezes else CUT_LEARNING_RATE
        args.learning_rate = RANDOM_LEARNING_RATE if initial is None else of_cut
    # A data set of the user's own has sizes of its own.
    if (initial or not teacher.weight_of_batch) and args.resolutions is None and train_dataset is None:
        args.resolutions = FULL_SIZE
    return args


def _train_noise(
    args: NoiseKDConfig, teacher: Teacher, train_dataset: Any, models: Sequence[nn.Module]
) -> NoiseDataset | None:
    """Return the training noise in sizes that all models take, found by trial; None for a data set of real images."""
    if train_dataset is None:
        train_dataset = NoiseDataset.for_model(teacher.model, **_noise_batches(args), **_noise_arguments(args, teacher))
    if not isinstance(train_dataset, NoiseDataset):
        return None
    noise = copy.copy(train_dataset)
    channels, *full_size = noise.input_size
    refused: list | None = None
    while (smaller := [size for size, _ in noise.image_sizes() if [*size] != full_size]) == refused or not all(
        _takes(model, (channels, *size)) for size in smaller for model in models
    ):
        refused = smaller
        noise.size_multiple *= 2
    if noise.size_multiple > 1:
        found = ", ".join(format_size(size) for size, _ in noise.image_sizes())
        logger.warning("The noise has images of %s pixels: the models do not take its own smaller sizes.", found)
    return noise


def _takes(model: nn.Module, input_size: tuple[int, int, int]) -> bool:
    try:
        logits_of_blanks(model, input_size, "model")
    except ValueError:
        return False
    return True


def _eval_noise(args: NoiseKDConfig, teacher: Teacher, train_noise: NoiseDataset | None) -> NoiseDataset:
    """Return held-out noise, of the kind of the training noise if there is any."""
    noise = _noise_arguments(args, teacher)
    if train_noise is not None:
        noise |= {key: getattr(train_noise, key) for key in ("distribution", "mean", "std")}
    size = args.per_device_eval_batch_size
    number = args.eval_noise_batches or min(8, max(1, EVAL_PIXELS // (size * math.prod(teacher.input_size[1:]))))
    batches = {"batch_size": size, "num_steps": number}
    return NoiseDataset.for_model(teacher.model, held_out=True, **batches, **noise)


def _noise_arguments(args: NoiseKDConfig, teacher: Teacher) -> dict[str, Any]:
    std = {} if args.noise_std is None else {"std": args.noise_std}
    return {"input_size": teacher.input_size, "seed": args.seed, "distribution": args.noise, **std}


def _breaks_bfloat16(
    args: NoiseKDConfig, model: nn.Module, noise: NoiseDataset | None, input_size: tuple[int, int, int]
) -> bool:
    """Return whether a CPU would train the student in bfloat16 wrongly on images so small, and warn of it."""
    if args.mixed_precision != "bf16" or args.device.type != "cpu":
        return False
    sizes = {input_size[1:]} if noise is None else {size for size, _ in noise.image_sizes()}
    for size in sorted(sizes):
        if layer := layer_that_bfloat16_breaks(model, (input_size[0], *size)):
            logger.warning(
                "The student is trained in float32: its layer %s gets maps so small from images of %s that a CPU "
                "computes its gradient in bfloat16 wrongly. Larger images, or noise of full size only "
                "(resolutions='1'), may spare it that.",
                layer,
                format_size((input_size[0], *size)),
            )
            return True
    return False


def _on_device(dataset: Any, args: NoiseKDConfig, memory_format: torch.memory_format, *, rank: int) -> Any:
    """Return noise that is drawn for a process in the form its steps want; other data sets as they are."""
    if isinstance(dataset, dict):
        return {name: _on_device(value, args, memory_format, rank=rank) for name, value in dataset.items()}
    if not isinstance(dataset, NoiseDataset):
        return dataset
    dataset = copy.copy(dataset)
    dataset.device, dataset.rank = args.device, rank
    dataset.dtype = torch.bfloat16 if args.bf16 else torch.float32
    dataset.memory_format = memory_format
    return dataset
