"""What a distillation trains and is evaluated on: noise in the sizes that its models take, and images of a user's."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from hf_noisekd.batches import DrawnDataset, PixelsDataset, ResizedDataset, SizedDataset, dataset_name
from hf_noisekd.calibration.calibration_images import (
    STEPS,
    CalibrationImages,
    calibration_images,
    default_held_out,
    least_images,
)
from hf_noisekd.calibration.given_images import check_enough, given_images, with_made_images
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import format_size, logits_of_blanks
from hf_noisekd.models.cpu_faults import layer_that_bfloat16_breaks, training_memory_format
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.mixed import MixedDataset
from hf_noisekd.shrinking.reconstruction import MAX_BATCH
from hf_noisekd.shrinking.reconstruction import STEPS as BLOCK_STEPS
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.cost import cost_of_matching, say_what_matching_takes
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)

SHARE = 0.15  # of the cost of a training that calibration images may have
COST_OF_TRAINING = 2.5 / 3  # on an image, as a share of a matching step's: the student has half of its teacher's
MADE_SHARE, GIVEN_SHARE = 0.25, 0.5  # of the steps, with calibration images, and with given ones
IMAGES_OF_SHARE = 256  # for that share; with fewer it is smaller
EVAL_PIXELS = 2**21  # of the noise to evaluate on
HELD_OUT_GIVEN = "held-out given images"


def calibration_of(
    images: SizedDataset,
    teacher_model: nn.Module,
    args: NoiseKDConfig,
    input_size: tuple[int, int, int],
    collate_fn: Callable,
) -> CalibrationImages:
    """Return unlabelled images of a user as calibration images, and beside few of them others, made without data."""
    given = given_images(teacher_model, pixels_of(images, input_size, collate_fn), dataset_name(images))
    options = _matching(args, teacher_model, input_size)
    return of_first_process(with_made_images(teacher_model, given, args.num_calibration_images, **options), args)


def made_before_training(args: NoiseKDConfig, teacher: Teacher) -> CalibrationImages | None:
    """Return calibration images to cut, repair, train and compare on; None if none are wanted, or can be made."""
    if not args.num_calibration_images or not stored_statistics(teacher.model):
        return None
    wanted, options = args.num_calibration_images, _matching(args, teacher.model, teacher.input_size)
    most = max(options["max_image_steps"] / STEPS, least_images(teacher.input_size))
    number = int(min(wanted + default_held_out(wanted), most))
    say_what_matching_takes(teacher.model, teacher.input_size, number, STEPS, STEPS)
    return of_first_process(calibration_images(teacher.model, wanted, **options), args)


def _matching(args: NoiseKDConfig, teacher_model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """Return how calibration images are made before a training."""
    shows = not args.disable_tqdm and args.process_index == 0
    limit = _most_image_steps(args, teacher_model, input_size)
    return {"max_image_steps": limit, "input_size": input_size, "seed": args.seed, "show_progress": shows}


def _most_image_steps(args: NoiseKDConfig, teacher_model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Return how many calibration images times steps take 15 % of the training.

    For a time there are all images or the fewest: a resumed run must make the same ones, whatever it measures.
    """
    if args.max_hours and stored_statistics(teacher_model):
        number = args.num_calibration_images + default_held_out(args.num_calibration_images)
        takes = number * STEPS * cost_of_matching(teacher_model, input_size)
        return math.inf if takes <= SHARE * 3600 * args.max_hours else 0.0
    return SHARE * COST_OF_TRAINING * _trained_images(args)


def trains_blocks(args: NoiseKDConfig) -> bool:
    """Return whether blocks are trained one by one before the training: a training on more images does as much."""
    return not args.max_hours and _trained_images(args) < BLOCK_STEPS * MAX_BATCH


def _trained_images(args: NoiseKDConfig) -> float:
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * args.steps_per_epoch
    return steps * args.train_batch_size * args.gradient_accumulation_steps


def of_first_process(images: CalibrationImages, args: NoiseKDConfig) -> CalibrationImages:
    """Return the images of process 0: those of others are rounded otherwise on GPUs, and might lead to another cut."""
    if args.world_size == 1:
        return images
    [found] = broadcast_object_list([images.to("cpu")])
    return found.to(args.device)


def pixels_of(images: SizedDataset, input_size: tuple[int, int, int], collate_fn: Callable) -> torch.Tensor:
    """Return unlabelled images of a user as pixels `[N, C, H, W]`, or raise a `ValueError` where they do not fit."""
    check_enough(len(images))
    pixel_values = collate_fn([images[index] for index in range(len(images))])["pixel_values"]
    if (found := tuple(pixel_values.shape[1:])) != input_size:
        raise ValueError(
            f"The images have the size {format_size(found)}, and the student is to take {format_size(input_size)}: "
            "preprocess them as for it."
        )
    return pixel_values


