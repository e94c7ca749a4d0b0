"""The record of a student: typed facts, stored as JSON without those that are unknown.

The trainer, `noisekd recalibrate` and `noisekd evaluate --update-card` write it; card, figures, push and export use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_noisekd.files import RECORD_NAME, json_text, read_json
from hf_noisekd.record.environment import Machine
from hf_noisekd.record.plain import from_dict, to_dict

# Which statistics BatchNorm layers normalise with: the running ones, as usual, or those of the batch at hand.
STATISTICS = ("running", "batch")


@dataclass(kw_only=True)
class ModelFacts:
    """What is known of a network."""

    architecture: str  # name in timm, or of the class
    library: str  # timm, transformers or else torch
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
    """Noise that a student was trained on; see [`NoiseDataset`]."""

    distribution: str
    mean: float
    std: float
    input_size: list[int]
    # ((height, width), share of the steps), in order of training; lists in JSON
    image_sizes: list[tuple[tuple[int, int], float]] = field(default_factory=list)
    seed: int | None = None


@dataclass(kw_only=True)
class ImagesFacts:
    """Real images that a student was trained on or recalibrated with."""

    images: int
    dataset: str | None = None
    split: str | None = None


@dataclass(kw_only=True)
class CalibrationFacts:
    """Calibration images that running statistics were re-estimated on; see [`calibration_images`]."""

    images: int
    held_out: int
    steps: int
    seed: int
    self_agreement: float  # in percent


@dataclass(kw_only=True)
class StartFacts:
    """How a student was initialised from its teacher.

    Of its `tensors`, parameters and buffers, `from_teacher` are the teacher's, `cut` of them with fewer channels.
    """

    removed_blocks: list[str]
    tensors: int
    from_teacher: int
    cut: int
    macs: float  # its multiply-adds as a share of the teacher's
    allowed_macs: float | None = None  # likewise, the most it could have, where that is more than 3 points more
    teacher_input_size: list[int] | None = None  # where the student takes smaller images
    size_agreement: float | None = None  # in percent, of the whole teacher on these with itself on its own
    recalibrated: bool = False  # whether the initial weights have statistics of images
    repaired_blocks: int = 0  # of the initial weights, fitted to the teacher's features
    training_helped: bool = True  # False if it has its initial weights again

    def __str__(self) -> str:
        some = "all" if self.from_teacher == self.tensors else f"{self.from_teacher} of"
        parts = [f"{some} {self.tensors} tensors are the teacher's", f"{self.macs:.0%} of its multiply-adds"]
        if self.allowed_macs:
            parts[1] += f", of the {self.allowed_macs:.0%} that it could have"
        if self.cut:
            parts[0] += f", {self.cut} of them with fewer channels"
        if blocks := len(self.removed_blocks):
            parts.insert(1, f"{blocks} of its blocks {'is' if blocks == 1 else 'are'} left out")
        if self.teacher_input_size:
            parts.append(
                f"smaller images than the teacher's {'x'.join(map(str, self.teacher_input_size))}, on which the whole "
                f"teacher keeps {self.size_agreement:.0f} % of its predictions"
            )
        if self.repaired_blocks:
            parts.append(f"{self.repaired_blocks} blocks repaired")
        return "; ".join(parts)


@dataclass(kw_only=True)
class Provenance:
    """How a student was made; the section `noisekd` of its `config.json`. Arguments are as in [`NoiseKDConfig`]."""

    method: str
    batch_norm: str  # the statistics to use it with, "batch" or "running"; see `better_statistics`
    teacher_batch_norm_fraction: float
    teacher_statistics: float = 1.0  # weight of batch against stored statistics; 0 for a teacher without BatchNorm
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
    real_images: ImagesFacts | None = None  # trained on, in some steps beside noise or in all
    made_images: int = 0  # calibration images, trained on in some steps
    compares_features: bool = False  # at the ends of stages, in the loss
    given_images: ImagesFacts | None = None  # unlabelled, to cut, repair, train and measure the student on
    recalibration: ImagesFacts | None = None  # for running statistics
    calibration: CalibrationFacts | None = None  # for running statistics, made without data
    start: StartFacts | None = None  # None if initialised at random
    others: dict[str, Any] = field(default_factory=dict)  # what other versions of this package know

    @classmethod
    def of(cls, model: nn.Module) -> "Provenance | None":
        """Return the provenance of a student, None if this package did not make it; a `ValueError` if damaged."""
        section = noisekd_section(model)
        try:
            return from_dict(cls, section) if section else None
        except ValueError as error:
            advice = "Remove it from config.json, or save the student with this package again."
            raise ValueError(f"The section 'noisekd' of config.json is damaged: {error}. {advice}") from error

    @classmethod
    def has_statistics_of_images(cls, model: nn.Module) -> bool:
        """Return whether running statistics of `model` hold for images, as far as is known: not only for noise."""
        made = cls.of(model)
        return made is None or made.batch_norm == "running"

    def attach(self, model: nn.Module) -> None:
        """Store this in `model`, and in its `config.json` once it is saved."""
        self.detach(model)
        model.noisekd = to_dict(self)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Remove the provenance from a model whose weights change."""
        for holder in (model, getattr(model, "config", model)):
            holder.__dict__.pop("noisekd", None)

    @property
    def is_data_free(self) -> bool:
        """Whether the student was made with noise alone, without any image."""
        return self.noise is not None and self.real_images is None and self.given_images is None


