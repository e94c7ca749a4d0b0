"""Distill a CIFAR-10 classifier with white Gaussian noise: Table 1 of Raikwar & Mishra (NeurIPS 2022).

    python recipes/cifar10.py                                   # about an hour on two CPU cores
    accelerate launch recipes/cifar10.py --preset paper         # the authors' networks and steps, for a GPU

A teacher is trained on the images, or taken from `--teacher`. Each student then learns in up to five ways: from the
teacher's predictions for white noise or for the images, with the teacher's BatchNorm layers on the statistics of the
batch or on their running statistics, and from the labels without a teacher. White noise teaches slowly: the paper's
39,200 steps reach 86 %, the `cpu` preset gives it 1,500. The authors lowered the learning rate by the test loss; a
cosine decay, which needs no test images, stands in for that. The most telling runs come first; results.json is written
after each.
"""

from harness.experiment import run_table
from harness.presets import CIFAR10


def main() -> None:
    """Train the teacher and the students, and print their table."""
    run_table("cifar10", __doc__, CIFAR10)


if __name__ == "__main__":
    main()
