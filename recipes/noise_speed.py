"""How fast and how high structured noise gets a student, against white noise.

    python recipes/noise_speed.py --teacher runs/cifar10/teacher
    python recipes/noise_speed.py --teacher runs/cifar10/teacher --white-steps 10000    # the long run
    accelerate launch recipes/noise_speed.py --preset gpu --white-steps 2000 10000    # the authors' networks

Beyond the paper. White noise takes its steps, and the default of `noisekd distill` as many as fit into the same
seconds; the cost of a step is measured beforehand. Each is a training of its own, with its own schedule. In a third of
the seconds of white noise's 1,800 steps the default is to be where white noise is at their end. `--preset cpu-wrn` has
another teacher, a WRN-16-2.
"""

from hf_noisekd.experiment import DISTILL_DEFAULTS, NOISE_PAIRS, Experiment, experiment_parser
from hf_noisekd.figures import ACCURACY_LABEL, Panel, plot_panels


def main() -> None:
    """Train the students, and print their table."""
    parser = experiment_parser(__doc__, "noise_speed", NOISE_PAIRS)
    parser.add_argument("--white-steps", type=int, nargs="+", default=[500, 600, 1800], help="steps of white noise")
    options = parser.parse_args()
    experiment = Experiment("noise_speed", options, NOISE_PAIRS[options.preset])
    experiment.prepare_teacher()
    runs = {"white": {"noise": "white"}, "structured": DISTILL_DEFAULTS}
    costs = experiment.step_cost(runs)
    rows, lines = [], {name: [] for name in runs}
    for white_steps in options.white_steps:
        for name, arguments in runs.items():
            steps = round(white_steps / costs[name])
            record = experiment.distil(
                f"{name}, time of {white_steps:,}", max_steps=steps, eval_strategy="no", **arguments
            ).record()
            accuracy = record["evaluations"][0]["batch"]["accuracy"]
            rows.append({"noise": name, "steps": steps, "in the time of white steps": white_steps})
            rows[-1] |= {"seconds": record["seconds"], "accuracy": accuracy}
            lines[name].append((white_steps * 1.0, accuracy))
        experiment.results.measure("accuracy", rows)
    panel = Panel(lines, xlabel="time, in steps of white noise", ylabel=ACCURACY_LABEL, log_x=True)
    experiment.results.plot("accuracy.png", lambda runs, path: plot_panels([panel], path))
    experiment.results.print_table()


if __name__ == "__main__":
    main()
