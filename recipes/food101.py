"""Distill a classifier of photos with white Gaussian noise: Table 2 of Raikwar & Mishra (NeurIPS 2022), Food-101.

    python recipes/food101.py                                # ResNet-18 to ResNet-10 at 64x64, hours on two CPU cores
    accelerate launch recipes/food101.py --preset paper      # ResNet-101 to ResNet-18 at 224x224, for GPUs

The teacher is timm's network, in `paper` with ImageNet weights, fine-tuned on the photos with timm's augmentation, or
what `--teacher` names, a folder or a Hub id; students are built from scratch. Noise has the size of the teacher's
input. The paper's oracle is `images-running`: the student learns from the predictions for the photos. Any data set of
photos will do: `--dataset` takes a Hub id or a folder that holds a folder of images for each class in `train` and in
`test`.
"""

from harness.experiment import run_table

PRESETS = {
    "cpu": {
        "dataset": "ethz/food101",
        "photos": True,
        "cfg": {"input_size": (3, 64, 64)},
        "teacher": "resnet18",
        "students": ["resnet10t"],
        "supervised": {"num_train_epochs": 5},
        "distillation": {"max_steps": 1500, "learning_rate": 3e-3, "warmup_steps": 0.1},
    },
    "paper": {
        "dataset": "ethz/food101",
        "photos": True,
        "teacher": "resnet101",
        "pretrained": True,
        "students": ["resnet18"],
        "supervised": {"num_train_epochs": 20, "learning_rate": 3e-4},
        "distillation": {"max_steps": 39_200},
    },
}


def main() -> None:
    """Train the teacher and the students, and print their table."""
    run_table("food101", __doc__, PRESETS)


if __name__ == "__main__":
    main()
