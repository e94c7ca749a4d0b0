"""Teachers without BatchNorm: students of their own kind and of another, trained on noise in one command.

    python recipes/no_batch_norm.py                         # a ConvNeXt
    python recipes/no_batch_norm.py --preset cpu-groupnorm  # a ResNet with GroupNorm

Beyond the paper, whose method needs BatchNorm. These teachers are used as they are, in evaluation mode, for noise, too.
The students learn as `noisekd distill` teaches them, without data. All are evaluated in ordinary evaluation mode, as
trained. For comparison those with BatchNorm are also evaluated with the statistics of batches of test images, and
with running statistics re-estimated on real images.
"""

from typing import Any

from harness.experiment import Experiment, experiment_parser
from harness.presets import DISTILL_DEFAULTS, NO_BATCH_NORM
from torch.nn.modules.batchnorm import _BatchNorm

REAL_IMAGES = 2560
# A student of its teacher's kind is initialised from that, and compared with it at its end.
FROM_TEACHER = {"init_student": "teacher", "num_calibration_images": 256}
RESNET10 = {"width": 32, "stem_stride": 2}
RESNET10_RUN = {"student": "resnet10_cifar", "model_init_kwargs": RESNET10, "max_steps": 3000}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu-convnext": NO_BATCH_NORM["cpu-convnext"]
    | {
        "runs": {
            "ResNet-10": RESNET10_RUN,
            "ConvNeXt of half the blocks": {
                "student": "convnext_atto",
                "model_init_kwargs": {"patch_size": 2, "kernel_sizes": 3, "depths": [1, 1, 3, 1]},
                "max_steps": 1000,
            },
        },
    },
    "cpu-groupnorm": NO_BATCH_NORM["cpu-groupnorm"]
    | {
        "runs": {
            "ResNet-10 with BatchNorm": RESNET10_RUN,
            "ResNet-10 with GroupNorm": RESNET10_RUN
            | {"model_init_kwargs": RESNET10 | {"norm_groups": 8}, "max_steps": 300},
        },
    },
}


def main() -> None:
    """Train the students, and print their table."""
    options = experiment_parser(__doc__, "no_batch_norm", PRESETS).parse_args()
    experiment = Experiment("no_batch_norm", options, PRESETS[options.preset])
    experiment.prepare_teacher()
    rows: list[dict] = []
    for name, arguments in experiment.preset["runs"].items():
        arguments = DISTILL_DEFAULTS | FROM_TEACHER | arguments | {"eval_strategy": "no"}
        trainer = experiment.distill(name, **arguments)
        rows.append(described(experiment, name, trainer))
        experiment.results.measure("students", rows)
    experiment.results.print_table()


def described(experiment: Experiment, name: str, trainer) -> dict:
    """Return what a student is, and its test accuracies in percent."""
    of_teacher, *_, of_student = (run.evaluations[0] for run in experiment.results.runs)
    accuracy = of_student.running["accuracy"]
    row = {
        "student": name,
        "begins": "as its teacher" if trainer.start else "at random",
        "parameters (M)": sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6,
        "steps": trainer.state.global_step,
        "accuracy": accuracy,
        "of its teacher's (%)": 100 * accuracy / of_teacher.running["accuracy"],
    }
    if any(isinstance(layer, _BatchNorm) for layer in trainer.model.modules()):
        row["with batch statistics"] = of_student.batch["accuracy"]
        images = experiment.real_images(REAL_IMAGES)
        row[f"with statistics of {REAL_IMAGES:,} real images"] = experiment.recalibrated_accuracy(trainer.model, images)
    return row


if __name__ == "__main__":
    main()
