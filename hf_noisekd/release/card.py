"""Model cards, each rendered from a [`Record`] alone, so that it can be made again at any time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_noisekd.files import CARD_NAME, CLASS_BALANCE_NAME, CURVES_NAME, replacing_files
from hf_noisekd.record.plain import code_text, from_dict, markdown_text, to_dict
from hf_noisekd.record.schema import (
    STATISTICS,
    Evaluation,
    ImagesFacts,
    Provenance,
    Record,
    read_record,
    write_record,
)
from hf_noisekd.release.card_code import CardCode
from hf_noisekd.release.figures import charted_evaluation, plot_class_balance, plot_curves
from hf_noisekd.release.hub import check_repo_id
from hf_noisekd.release.licenses import card_license
from hf_noisekd.shrinking import shrunk

TAGS = ("image-classification", "noisekd", "knowledge-distillation")
SHOWN_AS_CODE = ("revision", "sha256", "commit", "command")
LOSS_NAMES = {"soft_cross_entropy": "soft cross-entropy", "kl": "Kullback-Leibler divergence"}


def write_model_card(
    source: Record | str | Path,
    output_dir: str | Path | None = None,
    *,
    repo_id: str | None = None,
) -> Path:
    """Write the card of a student, `README.md` with figures, and its record `noisekd.json`; return the card's path.

    Args:
        source: The record of a student, or the folder of one.
        output_dir: Where to write. Default: the folder, if `source` is one.
        repo_id: Where the card's code finds the student on the Hub. Default: what the record says, else its own folder.

    Raises:
        ValueError: `source` tells of no distilled student, or there is nowhere to write.
    """
    if isinstance(source, Record):
        record = source
    else:
        record = read_record(source)
        output_dir = source if output_dir is None else output_dir
    if output_dir is None:
        raise ValueError("There is nowhere to write the card: pass output_dir.")
    if repo_id is not None:
        record = replace(record, repo_id=repo_id)
    output_dir = Path(output_dir).expanduser()
    with replacing_files(output_dir) as staging:
        figures = _draw_figures(record, staging)
        render_model_card(record, figures).save(staging / CARD_NAME)
        write_record(record, staging)
    for name in {CURVES_NAME, CLASS_BALANCE_NAME} - figures.keys():
        (output_dir / name).unlink(missing_ok=True)
    return output_dir / CARD_NAME


def render_model_card(record: Record, figures: Mapping[str, str] | None = None) -> ModelCard:
    """Render the card of a student; `figures` holds captions by file name.

    Raises:
        ValueError: The record is not of a distilled student.
    """
    made, model = record.noisekd, record.model
    if made is None:
        raise ValueError("The record tells of no distilled student: it has no section 'noisekd'.")
    if record.repo_id is not None:
        check_repo_id(record.repo_id)
    card_data, code = _card_data(record, made), CardCode(record, made.batch_norm == "batch")
    record = from_dict(Record, _as_markdown(to_dict(record)))
    made, model = cast(Provenance, record.noisekd), record.model
    on_batch = made.batch_norm == "batch"
    network = model.architecture
    if made.start and network == shrunk.ARCHITECTURE:  # which is no name that anybody knows
        network = f"{made.teacher.architecture} cut to {made.start.macs:.0%}"
    title = record.title or (record.repo_id or "").split("/")[-1]
    return ModelCard.from_template(
        card_data,
        template_str=(files("hf_noisekd.release") / "templates" / "model_card.md").read_text(encoding="utf-8"),
        network=network,
        title=title or f"{network}, taught by {made.teacher.architecture} with {_taught_by(made)}",
        model=model,
        parameters=_millions(model.parameters),
        teacher_parameters=_millions(made.teacher.parameters),
        teacher=made.teacher,
        teacher_link=_link(made.teacher.id),
        size=_pixels(model.input_size) if model.input_size else "any size",
        taught_by=_taught_by(made),
        is_data_free=made.is_data_free,
        start=made.start,
        results_table=_results_table(record),
        results_note=_results_note(record.evaluations),
        has_accuracy=any("accuracy" in evaluation.batch for evaluation in record.evaluations),
        statistics_advice=_statistics_advice(made, record.evaluations) if model.has_batch_norm else "",
        code=code,
        on_batch=on_batch,
        library=model.library,
        facts=_facts(record, made),
        figures=[{"file": file, "caption": markdown_text(caption)} for file, caption in (figures or {}).items()],
    )


def _as_markdown(value: Any, key: str = "") -> Any:
    """Return plain data with all texts, which may be anybody's, as they can stand in a card."""
    if isinstance(value, dict):
        return {name: _as_markdown(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_as_markdown(part, key) for part in value]
    if not isinstance(value, str):
        return value
    return code_text(value) if key in SHOWN_AS_CODE else markdown_text(value)


def _link(hub_id: str | None) -> str:
    """Return a link to a repository; what can be no id as it is."""
    try:
        check_repo_id(hub_id or "")
    except ValueError:
        return hub_id or ""
    return f"[{hub_id}](https://huggingface.co/{hub_id})"


def _card_data(record: Record, made: Provenance) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=evaluation.dataset,
            dataset_name=evaluation.dataset,
            dataset_split=evaluation.split,
            metric_type="accuracy",
            metric_name=f"Accuracy, {_reading(statistics, evaluation)}" if record.model.has_batch_norm else "Accuracy",
            metric_value=round(evaluation.scores(statistics)["accuracy"] / 100, 6),
        )
        for evaluation in record.evaluations
        for statistics in _readings(record)
        if "accuracy" in evaluation.scores(statistics)
    ]
    return ModelCardData(
        library_name={"torch": "pytorch"}.get(record.model.library, record.model.library),
        pipeline_tag="image-classification",
        tags=[*TAGS, *["data-free"] * made.is_data_free, *(record.tags or ())],
        language=record.language or None,
        **card_license(record.license or made.teacher.license),
        base_model=made.teacher.id if _link(made.teacher.id) != made.teacher.id else None,
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
        model_name=(record.repo_id or record.model.architecture).split("/")[-1] if results else None,
    )


