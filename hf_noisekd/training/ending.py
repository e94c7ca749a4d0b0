"""The end of a training without data: which weights and which running statistics a student is left with.

A student is compared with its teacher on images that were held out, and becomes the best of a few candidates:

| weights | running statistics | evaluated with | considered where |
|---|---|---|---|
| trained | of calibration images | running statistics | these are good enough, or given and cannot be checked |
| trained | of the training | running statistics | the teacher used stored statistics in training, at least in part |
| trained | of the training | batch statistics | else, and there are no good images |
| initial | as they were | running statistics | the student was initialised from its teacher |
| initial, repaired | of calibration images | running statistics | as above, and these images are good enough |

Initial weights are taken where both agreement and KL divergence say that they are better. So a student that was
initialised from its teacher does not end worse than it was before the training. Repair solves a cut
for its teacher's features; a trained student has features of its own, which that would spoil.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_noisekd.batches import PixelsDataset
from hf_noisekd.calibration.calibration_images import (
    CalibrationImages,
    calibration_images,
    default_held_out,
    noise_images,
)
from hf_noisekd.calibration.moments import store_statistics
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import bare_model, copied_state
from hf_noisekd.models.cost import count_macs
from hf_noisekd.record.schema import Evaluation, StartFacts
from hf_noisekd.shrinking.repair import fit_to_teacher
from hf_noisekd.training.evaluation import measured
from hf_noisekd.training.plan import InitialWeights
from hf_noisekd.training.teacher import Teacher
from hf_noisekd.training.training_data import HELD_OUT_GIVEN, SHARE

logger = logging.getLogger(__name__)

HELD_OUT = "held-out calibration images"
HELD_OUT_BOTH = "held-out given and calibration images"
HELD_OUT_NOISE = "held-out noise images"

State = Mapping[str, torch.Tensor]


@dataclass
class Candidate:
    """What a student may become; see the table of this module."""

    weights: State
    is_trained: bool  # whether the weights are those of the training, rather than those it was initialised with
    images: CalibrationImages | None = None  # that its statistics are re-estimated on; None leaves those of `weights`
    statistics: str = "running"  # that it is evaluated with, or "batch"
    start: StartFacts | None = None  # of initial weights, how they came to be
    agreement: Evaluation | None = None  # with its teacher on held-out images

    @property
    def score(self) -> float:
        """Agreement in percent."""
        assert self.agreement is not None
        return self.agreement.scores(self.statistics)["agreement"]

    @property
    def divergence(self) -> float:
        """KL divergence from the teacher, in nats."""
        assert self.agreement is not None
        return self.agreement.scores(self.statistics)["kl"]


def end_without_data(
    student: nn.Module,
    teacher: Teacher,
    num_images: int,
    *,
    initial: InitialWeights | None,
    images: CalibrationImages | None = None,
    trained_on: float = math.inf,
    seed: int,
    step: int,
    show_progress: bool,
) -> Candidate | None:
    """Make of a trained student the best candidate of the table of this module, and return that.

    Images that are not good enough for statistics are good enough to compare on. A teacher that stores no statistics
    is compared with on noise. `initial` is what the student was initialised with, if from its teacher, `step` the
    training step that it is of, and `images` those of the teacher, if there are any already. Else `num_images` are
    made, or fewer, where these would take more than 15 % of the cost of a training on `trained_on` images of full size.

    None if the student keeps the statistics of its training noise. A warning names the reason: the images are not good
    enough, or something failed or was interrupted, as a trained student must not be lost to what comes after.
    """
    trained = copied_state(student)
    try:
        common: Any = {"input_size": teacher.input_size, "seed": seed}
        if images is None and stored_statistics(teacher.model):
            limit = matching_limit(student, teacher, trained_on)
            common |= {"max_image_steps": limit, "show_progress": show_progress}
            images = calibration_images(teacher.model, num_images, **common)
        if images is not None:
            held_out, why = images.to_compare_on, images.problem
            name = HELD_OUT_BOTH if images.made else HELD_OUT_GIVEN if images.given else HELD_OUT
            if why and not images.given:  # no statistics are taken of any, so all can be compared on
                held_out = torch.cat([images.pixel_values, held_out])
        else:
            held_out = noise_images(teacher.model, default_held_out(num_images), **common)
            name, why = HELD_OUT_NOISE, "Its teacher stores no statistics that images could be matched to."
        tried = _candidates(student, trained, initial, images, teacher.weight_of_batch)
        samples = PixelsDataset(held_out)
        for one in tried:
            _become(student, one, teacher, initial)
            one.agreement = measured(student, samples, name=name, step=step, teacher_model=teacher.model)
            one.weights = copied_state(student)
    except (Exception, KeyboardInterrupt) as error:  # of too little memory, and of a user who does not want to wait
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        tried = []
    best = _best(tried)
    if best is None or best.statistics == "batch":
        student.load_state_dict(trained)
        logger.warning("The student keeps the running statistics of its training noise. %s", why)
        return None
    student.load_state_dict(best.weights)
    best.weights = {}  # which it has now
    if why and images is not None and not images.given:
        logger.warning("No statistics were taken of calibration images. %s", why)
    if not best.is_trained:
        _say_that_training_did_not_help(best, tried, len(held_out))
    return best


def _best(tried: list[Candidate]) -> Candidate | None:
    """Return the trained candidate with the lowest divergence, or an initial one that is better by both measures.

    On a few dozen images agreement is a lottery; divergence alone would punish a student that is less sure.
    """
    by_kind = [[one for one in tried if one.is_trained is is_trained] for is_trained in (True, False)]
    trained, initial = (min(kind, key=lambda one: one.divergence, default=None) for kind in by_kind)
    if trained and initial and initial.score >= trained.score and initial.divergence < trained.divergence:
        return initial
    return trained


def _say_that_training_did_not_help(best: Candidate, tried: list[Candidate], num_images: int) -> None:
    logger.warning(
        "Training did not help: trained, the student agrees with its teacher on %.1f %% of %d held-out images, and "
        "before the training on %.1f %%. It has the weights of then%s.",
        max(candidate.score for candidate in tried if candidate.is_trained),
        num_images,
        best.score,
        ", repaired" if best.start and best.start.repaired_blocks else "",
    )


def matching_limit(student: nn.Module, teacher: Teacher, trained_on: float) -> float:
    """Return how many calibration images times steps have 15 % of the multiply-adds of a training on some images."""
    of_student, of_teacher = (count_macs(model, teacher.input_size)[""] for model in (student, teacher.model))
    # A backward pass costs two forward passes.
    return SHARE * trained_on * (of_teacher + 3 * of_student) / max(3 * of_teacher, 1)


def _candidates(
    student: nn.Module,
    trained: State,
    initial: InitialWeights | None,
    images: CalibrationImages | None,
    weight_of_batch: float,
) -> list[Candidate]:
    """Return what a student may become; of equals the first is taken."""
    stores = bool(stored_statistics(student))
    good = images if stores and images and not images.problem else None
    # Given ones can be tried also where no statistics of the teacher's tell whether they are good.
    used = images if stores and images and images.given and images.self_agreement is None else good
    table = [(Candidate(trained, True, used), used is not None)]
    # Statistics of the training hold for images as far as the teacher used its own stored statistics for the noise.
    table += [(Candidate(trained, True), not stores or weight_of_batch < 1)]
    table += [(Candidate(trained, True, statistics="batch"), stores and good is None and weight_of_batch > 0)]
    if initial is not None:
        of_start = good if initial.facts.recalibrated else None
        table += [(Candidate(initial.state, False, of_start, start=initial.facts), True)]
        repairs = good is not None and not good.given  # those that are given have repaired it before the training
        table += [(Candidate(initial.state, False, good), repairs)]
    return [candidate for candidate, is_considered in table if is_considered]


def _become(student: nn.Module, candidate: Candidate, teacher: Teacher, initial: InitialWeights | None) -> None:
    student.load_state_dict(candidate.weights)
    if candidate.is_trained and candidate.images:
        store_statistics(student, candidate.images)
    elif not candidate.is_trained and initial and candidate.start is None:
        recalibrated, repaired = fit_to_teacher(student, bare_model(teacher.model), initial.cut, candidate.images)
        candidate.images = candidate.images if recalibrated else None
        candidate.start = replace(initial.facts, recalibrated=recalibrated, repaired_blocks=repaired)
