"""Distill a digit classifier with noise: the whole method in a few minutes on two CPU cores.

    python recipes/digits.py

scikit-learn's 1,797 real 8x8 digits train a small ResNet. Then two students learn from its predictions for Gaussian
noise alone, one with the teacher's BatchNorm layers on their running statistics, where the method fails, and one with
them on the statistics of the noise batch (Raikwar & Mishra, NeurIPS 2022, Algorithm 1). Writes results.json, curves.png
and the models to the output folder.
"""

import math

import timm
import torch
from harness.datasets import digit_datasets
from harness.figures import plot_curves
from harness.results import Results, recipe_parser

from hf_noisekd import ClassifierConfig, ClassifierTrainer, NoiseKDConfig, NoiseKDTrainer

PRESETS = {"cpu": {"teacher_width": 32, "student_width": 16, "supervised_steps": 400, "noise_steps": 1500}}


def main() -> None:
    """Train the teacher and three students, and print their table."""
    options = recipe_parser(__doc__, "digits", PRESETS, pushes=True).parse_args()
    preset = PRESETS[options.preset]
    results = Results("digits", options, preset)
    train_dataset, test_dataset = digit_datasets()

    def build(width: int) -> torch.nn.Module:
        torch.manual_seed(options.seed)
        cfg = train_dataset.pretrained_cfg
        return timm.create_model("resnet10_cifar", width=width, in_chans=1, pretrained_cfg_overlay=cfg)

    def arguments(name: str, steps: int) -> dict:
        steps = min(steps, options.max_steps or steps)
        return {
            "output_dir": options.output_dir / name,
            "max_steps": steps,
            "lr_scheduler_type": "cosine",
            "seed": options.seed,
            "eval_strategy": "steps",
            "eval_steps": max(1, steps // 6),
            "save_strategy": "no",
        }

    def supervised(name: str, width: int) -> torch.nn.Module:
        args = ClassifierConfig(**arguments(name, preset["supervised_steps"]), learning_rate=3e-3)
        trainer = ClassifierTrainer(build(width), args, train_dataset=train_dataset, eval_dataset=test_dataset)
        model = results.train(name, trainer)
        trainer.save_model()
        return model

    teacher = supervised("teacher", preset["teacher_width"])
    supervised("supervised student", preset["student_width"])
    # The teacher of a trial would vouch for no image, after a long search.
    is_trial = (options.max_steps or math.inf) < preset["noise_steps"]
    for name, fraction, images in (
        ("noise, running-statistics teacher", 0.0, 0),
        ("noise, batch-statistics teacher", 1.0, 0 if is_trial else 256),
    ):
        args = NoiseKDConfig(
            **arguments("student", preset["noise_steps"]),
            noise="white",
            loss_type="soft_cross_entropy",
            temperature=1.0,
            learning_rate=3e-3,
            batch_norm_fraction=fraction,
            num_calibration_images=images,
            hub_model_id=options.push_to,
        )
        trainer = NoiseKDTrainer(build(preset["student_width"]), teacher, args, eval_dataset=test_dataset)
        results.train(name, trainer)

    trainer.save_model()
    trainer.create_model_card()
    results.plot("curves.png", plot_curves)
    results.print_table()
    if options.push_to:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
