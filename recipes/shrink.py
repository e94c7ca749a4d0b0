"""Students initialised from their teacher, cut down, against random initial weights: accuracy by size and by time.

    python recipes/shrink.py --teacher runs/cifar10/teacher
    python recipes/shrink.py --preset cpu-leaders           # the rows of docs/shrink.md
    python recipes/shrink.py --preset cpu-wrn               # a Wide ResNet
    python recipes/shrink.py --preset gpu                   # the authors' networks

Beyond the paper. All students learn as `noisekd distill` teaches them, without data, and are evaluated in ordinary
evaluation mode, with running statistics of calibration images. A time is that of so many steps of the first student
from a random start; a student trains in what calibration images and cutting leave of it. Time 0 is a student before any
training, cut and since version 0.8 repaired. `real images` is what could be had with data: the first student, from a
random start, trained on all training images.
"""

from collections.abc import Mapping
from typing import Any

from harness.equal_seconds import step_cost, timed
from harness.experiment import Experiment, experiment_parser, share_of_macs
from harness.figures import ACCURACY_LABEL, Panel, plot_panels
from harness.presets import CIFAR10, DISTILL_DEFAULTS, NOISE_PAIRS, STRUCTURED_SIZES

from hf_noisekd import NoiseKDTrainer, calibration_images, evaluate

CALIBRATION_IMAGES, REAL_IMAGES = 256, 2560
STEPS_TO_TIME = 40
RANDOM, FROM_TEACHER = {"init_student": "random"}, {"init_student": "teacher"}
RESNET10 = {"student": "resnet10_cifar", "model_init_kwargs": {"width": 32, "stem_stride": 2}}
HALF_WIDTH = {"student": "resnet18_cifar", "model_init_kwargs": {"width": 16, "stem_stride": 2}}
RESNET18 = {"student": "resnet18_cifar", "model_init_kwargs": {}}
SHALLOW_WRN = {"student": "wide_resnet16_2_cifar", "model_init_kwargs": {"blocks": 1}}
SMALL_FIRST = {"resolutions": STRUCTURED_SIZES}  # the default for random initial weights
KEPT = {f"keep {share}": ({"keep": share}, [600, 2000]) for share in (0.75, 0.5, 0.25, 0.125)}
# How a student is initialised, and the times that it is trained for, in steps of the first one.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": NOISE_PAIRS["cpu"]
    | {
        "starts": {
            "ResNet-10, random": (RESNET10 | RANDOM, [600, 2000, 6000]),
            "ResNet-10, from the teacher": (RESNET10 | FROM_TEACHER, [600, 2000, 6000]),
        }
        | KEPT,
        "real_images_steps": 2000,
    },
    "cpu-leaders": NOISE_PAIRS["cpu"]
    | {
        "starts": {
            "ResNet-10, random": (RESNET10 | RANDOM, []),
            "ResNet-10, from the teacher": (RESNET10 | FROM_TEACHER, [1200, 4000]),
            "half the width, from the teacher": (HALF_WIDTH | FROM_TEACHER, [2400]),
        }
    },
    "cpu-long": NOISE_PAIRS["cpu"]
    | {
        "starts": {
            "ResNet-10, random": (RESNET10 | RANDOM, []),
            "ResNet-10, from the teacher": (RESNET10 | FROM_TEACHER, [12_000]),
        }
    },
    "cpu-wrn": NOISE_PAIRS["cpu-wrn"]
    | {
        "starts": {
            "WRN-10-2, random": (SHALLOW_WRN | RANDOM, [600, 2000]),
            "WRN-10-2, from the teacher": (SHALLOW_WRN | FROM_TEACHER, [600, 2000]),
        }
        | KEPT,
    },
    "cpu-wrn-leaders": NOISE_PAIRS["cpu-wrn"]
    | {
        "starts": {
            "WRN-10-2, random": (SHALLOW_WRN | RANDOM, [1000]),
            "WRN-10-2, from the teacher": (SHALLOW_WRN | FROM_TEACHER, [1000]),
            "WRN-10-2, from the teacher, small sizes first": (SHALLOW_WRN | FROM_TEACHER | SMALL_FIRST, [1000]),
        }
    },
    "gpu": CIFAR10["paper"] | {"starts": {"ResNet-18, from the teacher": (RESNET18 | FROM_TEACHER, [15_000])}},
}


