"""After the last step of a training: running statistics without data, and how often student and teacher agree.

A student that began as its teacher must not be worse than the cut it began as: where training did not help, it becomes
that again.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_noisekd.calibration.calibration_images import (
    CalibrationImages,
    calibration_images,
    default_held_out,
    noise_images,
)
from hf_noisekd.calibration.recalibration import recalibrate_batch_norm
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.record.schema import Evaluation
from hf_noisekd.training.evaluation import evaluate
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)


HELD_OUT = "held-out calibration images"
HELD_OUT_NOISE = "held-out noise images"

State = dict[str, torch.Tensor]


class Ending(NamedTuple):
    """What a student is after its training, to be read in evaluation mode."""

    agreement: Evaluation  # with its teacher on held-out calibration images
    images: CalibrationImages | None = None  # those that its running statistics are of
    healed: bool = True  # whether it has the weights of the training, not those that it began with


def end_without_data(
    student: nn.Module,
    teacher: Teacher,
    num_images: int,
    *,
    start: Mapping[str, torch.Tensor] | None,
    seed: int,
    step: int,
    show_progress: bool,
) -> Ending | None:
    """Re-estimate a student's running statistics on [`calibration_images`] of its teacher.

    Where the teacher answered noise partly by the statistics that it stores, those of the student's training may hold
    for images, too, and both are tried. If it began as its teacher, with the weights `start`, it is compared with that,
    as it was and with such statistics. It becomes what agrees with the teacher on held-out images the most often.
    Images that are not good enough for statistics are good enough to compare on; a student whose teacher used those of
    the batch, at least partly, may then be read by those.

    For a teacher that stores no statistics there are no such images, and the two are compared on noise.

    If the images are not good enough, or anything fails or is interrupted, there is a warning, and a student that began
    at random does not change; a trained student must not be lost to what comes after. The result is None then.
    """
    trained = _copy(student)
    states = {True: trained} | ({False: start} if start else {})
    try:
        common: Any = {"input_size": teacher.input_size, "seed": seed}
        if stored_statistics(teacher.model):
            images = calibration_images(teacher.model, num_images, show_progress=show_progress, **common)
            return _best(student, teacher, states, images.held_out, images, step)
        noise = noise_images(teacher.model, default_held_out(num_images), **common)
        return _best(student, teacher, states, noise, None, step)
    except (Exception, KeyboardInterrupt) as error:  # of too little memory, and of a user who does not want to wait
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        student.load_state_dict(trained)
        logger.warning("The student keeps the running statistics of its training noise. %s", why)
        return None


def _best(
    student: nn.Module,
    teacher: Teacher,
    states: Mapping[bool, Mapping[str, torch.Tensor]],
    held_out: torch.Tensor,
    images: CalibrationImages | None,
    step: int,
) -> Ending | None:
    """Make of a student the best of what it was after and before its training; see [`end_without_data`]."""
    stores = bool(stored_statistics(student))
    good = images if stores and images and not images.problem else None
    # How a student is read that keeps the statistics of its training, which hold for images as far as its teacher
    # answered noise by its own.
    by_own = ["running"] * (not stores or teacher.weight_of_batch < 1)
    by_own += ["batch"] * (stores and not good and teacher.weight_of_batch > 0)
    name = HELD_OUT if images else HELD_OUT_NOISE
    found: list[tuple[float, str, Ending, State]] = []
    for healed, state in states.items():
        kept = by_own if healed else ["running"]
        for statistics_of, readings in [(good, ["running"])] * bool(good) + [(None, kept)] * bool(kept):
            student.load_state_dict(state)
            if statistics_of:
                recalibrate_batch_norm(student, statistics_of)
            ending = Ending(_agreement(student, teacher, held_out, name, step), statistics_of, healed)
            for reading in readings:
                found.append((ending.agreement.scores(reading)["agreement"], reading, ending, _copy(student)))
    _, reading, ending, state = max(found, key=lambda candidate: candidate[0])
    student.load_state_dict(state)
    if reading == "batch":
        why = images.problem if images else "Its teacher stores none that images could be matched to."
        logger.warning("The student keeps the running statistics of its training noise. %s", why)
        return None
    if not ending.healed:
        logger.warning(
            "Training did not help: trained, the student gives its teacher's answer to %.1f %% of %d held-out images, "
            "and as it was cut to %.1f %%. It is what it was cut to.",
            max(score for score, _, other, _ in found if other.healed),
            len(held_out),
            ending.agreement.running["agreement"],
        )
    return ending


def _copy(student: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def _agreement(student: nn.Module, teacher: Teacher, held_out: torch.Tensor, name: str, step: int) -> Evaluation:
    samples = [{"pixel_values": image} for image in held_out]
    scores = evaluate(student, samples, teacher_model=teacher.model)  # type: ignore[arg-type]
    return Evaluation(
        dataset=name,
        images=len(samples),
        batch_size=min(256, len(samples)),
        step=step,
        precision="float32",
        running=scores["running"],
        batch=scores["batch"],
    )
