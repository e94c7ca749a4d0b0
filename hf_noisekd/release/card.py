"""Model cards: what a student is, how well it does, how to load it, how it was made, and what it is not.

A card is rendered from a record of [`hf_noisekd.release.record`] alone, by huggingface_hub's `ModelCard` from
`templates/model_card.md`. So the card of a student on disk can be made again at any time, and that of a recipe from its
results file.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_noisekd.files import CARD_NAME, RECORD_NAME, replacing_files
from hf_noisekd.models import cifar
from hf_noisekd.models.loading import model_folder
from hf_noisekd.release.environment import describe_machine
from hf_noisekd.release.figures import charted_evaluation, plot_class_balance, plot_curves
from hf_noisekd.training.evaluation import STATISTICS

TAGS = ("image-classification", "noisekd", "knowledge-distillation")
CURVES_NAME = "curves.png"
CLASS_BALANCE_NAME = "class_balance.png"


def write_model_card(
    source: Mapping | str | Path,
    output_dir: str | Path | None = None,
    *,
    repo_id: str | None = None,
    run: str | None = None,
) -> Path:
    """Write the card of a student, `README.md` with figures, and its record `noisekd.json`.

    Args:
        source: The record of a student; a folder that the trainer or `noisekd distill` wrote; or the results file of a
            recipe, of which one run counts, and which takes the place of the record.
        output_dir: Where to write. Default: the folder, if `source` is one.
        repo_id: Where the student is on the Hub, for the code that loads it. Default: what the record says; without one
            the code loads the folder that it is run in.
        run: Name of that run. Default: the last one.

    Returns:
        The path of the card.

    Raises:
        ValueError: `source` tells of no distilled student, or there is nowhere to write.
    """
    record = dict(source) if isinstance(source, Mapping) else read_record(source, run)
    if output_dir is None:
        if isinstance(source, Mapping) or not Path(source).is_dir():
            raise ValueError("There is nowhere to write the card: pass output_dir.")
        output_dir = source
    if repo_id is not None:
        record["repo_id"] = repo_id
    with replacing_files(output_dir) as staging:
        figures = _draw_figures(record, staging)
        render_model_card(record, figures).save(staging / CARD_NAME)
        if "runs" not in record:
            (staging / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")
    for name in {CURVES_NAME, CLASS_BALANCE_NAME} - figures.keys():
        (Path(output_dir) / name).unlink(missing_ok=True)
    return Path(output_dir) / CARD_NAME


def read_record(source: str | Path, run: str | None = None) -> dict:
    """Return the record of a student, in a folder or on the Hub, or of a run of a recipe's results file.

    Args:
        source: The folder, the Hub id or the results file.
        run: Name of the run of a results file; the first of that name counts. Default: the last run.

    Raises:
        ValueError: There is none; the message says what was found.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        path = model_folder(str(source))[0] / RECORD_NAME
    if not path.is_file():
        raise ValueError(
            f"There is no {path}: a card is made from the {RECORD_NAME} that the trainer writes beside a student, or "
            "from the results file of a recipe."
        )
    try:
        record = json.loads(path.read_text())
        if "runs" in record:
            names = [each["name"] for each in record["runs"]]
            if run is not None and run not in names:
                raise ValueError(f"it has no run {run!r}, only {', '.join(map(repr, names))}")
            record |= record["runs"][-1 if run is None else names.index(run)]
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is neither a record nor a results file: {error}") from error
    if not isinstance(record, dict) or "noisekd" not in record:
        raise ValueError(f"{path} tells of no distilled student: it has no section 'noisekd'.")
    return record