def _results_table(record: Record) -> str:
    if not record.evaluations:
        return ""
    names = {"accuracy": "accuracy (%)", "top5_accuracy": "top-5 accuracy (%)", "agreement": "agreement (%)"}
    columns = [name for name in names if any(name in evaluation.batch for evaluation in record.evaluations)]
    lines = [
        f"| evaluated on | BatchNorm on | {' | '.join(names[column] for column in columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for evaluation in record.evaluations:
        split = f", {evaluation.split}" if evaluation.split else ""
        after = "" if evaluation.step == record.steps else f", after step {evaluation.step:,}"
        where = f"{evaluation.dataset}{split} ({evaluation.images:,} images{after})"
        for statistics in _readings(record):
            scores = evaluation.scores(statistics)
            values = [f"{scores[column]:.2f}" if column in scores else "" for column in columns]
            reading = _reading(statistics, evaluation) if record.model.has_batch_norm else "it has none"
            lines.append(f"| {where} | {reading} | {' | '.join(values)} |")
    return "\n".join(lines)


def _readings(record: Record) -> Sequence[str]:
    """Return by which statistics a student can be read; one without BatchNorm reads the same by both."""
    return STATISTICS if record.model.has_batch_norm else STATISTICS[:1]


def _results_note(evaluations: Sequence[Evaluation]) -> str:
    precisions = sorted({evaluation.precision for evaluation in evaluations})
    note = f"Measured in {' and '.join(precisions)}."
    if any("agreement" in evaluation.batch for evaluation in evaluations):
        note += " Agreement is the share of images for which student and teacher give the same first answer."
    return note


def _reading(statistics: str, evaluation: Evaluation) -> str:
    return "running statistics" if statistics == "running" else f"batch statistics, batches of {evaluation.batch_size}"


def _statistics_advice(made: Provenance, evaluations: Sequence[Evaluation]) -> str:
    if made.batch_norm == "batch":
        sizes = dict.fromkeys(str(evaluation.batch_size) for evaluation in evaluations)
        measured = f" (it was measured with {' and '.join(sizes)})" if sizes else ""
        return (
            "**Batch statistics.** The running statistics that this student stores are those of what it was taught "
            "with, not of real images, and reading it with them costs accuracy. Give it batches of images of mixed "
            f"classes, the larger the better up to about 256{measured}, and let its BatchNorm layers use the "
            "statistics of the batch at hand, as below; or recalibrate it once."
        )
    again = ""
    if made.recalibration:
        again = f": they were re-estimated from {_number_of_images(made.recalibration)}"
    elif made.calibration:
        again = (
            f": they were re-estimated, without data, from {made.calibration.images:,} images that were made to have "
            "the statistics which the teacher stores"
        )
    return f"**Running statistics**, as for any other model{again}. Single images and batches of any size will do."


def _taught_by(made: Provenance) -> str:
    if made.noise is None:
        return "unlabelled images"
    noise = f"{made.noise.distribution} noise"
    return f"{noise} and {_number_of_images(made.real_images)}" if made.real_images else noise


def _number_of_images(on: ImagesFacts) -> str:
    return f"{on.images:,} real images" + (f" of {on.dataset}" if on.dataset else "")


def _facts(record: Record, made: Provenance) -> list[str]:
    """Return how the student was made, a line each; what is not known has no line."""
    teacher = made.teacher.architecture
    if hub_id := made.teacher.id:
        revision = f", revision `{made.teacher.revision}`" if made.teacher.revision else ""
        teacher += f" ({_link(hub_id)}{revision})"
    elif made.teacher.sha256:
        teacher += f" (SHA-256 of its weights `{made.teacher.sha256[:16]}`)"
    lines = [f"Teacher: {teacher}, {_way_of_asking(made)}."]
    if made.start:
        lines.append(f"Start: the teacher, cut down; {made.start}.")
    if noise := made.noise:
        # Older records do not know sizes that change in the course of the training.
        parts = [f"{h}x{w} pixels for {share:.0%} of the steps" for (h, w), share in noise.image_sizes]
        in_turn = f"; in turn {', then '.join(parts)}" if len(parts) > 1 else ""
        lines.append(
            f"Noise: {noise.distribution}, mean {noise.mean:g}, standard deviation {noise.std:g}, images of "
            f"{_pixels(noise.input_size)}, drawn afresh for each step{in_turn}."
        )
    if made.real_images:
        images = _number_of_images(made.real_images)
        lines.append(f"In every second step a batch drawn from {images}, without labels, in its place.")
    loss = LOSS_NAMES.get(made.loss_type, made.loss_type)
    lines.append(
        f"Training: {made.steps:,} steps of {made.batch_size} images, {loss} at temperature {made.temperature:g}, seed "
        f"{made.seed}."
    )
    if made.start and not made.start.training_helped:
        lines.append(
            "This training did not help: cut down, and with no training, the student agrees with its teacher more "
            "often on images made without data. **So it has the weights that it began with.**"
        )
    if made.recalibration:
        lines.append(f"Recalibration: running statistics of {_number_of_images(made.recalibration)}.")
    if of := made.calibration:
        lines.append(
            f"Calibration: running statistics of {of.images:,} images, noise that was moved in {of.steps:,} steps "
            "until the teacher's BatchNorm layers saw the statistics that they store. With its own statistics "
            f"re-estimated on them the teacher gave its own answer to {of.self_agreement:.1f} % of {of.held_out:,} "
            "others. The images are not published: they can show what the teacher memorised."
        )
    if device := str(record.machine or ""):
        lines.append(
            f"Device: {device}{f', {record.processes} processes' if record.processes > 1 else ''}"
            + (f"; {record.seconds:,.0f} seconds" if record.seconds else "")
            + (f", {record.images_per_second:,.0f} images a second" if record.images_per_second else "")
            + "."
        )
    if record.command:
        at = f", at commit `{record.commit}` of hf_noisekd" if record.commit else ""
        lines.append(f"Command: `{record.command}`{at}.")
    lines.append(
        "Versions: " + ", ".join(f"{markdown_text(name)} {number}" for name, number in made.versions.items()) + "."
    )
    return lines


def _way_of_asking(made: Provenance) -> str:
    """Return by which statistics the teacher answered in training."""
    fraction, weight = made.teacher_batch_norm_fraction, made.teacher_statistics
    if not weight * fraction:
        return "as it is, in evaluation mode"
    layers = "all its BatchNorm layers" if fraction == 1 else f"{fraction:.0%} of its BatchNorm layers"
    if weight == 1:
        return f"with {layers} on the statistics of the batch at hand"
    return f"with {layers} on statistics that are {weight:.0%} those of the batch at hand and else the stored ones"


def _draw_figures(record: Record, folder: Path) -> dict[str, str]:
    """Draw the figures that the record has the data for, and return their captions by file name."""
    figures: dict[str, str] = {}
    for metric, what in (("accuracy", "Accuracy on"), ("agreement", "Agreement with the teacher on")):
        evaluation = charted_evaluation(record, metric)
        if evaluation and record.curve and not figures:
            plot_curves(record, evaluation, folder / CURVES_NAME, metric)
            figures[CURVES_NAME] = f"{what} {evaluation.dataset} against training steps"
    if record.class_frequencies:
        plot_class_balance(record.class_frequencies, folder / CLASS_BALANCE_NAME, record.model.label_names)
        figures[CLASS_BALANCE_NAME] = "How often the teacher answered each class to the training noise"
    return figures


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.0f} k"


def _pixels(input_size: Sequence[int]) -> str:
    channels, height, width = input_size
    return f"{height}x{width} pixels in {'gray' if channels == 1 else f'{channels} channels'}"
