"""Distill a CIFAR-100 classifier with white Gaussian noise: Table 2 of Raikwar & Mishra (NeurIPS 2022), second row.

    python recipes/cifar100.py                               # small networks and 1,500 steps, for two CPU cores
    accelerate launch recipes/cifar100.py --preset paper     # the authors' networks and steps, for a GPU

The classes are the 100 fine ones; `--label-column coarse_label` takes the 20 coarse ones. The paper's oracle is
`images-running`: the student learns from the predictions for the images.
"""

from harness.experiment import run_table
from harness.presets import CIFAR10

CIFAR100 = {"dataset": "uoft-cs/cifar100", "label_column": "fine_label"}
PRESETS = {
    "cpu": CIFAR10["cpu"] | CIFAR100,
    "paper": CIFAR10["paper"] | CIFAR100 | {"teacher": "wide_resnet28_10_cifar", "students": ["wide_resnet16_8_cifar"]},
}


def main() -> None:
    """Train the teacher and the students, and print their table."""
    run_table("cifar100", __doc__, PRESETS)


if __name__ == "__main__":
    main()
