"""The end of a training without data: which weights and which running statistics a student is left with.

A student is compared with its teacher on images that were held out, and becomes the best of a few candidates:

| weights | running statistics | evaluated with | considered where |
|---|---|---|---|
| trained | of calibration images | running statistics | these images are good enough |
| trained | of the training | running statistics | the teacher used stored statistics in training, at least in part |
| trained | of the training | batch statistics | else, and there are no good images |
| initial | of calibration images | running statistics | the student was initialised from its teacher; as above |
| initial | of the teacher | running statistics | the student was initialised from its teacher |

So a student that was initialised from its teacher is never worse than that cut was before the training.
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
from hf_noisekd.calibration.moments import store_statistics
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.record.schema import Evaluation
from hf_noisekd.training.evaluation import measured
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)

HELD_OUT = "held-out calibration images"
HELD_OUT_NOISE = "held-out noise images"

State = Mapping[str, torch.Tensor]


class Candidate(NamedTuple):
    """What a student may become; see the table of this module."""

    weights: State
    is_trained: bool  # whether the weights are those of the training, rather than those it was initialised with
    images: CalibrationImages | None  # that its running statistics are re-estimated on; None leaves those of `weights`
    statistics: str  # that it is evaluated with, "running" or "batch"
    agreement: Evaluation | None = None  # with its teacher on held-out images

    @property
    def score(self) -> float:
        """Agreement in percent."""
        assert self.agreement is not None
        return self.agreement.scores(self.statistics)["agreement"]


def end_without_data(
    student: nn.Module,
    teacher: Teacher,
    num_images: int,
    *,
    initial: State | None,
    seed: int,
    step: int,
    show_progress: bool,
) -> Candidate | None:
    """Make of a trained student the best candidate of the table of this module, and return that.

    Images that are not good enough for statistics are good enough to compare on. A teacher that stores no statistics
    is compared with on noise. `initial` are the weights from the teacher that the student was initialised with, if it
    was, and `step` is the training step that it is of.

    None if the student keeps the statistics of its training noise. A warning names the reason: the images are not good
    enough, or something failed or was interrupted, as a trained student must not be lost to what comes after.
    """
    trained = copied_state(student)
    try:
        common: Any = {"input_size": teacher.input_size, "seed": seed}
        if stored_statistics(teacher.model):
            images = calibration_images(teacher.model, num_images, show_progress=show_progress, **common)
            held_out, name, why = images.held_out, HELD_OUT, images.problem
        else:
            held_out = noise_images(teacher.model, default_held_out(num_images), **common)
            images, name = None, HELD_OUT_NOISE
            why = "Its teacher stores no statistics that images could be matched to."
        table = _candidates(student, trained, initial, images, teacher.weight_of_batch)
        tried = [one._replace(agreement=_agreement(student, one, teacher, held_out, name, step)) for one in table]
    except (Exception, KeyboardInterrupt) as error:  # of too little memory, and of a user who does not want to wait
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        tried = []
    best = max(tried, key=lambda candidate: candidate.score, default=None)
    if best is None or best.statistics == "batch":
        student.load_state_dict(trained)
        logger.warning("The student keeps the running statistics of its training noise. %s", why)
        return None
    _become(student, best)
    best = best._replace(weights={})  # which it has now
    if not best.is_trained:
        logger.warning(
            "Training did not help: trained, the student agrees with its teacher on %.1f %% of %d held-out images, and "
            "as it was initialised on %.1f %%. It has the weights that it was initialised with.",
            max(candidate.score for candidate in tried if candidate.is_trained),
            len(held_out),
            best.score,
        )
    return best


def _candidates(
    student: nn.Module, trained: State, initial: State | None, images: CalibrationImages | None, weight_of_batch: float
) -> list[Candidate]:
    """Return what a student may become; of equals the first is taken."""
    stores = bool(stored_statistics(student))
    good = images if stores and images and not images.problem else None
    table = [(Candidate(trained, True, good, "running"), good is not None)]
    # Statistics of the training hold for images as far as the teacher used its own stored statistics for the noise.
    table += [(Candidate(trained, True, None, "running"), not stores or weight_of_batch < 1)]
    table += [(Candidate(trained, True, None, "batch"), stores and good is None and weight_of_batch > 0)]
    if initial is not None:
        table += [(Candidate(initial, False, good, "running"), good is not None)]
        table += [(Candidate(initial, False, None, "running"), True)]
    return [candidate for candidate, is_considered in table if is_considered]


def _become(student: nn.Module, candidate: Candidate) -> None:
    student.load_state_dict(candidate.weights)
    if candidate.images:
        store_statistics(student, candidate.images)


def copied_state(student: nn.Module) -> State:
    """Return a copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def _agreement(
    student: nn.Module, candidate: Candidate, teacher: Teacher, held_out: torch.Tensor, name: str, step: int
) -> Evaluation:
    _become(student, candidate)
    samples: Any = [{"pixel_values": image} for image in held_out]
    return measured(student, samples, name=name, step=step, teacher_model=teacher.model)
