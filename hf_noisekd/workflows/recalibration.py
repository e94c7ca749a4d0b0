"""A saved student with other running statistics: of images made without data, or of some real ones."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from hf_noisekd.batches import collate_images
from hf_noisekd.calibration.calibration_images import STEPS
from hf_noisekd.calibration.given_images import BATCH_SIZE, given_images
from hf_noisekd.calibration.recalibration import check_recalibration, recalibrate_batch_norm
from hf_noisekd.files import RECORD_NAME
from hf_noisekd.image_datasets import Images
from hf_noisekd.models.loading import has_weights, model_folder
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.models.saving import save_model
from hf_noisekd.record.schema import CalibrationFacts, ImagesFacts, Provenance, read_record
from hf_noisekd.release.card import write_model_card
from hf_noisekd.workflows.inputs import (
    UsageError,
    check_same_kind,
    check_unused,
    made_images,
    unlabelled_images,
    usable_model,
)

logger = logging.getLogger(__name__)

MAX_CHECKED = 512  # images


def recalibrate(
    model: str | Path | nn.Module,
    output_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
    teacher_model: str | Path | nn.Module | None = None,
    images: str | Path | None = None,
    images_split: str = "train",
    image_column: str | None = None,
    num_images: int = 256,
    calibration_steps: int = 900,
    input_size: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> CalibrationFacts | ImagesFacts:
    """Re-estimate the running statistics of a student, and save it with its card; see [`recalibrate_batch_norm`].

    Args:
        model: The student, as [`load_teacher`] takes it. A module is changed in place.
        output_dir: Where the student goes then; new or empty.
        checkpoint: File of weights for the timm architecture that `model` names, as [`load_teacher`] takes it.
        teacher_model: Its teacher, from whose stored statistics [`calibration_images`] are made, without data.
        images: Or unlabelled images of its task: the name of a data set, or a folder, as [`load_images`] takes it.
        images_split: Their split.
        image_column: Their column, where there are several.
        num_images: Images to make, or up to so many to draw at random.
        calibration_steps: Steps at most to make images; it ends where more would not do.
        input_size: `(channels, height, width)` of the images. Default: what the student declares.
        trust_remote_code: Run the Python code that a transformers model on the Hub brings along.

    Returns:
        Which images the statistics are of.

    Raises:
        UsageError: There are both a teacher and images, or neither, or the folder is in use.
        ValueError: There are no running statistics, the images made are too poor, or something cannot be loaded.
    """
    if (teacher_model is None) == (images is None):
        raise UsageError("Give either a teacher, for images made without data, or real images.")
    check_unused(output_dir)
    student = usable_model(model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    check_recalibration(student)
    if teacher_model is not None:
        teacher = usable_model(teacher_model, trust_remote_code=trust_remote_code)
        check_same_kind(student, teacher)
        made = made_images(teacher, num_images, input_size_of(student, input_size), STEPS, calibration_steps)
        recalibrate_batch_norm(student, made)
        facts: Any = made.facts
    else:
        given: Any = {"split": images_split, "at_most": num_images, "image_column": image_column}
        drawn = unlabelled_images(str(images), student, **given, input_size=input_size)
        if Provenance.has_statistics_of_images(student):
            _check_images(student, drawn)
        loader = DataLoader(drawn, batch_size=BATCH_SIZE, collate_fn=collate_images)
        recalibrate_batch_norm(student, loader, dataset=drawn.name, split=images_split)
        facts = ImagesFacts(images=len(drawn), dataset=drawn.name, split=images_split)
    save_model(student, output_dir)
    if checkpoint is None and not isinstance(model, nn.Module) and has_weights(str(model)):
        _write_card(model_folder(str(model))[0], student, output_dir)
    return facts


def _check_images(model: nn.Module, images: Images) -> None:
    """Warn if statistics of images are worse than those of the model."""
    some = [images[index] for index in range(min(len(images), MAX_CHECKED))]
    if problem := given_images(model, collate_images(some)["pixel_values"]).problem:
        text = problem.replace("the teacher's", "the model's").replace("the teacher", "the model")
        logger.warning("%s If its own statistics were right, keep it as it was.", text)


def _write_card(before: Path, student: nn.Module, output_dir: str | Path) -> None:
    """Write the card of a student with new statistics, if there was a record of it in the folder `before`."""
    if (before / RECORD_NAME).is_file():
        write_model_card(read_record(before).recalibrated(Provenance.of(student)), output_dir)
