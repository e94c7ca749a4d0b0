"""Put only a share of the teacher's BatchNorm layers on batch statistics: Table 3 of Raikwar & Mishra (NeurIPS 2022).

    python recipes/partial_batch_norm.py --teacher runs/cifar10/teacher    # about 20 minutes on two CPU cores
    accelerate launch recipes/partial_batch_norm.py --preset paper         # the authors' networks, for a GPU

A student is trained on white noise for each share of the teacher's layers that stay on running statistics. The layers
are drawn with the seed, and those of a smaller share lie in a larger one. Without `--teacher` one is trained first. The
`cpu` preset takes 750 steps for each share.
"""

from functools import partial

from harness.experiment import Experiment, experiment_parser
from harness.figures import plot_accuracy
from harness.presets import with_cpu_steps

RUNNING_SHARES = (100, 90, 75, 50, 25, 0)  # percent
PRESETS = with_cpu_steps(750)


def main() -> None:
    """Train a student for each share, and print their table."""
    options = experiment_parser(__doc__, "partial_batch_norm", PRESETS).parse_args()
    experiment = Experiment("partial_batch_norm", options, PRESETS[options.preset])
    experiment.prepare_teacher()
    for share in RUNNING_SHARES:
        experiment.distill(
            f"{share} % of the layers on running statistics",
            batch_norm_fraction=(100 - share) / 100,
            eval_strategy="no",
        )
    xlabel = "share of the teacher's BatchNorm layers on batch statistics"
    experiment.results.plot("accuracy.png", partial(plot_accuracy, key="teacher_batch_norm_fraction", xlabel=xlabel))
    experiment.results.print_table()


if __name__ == "__main__":
    main()