def at_size(
    size: tuple[int, int, int],
    args: NoiseKDConfig,
    images: CalibrationImages | None,
    eval_dataset: Any,
    *,
    is_whole: bool,
) -> tuple[NoiseKDConfig, CalibrationImages | None, Any]:
    """Return arguments, images and evaluation data for smaller images than those of the teacher.

    A student that `is_whole`, its teacher on smaller images, has one step: there is nothing to learn.
    """
    args = copy.copy(args)
    args.input_size = list(size)
    if is_whole:
        logger.info("The student is the whole teacher, on smaller images: there is nothing to train.")
        args.max_steps, args.max_hours = 1, None

    def smaller(dataset: Any) -> Any:
        return dataset if dataset is None or isinstance(dataset, DrawnDataset) else ResizedDataset(dataset, size[1:])

    named = isinstance(eval_dataset, dict)
    of_size = {name: smaller(one) for name, one in eval_dataset.items()} if named else smaller(eval_dataset)
    return args, images and images.at(size[1:]), of_size


def needs_stored_statistics(
    args: NoiseKDConfig, teacher_model: nn.Module, given: CalibrationImages, train_dataset: Any
) -> bool:
    """Return whether to train on the given images alone, with the BatchNorm statistics that the teacher stores.

    So it is where those of the images spoil the teacher itself. Those of noise do so even more.
    """
    decides = train_dataset is None and args.teacher_statistics is None and args.batch_norm_fraction == 1
    return decides and bool(stored_statistics(teacher_model)) and given.problem is not None


def mixed_noise(args: NoiseKDConfig, teacher: Teacher, images: CalibrationImages, *, alone: bool) -> NoiseDataset:
    """Return noise as of the arguments, and images, without those held out, in a share of the steps, or all.

    A few dozen images in half of the steps would be learnt by heart.
    """
    given = len(images.pixel_values) if images.given else 0
    share = (GIVEN_SHARE * given + MADE_SHARE * (len(images) - given)) / IMAGES_OF_SHARE
    pixel_values = torch.cat([batch.cpu() for batch in images])
    mixed: Any = MixedDataset.for_model(
        teacher.model,
        images=PixelsDataset(pixel_values, augments=True),
        share=1.0 if alone else min(share, GIVEN_SHARE),
        **_noise_batches(args),
        **_noise_arguments(args, teacher),
    )
    mixed.real = images.real
    return mixed


def train_noise(
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


def eval_noise(args: NoiseKDConfig, teacher: Teacher, train_noise: NoiseDataset | None) -> NoiseDataset:
    """Return held-out noise, of the kind of the training noise if there is any."""
    noise = _noise_arguments(args, teacher)
    if train_noise is not None:
        noise |= {key: getattr(train_noise, key) for key in ("distribution", "mean", "std")}
    size = args.per_device_eval_batch_size
    number = args.eval_noise_batches or min(8, max(1, EVAL_PIXELS // (size * math.prod(teacher.input_size[1:]))))
    batches = {"batch_size": size, "num_steps": number}
    return NoiseDataset.for_model(teacher.model, held_out=True, **batches, **noise)


def _noise_batches(args: NoiseKDConfig) -> dict[str, Any]:
    return {
        "resolutions": args.resolutions,
        "batch_size": args.per_device_train_batch_size,
        "num_steps": args.steps_per_epoch,
    }


def _noise_arguments(args: NoiseKDConfig, teacher: Teacher) -> dict[str, Any]:
    std = {} if args.noise_std is None else {"std": args.noise_std}
    return {"input_size": teacher.input_size, "seed": args.seed, "distribution": args.noise, **std}


def breaks_bfloat16(
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


def on_device(dataset: Any, args: NoiseKDConfig, student: nn.Module, *, rank: int) -> Any:
    """Return noise that is drawn for a process in the form that the student wants; other data sets as they are."""
    if isinstance(dataset, dict):
        return {name: on_device(value, args, student, rank=rank) for name, value in dataset.items()}
    if not isinstance(dataset, NoiseDataset):
        return dataset
    dataset = copy.copy(dataset)
    dataset.device, dataset.rank = args.device, rank
    dataset.dtype = torch.bfloat16 if args.bf16 else torch.float32
    dataset.memory_format = training_memory_format(student, args.device)
    return dataset