def render_model_card(record: Mapping, figures: Mapping[str, str] | None = None) -> ModelCard:
    """Render the card of a student.

    Args:
        record: What is known of it; see [`hf_noisekd.release.record`]. `repo_id`, `license` and `tags` may stand in it
            too.
        figures: Captions of the figures by file name.
    """
    made, model = record["noisekd"], record["model"]
    teacher = made["teacher"]
    on_batch = made["batch_norm"] == "batch"
    code = _Code(record, on_batch)
    title = record.get("title") or (record.get("repo_id") or "").split("/")[-1]
    return ModelCard.from_template(
        _card_data(record),
        template_str=(files(__package__) / "templates" / "model_card.md").read_text(encoding="utf-8"),
        title=title or f"{model['architecture']}, taught by {teacher['architecture']} with {_taught_by(made)}",
        model=model,
        parameters=_millions(model["parameters"]),
        teacher_parameters=_millions(teacher["parameters"]),
        teacher=teacher,
        size=_by(model["input_size"]) if "input_size" in model else "any size",
        taught_by=_taught_by(made),
        is_data_free=_is_data_free(made),
        results_table=_results_table(record),
        results_note=_results_note(record["evaluations"]),
        has_accuracy=any("accuracy" in evaluation["batch"] for evaluation in record["evaluations"]),
        statistics_advice=_statistics_advice(record),
        code=code,
        on_batch=on_batch,
        library=model["library"],
        facts=_facts(record),
        figures=[{"file": file, "caption": caption} for file, caption in (figures or {}).items()],
    )


def _card_data(record: Mapping) -> ModelCardData:
    teacher = record["noisekd"]["teacher"]
    data_free = ["data-free"] if _is_data_free(record["noisekd"]) else []
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=evaluation["dataset"],
            dataset_name=evaluation["dataset"],
            dataset_split=evaluation.get("split"),
            metric_type="accuracy",
            metric_name=f"Accuracy, {_reading(statistics, evaluation)}",
            metric_value=round(evaluation[statistics]["accuracy"] / 100, 6),
        )
        for evaluation in record["evaluations"]
        for statistics in STATISTICS
        if "accuracy" in evaluation[statistics]
    ]
    fields = {
        "language": record.get("language"),
        "license": record.get("license") or teacher.get("license"),
        "base_model": teacher.get("id"),
        "metrics": ["accuracy"] if results else None,
        "eval_results": results or None,
        "model_name": (record.get("repo_id") or record["model"]["architecture"]).split("/")[-1] if results else None,
    }
    return ModelCardData(
        library_name={"torch": "pytorch"}.get(record["model"]["library"], record["model"]["library"]),
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys([*TAGS, *data_free, *record.get("tags", ())])),
        **{key: value for key, value in fields.items() if value},
    )


