"""What is known of a student, as one typed record, stored as JSON in which what is not known is left out.

Trainer, `noisekd recalibrate` and `noisekd evaluate --update-card` write it; card, figures, push and export read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_noisekd.files import RECORD_NAME, json_text, read_json
from hf_noisekd.record.environment import Machine
from hf_noisekd.record.plain import from_dict, to_dict

# The two ways to read a student: as any network, or by the statistics of the batch at hand.
STATISTICS = ("running", "batch")


@dataclass(kw_only=True)
class ModelFacts:
    """What a network is."""

    architecture: str  # timm's name, or that of the class
    library: str  # what can build it: timm, transformers or else torch
    parameters: int
    input_size: list[int] | None = None  # channels, height, width
    label_names: list[str] | None = None
    num_classes: int | None = None
    has_batch_norm: bool = True


@dataclass(kw_only=True)
class TeacherFacts:
    """What identifies a teacher; see [`teacher_identity`]."""

    architecture: str
    parameters: int
    id: str | None = None
    revision: str | None = None
    license: str | None = None
    sha256: str | None = None


@dataclass(kw_only=True)
class NoiseFacts:
    """What a student was taught with; see [`NoiseDataset`]."""

    distribution: str
    mean: float
    std: float
    input_size: list[int]
    # ((height, width), share of the steps), in turn; lists in JSON
    image_sizes: list[tuple[tuple[int, int], float]] = field(default_factory=list)
    seed: int | None = None


@dataclass(kw_only=True)
class ImagesFacts:
    """Real images that a student has seen: their number, and where they are from."""

    images: int
    dataset: str | None = None
    split: str | None = None


@dataclass(kw_only=True)
class CalibrationFacts:
    """Images matched to the teacher that the running statistics are of; see [`calibration_images`]."""

    images: int
    held_out: int
    steps: int
    seed: int
    self_agreement: float  # in percent


@dataclass(kw_only=True)
class StartFacts:
    """How a student was initialised, if not at random: from its teacher, cut down.

    Of its `tensors`, parameters and buffers, `from_teacher` are the teacher's, `cut` of them with fewer channels.
    """

    removed_blocks: list[str]
    tensors: int
    from_teacher: int
    cut: int
    macs: float  # its multiply-adds as a share of the teacher's
    training_helped: bool = True  # False if it has the weights that it was initialised with

    def __str__(self) -> str:
        some = "all" if self.from_teacher == self.tensors else f"{self.from_teacher} of"
        parts = [f"{some} {self.tensors} tensors are the teacher's", f"{self.macs:.0%} of its multiply-adds"]
        if self.cut:
            parts[0] += f", {self.cut} of them with fewer channels"
        if blocks := len(self.removed_blocks):
            parts.insert(1, f"{blocks} of its blocks {'is' if blocks == 1 else 'are'} left out")
        return "; ".join(parts)


@dataclass(kw_only=True)
class Provenance:
    """How a student was made; the section `noisekd` of its `config.json`. Arguments are as in [`NoiseKDConfig`]."""

    method: str
    batch_norm: str  # the statistics to read it with, "batch" or "running"; see `better_statistics`
    teacher_batch_norm_fraction: float
    teacher_statistics: float = 1.0  # weight of the batch against stored statistics; 0 for a teacher without BatchNorm
    loss_type: str
    temperature: float
    learning_rate: float | None = None
    lr_scheduler_type: str | None = None
    steps: int
    batch_size: int  # over all devices
    seed: int
    teacher: TeacherFacts
    versions: dict[str, str] = field(default_factory=dict)
    noise: NoiseFacts | None = None
    real_images: ImagesFacts | None = None  # those that took turns with the noise
    recalibration: ImagesFacts | None = None  # those that the running statistics are of
    calibration: CalibrationFacts | None = None  # or these, made without data
    start: StartFacts | None = None  # what it began as, if not at random
    others: dict[str, Any] = field(default_factory=dict)  # what other versions of this package know

    @classmethod
    def of(cls, model: nn.Module) -> "Provenance | None":
        """Return what a model says of its making, or None for one that this package did not make.

        Raises:
            ValueError: It says something else than a provenance.
        """
        section = noisekd_section(model)
        try:
            return from_dict(cls, section) if section else None
        except ValueError as error:
            advice = "Take it out of config.json, or save the student with this package again."
            raise ValueError(f"The section 'noisekd' of the model cannot be read: {error}. {advice}") from error

    def attach(self, model: nn.Module) -> None:
        """Have `model` say so, and its `config.json` once it is saved."""
        self.detach(model)
        model.noisekd = to_dict(self)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Have `model` say nothing of its making, as what is known does not hold for what it becomes."""
        for holder in (model, getattr(model, "config", model)):
            holder.__dict__.pop("noisekd", None)

    @property
    def is_data_free(self) -> bool:
        """Whether noise alone taught the student."""
        return self.noise is not None and self.real_images is None