def main() -> None:
    """Train the students, and print their table."""
    parser = experiment_parser(__doc__, "shrink", PRESETS)
    parser.add_argument("--starts", nargs="+", metavar="NAME", help="students to train; default: all of the preset")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    if options.starts:
        kept = {name: (start, times * (name in options.starts)) for name, (start, times) in preset["starts"].items()}
        first = next(iter(kept))  # whose steps are the unit of time
        preset = preset | {"starts": {name: kept[name] for name in kept if name == first or name in options.starts}}
    experiment = Experiment("shrink", options, preset)
    teacher = experiment.prepare_teacher()
    defaults = {"num_calibration_images": CALIBRATION_IMAGES} | DISTILL_DEFAULTS
    runs = {name: defaults | start for name, (start, _) in preset["starts"].items()}
    costs = step_cost(experiment, runs)
    first = next(iter(runs))
    before = seconds_of_a_step(experiment, runs[first])
    calibration, seconds = timed(calibration_images, teacher, CALIBRATION_IMAGES, seed=options.seed)
    step = (before + seconds_of_a_step(experiment, runs[first])) / 2
    experiment.results.measure(
        "what is paid beside the steps",
        [{"for": "calibration images", "in steps of the first student": seconds / step}],
    )
    rows: list[dict] = []
    for name, (_, times) in preset["starts"].items():
        trainer = experiment.distillation_trainer(name, **runs[name] | {"max_steps": 1})
        facts = {
            "student": name,
            "parameters (M)": sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6,
        }
        facts["multiply-adds (%)"] = 100 * share_of_macs(trainer)
        if trainer.start:
            rows.append(facts | {"time": 0, "steps": 0} | accuracies(experiment, trainer, calibration))
        for time_ in times:
            run, arguments = f"{name}, time of {time_:,}", runs[name] | {"eval_strategy": "no"}
            # How many images are made goes by the number of steps.
            most = round(time_ / costs[name])
            trainer, before = timed(experiment.distillation_trainer, run, **arguments | {"max_steps": most})
            before += 0 if trainer.images else seconds
            trainer.args.max_steps = options.max_steps or max(1, round((time_ - before / step) / costs[name]))
            experiment.results.train(run, trainer)
            minutes = (before + experiment.results.runs[-1].seconds) / 60
            row = {"time": time_, "steps": trainer.state.global_step, "minutes": minutes}
            rows.append(facts | row | accuracies(experiment, trainer, calibration))
            experiment.results.measure("accuracy", rows)
    limits = {"the teacher": experiment.results.runs[0].evaluations[0].running["accuracy"]}
    if (steps := preset.get("real_images_steps")) and not options.starts:
        arguments = runs[first] | {"batch_norm_fraction": 0.0, "eval_strategy": "no", "max_steps": steps}
        experiment.distill("real images", train_dataset=experiment.train_dataset, **arguments)
        limits["ResNet-10, taught with all real images"] = (
            experiment.results.runs[-1].evaluations[0].running["accuracy"]
        )
    if len(runs) > 3:
        experiment.results.plot("accuracy.png", lambda _, path: plot_panels(panels(rows, limits), path, share_y=True))
    experiment.results.print_table()


def seconds_of_a_step(experiment: Experiment, arguments: Mapping) -> float:
    """Return the seconds of a training step, on the average of a whole training."""
    steps = experiment.options.max_steps or STEPS_TO_TIME
    arguments = dict(arguments) | {"max_steps": steps, "eval_strategy": "no", "disable_tqdm": True}
    arguments |= {"num_calibration_images": 0}
    return experiment.distillation_trainer("a step", **arguments).train().metrics["train_runtime"] / steps


def accuracies(experiment: Experiment, trainer: NoiseKDTrainer, calibration) -> dict[str, float]:
    """Return test accuracies in percent in evaluation mode, without data, and with statistics of real images."""
    if trainer.images:  # of which it has statistics
        own = evaluate(trainer.model, experiment.test_dataset)["running"]["accuracy"]
    else:
        own = experiment.recalibrated_accuracy(trainer.model, calibration)
    return {
        "accuracy": own,
        f"with statistics of {REAL_IMAGES:,} real images": experiment.recalibrated_accuracy(
            trainer.model, experiment.real_images(REAL_IMAGES)
        ),
    }


def panels(rows: list[dict], limits: Mapping[str, float]) -> list[Panel]:
    """Return accuracy against time, a line for each student, and against size, a line for each time."""
    trained = [row for row in rows if row["time"]]
    times = sorted({row["time"] for row in trained})
    by_time: dict[str, list] = {row["student"]: [] for row in trained}
    by_size: dict[str, list] = {f"cut to a share, time of {time_:,}": [] for time_ in times}
    for row in trained:
        by_time[row["student"]].append((row["time"], row["accuracy"]))
        if row["student"].startswith("keep"):
            by_size[f"cut to a share, time of {row['time']:,}"].append((row["multiply-adds (%)"], row["accuracy"]))
    for name, accuracy in limits.items():
        by_time[name] = [(time_, accuracy) for time_ in (times[0], times[-1])]
    by_size = {name: points for name, points in by_size.items() if points}
    return [
        Panel(by_time, xlabel="time, in steps from a random start", ylabel=ACCURACY_LABEL, log_x=True),
        Panel(by_size, xlabel="multiply-adds, in percent of the teacher's"),
    ]


if __name__ == "__main__":
    main()
