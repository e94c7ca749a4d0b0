"""What the functions of this folder are given: models and data sets by name, and folders to write to."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hf_noisekd.calibration.calibration_images import (
    CalibrationImages,
    calibration_images,
    default_held_out,
)
from hf_noisekd.calibration.given_images import MIN_IMAGES, check_enough
from hf_noisekd.image_datasets import Images, draw_indices, load_images
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import declared_input_size, declared_num_classes
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.models.memory import keep_freed_memory
from hf_noisekd.models.preprocessing import preprocessing_of
from hf_noisekd.onnx.floats import OnnxClassifier
from hf_noisekd.training.cost import say_what_matching_takes

logger = logging.getLogger(__name__)

SAME_PIXELS = 0.01  # means and standard deviations may differ by so much, in units of the range of an image


class UsageError(ValueError):
    """Arguments that do not fit each other or what is there; nothing was written."""


def usable_model(
    source: str | Path | nn.Module, *, checkpoint: str | Path | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Return a module as it is, or load one by name, in evaluation mode, on the accelerator if any, or an ONNX file."""
    if checkpoint is None:
        if isinstance(source, nn.Module):
            return source
        if Path(source).suffix == ".onnx":
            return OnnxClassifier(Path(source).expanduser())
    model = load_teacher(source, checkpoint=checkpoint, trust_remote_code=trust_remote_code).eval()
    if not torch.accelerator.is_available():
        keep_freed_memory()
        return model
    return model.to(torch.accelerator.current_accelerator())


def unlabelled_images(
    source: str | Path,
    model: nn.Module,
    *,
    split: str,
    at_most: int,
    image_column: str | None = None,
    input_size: Sequence[int] | None = None,
) -> Images:
    """Return images of a data set, preprocessed for `model`, without labels; up to `at_most`, drawn at random.

    With `input_size`, `(channels, height, width)`, they have that size. Too few images are a [`UsageError`].
    """
    like = load_teacher(model, input_size=input_size)
    images = load_images(source, like, split=split, image_column=image_column, labels=False)
    try:
        check_enough(len(images))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if at_most < MIN_IMAGES:
        raise UsageError(f"num_images is {at_most}: use at least {MIN_IMAGES} of the {len(images)} given images.")
    return replace(images, indices=draw_indices(len(images), min(at_most, len(images)), 0, images.name))


def made_images(
    teacher: nn.Module, num_images: int, input_size: tuple[int, int, int], steps: int, max_steps: int
) -> CalibrationImages:
    """Return the [`calibration_images`] of a teacher, after a line in the log on what they take."""
    if stored_statistics(teacher):
        say_what_matching_takes(teacher, input_size, num_images + default_held_out(num_images), steps, max_steps)
    return calibration_images(teacher, num_images, input_size=input_size, steps=steps, max_steps=max_steps)


def check_unused(output_dir: str | Path, advice: str = "") -> None:
    """Raise a [`UsageError`] for an output folder that holds something, before anything is loaded."""
    # Other processes may be late, and find what the first one has written.
    if os.environ.get("RANK", "0") != "0":
        return
    folder = Path(output_dir).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"The output folder {str(folder)!r} is not empty: choose another output_dir.{advice}")
    if folder.is_file():
        raise UsageError(f"The output folder {str(folder)!r} is a file: choose another output_dir.")


def check_same_kind(student: nn.Module, teacher: nn.Module) -> None:
    """Raise a `ValueError` if what the models declare of their inputs and classes differs."""
    both = student, teacher
    for what, found in (
        ("{} channels", [size and size[0] for size in map(declared_input_size, both)]),
        ("{} classes", list(map(declared_num_classes, both))),
    ):
        if None not in found and found[0] != found[1]:
            student_has, teacher_has = map(what.format, found)
            raise ValueError(
                f"The student has {student_has} and the teacher {teacher_has}: give the student's teacher."
            )
    known, of_teacher = map(preprocessing_of, both)
    for key in {"mean", "std"} & known.keys() & of_teacher.keys():
        if not np.allclose(known[key], of_teacher[key], atol=SAME_PIXELS):
            raise ValueError(
                f"The student has pixels of {key} {known[key]} and the teacher of {of_teacher[key]}, so one cannot "
                f"take the images of the other: give the student's teacher, or correct {key} in a `pretrained_cfg`."
            )
