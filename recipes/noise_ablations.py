"""Take the default of `noisekd distill` apart: what each of its ingredients gives, at equal steps and at equal seconds.

    python recipes/noise_ablations.py --teacher runs/cifar10/teacher
    python recipes/noise_ablations.py --teacher runs/cifar10/teacher --preset cpu-long --runs "batches of 128"

Beyond the paper. The first row has white noise at the rate that it has in the paper's tables here; all others are the
default but for what they name. "White noise" is at full size throughout, as white noise is by itself. The seconds are
those of 500 steps of the first row, in `cpu-long` of 1,800, and the steps those that the default takes in them; the
cost of a step is measured beforehand. Where it is the same within 2 %, one run is both. The default was chosen in such
runs, by the accuracy on the test images that is reported here, so a point between it and its neighbours may be chance.
`--preset cpu-wrn` has another teacher, a WRN-16-2. `--preset cpu-augmentations --runs mirrored` has an augmentation
that came later, and `cpu-augmentations-short` has it in half the time. The results have another one beside it, which
bent images and was not kept.
"""

from harness.equal_seconds import distill_twice, step_cost
from harness.experiment import Experiment, experiment_parser
from harness.noises import CentredLogitsTrainer, noise_of
from harness.presets import DISTILL_DEFAULTS, NOISE_PAIRS, STRUCTURED_SIZES

PRESETS = {name: pair | {"white_steps": 500} for name, pair in NOISE_PAIRS.items()} | {
    "cpu-long": NOISE_PAIRS["cpu"] | {"white_steps": 1800},
    "cpu-augmentations": NOISE_PAIRS["cpu"] | {"white_steps": 500},
    "cpu-augmentations-short": NOISE_PAIRS["cpu"] | {"white_steps": 250},
}
RUNS = {"white": {"noise": "white"}} | {
    name: DISTILL_DEFAULTS | change
    for name, change in {
        "the default": {},
        "white noise": {"noise": "white"},
        "white noise, small sizes first": {"noise": "white", "resolutions": STRUCTURED_SIZES},
        "full size throughout": {"resolutions": "1"},
        "two sizes": {"resolutions": "0.5:0.6,1:0.4"},
        "two sizes, half size longer": {"resolutions": "0.5:0.8,1:0.2"},
        "half size only": {"resolutions": "0.5"},
        "cut and paste": {"noise": "dead_leaves|cutmix:0.5", "resolutions": STRUCTURED_SIZES},
        "mixed images": {"noise": noise_of("dead_leaves|mixup:0.5"), "resolutions": STRUCTURED_SIZES},
        "mirrored": {"noise": "dead_leaves|mirror:0.5", "resolutions": STRUCTURED_SIZES},
        "temperature 1": {"temperature": 1.0},
        "centred logits": {},
        "learning rate 3e-3": {"learning_rate": 3e-3},
        "learning rate 2e-2": {"learning_rate": 2e-2},
        "cosine decay": {"lr_scheduler_type": "cosine"},
        "batches of 128": {"per_device_train_batch_size": 128},
        "teacher on running statistics": {"batch_norm_fraction": 0.0, "resolutions": STRUCTURED_SIZES},
    }.items()
}
FIRST, DEFAULT, *CHANGED = RUNS
# Runs that are not trained by the package's own trainer.
TRAINERS = {"centred logits": {"trainer_class": CentredLogitsTrainer}}


def main() -> None:
    """Train the students, and print their table."""
    parser = experiment_parser(__doc__, "noise_ablations", PRESETS, resumes=True)
    parser.add_argument("--runs", nargs="+", choices=CHANGED, default=CHANGED, help="runs beside the first two")
    options = parser.parse_args()
    runs = {name: RUNS[name] for name in (FIRST, DEFAULT, *options.runs)}
    preset = PRESETS[options.preset]
    experiment = Experiment("noise_ablations", options, preset | {"arguments": runs})
    experiment.prepare_teacher()
    runs = {name: arguments | TRAINERS.get(name, {}) for name, arguments in runs.items()}
    costs = step_cost(experiment, runs)
    steps = round(preset["white_steps"] / costs[DEFAULT])
    rows = []
    for name, arguments in runs.items():
        steps_in_same_seconds = round(preset["white_steps"] / costs[name])
        row = distill_twice(experiment, name, steps, steps_in_same_seconds, **arguments)
        rows.append({"run": name} | row | {"cost of a step": costs[name]})
        experiment.results.measure("accuracy", rows)
    experiment.results.print_table()


if __name__ == "__main__":
    main()