def _results_table(record: Mapping) -> str:
    evaluations = record["evaluations"]
    if not evaluations:
        return ""
    names = {"accuracy": "accuracy (%)", "top5_accuracy": "top-5 accuracy (%)", "agreement": "agreement (%)"}
    columns = [name for name in names if any(name in evaluation["batch"] for evaluation in evaluations)]
    lines = [
        f"| evaluated on | BatchNorm on | {' | '.join(names[column] for column in columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for evaluation in evaluations:
        where = f"{evaluation['dataset']}{', ' + evaluation['split'] if 'split' in evaluation else ''}"
        after = "" if evaluation["step"] == record["steps"] else f", after step {evaluation['step']:,}"
        for statistics in STATISTICS:
            values = [
                f"{evaluation[statistics][column]:.2f}" if column in evaluation[statistics] else ""
                for column in columns
            ]
            lines.append(
                f"| {where} ({evaluation['images']:,} images{after}) | {_reading(statistics, evaluation)} "
                f"| {' | '.join(values)} |"
            )
    return "\n".join(lines)


def _results_note(evaluations: list[Mapping]) -> str:
    precisions = sorted({evaluation["precision"] for evaluation in evaluations})
    note = f"Measured in {' and '.join(precisions)}."
    if any("agreement" in evaluation["batch"] for evaluation in evaluations):
        note += " Agreement is the share of images for which student and teacher give the same first answer."
    return note


def _reading(statistics: str, evaluation: Mapping) -> str:
    if statistics == "running":
        return "running statistics"
    return f"batch statistics, batches of {evaluation['batch_size']}"


def _statistics_advice(record: Mapping) -> str:
    made = record["noisekd"]
    if made["batch_norm"] == "batch":
        sizes = [str(evaluation["batch_size"]) for evaluation in record["evaluations"]]
        measured = f" (it was measured with {' and '.join(dict.fromkeys(sizes))})" if sizes else ""
        return (
            "**Batch statistics.** The running statistics that this student stores are those of what it was taught "
            "with, not of real images, and reading it with them costs accuracy. Give it batches of images of mixed "
            f"classes, the larger the better up to about 256{measured}, and let its BatchNorm layers use the "
            "statistics of the batch at hand, as below; or recalibrate it once."
        )
    if "recalibration" in made:
        return (
            "**Running statistics**, as for any other model: they were re-estimated from "
            f"{_number_of_images(made['recalibration'])}. Single images and batches of any size will do."
        )
    return "**Running statistics**, as for any other model. Single images and batches of any size will do."


def _taught_by(made: Mapping) -> str:
    if "noise" not in made:
        return "unlabelled images"
    noise = f"{made['noise']['distribution']} noise"
    return noise if _is_data_free(made) else f"{noise} and {_number_of_images(made['real_images'])}"


def _is_data_free(made: Mapping) -> bool:
    return "noise" in made and "real_images" not in made


def _number_of_images(on: Mapping) -> str:
    return f"{on['images']:,} real images" + (f" of {on['dataset']}" if "dataset" in on else "")


def _facts(record: Mapping) -> list[str]:
    """Return how the student was made, a line each; what is not known has no line."""
    made = record["noisekd"]
    teacher, noise = made["teacher"], made.get("noise")
    fraction = made["teacher_batch_norm_fraction"]
    layers = "all its BatchNorm layers" if fraction == 1 else f"{fraction:.0%} of its BatchNorm layers"
    if teacher.get("id"):
        identity = f" ([{teacher['id']}](https://huggingface.co/{teacher['id']})"
        identity += f", revision `{teacher['revision']}`)" if "revision" in teacher else ")"
    else:
        identity = f" (SHA-256 of its weights `{teacher['sha256'][:16]}`)"
    loss = {
        "soft_cross_entropy": "soft cross-entropy",
        "kl": "Kullback-Leibler divergence",
        "centered_mse": "mean squared error of centred logits",
    }[made["loss_type"]]
    lines = [f"Teacher: {teacher['architecture']}{identity}, with {layers} on the statistics of the batch at hand."]
    if noise:
        lines.append(
            f"Noise: {noise['distribution']}, mean {noise['mean']:g}, standard deviation {noise['std']:g}, images of "
            f"{_by(noise['input_size'])}, drawn afresh for each step{_sizes_in_turn(noise)}."
        )
    if "real_images" in made:
        lines.append(
            f"In every second step a batch drawn from {_number_of_images(made['real_images'])}, without labels, in its "
            "place."
        )
    lines.append(
        f"Training: {made['steps']:,} steps of {made['batch_size']} images, {loss} at temperature "
        f"{made['temperature']:g}, seed {made['seed']}."
    )
    if "recalibration" in made:
        lines.append(f"Recalibration: running statistics of {_number_of_images(made['recalibration'])}.")
    if device := describe_machine(record.get("machine", {})):
        processes = record.get("processes", 1)
        lines.append(
            f"Device: {device}{f', {processes} processes' if processes > 1 else ''}"
            + (f"; {record['seconds']:,.0f} seconds" if record.get("seconds") else "")
            + (f", {record['images_per_second']:,.0f} images a second" if record.get("images_per_second") else "")
            + "."
        )
    if record.get("command"):
        at = f", at commit `{record['commit']}` of hf_noisekd" if record.get("commit") else ""
        lines.append(f"Command: `{record['command']}`{at}.")
    lines.append("Versions: " + ", ".join(f"{name} {number}" for name, number in made["versions"].items()) + ".")
    return lines


def _draw_figures(record: Mapping, folder: Path) -> dict[str, str]:
    """Draw the figures that the record has the data for, and return their captions by file name."""
    figures = {}
    runs = record.get("runs") or [{"name": "this student"} | dict(record)]
    for metric, what in (("accuracy", "Accuracy on"), ("agreement", "Agreement with the teacher on")):
        evaluation = charted_evaluation(record, metric)
        if evaluation and record["curve"] and not figures:
            plot_curves(runs, folder / CURVES_NAME, metric)
            figures[CURVES_NAME] = f"{what} {evaluation['dataset']} against training steps"
    if record.get("class_frequencies"):
        plot_class_balance(record["class_frequencies"], folder / CLASS_BALANCE_NAME, record["model"].get("label_names"))
        figures[CLASS_BALANCE_NAME] = "How often the teacher answered each class to the training noise"
    return figures


class _Code:
    """The code of a card, for a student on the Hub or in the folder that the code is run in."""

    def __init__(self, record: Mapping, on_batch: bool):
        self.source = record.get("repo_id") or "."
        self.architecture = record["model"]["architecture"]
        self.is_timm = record["model"]["library"] == "timm"
        self.image_mode = "L" if record["model"].get("input_size", [3])[0] == 1 else "RGB"
        self.on_batch = on_batch
        # timm and transformers know the architectures of this package once it is imported.
        self.registers = self.is_timm and self.architecture in cifar.default_cfgs
        self.needs_package = on_batch or self.registers

    def timm(self) -> str:
        source = "local-dir:." if self.source == "." else f"hf-hub:{self.source}"
        return self._inference(
            ["import timm", "import torch"],
            f'model = timm.create_model("{source}", pretrained=True).eval()',
            "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
            "inputs = torch.stack([transform(image) for image in images])",
            answer="probs = model(inputs).softmax(-1)",
        )

    def transformers(self) -> str:
        return self._inference(
            ["import torch", "from transformers import AutoImageProcessor, AutoModelForImageClassification"],
            f'model = AutoModelForImageClassification.from_pretrained("{self.source}").eval()',
            f'processor = AutoImageProcessor.from_pretrained("{self.source}")',
            'inputs = processor(images, return_tensors="pt")',
            answer="probs = model(**inputs).logits.softmax(-1)",
        )

    def pipeline(self) -> str:
        register = self._register()
        if self.image_mode == "L" and self.is_timm:
            lines = [
                "from torchvision.transforms import Grayscale",
                "from transformers import AutoImageProcessor, pipeline",
                *register,
                "",
                f'processor = AutoImageProcessor.from_pretrained("{self.source}")',
                "processor.val_transforms.transforms.insert(0, Grayscale())  # a pipeline turns images into RGB",
                f'classify = pipeline("image-classification", model="{self.source}", image_processor=processor)',
            ]
        else:
            lines = [
                "from transformers import pipeline",
                *register,
                "",
                f'classify = pipeline("image-classification", model="{self.source}")',
            ]
        return "\n".join([*lines, "answers = classify(images)"])

    def recalibrate(self) -> str:
        return (
            f"noisekd recalibrate --model {self.source} --dataset FOLDER_OR_HUB_ID --split train "
            "--output-dir recalibrated"
        )

    def _register(self) -> list[str]:
        return [f"import hf_noisekd  # registers {self.architecture}"] if self.registers else []

    def _inference(self, imports: list[str], load: str, prepare: str, inputs: str, *, answer: str) -> str:
        own = ["from hf_noisekd import batch_statistics"] if self.on_batch else self._register()
        context = "torch.no_grad(), batch_statistics(model)" if self.on_batch else "torch.no_grad()"
        return "\n".join(
            [
                *imports,
                *own,
                "",
                load,
                prepare,
                f'images = [image.convert("{self.image_mode}") for image in images]  # a list of PIL images',
                inputs,
                f"with {context}:",
                f"    {answer}",
            ]
        )


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.0f} k"


def _sizes_in_turn(noise: Mapping) -> str:
    """Return what is to be said of sizes that change in the course of the training; older records do not know."""
    sizes = noise.get("image_sizes", [])
    parts = [f"{height}x{width} pixels for {share:.0%} of the steps" for (height, width), share in sizes]
    return f"; in turn {', then '.join(parts)}" if len(parts) > 1 else ""


def _by(input_size: list[int]) -> str:
    channels, height, width = input_size
    return f"{height}x{width} pixels in {'gray' if channels == 1 else f'{channels} channels'}"
