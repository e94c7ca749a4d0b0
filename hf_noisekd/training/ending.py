"""The end of a training without data: which weights and which running statistics a student is left with.

A student is compared with its teacher on images that were held out, and becomes the best of a few candidates:

| weights | running statistics | evaluated with | considered where |
|---|---|---|---|
| trained | of calibration images | running statistics | these are good enough, or given and cannot be checked |
| trained | of the training | running statistics | the teacher used stored statistics in training, at least in part |
| trained | of the training | batch statistics | else, and there are no good images |
| initial | as they were | running statistics | the student was initialised from its teacher |

Initial weights are taken where both agreement and KL divergence say that they are better, or one of them where the
trained student would have to be evaluated with batch statistics. So a student that was initialised from its teacher
does not end worse than it was before the training.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_noisekd.batches import PixelsDataset
from hf_noisekd.calibration.calibration_images import CalibrationImages, default_held_out, noise_images
from hf_noisekd.calibration.moments import store_statistics
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import copied_state
from hf_noisekd.record.schema import Evaluation
from hf_noisekd.training.evaluation import measured
from hf_noisekd.training.plan import InitialWeights
from hf_noisekd.training.teacher import Teacher
from hf_noisekd.training.training_data import HELD_OUT_GIVEN

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
    images: CalibrationImages | None,
    *,
    initial: InitialWeights | None,
    num_noise: int,
    seed: int,
    step: int,
) -> Candidate | None:
    """Make of a trained student the best candidate of the table of this module, and return that.

    `images` are those of the teacher. Such that are not good enough for statistics are good enough to compare on; None
    compares on half of `num_noise` noise images. `initial` is what the student was initialised with, if from its
    teacher, and `step` the training step that it is of.

    None if the student keeps the statistics of its training noise. A warning names the reason: the images are not good
    enough, or something failed or was interrupted, as a trained student must not be lost to what comes after.
    """
    trained = copied_state(student)
    try:
        if images is not None:
            held_out, why = images.to_compare_on, images.problem
            name = HELD_OUT_BOTH if images.made else HELD_OUT_GIVEN if images.given else HELD_OUT
            if why and not images.given:  # no statistics are taken of any, so all can be compared on
                held_out = torch.cat([images.pixel_values, held_out])
        else:
            number, size = default_held_out(num_noise), teacher.input_size
            held_out = noise_images(teacher.model, number, input_size=size, seed=seed)
            name, why = HELD_OUT_NOISE, "Its teacher stores no statistics that images could be matched to."
        tried = _candidates(student, trained, initial, images, teacher.weight_of_batch)
        samples = PixelsDataset(held_out)
        for one in tried:
            student.load_state_dict(one.weights)
            if one.images:
                store_statistics(student, one.images)
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
        if initial and initial.facts.recalibrated:
            best.images = images
        _say_that_training_did_not_help(best, tried, len(held_out))
    return best


def _best(tried: list[Candidate]) -> Candidate | None:
    """Return the trained candidate with the lowest divergence, or an initial one that is better by both measures.

    On a few dozen images agreement is a lottery; divergence alone would punish a student that is less sure. A trained
    one that classifies batches alone has to be better by both itself.
    """
    trained, initial = _closest(tried, is_trained=True), _closest(tried, is_trained=False)
    if trained and initial:
        enough = any if trained.statistics == "batch" else all
        if enough((initial.score >= trained.score, initial.divergence < trained.divergence)):
            return initial
    return trained


def _closest(tried: list[Candidate], *, is_trained: bool) -> Candidate | None:
    """Return the candidate with such weights whose divergence from the teacher is the lowest, if there is any."""
    return min((one for one in tried if one.is_trained is is_trained), key=lambda one: one.divergence, default=None)


def _say_that_training_did_not_help(best: Candidate, tried: list[Candidate], num_images: int) -> None:
    trained = _closest(tried, is_trained=True)
    assert trained is not None  # there always is one
    logger.warning(
        "Training did not help: trained, the student agrees with its teacher on %.1f %% of %d held-out images%s, and "
        "before the training on %.1f %% (KL divergence %.2f and %.2f). It has the weights of then.",
        trained.score,
        num_images,
        ", in batches" if trained.statistics == "batch" else "",
        best.score,
        trained.divergence,
        best.divergence,
    )


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
    table += [(Candidate(initial.state, False), True)] if initial else []
    return [candidate for candidate, is_considered in table if is_considered]
