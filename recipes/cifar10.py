"""Distil a CIFAR-10 classifier with white Gaussian noise: Table 1 of Raikwar & Mishra (NeurIPS 2022).

    python recipes/cifar10.py                                   # about 25 minutes on two CPU cores
    accelerate launch recipes/cifar10.py --preset paper         # the authors' networks and schedule, for a GPU

A teacher is trained on the images, or taken from `--teacher`. Then two students learn from its answers to white noise
alone: one with the teacher's BatchNorm layers on their running statistics, and one with them on the statistics of the
noise batch. White noise teaches slowly: the paper's 39,200 steps reach 86 %, the `cpu` preset gives it 1,500. Writes
results.json, curves.png, the teacher and the student of the last run to the output folder.
"""

import math
from pathlib import Path

import timm
import torch

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.classifier import pretrained_cfg_of
from hf_noisekd.config import ClassifierConfig
from hf_noisekd.figures import plot_curves
from hf_noisekd.hub import load_teacher
from hf_noisekd.image_data import load_image_datasets
from hf_noisekd.recipe import Results, recipe_parser
from hf_noisekd.supervised import ClassifierTrainer

SMALL = {"width": 32, "stem_stride": 2}
PRESETS = {
    "cpu": {
        "teacher": "resnet18_cifar",
        "student": "resnet10_cifar",
        "model_args": SMALL,
        "teacher_epochs": 10,
        "noise": {"max_steps": 1500, "learning_rate": 3e-3, "warmup_steps": 0.1},
    },
    "paper": {
        "teacher": "resnet34_cifar",
        "student": "resnet18_cifar",
        "model_args": {},
        "teacher_epochs": 100,
        "noise": {"max_steps": 39_200, "learning_rate": 1e-3},
    },
}


def main() -> None:
    """Train the teacher and two students, and print their table."""
    parser = recipe_parser(__doc__, "cifar10", PRESETS)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="Hub id or local folder (default: %(default)s)")
    parser.add_argument("--teacher", help="trained teacher: folder, Hub id or timm name; default: train one first")
    parser.add_argument("--student", help="timm name of the student; default: the preset's")
    options = parser.parse_args()
    preset = PRESETS[options.preset] | ({"student": options.student} if options.student else {})
    sources = {"dataset": Path(options.dataset).name, "trained_teacher": options.teacher is not None}
    results = Results("cifar10", options, preset | sources)
    train_dataset, test_dataset = load_image_datasets(options.dataset)
    shared = {"seed": options.seed, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 0.25}

    def model(name: str) -> torch.nn.Module:
        torch.manual_seed(options.seed)
        cfg = train_dataset.pretrained_cfg
        model_args = preset["model_args"] if name.startswith("resnet") else {}
        return timm.create_model(name, num_classes=cfg["num_classes"], pretrained_cfg_overlay=cfg, **model_args)

    if options.teacher:
        teacher = load_teacher(options.teacher)
        cfg = pretrained_cfg_of(teacher)
        for dataset in (train_dataset, test_dataset):  # the student's images are the teacher's
            dataset.mean, dataset.std = cfg.get("mean", dataset.mean), cfg.get("std", dataset.std)
        results.add("teacher", teacher, test_dataset)
    else:
        args = ClassifierConfig(
            options.output_dir / "teacher",
            max_steps=min(options.max_steps or 10**9, preset["teacher_epochs"] * math.ceil(len(train_dataset) / 256)),
            learning_rate=3e-3,
            weight_decay=0.05,
            lr_scheduler_type="linear",
            warmup_steps=0.2,
            **shared,
        )
        trainer = ClassifierTrainer(
            model(preset["teacher"]), args, train_dataset=train_dataset, eval_dataset=test_dataset
        )
        teacher = results.train("teacher", trainer)
        trainer.save_model()

    for name, fraction in (("noise, running-statistics teacher", 0.0), ("noise, batch-statistics teacher", 1.0)):
        noise = preset["noise"] | {"max_steps": min(options.max_steps or 10**9, preset["noise"]["max_steps"])}
        args = NoiseKDConfig.paper(
            options.output_dir / "student",
            batch_norm_fraction=fraction,
            hub_model_id=options.push_to,
            **noise,
            **shared,
        )
        trainer = NoiseKDTrainer(model(preset["student"]), teacher, args, eval_dataset=test_dataset)
        results.train(name, trainer)

    trainer.save_model()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        plot_curves(results.record["runs"], options.output_dir / "curves.png")
        print(results.table())
    if options.push_to:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
