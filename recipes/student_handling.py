"""Evaluate a student trained on noise: Fig. 6 of Raikwar & Mishra (NeurIPS 2022).

    python recipes/student_handling.py --student runs/cifar10/noise-batch-statistics-teacher-resnet10-cifar
    accelerate launch recipes/student_handling.py --preset paper         # the authors' networks, for a GPU

A student knows only the statistics of noise. It can classify real images with the statistics of their batch: how large
must that be? Or its running statistics can be re-estimated from real images: how many does that take? Those are drawn
from the training images, several times for each number. Takes a trained student with `--student`, or trains one first.
"""

import statistics

from accelerate import PartialState
from harness.experiment import Experiment, experiment_parser
from harness.figures import ACCURACY_LABEL, Panel, plot_panels
from harness.presets import CIFAR10

from hf_noisekd import evaluate

BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NUM_IMAGES = (4, 16, 64, 256, 1024, 4096)
DRAWS = 3


def main() -> None:
    """Measure the student's accuracy for each way of reading it, and print the tables."""
    parser = experiment_parser(__doc__, "student_handling", CIFAR10)
    parser.add_argument("--student", help="trained student: folder or Hub id; default: train one first")
    options = parser.parse_args()
    if options.student:
        options.teacher = options.student  # the images are preprocessed as for it, and no teacher is needed
    experiment = Experiment("student_handling", options, CIFAR10[options.preset])
    if options.student:
        student = experiment.teacher
        experiment.results.add("student", student, experiment.test_dataset)
    else:
        experiment.prepare_teacher()
        student = experiment.distill("student").model
    if PartialState().is_main_process:
        measure(experiment, student.eval())
    experiment.results.print_table()


def measure(experiment: Experiment, student) -> None:
    """Record both tables and draw the figure."""
    test_dataset, results = experiment.test_dataset, experiment.results
    by_batch = []
    for size in BATCH_SIZES:
        scores = evaluate(student, test_dataset, batch_size=size)
        by_batch.append({"batch size": size, "accuracy (%)": scores["batch"]["accuracy"]})
    results.measure("batch statistics", by_batch)
    by_images = []
    for count in (count for count in NUM_IMAGES if count <= len(experiment.train_dataset)):
        draws = [
            experiment.recalibrated_accuracy(student, experiment.real_images(count, seed)) for seed in range(DRAWS)
        ]
        mean, spread = statistics.mean(draws), statistics.stdev(draws)
        by_images.append({"images": count, "accuracy (%)": mean, "standard deviation": spread, "draws": DRAWS})
    results.measure("recalibrated running statistics", by_images)
    as_trained = scores["running"]["accuracy"]
    panels = [
        Panel(
            {"batch statistics": [tuple(row.values()) for row in by_batch]},
            xlabel="images in a batch",
            ylabel=ACCURACY_LABEL,
        ),
        Panel(
            {"running statistics, re-estimated": [tuple(row.values())[:3] for row in by_images]},
            xlabel="real images that they are re-estimated from",
        ),
    ]
    for panel in panels:
        panel.log_x = True
        (points,) = panel.lines.values()
        panel.lines["running statistics, as trained"] = [(x, as_trained) for x in (points[0][0], points[-1][0])]
    plot_panels(panels, results.output_dir / "accuracy.png", share_y=True)


if __name__ == "__main__":
    main()
