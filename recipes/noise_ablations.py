"""Take the default of `noisekd distill` apart: what each of its ingredients gives, at equal steps and at equal seconds.

    python recipes/noise_ablations.py --teacher runs/cifar10/teacher

Beyond the paper. The seconds are those of 500 steps of white noise, and the steps those that the default takes in them;
the cost of a step is measured beforehand. Where it is the same within 2 %, one run is both. `--preset cpu-wrn` has
another teacher, a WRN-16-2.
"""

from hf_noisekd.experiment import DISTILL_DEFAULTS, NOISE_PAIRS, Experiment, experiment_parser

WHITE_STEPS = 500
RUNS = {"white": {"noise": "white"}, "white at the default's rate": {"noise": "white", "learning_rate": 1e-2}} | {
    name: DISTILL_DEFAULTS | change
    for name, change in {
        "structured, the default": {},
        "full size throughout": {"resolutions": "1"},
        "half size longer": {"resolutions": "0.5:0.8,1:0.2"},
        "three sizes": {"resolutions": "0.5:0.6,0.75:0.25,1:0.15"},
        "half size only": {"resolutions": "0.5"},
        "white noise, half size first": {"noise": "white", "resolutions": "0.5:0.6,1:0.4"},
        "cut and paste": {"noise": "dead_leaves|cutmix:0.5", "resolutions": "0.5:0.6,1:0.4"},
        "mixed images": {"noise": "dead_leaves|mixup:0.5", "resolutions": "0.5:0.6,1:0.4"},
        "temperature 4": {"loss_type": "kl", "temperature": 4.0},
        "centred logits": {"loss_type": "centered_mse"},
        "learning rate 3e-3": {"learning_rate": 3e-3},
        "learning rate 2e-2": {"learning_rate": 2e-2},
        "linear decay": {"lr_scheduler_type": "linear"},
        "batches of 128": {"per_device_train_batch_size": 128},
        "teacher on running statistics": {"batch_norm_fraction": 0.0},
        "one adversarial step": {"adversarial_steps": 1},
        "balanced classes": {"balance_classes": True},
    }.items()
}
WHITE, DEFAULT = "white", "structured, the default"
CHANGED = [name for name in RUNS if name not in (WHITE, DEFAULT)]


def main() -> None:
    """Train the students, and print their table."""
    parser = experiment_parser(__doc__, "noise_ablations", NOISE_PAIRS)
    parser.add_argument("--runs", nargs="+", choices=CHANGED, default=CHANGED, help="runs beside white and the default")
    options = parser.parse_args()
    experiment = Experiment("noise_ablations", options, NOISE_PAIRS[options.preset])
    experiment.prepare_teacher()
    runs = {name: RUNS[name] for name in (WHITE, DEFAULT, *options.runs)}
    costs = experiment.step_cost(runs)
    steps = round(WHITE_STEPS / costs[DEFAULT])
    rows = []
    for name, arguments in runs.items():
        row = experiment.distil_twice(name, steps, round(WHITE_STEPS / costs[name]), **arguments)
        rows.append(row | {"cost of a step": costs[name]})
        experiment.results.measure("accuracy", rows)
    experiment.results.print_table()


if __name__ == "__main__":
    main()
