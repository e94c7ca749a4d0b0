"""How the agreement of student and teacher on images made without data goes with the accuracy.

    python recipes/agreement.py --teacher runs/cifar10/teacher
    python recipes/agreement.py --preset cpu-wrn
    python recipes/agreement.py --preset cpu-weak           # a teacher of few epochs

Beyond the paper. Students of one teacher learn for more or fewer steps, and from other noises. Each has its running
statistics re-estimated on calibration images, and is compared with its teacher on others like them, and, as training
does, on held-out noise under batch statistics; then with the labels of the test images, and with the teacher on them.
The rank correlation (Spearman's) shows whether it ranks students; the mean error, in points,
how far the agreement without data is from that on the test images. `by class` is the rank correlation within a
student, over the classes, of its agreement where the teacher predicts the class, and its accuracy on the class.
"""

import statistics

import torch
from harness.datasets import ImageDataset
from harness.experiment import Experiment, experiment_parser
from harness.presets import CIFAR10, DISTILL_DEFAULTS, NOISE_PAIRS
from scipy.stats import spearmanr
from torch import nn

from hf_noisekd import NoiseDataset, calibration_images, evaluate, recalibrate_batch_norm

PRESETS = NOISE_PAIRS | {
    "cpu-weak": CIFAR10["cpu"] | {"teacher": "resnet10_cifar", "supervised": {"num_train_epochs": 3}}
}
RUNS = {
    "structured, 100 steps": {"max_steps": 100},
    "structured, 300 steps": {"max_steps": 300},
    "structured, 1,000 steps": {"max_steps": 1000},
    "half size only, 300 steps": {"max_steps": 300, "resolutions": "0.5"},
    "fractals, 300 steps": {"max_steps": 300, "noise": "fractal"},
    "white noise, 300 steps": {"max_steps": 300, "noise": "white"},
}
TOLD_BY = ("on calibration images", "on held-out noise")


def main() -> None:
    """Train the students, measure them, and print their tables."""
    options = experiment_parser(__doc__, "agreement", PRESETS).parse_args()
    experiment = Experiment("agreement", options, PRESETS[options.preset] | {"runs": RUNS})
    teacher = experiment.prepare_teacher()
    calibration = calibration_images(teacher, 256, num_held_out=256, seed=options.seed)
    held_out = [{"pixel_values": image} for image in calibration.held_out]
    noise = NoiseDataset.for_model(teacher, distribution="structured", num_steps=4, held_out=True, seed=options.seed)
    rows = []
    for name, arguments in RUNS.items():
        student = experiment.distill(name, eval_strategy="no", **DISTILL_DEFAULTS | arguments).model
        on_noise = evaluate(student, noise, teacher_model=teacher)["batch"]["agreement"]
        recalibrate_batch_norm(student, calibration)
        on_images = evaluate(student, held_out, teacher_model=teacher)["running"]["agreement"]
        test = evaluate(student, experiment.test_dataset, teacher_model=teacher)["running"]
        rows.append({"student": name} | dict(zip(TOLD_BY, (on_images, on_noise), strict=True)))
        rows[-1] |= {"on test images": test["agreement"], "accuracy": test["accuracy"]}
        rows[-1]["by class"] = by_class(student, teacher, calibration.held_out, experiment.test_dataset)
        experiment.results.measure("agreement with the teacher", rows)
    experiment.results.measure("what it tells", [what_it_tells(rows, kind) for kind in TOLD_BY])
    experiment.results.print_table()


@torch.no_grad()
def by_class(student: nn.Module, teacher: nn.Module, images: torch.Tensor, test_dataset: ImageDataset) -> float:
    """Return the rank correlation over the classes of agreement on images and accuracy on test images."""
    expected, found = teacher(images).argmax(-1), student(images).argmax(-1)
    batch = test_dataset.__getitems__(range(len(test_dataset)))
    pixel_values = batch["pixel_values"].to(next(student.parameters()).device)
    answers = torch.cat([student(pixels).argmax(-1) for pixels in pixel_values.split(256)]).cpu()
    classes = [index for index in range(len(test_dataset.label_names)) if (expected == index).any()]
    agreements = [(found == index)[expected == index].float().mean().item() for index in classes]
    accuracies = [(answers == index)[batch["labels"] == index].float().mean().item() for index in classes]
    return float(spearmanr(agreements, accuracies).statistic)


def what_it_tells(rows: list[dict], kind: str) -> dict:
    """Return how the agreement on one kind of images goes with the accuracy, and with that on the test images."""
    correlation = spearmanr([row[kind] for row in rows], [row["accuracy"] for row in rows]).statistic
    errors = [abs(row[kind] - row["on test images"]) for row in rows]
    return {
        "agreement": kind,
        "rank correlation with accuracy": float(correlation),
        "mean error": statistics.mean(errors),
    }


if __name__ == "__main__":
    main()
