"""Running statistics and int8 without data: students that classify single images in ordinary evaluation mode.

    python recipes/deploy.py --teacher runs/cifar10/teacher
    python recipes/deploy.py --preset cpu-wrn-mobilenetv2
    python recipes/deploy.py --preset gpu                   # the authors' networks

Beyond the paper. Students learn from structured noise, as `noisekd distill` teaches them, and are then read in ordinary
evaluation mode, with running statistics as trained, and re-estimated on noise, on calibration images, which take no
data, and on real training images. Then onnxruntime runs them image by image: in float32, in float16, and in int8 with
ranges of calibration images, of real ones and of white noise. Under seed 0 transformers' pipeline classifies the images
too. The seconds are those of making the calibration images, beside those of the training on the same threads. Times of
onnxruntime are medians over single images on one thread, taken in turns.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from harness.experiment import Experiment, experiment_parser
from harness.onnx_files import read_in_turns, write_files
from harness.presets import CIFAR10, DISTILL_DEFAULTS, NOISE_PAIRS
from torch import nn
from transformers import pipeline

from hf_noisekd import NoiseDataset, calibration_images, recalibrate_batch_norm, save_model

# With the steps of each student; one of a MobileNetV2 takes a CPU ten times as long as one of a ResNet-10.
PRESETS = {name: pair | {"steps": {"resnet10_cifar": 2400}} for name, pair in NOISE_PAIRS.items()}
PRESETS |= {f"{name}-mobilenetv2": pair | {"steps": {"mobilenetv2_cifar": 200}} for name, pair in NOISE_PAIRS.items()}
PRESETS["gpu"] = CIFAR10["paper"] | {"steps": {"resnet18_cifar": 20_000, "mobilenetv2_cifar": 20_000}}
CALIBRATION_IMAGES = 256
REAL_IMAGES = (256, 2560)


def main() -> None:
    """Train the students, and print their tables."""
    options = experiment_parser(__doc__, "deploy", PRESETS).parse_args()
    preset = PRESETS[options.preset]
    experiment = Experiment("deploy", options, preset)
    teacher = experiment.prepare_teacher()
    start = time.perf_counter()
    calibration = calibration_images(teacher, CALIBRATION_IMAGES, seed=options.seed)
    cost = {"seconds of the calibration images": time.perf_counter() - start, "their steps": calibration.steps}
    cost |= {"their distance": calibration.distance, "self-agreement (%)": calibration.self_agreement}
    tables: dict[str, list[dict]] = {"calibration": [], "running statistics": [], "onnxruntime": []}
    for student, steps in preset["steps"].items():
        record, model, folder = train_student(experiment, student, steps)
        tables["calibration"].append(
            {"student": student, "steps": record.steps, "seconds of the training": record.seconds} | cost
        )
        tables["running statistics"] += [
            {"student": student, "statistics of": kind, "accuracy": accuracy}
            for kind, accuracy in accuracies(experiment, record, model, calibration).items()
        ]
        recalibrate_batch_norm(model, calibration)
        save_model(model, folder)
        rows = onnx_rows(experiment, model, calibration)
        if options.seed == 0:
            rows.append({"read by": "transformers' pipeline", "accuracy": pipeline_accuracy(experiment, folder)})
        tables["onnxruntime"] += [{"student": student} | row for row in rows]
        for table, measured in tables.items():
            experiment.results.measure(table, measured)
    experiment.results.print_table()


def train_student(experiment: Experiment, student: str, steps: int) -> tuple[Any, nn.Module, Path]:
    """Return the record of a student with the statistics of its noise, the student, and where it is saved."""
    arguments = DISTILL_DEFAULTS | {"max_steps": steps, "eval_strategy": "no"}  # without calibration, as in the paper
    trainer = experiment.distill(f"structured noise, {student}", student, **arguments)
    return experiment.results.runs[-1], trainer.model, Path(trainer.args.output_dir)


def accuracies(experiment: Experiment, record, model: nn.Module, calibration) -> dict[str, float]:
    """Return test accuracies in percent, with running statistics of several kinds of images."""
    noises = {
        f"{kind}, {CALIBRATION_IMAGES} images": NoiseDataset.for_model(
            model, distribution=name, batch_size=CALIBRATION_IMAGES
        )
        for kind, name in (("white noise", "white"), ("dead leaves", "dead_leaves"))
    }
    images: dict[str, Any] = {name: [noise.draw(0)] for name, noise in noises.items()}
    images[f"calibration images, {CALIBRATION_IMAGES}"] = calibration
    images |= {f"real images, {number:,}": experiment.real_images(number) for number in REAL_IMAGES}
    scores = {"the training noise, as trained": record.evaluations[0].running["accuracy"]}
    scores |= {name: experiment.recalibrated_accuracy(model, batches) for name, batches in images.items()}
    return scores | {"each batch of 256 test images": record.evaluations[0].batch["accuracy"]}


def onnx_rows(experiment: Experiment, model: nn.Module, calibration) -> list[dict]:
    """Return size, accuracy and latency of a student in onnxruntime, an image at a time, in several precisions."""
    white = NoiseDataset.for_model(model, batch_size=CALIBRATION_IMAGES)
    ranges = {
        "calibration images": calibration,
        "white noise": [white.draw(0)],
        "real images": experiment.real_images(CALIBRATION_IMAGES),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(model, Path(folder), ranges)
        answers, seconds = read_in_turns(paths, experiment.test_dataset)
        labels = experiment.test_dataset.labels
        return [
            {
                "read by": f"onnxruntime, {name}",
                "accuracy": 100 * (answers[name] == labels).float().mean().item(),
                "MB": path.stat().st_size / 1e6,
                "ms an image": 1000 * statistics.median(seconds[name]),
            }
            for name, path in paths.items()
        ]


def pipeline_accuracy(experiment: Experiment, folder: Path) -> float:
    """Return the accuracy in percent of transformers' pipeline on the test images, one at a time, from the folder."""
    images = experiment.test_dataset
    classify = pipeline("image-classification", model=str(folder), top_k=1)
    pictures = [PIL.Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))) for image in images.images]
    right = 0
    for picture, label in zip(pictures, images.labels.tolist(), strict=True):
        right += classify(picture)[0]["label"] == images.label_names[label]
    return 100 * right / len(pictures)


if __name__ == "__main__":
    main()
