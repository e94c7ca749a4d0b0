"""Model cards, each rendered from a [`Record`] alone, so that it can be made again at any time."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_noisekd.files import CARD_NAME, CLASS_BALANCE_NAME, CURVES_NAME, replacing_files
from hf_noisekd.models import cifar
from hf_noisekd.record.plain import code_text, from_dict, markdown_text, to_dict
from hf_noisekd.record.schema import STATISTICS, Provenance, Record, read_record, write_record
from hf_noisekd.release.figures import charted_evaluation, plot_class_balance, plot_curves
from hf_noisekd.release.hub import OWN, check_repo_id
from hf_noisekd.release.licenses import card_license
from hf_noisekd.shrinking import shrunk

TAGS = ("image-classification", OWN, "knowledge-distillation")
SHOWN_AS_CODE = ("revision", "sha256", "commit", "command")
METRIC_NAMES = {"accuracy": "accuracy (%)", "top5_accuracy": "top-5 accuracy (%)", "agreement": "agreement (%)"}
LOSS_NAMES = {"soft_cross_entropy": "soft cross-entropy", "kl": "Kullback-Leibler divergence"}


def write_model_card(
    source: Record | str | Path, output_dir: str | Path | None = None, *, repo_id: str | None = None
) -> Path:
    """Write the card of a student, `README.md` with figures, and its record `noisekd.json`; return the card's path.

    By default they go to the folder `source`, and the card's code loads the `repo_id` of the record, or else the
    folder. A `source` that is no record of a distilled student, or a record without `output_dir`, is a `ValueError`.
    """
    if isinstance(source, Record):
        record = source
    else:
        record = read_record(source)
        output_dir = source if output_dir is None else output_dir
    if output_dir is None:
        raise ValueError("The record has no folder to write the card to: pass output_dir.")
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
    """Render the card of a distilled student, else raise a `ValueError`; `figures` holds captions by file name."""
    made, architecture = record.noisekd, record.model.architecture
    if made is None:
        raise ValueError("The record has no section 'noisekd': a card describes a distilled student.")
    if record.repo_id is not None:
        check_repo_id(record.repo_id)
    card_data = _card_data(record, made)
    shown = from_dict(Record, _as_markdown(to_dict(record)))
    network = shown.model.architecture
    if made.start and network == shrunk.ARCHITECTURE:  # a name that nobody knows
        network = f"{cast(Provenance, shown.noisekd).teacher.architecture} cut to {made.start.macs:.0%}"
    measured = {metric for evaluation in record.evaluations for metric in evaluation.batch}
    template = (files("hf_noisekd.release") / "templates" / "model_card.md").read_text(encoding="utf-8")
    return ModelCard(
        jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(
            card_data=card_data.to_yaml(),
            record=shown,
            title=shown.title or (shown.repo_id or "").split("/")[-1],
            network=network,
            class_name=architecture if architecture.isidentifier() else "Model",
            source=record.repo_id or ".",
            # timm and transformers know the architectures of this package once it is imported.
            registers=record.model.library == "timm" and architecture in cifar.default_cfgs | shrunk.default_cfgs,
            image_mode="L" if (record.model.input_size or [3])[0] == 1 else "RGB",
            on_batch=made.batch_norm == "batch",
            teacher_on_hub=card_data.base_model is not None,
            columns={metric: name for metric, name in METRIC_NAMES.items() if metric in measured},
            statistics_used=_statistics_used(record),
            has_accuracy="accuracy" in measured,
            loss_names=LOSS_NAMES,
            figures={file: markdown_text(caption) for file, caption in (figures or {}).items()},
        )
    )


def _as_markdown(value: Any, key: str = "") -> Any:
    """Return plain data with its texts, keys of `versions` included, escaped for a card."""
    if isinstance(value, dict):
        return {markdown_text(name): _as_markdown(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_as_markdown(part, key) for part in value]
    if not isinstance(value, str):
        return value
    return code_text(value) if key in SHOWN_AS_CODE else markdown_text(value)


def _statistics_used(record: Record) -> tuple[str, ...]:
    """Return the statistics to report: both, or one for a student without BatchNorm, for which they are the same."""
    return STATISTICS if record.model.has_batch_norm else STATISTICS[:1]


def _card_data(record: Record, made: Provenance) -> ModelCardData:
    results = []
    for evaluation in record.evaluations:
        for statistics in _statistics_used(record):
            scores = evaluation.scores(statistics)
            name = "Accuracy"
            if record.model.has_batch_norm:
                batches = f", batches of {evaluation.batch_size}" if statistics == "batch" else ""
                name = f"Accuracy, {statistics} statistics{batches}"
            if "accuracy" in scores:
                results.append(
                    EvalResult(
                        task_type="image-classification",
                        task_name="Image classification",
                        dataset_type=evaluation.dataset,
                        dataset_name=evaluation.dataset,
                        dataset_split=evaluation.split,
                        metric_type="accuracy",
                        metric_name=name,
                        metric_value=round(scores["accuracy"] / 100, 6),
                    )
                )
    return ModelCardData(
        library_name={"torch": "pytorch"}.get(record.model.library, record.model.library),
        pipeline_tag="image-classification",
        tags=[*TAGS, *["data-free"] * made.is_data_free, *(record.tags or ())],
        language=record.language or None,
        **card_license(record.license or made.teacher.license),
        base_model=made.teacher.id if _is_repo_id(made.teacher.id) else None,
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
        model_name=(record.repo_id or record.model.architecture).split("/")[-1] if results else None,
    )


def _is_repo_id(text: str | None) -> bool:
    try:
        check_repo_id(text or "")
    except ValueError:
        return False
    return True


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
        figures[CLASS_BALANCE_NAME] = "How often the teacher predicted each class on the training noise"
    return figures
