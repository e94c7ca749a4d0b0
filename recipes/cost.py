"""What a distillation costs, in time and memory, by network and size of the images, measured before its first step.

    python recipes/cost.py    # about 2 minutes on two CPU cores

Beyond the paper. Networks with random weights teach a student of the same kind, the most that one can cost. Nothing is
trained: the numbers are those that `noisekd distill` says before its first step. A step is of 256 images. Its memory is
what is kept for the student's backward pass, in float32 or, where the machine has it, in bfloat16; half of the batch
takes half of the time and the memory.
"""

import tempfile

import timm
from harness.results import Results, recipe_parser

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer

PRESETS: dict[str, dict] = {
    "cpu": {"networks": ["mobilenetv2_100", "resnet18", "resnet50"], "pixels": [32, 64, 128, 224]},
    "gpu": {"networks": ["mobilenetv2_100", "resnet18", "resnet50"], "pixels": [32, 64, 128, 224]},
}
BATCH_SIZE, STEPS = 256, 2000


def main() -> None:
    """Measure all, and print the table."""
    parser = recipe_parser(__doc__, "cost", PRESETS)
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="timm's names; default: those of the preset")
    parser.add_argument("--pixels", nargs="+", type=int, metavar="N", help="sides of the images; likewise")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    results = Results("cost", options, preset)
    rows: list[dict] = []
    for name in options.networks or preset["networks"]:
        for pixels in options.pixels or preset["pixels"]:
            estimate = estimate_of(name, pixels)
            row: dict = {"network": name, "pixels": pixels, "seconds a step": estimate.step}
            row |= {"GiB a step": estimate.memory / 2**30}
            rows.append(row | {"hours for 2,000 steps": estimate.seconds / 3600})
            results.measure("cost", rows)
            print(f"{name} at {pixels} pixels: {estimate}", flush=True)
    results.print_table()


def estimate_of(name: str, pixels: int):
    """Return what a distillation of a network into one of its kind is estimated to take."""
    overlay = {"pretrained_cfg_overlay": {"input_size": (3, pixels, pixels)}}
    teacher, student = (timm.create_model(name, **overlay) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": STEPS, "per_device_train_batch_size": BATCH_SIZE, "resolutions": "1"}
        args = NoiseKDConfig(folder, num_calibration_images=0, **options)
        return NoiseKDTrainer(student, teacher.eval(), args).estimate()


if __name__ == "__main__":
    main()
