"""Whether a teacher's predictions show, without data, which noise and which statistics will teach best.

    python recipes/choice.py --teacher runs/cifar10/teacher     # a ResNet-18
    python recipes/choice.py --preset cpu-convnext
    python recipes/choice.py --preset cpu-groupnorm
    python recipes/choice.py --preset digits                    # gray images
    python recipes/choice.py --preset digits-groupnorm

Beyond the paper. The information of predictions is the mutual information of image and class, relative to its maximum:
the class balance less the flatness, of two batches, which takes seconds. A student is taught for 500 steps in each
setting. It is evaluated as it is, and with running statistics of real images; the better of the two counts. The rank
correlation (Spearman's) of information and accuracy says whether the first foretells the second.
"""

from typing import Any

from harness.datasets import DIGITS
from harness.experiment import Experiment, experiment_parser
from harness.noise_fit import answers_of
from harness.presets import CIFAR10, DISTILL_DEFAULTS, NO_BATCH_NORM, NOISE_PAIRS
from scipy.stats import spearmanr
from torch.nn.modules.batchnorm import _BatchNorm

REAL_IMAGES = 2560
STUDENT = {"student": "resnet10_cifar", "init_student": "random"}
STEPS = {"max_steps": 500, "per_device_train_batch_size": 128, "resolutions": "1", "num_calibration_images": 0}
ON_BATCH = {
    "dead leaves": {},
    "dead leaves, statistics mixed, 0.5": {"teacher_statistics": 0.5},
    "dead leaves, statistics mixed, 0.1": {"teacher_statistics": 0.1},
    "dead leaves, running statistics": {"teacher_statistics": 0.0},
    "fractals": {"noise": "fractal"},
    "white noise": {"noise": "white"},
}
AS_IT_IS = {
    "dead leaves": {},
    "dead leaves of half the contrast": {"noise_std": 0.5},
    "dead leaves of twice the contrast": {"noise_std": 2.0},
    "fractals": {"noise": "fractal"},
    "Gaussian fields": {"noise": "spectrum"},
    "white noise": {"noise": "white"},
}
CIFAR10_STUDENT = {"model_init_kwargs": {"width": 16, "stem_stride": 2}}
GRAY: dict[str, Any] = CIFAR10["cpu"] | {
    "dataset": DIGITS,
    "teacher": "resnet10_cifar",
    "teacher_args": {"width": 32},
    "model_init_kwargs": {"width": 16},
    "supervised": {"num_train_epochs": 60},
}
PRESETS: dict[str, dict[str, Any]] = {
    **{name: pair | CIFAR10_STUDENT for name, pair in (NOISE_PAIRS | NO_BATCH_NORM).items()},
    "digits": GRAY,
    "digits-groupnorm": GRAY | {"teacher_args": {"width": 32, "norm_groups": 8}},
}


def main() -> None:
    """Teach a student in each setting, and print the table."""
    options = experiment_parser(__doc__, "choice", PRESETS).parse_args()
    experiment = Experiment("choice", options, PRESETS[options.preset])
    teacher = experiment.prepare_teacher()
    rows: list[dict] = []
    has_batch_norm = any(isinstance(layer, _BatchNorm) for layer in teacher.modules())
    for name, setting in (ON_BATCH if has_batch_norm else AS_IT_IS).items():
        arguments = (
            DISTILL_DEFAULTS | STUDENT | STEPS | {"model_init_kwargs": experiment.preset["model_init_kwargs"]} | setting
        )
        trainer = experiment.distill(name, **arguments | {"eval_strategy": "no"})
        images = experiment.real_images(REAL_IMAGES)
        read = {
            "as trained": experiment.results.runs[-1].evaluations[0].running["accuracy"],
            "with statistics of real images": experiment.recalibrated_accuracy(trainer.model, images),
        }
        rows.append({"setting": name} | answers_of(trainer) | read | {"accuracy": max(read.values())})
        experiment.results.measure("settings", rows)
    # To three digits, as GroupNorm makes the same of any contrast but for the last ones.
    told = spearmanr([float(f"{row['information']:.3g}") for row in rows], [row["accuracy"] for row in rows]).statistic
    experiment.results.measure("what it tells", [{"rank correlation with accuracy": float(told)}])
    experiment.results.print_table()


if __name__ == "__main__":
    main()
