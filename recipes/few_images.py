"""Distill with a few real images, with noise, and with both: the claim of the abstract of Raikwar & Mishra (2022).

    python recipes/few_images.py --teacher runs/cifar10/teacher    # about 25 minutes on two CPU cores
    accelerate launch recipes/few_images.py --preset paper         # the authors' networks, for a GPU

The images are drawn with the seed from the training images, cropped and mirrored at random, and used without labels.
For images alone the teacher uses running statistics, as in ordinary distillation. With both, noise and images
take turns, a batch each, and the teacher is on batch statistics, as for noise alone. All students take the same number
of full batches, in which few images come several times. Each is also evaluated with its running statistics
re-estimated from its few images, as someone who has them would.
"""

from accelerate import PartialState
from harness.experiment import Experiment, experiment_parser
from harness.figures import plot_curves
from harness.presets import with_cpu_steps
from harness.results import at_least
from torch.utils.data import Subset

from hf_noisekd import MixedDataset

PRESETS = with_cpu_steps(750)


def main() -> None:
    """Train the students, recalibrate them, and print their tables."""
    parser = experiment_parser(__doc__, "few_images", PRESETS)
    parser.add_argument(
        "--real-images", type=at_least(1), nargs="+", default=[100, 500], help="numbers of images to try"
    )
    options = parser.parse_args()
    experiment = Experiment("few_images", options, PRESETS[options.preset])
    subsets = {
        count: experiment.train_dataset.subset(count, options.seed, augmented=True) for count in options.real_images
    }
    teacher = experiment.prepare_teacher()
    noise = experiment.distill("noise alone")
    rows = []
    for count, images in subsets.items():
        repeated = Subset(images, [index % count for index in range(196 * 256)])
        mixed = MixedDataset.for_model(teacher, images=images, num_steps=196, seed=options.seed)
        alone = experiment.distill(f"{count:,} images alone", train_dataset=repeated, batch_norm_fraction=0)
        both = experiment.distill(f"noise and {count:,} images", train_dataset=mixed)
        for taught_with, trainer in (("images", alone), ("noise", noise), ("both", both)):
            if PartialState().is_main_process:
                evaluation = trainer.record().evaluations[0]
                row = {"images": count, "taught with": taught_with}
                row |= {f"{key} statistics": evaluation.scores(key)["accuracy"] for key in ("running", "batch")}
                recalibrated = experiment.recalibrated_accuracy(trainer.model, experiment.real_images(count))
                rows.append(row | {"running statistics of the images": recalibrated})
        experiment.results.measure("accuracy", rows)
    experiment.results.plot("curves.png", plot_curves)
    experiment.results.print_table()


if __name__ == "__main__":
    main()
