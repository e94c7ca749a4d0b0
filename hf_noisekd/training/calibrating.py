"""After the last step of a training: running statistics without data, and how often student and teacher agree."""

import logging

from torch import nn

from hf_noisekd.calibration.images import CalibrationImages, calibration_images
from hf_noisekd.calibration.recalibration import recalibrate_batch_norm
from hf_noisekd.release.record import Evaluation
from hf_noisekd.training.evaluation import evaluate
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)


HELD_OUT = "held-out calibration images"


def recalibrate_without_data(
    student: nn.Module, teacher: Teacher, num_images: int, *, seed: int, step: int, show_progress: bool
) -> tuple[CalibrationImages, Evaluation] | None:
    """Re-estimate a student's running statistics on [`calibration_images`] of its teacher.

    Returns:
        The images, and how often student and teacher give the same answer to those that were held out.

    If the images are not good enough, or anything fails or is interrupted, there is a warning, nothing changes, and the
    result is None: a trained student must not be lost to what comes after.
    """
    try:
        images = calibration_images(
            teacher.model, num_images, input_size=teacher.input_size, seed=seed, show_progress=show_progress
        )
        recalibrate_batch_norm(student, images)
        return images, _agreement(student, teacher, images, step)
    except (Exception, KeyboardInterrupt) as error:  # of too little memory, and of a user who does not want to wait
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        logger.warning("The student keeps the running statistics of its training noise. %s", why)
        return None


def _agreement(student: nn.Module, teacher: Teacher, images: CalibrationImages, step: int) -> Evaluation:
    samples = [{"pixel_values": image} for image in images.held_out]
    scores = evaluate(student, samples, teacher_model=teacher.model)  # type: ignore[arg-type]
    return Evaluation(
        dataset=HELD_OUT,
        images=len(samples),
        batch_size=min(256, len(samples)),
        step=step,
        precision="float32",
        running=scores["running"],
        batch=scores["batch"],
    )