@dataclass(kw_only=True)
class Evaluation:
    """What [`evaluate`] measured on a data set: accuracies in percent, `loss` and `kl` in nats."""

    dataset: str
    split: str | None = None
    images: int
    batch_size: int
    step: int  # the training step after which
    precision: str  # float32, or that of autocast
    log_prefix: str | None = None  # of its entries in the curve, if it was made in the training, too
    running: dict[str, float]
    batch: dict[str, float]

    def scores(self, statistics: str) -> dict[str, float]:
        """Return what was measured with `"running"` or with `"batch"` statistics."""
        return self.running if statistics == "running" else self.batch


@dataclass(kw_only=True)
class Record:
    """All that is known of a model that was trained here."""

    name: str | None = None  # among others
    model: ModelFacts
    steps: int
    seconds: float | None = None  # from the first step to the last, with the evaluations; none if resumed
    images_per_second: float | None = None
    processes: int = 1
    evaluations: list[Evaluation] = field(default_factory=list)  # how good it is now, one for each data set
    curve: list[dict[str, Any]] = field(default_factory=list)  # the training log, entries with `step`
    noisekd: Provenance | None = None
    class_frequencies: list[float] | None = None  # the teacher's mean answer to the noise since the start or resumption
    machine: Machine | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    commit: str | None = None
    repo_id: str | None = None
    language: str | None = None
    license: str | None = None
    tags: list[str] | None = None
    title: str | None = None
    others: dict[str, Any] = field(default_factory=dict)  # what other versions of this package know

    def recalibrated(self, provenance: Provenance | None) -> "Record":
        """Return the record of the student with other running statistics, for which no measurement holds.

        Nor is it to be had where the student was.
        """
        return replace(self, noisekd=provenance, evaluations=[], curve=[], repo_id=None)

    def measured(self, evaluation: Evaluation) -> "Record":
        """Return the record with an evaluation in place of the one that was made on the same images."""
        others = []
        for entry in self.evaluations:
            # What the training measured has no split.
            if entry.dataset != evaluation.dataset or entry.split not in (None, evaluation.split):
                others.append(entry)
            elif entry.log_prefix is not None:
                evaluation = replace(evaluation, log_prefix=entry.log_prefix)
        return replace(self, evaluations=[*others, evaluation])


def noisekd_section(model: nn.Module) -> dict:
    """Return the section `noisekd` of the `config.json` of a student of this package; empty for any other model."""
    section = getattr(model, "noisekd", None) or getattr(getattr(model, "config", None), "noisekd", None)
    return dict(section or {})


def better_statistics(evaluations: Sequence[Evaluation], *, taught_on_batch: bool) -> str:
    """Return the BatchNorm statistics that a student's card says to read it with, `"batch"` or `"running"`.

    Those with which it is better on labelled images, running statistics having the benefit of one percentage point.
    Where there are none, those that its teacher answered noise by: a teacher that is asked as it is teaches the student
    what to make of an image, whatever others are in the batch.

    Args:
        evaluations: How good it is now; the last one with an accuracy counts.
        taught_on_batch: Whether its training data were noise, at least in part, and its teacher normalised that by the
            statistics of the batch.
    """
    leads = [entry.batch["accuracy"] - entry.running["accuracy"] for entry in evaluations if "accuracy" in entry.batch]
    if leads:
        return "batch" if leads[-1] > 1 else "running"
    return "batch" if taught_on_batch else "running"


def current_evaluations(made: Sequence[tuple[Evaluation, bool]], step: int) -> list[Evaluation]:
    """Return the evaluations that tell how good a model is now, one for each data set.

    Those made after the training count before those made in it, and later ones before earlier ones.

    Args:
        made: All evaluations, in order, each with whether it was made in the training.
        step: The step that the weights are of: what was measured in the training after it does not count.
    """
    current = {}
    for during in (True, False):
        for evaluation, in_training in made:
            if in_training == during and evaluation.step <= step:
                current[evaluation.dataset] = evaluation
    return list(current.values())


def read_record(folder: str | Path) -> Record:
    """Return the record of the student in a folder.

    Raises:
        ValueError: There is none; the message says what was found.
    """
    path = Path(folder).expanduser() / RECORD_NAME
    if not path.is_file():
        raise ValueError(
            f"There is no {path}: a card is made from the {RECORD_NAME} that the trainer writes beside a student."
        )
    try:
        record = read_json(path)
        if isinstance(record, dict) and "noisekd" in record:
            return from_dict(Record, record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record: {error}") from error
    raise ValueError(f"{path} tells of no distilled student: it has no section 'noisekd'.")


def write_record(record: Record, folder: Path) -> None:
    """Write the record of the student in a folder."""
    (folder / RECORD_NAME).write_text(json_text(to_dict(record)))
