"""Time a training step of NoiseKDTrainer against a loop written by hand at the same precision.

    python recipes/benchmark_step_time.py

Both run the same networks, noise, precision, memory format, optimiser and gradient clipping. Blocks of steps alternate,
so that a slow moment of the machine meets both; the figure is the median over the blocks of the ratio of their times.
The trainer's are those of its steps, as it reports them; what a training takes beside these is a number of its own.
Writes benchmark.json to the output folder.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from harness.results import Results, recipe_parser

from hf_noisekd import NoiseDataset, NoiseKDConfig, NoiseKDTrainer, batch_statistics

PRESETS = {
    "cpu": {"width": 32, "stem_stride": 2, "batch_size": 256, "blocks": 8, "steps": 15},
    "paper": {"width": 64, "stem_stride": 1, "batch_size": 256, "blocks": 8, "steps": 100},
}


def main() -> None:
    """Time both and print the ratio."""
    options = recipe_parser(__doc__, "benchmark_step_time", PRESETS).parse_args()
    preset = PRESETS[options.preset]
    steps = min(preset["steps"], options.max_steps or preset["steps"])
    torch.manual_seed(options.seed)
    size = {"width": preset["width"], "stem_stride": preset["stem_stride"]}
    teacher = timm.create_model("resnet18_cifar", **size).eval()
    args = NoiseKDConfig(
        options.output_dir / "trainer",
        noise="white",
        loss_type="soft_cross_entropy",
        temperature=1.0,
        max_steps=steps,
        per_device_train_batch_size=preset["batch_size"],
        save_strategy="no",
        num_calibration_images=0,
        disable_tqdm=True,
    )
    trainer = NoiseKDTrainer(timm.create_model("resnet18_cifar", **size), teacher, args)
    student = timm.create_model("resnet18_cifar", **size).to(args.device, memory_format=trainer.memory_format)
    optimizer = torch.optim.AdamW(student.parameters(), lr=trainer.args.learning_rate, fused=True)
    autocast = torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.bf16)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    noise = NoiseDataset(
        (3, 32, 32), preset["batch_size"], device=args.device, dtype=dtype, memory_format=trainer.memory_format
    )
    on_batch_statistics = batch_statistics(teacher)

    def by_hand() -> None:
        student.train()
        for step in range(steps):
            pixel_values = noise.draw(step)
            with autocast:
                with torch.no_grad(), on_batch_statistics:
                    teacher_logits = teacher(pixel_values)
                student_logits = student(pixel_values)
            F.cross_entropy(student_logits.float(), teacher_logits.float().softmax(-1)).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    by_hand(), trainer.train()  # warm up
    runs = [(seconds(by_hand)[0], *seconds(trainer.train)) for _ in range(preset["blocks"])]
    times = [(hand, trained.metrics["train_runtime"]) for hand, _, trained in runs]
    beside = [whole - trained.metrics["train_runtime"] for _, whole, trained in runs]
    record = Results("benchmark_step_time", options, preset).record
    del record["runs"]
    record["by_hand_ms_per_step"] = round(1000 * statistics.median(hand for hand, _ in times) / steps, 2)
    record["trainer_ms_per_step"] = round(1000 * statistics.median(trainer for _, trainer in times) / steps, 2)
    record["median_ratio"] = round(statistics.median(trainer / hand for hand, trainer in times), 3)
    record["seconds_beside_steps"] = round(statistics.median(beside), 2)
    record["ratios"] = [round(trainer / hand, 3) for hand, trainer in times]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "benchmark.json").write_text(json.dumps(record, indent=1))
    print(
        f"by hand {record['by_hand_ms_per_step']} ms a step, NoiseKDTrainer {record['trainer_ms_per_step']} ms a step: "
        f"ratio {record['median_ratio']} (median of {len(times)} blocks of {steps} steps)"
    )


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the time of a block of steps, and what it returns."""
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