@dataclass(kw_only=True)
class Evaluation:
    """Results of [`evaluate`] on a data set: accuracies and agreement in percent, `loss` and `kl` in nats."""

    dataset: str
    split: str | None = None
    images: int
    batch_size: int
    step: int  # training steps before it
    precision: str  # float32, or that of autocast
    log_prefix: str | None = None  # of its entries in the curve, if it was also made during training
    running: dict[str, float]
    batch: dict[str, float]

    def scores(self, statistics: str) -> dict[str, float]:
        """Return the results with `"running"` or with `"batch"` statistics."""
        return self.running if statistics == "running" else self.batch


@dataclass(kw_only=True)
class Record:
    """All that is known of a model trained with this package."""

    name: str | None = None  # of the run in a results file
    model: ModelFacts
    steps: int
    seconds: float | None = None  # of training, evaluations included; None if resumed
    images_per_second: float | None = None
    processes: int = 1
    evaluations: list[Evaluation] = field(default_factory=list)  # of the current weights, one for each data set
    curve: list[dict[str, Any]] = field(default_factory=list)  # the training log, entries with `step`
    noisekd: Provenance | None = None
    class_frequencies: list[float] | None = None  # mean probabilities of the teacher on the training noise
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
        """Return the record of the student with new running statistics, without the evaluations of the old ones."""
        return replace(self, noisekd=provenance, evaluations=[], curve=[], repo_id=None)

    def measured(self, evaluation: Evaluation) -> "Record":
        """Return the record with an evaluation that replaces the one on the same images."""
        others = []
        for entry in self.evaluations:
            # Evaluations during training have no split.
            if entry.dataset != evaluation.dataset or entry.split not in (None, evaluation.split):
                others.append(entry)
            elif entry.log_prefix is not None:
                evaluation = replace(evaluation, log_prefix=entry.log_prefix)
        return replace(self, evaluations=[*others, evaluation])


def noisekd_section(model: nn.Module) -> dict:
    """Return the section `noisekd` of the `config.json` of a student; empty for any other model."""
    section = getattr(model, "noisekd", None) or getattr(getattr(model, "config", None), "noisekd", None)
    return dict(section or {})


def better_statistics(evaluations: Sequence[Evaluation], *, taught_on_batch: bool) -> str:
    """Return the BatchNorm statistics to use a student with, `"batch"` or `"running"`.

    Those with the higher accuracy in the last of `evaluations` that has one; batch statistics must lead by more than a
    percentage point, as they need batches. Without labelled images, `taught_on_batch` decides: whether the student was
    trained on noise and its teacher used the statistics of the batch.
    """
    leads = [entry.batch["accuracy"] - entry.running["accuracy"] for entry in evaluations if "accuracy" in entry.batch]
    if leads:
        return "batch" if leads[-1] > 1 else "running"
    return "batch" if taught_on_batch else "running"


def current_evaluations(made: Sequence[tuple[Evaluation, bool]], step: int) -> list[Evaluation]:
    """Return the evaluations of the current weights, one for each data set.

    `made` are all in order, each with whether it was made during training. Those made after training replace those made
    during it, later ones replace earlier ones, and those after `step`, that of the weights, do not count.
    """
    during_first = sorted(made, key=lambda entry: not entry[1])
    return list({evaluation.dataset: evaluation for evaluation, _ in during_first if evaluation.step <= step}.values())


def read_record(folder: str | Path) -> Record:
    """Return the record of the student in a folder; a `ValueError` if there is none, or it is damaged."""
    path = Path(folder).expanduser() / RECORD_NAME
    if not path.is_file():
        raise ValueError(f"There is no {path}: the trainer writes it beside a student.")
    try:
        record = from_dict(Record, read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if record.noisekd is None:
        raise ValueError(f"{path} has no section 'noisekd': it is not of a distilled student.")
    return record


def write_record(record: Record, folder: Path) -> None:
    """Write the record of the student in a folder."""
    (folder / RECORD_NAME).write_text(json_text(to_dict(record)))
