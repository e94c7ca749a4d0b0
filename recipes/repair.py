"""Cut, repaired, and trained for a few minutes: without an image, and with a few unlabelled ones.

    python recipes/repair.py --teacher runs/cifar10/teacher
    python recipes/repair.py --preset cpu-leaders           # the rows of the README
    python recipes/repair.py --preset cpu-wrn               # a Wide ResNet

Beyond the paper. Students are initialised from their teacher, as `noisekd distill` does before its first step, and
evaluated in ordinary evaluation mode. Images `none, not repaired` are students as they were cut, with statistics of
calibration images; `none` are repaired on these images, which are made without data. A number is that of training
images, without their labels. `trained` is after a short training, as `noisekd distill` does it. Seconds are of one
core, and of all that leads to a student: those of `none` and of few images have the making of images in them.
"""

import time
from functools import partial

import torch
from harness.equal_seconds import timed
from harness.experiment import Experiment, experiment_parser, share_of_macs
from harness.presets import DISTILL_DEFAULTS, NOISE_PAIRS

from hf_noisekd import calibration_images, evaluate

CALIBRATION_IMAGES = 256
core_timed = partial(timed, clock=time.process_time)  # seconds of a core
FROM_TEACHER = DISTILL_DEFAULTS | {
    "init_student": "teacher",
    "num_calibration_images": CALIBRATION_IMAGES,
    "eval_strategy": "no",
    "max_steps": 300,
    "per_device_train_batch_size": 128,
}
KEPT = {f"keep {share}": {"keep": share} for share in (0.75, 0.5, 0.25, 0.125)}
PRESETS = {
    "cpu": NOISE_PAIRS["cpu"]
    | {
        "images": [64, 512],
        "students": {
            "ResNet-10": {"student": "resnet10_cifar", "model_init_kwargs": {"width": 32, "stem_stride": 2}},
            "half the width": {"student": "resnet18_cifar", "model_init_kwargs": {"width": 16, "stem_stride": 2}},
        }
        | KEPT,
    },
    "cpu-leaders": NOISE_PAIRS["cpu"]
    | {"images": [], "students": {name: KEPT[name] for name in ("keep 0.5", "keep 0.25")}},
    "cpu-wrn": NOISE_PAIRS["cpu-wrn"]
    | {
        "images": [64, 512],
        "students": {
            "WRN-10-2": {"student": "wide_resnet16_2_cifar", "model_init_kwargs": {"blocks": 1}},
            "keep 0.5": KEPT["keep 0.5"],
        },
    },
}


def main() -> None:
    """Cut, repair and train the students, and print their table."""
    parser = experiment_parser(__doc__, "repair", PRESETS)
    parser.add_argument("--students", nargs="+", metavar="NAME", help="students to make; default: all of the preset")
    parser.add_argument("--images", nargs="*", type=int, metavar="N", help="numbers of images; default: the preset's")
    options = parser.parse_args()
    preset = dict(PRESETS[options.preset])
    preset["students"] = {name: preset["students"][name] for name in options.students or preset["students"]}
    architectures = [one["student"] for one in preset["students"].values() if "student" in one]
    experiment = Experiment("repair", options, preset | {"students": architectures})
    teacher = experiment.prepare_teacher()
    made, making = core_timed(calibration_images, teacher, CALIBRATION_IMAGES, seed=options.seed)
    numbers = preset["images"] if options.images is None else options.images
    pixels = torch.cat([made.pixel_values, made.held_out])
    given: dict = {"none": [{"pixel_values": image} for image in pixels]}
    given |= {number: experiment.train_dataset.subset(number, options.seed) for number in numbers}
    rows: list[dict] = []
    for name, arguments in preset["students"].items():
        for images in ("none, not repaired", *given):
            run = FROM_TEACHER | arguments
            alone = run | {"max_steps": 1}  # blocks are trained alone only before a short training
            if images == "none, not repaired":
                alone |= {"num_calibration_images": 0}
            trainer, seconds = core_timed(experiment.distillation_trainer, name, **alone, images=given.get(images))
            row = {"student": name, "multiply-adds (%)": 100 * share_of_macs(trainer), "images": images}
            row["seconds"] = seconds + making * (images == "none")
            if images == "none, not repaired":
                row["accuracy"] = experiment.recalibrated_accuracy(trainer.model, made)
                row |= {"seconds, trained": None, "trained": None}
            else:
                row["accuracy"] = evaluate(trainer.model, experiment.test_dataset)["running"]["accuracy"]
                if images != "none":  # it makes its own, as many as it may for its length
                    run |= {"images": given[images]}
                trainer, seconds = core_timed(experiment.distillation_trainer, name, **run)
                row["seconds, trained"] = seconds + core_timed(trainer.train)[1]
                row["trained"] = evaluate(trainer.model, experiment.test_dataset)["running"]["accuracy"]
            rows.append(row)
            experiment.results.measure("accuracy", rows)
    experiment.results.print_table()


if __name__ == "__main__":
    main()
