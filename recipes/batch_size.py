"""Train students with noise batches of several sizes: Fig. 5 of Raikwar & Mishra (NeurIPS 2022).

    python recipes/batch_size.py --teacher runs/cifar10/teacher    # about 10 minutes on two CPU cores
    accelerate launch recipes/batch_size.py --preset paper         # the authors' networks, for a GPU

All students take the same number of steps at the same rate, so a larger batch also means more noise images. All are
read in batches of 256. On several processes each has batches of that size, whose statistics its teacher uses, and the
figure shows the size of all together. Without `--teacher` one is trained first.
"""

from functools import partial

from harness.experiment import Experiment, experiment_parser
from harness.figures import plot_accuracy
from harness.presets import with_cpu_steps

BATCH_SIZES = (16, 32, 64, 128, 256, 512)
PRESETS = with_cpu_steps(500)


def main() -> None:
    """Train a student for each batch size, and print their table."""
    options = experiment_parser(__doc__, "batch_size", PRESETS).parse_args()
    experiment = Experiment("batch_size", options, PRESETS[options.preset])
    experiment.prepare_teacher()
    for batch_size in BATCH_SIZES:
        experiment.distill(f"batches of {batch_size}", per_device_train_batch_size=batch_size, eval_strategy="no")
    xlabel = "noise images in a training batch"
    experiment.results.plot("accuracy.png", partial(plot_accuracy, key="batch_size", xlabel=xlabel, log_x=True))
    experiment.results.print_table()


if __name__ == "__main__":
    main()
