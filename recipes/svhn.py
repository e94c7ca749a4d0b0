"""Distill an SVHN classifier with white Gaussian noise: Table 2 of Raikwar & Mishra (NeurIPS 2022), first row.

    python recipes/svhn.py                                   # small networks and 1,500 steps, for two CPU cores
    accelerate launch recipes/svhn.py --preset paper         # the authors' networks and steps, for a GPU

House numbers are not mirrored in training. The paper's oracle is `images-running`: the student learns from the
predictions for the images. Its student learns from the labels only in the row `supervised`, which Table 2 does not
have.
"""

from harness.experiment import run_table
from harness.presets import CIFAR10

SVHN = {"dataset": "ufldl-stanford/svhn", "dataset_config": "cropped_digits", "flip": False}
PRESETS = {
    "cpu": CIFAR10["cpu"] | SVHN,
    "paper": CIFAR10["paper"] | SVHN | {"teacher": "resnet18_cifar", "students": ["mobilenetv2_cifar"]},
}


def main() -> None:
    """Train the teacher and the students, and print their table."""
    run_table("svhn", __doc__, PRESETS)


if __name__ == "__main__":
    main()
