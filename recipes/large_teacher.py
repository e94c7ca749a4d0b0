"""An ImageNet teacher made smaller with a few dozen images, without labels: how often it agrees with the whole teacher.

    python recipes/large_teacher.py --teacher tf_efficientnet_lite0.in1k    # about 30 minutes of a core

Beyond the paper. At 1,000 classes noise teaches nothing, and BatchNorm statistics of other images spoil the teacher
itself. So the images, CIFAR-10's training images enlarged, choose what is cut, repair it, and train it with the
teacher's statistics. Agreement is with the whole teacher, on 500 enlarged test images. Of "none" the cut was chosen on
noise, and nothing else was done to it. Students may also take smaller images, and so may the whole teacher. Seconds are
those of a core, with cut and repair.
"""

import time

import torch
import torch.nn.functional as F
from harness.results import Results, at_least, recipe_parser
from torch import nn

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer, evaluate, load_images, load_teacher

PRESETS: dict[str, dict] = {
    "cpu": {
        "dataset": "uoft-cs/cifar10",
        "pixels": 128,
        "smaller": [112, 96],
        "keep": [0.75, 0.5],
        "images": [0, 64, 400],
        "steps": 150,
        "batch_size": 64,
        "test_images": 500,
    }
}


def main() -> None:
    """Cut, repair and train the students, and print their table."""
    parser = recipe_parser(__doc__, "large_teacher", PRESETS)
    parser.add_argument("--teacher", default="tf_efficientnet_lite0.in1k", help="timm name, Hub id or folder")
    parser.add_argument("--dataset", help="Hub id or folder of the images; default: that of the preset")
    parser.add_argument("--images", nargs="+", type=at_least(0), metavar="N", help="numbers of images; likewise")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    results = Results("large_teacher", options, preset)
    teacher = load_teacher(options.teacher, input_size=(3, preset["pixels"], preset["pixels"])).eval()
    dataset = options.dataset or preset["dataset"]
    test = load_images(dataset, teacher, num_images=preset["test_images"], labels=False)
    rows: list[dict] = []

    def agreement(student: nn.Module, pixels: int) -> float:
        return evaluate(Smaller(student, pixels), test, teacher_model=teacher)["running"]["agreement"]

    for pixels in preset["smaller"]:
        share = 100 * (pixels / preset["pixels"]) ** 2
        row = {"images": "none, the whole teacher", "multiply-adds (%)": share, "pixels": pixels}
        rows.append(row | {"before training": agreement(teacher, pixels), "after": None, "seconds": None})
    for keep in preset["keep"]:
        for number in preset["images"] if options.images is None else options.images:
            start = time.process_time()
            images = load_images(dataset, teacher, split="train", num_images=number, labels=False) if number else None
            args = NoiseKDConfig(
                options.output_dir / f"keep-{keep}-{number}",
                keep=keep,
                max_steps=min(preset["steps"], options.max_steps or preset["steps"]),
                per_device_train_batch_size=preset["batch_size"],
                num_calibration_images=0,
                save_strategy="no",
                seed=options.seed,
            )
            trainer = NoiseKDTrainer(None, teacher, args, images=images)
            pixels = trainer.teacher.input_size[1]
            row = {"images": str(number or "none"), "multiply-adds (%)": 100 * keep, "pixels": pixels}
            row |= {"before training": agreement(trainer.model, pixels), "after": None, "seconds": None}
            if images:
                trainer.train()
                row |= {"seconds": time.process_time() - start, "after": agreement(trainer.model, pixels)}
            rows.append(row)
            results.measure("agreement with the teacher", rows)
    results.print_table()


class Smaller(nn.Module):
    """A network that is given smaller images."""

    def __init__(self, model: nn.Module, pixels: int):
        super().__init__()
        self.model, self.pixels = model, pixels

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits of the images, made smaller."""
        return self.model(F.interpolate(pixel_values, (self.pixels, self.pixels), mode="bicubic", antialias=True))


if __name__ == "__main__":
    main()
