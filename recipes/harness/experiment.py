"""What the recipes on images share: their data, their teacher, and training runs that end in one results file."""

import argparse
import copy
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import timm
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from harness.datasets import load_image_datasets, load_photo_datasets
from harness.figures import plot_curves
from harness.presets import RELEASED_ROW, ROWS, SUPERVISED
from harness.results import Results, recipe_parser
from hf_noisekd import (
    ClassifierConfig,
    ClassifierTrainer,
    NoiseKDConfig,
    NoiseKDTrainer,
    evaluate,
    load_teacher,
    recalibrate_batch_norm,
)
from hf_noisekd.batches import collate_images
from hf_noisekd.models.classifier import declared_input_size, declared_num_classes, teacher_identity
from hf_noisekd.models.cost import count_macs
from hf_noisekd.models.loading import nearest_architecture
from hf_noisekd.models.preprocessing import preprocessing_of
from hf_noisekd.record.environment import usable_cores
from hf_noisekd.record.schema import Record


def run_table(recipe: str, doc: str, presets: Mapping[str, Mapping]) -> None:
    """Run a recipe whose table has the rows of [`ROWS`] and a column for each student.

    Args:
        recipe: The recipe's name.
        doc: Its docstring, for `--help`.
        presets: Its constants by preset; see [`Experiment`].
    """
    parser = experiment_parser(doc, recipe, presets, pushes=True)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows of the table to run")
    parser.add_argument("--students", nargs="+", metavar="NAME", help="timm names; default: the preset's")
    options = parser.parse_args()
    if options.push_to and RELEASED_ROW not in options.rows:
        parser.error(f"--push-to pushes the first student of the row {RELEASED_ROW}: add it to --rows.")
    preset = presets[options.preset] | ({"students": options.students} if options.students else {})
    experiment = Experiment(recipe, options, preset)
    experiment.prepare_teacher()
    released = None
    for row in options.rows:
        for student in preset["students"]:
            if options.push_to and row == RELEASED_ROW and released is None:
                released = experiment.run_row(row, student, hub_model_id=options.push_to)
            else:
                experiment.run_row(row, student)
    experiment.results.plot("curves.png", plot_curves)
    experiment.results.print_table()
    if released is not None:
        released.push_to_hub()


def experiment_parser(doc: str, name: str, presets: Mapping[str, Mapping], **kwargs) -> argparse.ArgumentParser:
    """Return a parser with the options of every recipe on images; see [`recipe_parser`]."""
    parser = recipe_parser(doc, name, presets, **kwargs)
    parser.add_argument("--dataset", help="Hub id or local folder of the images; default: the preset's, from the Hub")
    parser.add_argument("--dataset-config", help="its configuration, where it has several; default: the preset's")
    parser.add_argument("--image-column", help="column of the images; default: the only one of type Image")
    parser.add_argument("--label-column", help="column of the classes; default: the preset's, or the only ClassLabel")
    parser.add_argument("--teacher", help="trained teacher: folder, Hub id or timm name; default: train one first")
    parser.add_argument("--teacher-checkpoint", help="file of weights for the timm name --teacher")
    return parser


class Experiment:
    """The data, the teacher and the runs of a recipe.

    A preset has `dataset`, a Hub id; where needed `dataset_config`, `label_column` and `flip`; the timm names `teacher`
    and `students`, and `model_args` for those of this package, as far as they take them; where needed `teacher_args`,
    what timm is to build the teacher with in place of those; `supervised` and `distillation`, training arguments that
    differ from [`SUPERVISED`] and [`NoiseKDConfig.paper`]. For images of any size it has `photos`, and where needed
    `cfg`, what differs from timm's `pretrained_cfg` of a teacher to be trained, and `pretrained`, whether that starts
    from timm's weights.

    Args:
        recipe: The recipe's name.
        options: Its parsed options, from [`experiment_parser`].
        preset: The constants of the experiment.

    Attributes:
        train_dataset: Training images with labels, augmented.
        test_dataset: Test images with labels.
        results: The results file.
        teacher: The teacher, once there is one.

    Raises:
        ValueError: A model or the data set cannot be loaded, or a given teacher has other classes than the data set.
    """

    def __init__(self, recipe: str, options: argparse.Namespace, preset: Mapping):
        self.options = options
        self.preset = preset
        for architecture in (preset["teacher"], *preset["students"]):
            if not timm.is_model(architecture):
                raise ValueError(f"timm knows no architecture {architecture!r}.{nearest_architecture(architecture)}")
        self.teacher = self.load(options.teacher, options.teacher_checkpoint) if options.teacher else None
        name = options.dataset or preset["dataset"]
        choice = {
            "config": options.dataset_config or (preset.get("dataset_config") if name == preset["dataset"] else None),
            "image_column": options.image_column,
            "label_column": options.label_column or preset.get("label_column"),
        }
        if preset.get("photos"):
            self.train_dataset, self.test_dataset = load_photo_datasets(name, self._photo_cfg(), **choice)
        else:
            self.train_dataset, self.test_dataset = load_image_datasets(name, flip=preset.get("flip", True), **choice)
            cfg = preprocessing_of(self.teacher) if self.teacher else {}  # a student sees images as its teacher does
            for dataset in (self.train_dataset, self.test_dataset):
                dataset.to(PartialState().device)  # a CPU would not keep up with a GPU in cropping and mirroring
                dataset.mean, dataset.std = cfg.get("mean", dataset.mean), cfg.get("std", dataset.std)
        self._check_teacher()
        facts = {"dataset": self.train_dataset.name, "dataset_config": choice["config"]}
        facts |= {"label_column": choice["label_column"], "supervised": SUPERVISED | preset.get("supervised", {})}
        self.results = Results(recipe, options, preset | facts)

    def load(self, source: str, checkpoint: str | None = None) -> nn.Module:
        """Load a trained classifier, as [`load_teacher`] does, to the device that trains."""
        return load_teacher(source, checkpoint=checkpoint).to(PartialState().device)

    def _check_teacher(self) -> None:
        classes = self.train_dataset.pretrained_cfg["num_classes"]
        found = classes if self.teacher is None else declared_num_classes(self.teacher)
        if found not in (None, classes):
            raise ValueError(
                f"The teacher {self.options.teacher} has {found} classes and {self.train_dataset.name} {classes}: give "
                "one that was trained on these classes, or none to have one trained."
            )

    def _check_same_teacher(self) -> None:
        identity = teacher_identity(self.teacher)
        for run in self.results.record["runs"]:
            if run.get("noisekd", {}).get("teacher", identity) != identity:
                raise ValueError(
                    f"Cannot go on in {self.options.output_dir}: the run {run['name']!r} has another teacher than "
                    f"{self.options.teacher or self._folder('teacher')}. Give that one, or another --output-dir."
                )

    def build(self, architecture: str, own_args: Mapping | None = None, **kwargs) -> nn.Module:
        """Build a classifier of the data set's classes and image size, with random weights of the recipe's seed.

        Args:
            architecture: timm's name.
            own_args: What it is built with, and saved with, in place of the preset's `model_args`.
            **kwargs: Anything else that `timm.create_model` takes.
        """
        torch.manual_seed(self.options.seed)
        cfg = self.train_dataset.pretrained_cfg
        model_args = self.preset.get("model_args", {})
        if own_args:
            kwargs |= own_args
        elif architecture.startswith("resnet") and architecture.endswith("_cifar"):
            kwargs |= model_args
        elif architecture == "mobilenetv2_cifar":
            kwargs |= {key: value for key, value in model_args.items() if key == "stem_stride"}
        overlay = {key: value for key, value in cfg.items() if key != "num_classes" or not kwargs.get("pretrained")}
        kwargs |= {"num_classes": cfg["num_classes"], "in_chans": cfg["input_size"][0]}
        model = timm.create_model(architecture, pretrained_cfg_overlay=overlay, **kwargs)
        if own_args:
            model.model_args = dict(own_args)
        return model

    def prepare_teacher(self) -> nn.Module:
        """Train the teacher and save it, or evaluate the one that was given; return it.

        Raises:
            ValueError: A recipe is resumed, and its students have another teacher.
        """
        if self.results.find("teacher"):
            self.teacher = self.teacher or self.load(self._folder("teacher"))
            self._check_same_teacher()
        elif self.teacher is not None:
            self.results.add("teacher", self.teacher, self.test_dataset, **self._loading())
        else:
            pretrained = self.preset.get("pretrained", False)
            model = self.build(self.preset["teacher"], self.preset.get("teacher_args"), pretrained=pretrained)
            self.teacher = self.train_supervised("teacher", model).model
        return self.teacher

    def run_row(self, row: str, student: str, **arguments) -> ClassifierTrainer:
        """Train a student in one of the ways of [`ROWS`], record the run and return its trainer; see [`distill`].

        A student that the teacher taught gets a card.
        """
        if row == "supervised":
            return self.train_supervised(ROWS[row], self.build(student))
        taught_with, statistics = row.split("-")
        trainer = self.distill(
            ROWS[row],
            student,
            train_dataset=self.train_dataset if taught_with == "images" else None,
            batch_norm_fraction=float(statistics == "batch"),
            **arguments,
        )
        trainer.create_model_card()
        return trainer

    def train_supervised(self, name: str, model: nn.Module) -> ClassifierTrainer:
        """Train a classifier on the images and their labels, record the run as `name`, and return its trainer."""
        arguments = SUPERVISED | self.preset["supervised"]
        if self.options.max_steps:
            batch_size = ClassifierConfig.per_device_train_batch_size * PartialState().num_processes
            steps_per_epoch = math.ceil(len(self.train_dataset) / batch_size)
            arguments["max_steps"] = min(self.options.max_steps, arguments.pop("num_train_epochs") * steps_per_epoch)
        args = ClassifierConfig(
            self._folder(name, model.pretrained_cfg["architecture"]), **(self._shared() | arguments)
        )
        trainer = ClassifierTrainer(model, args, train_dataset=self.train_dataset, eval_dataset=self.test_dataset)
        self.results.train(name, trainer)
        trainer.save_model()
        return trainer

    def distill(self, name: str, student: str | None = None, **arguments) -> NoiseKDTrainer:
        """Distill the teacher into a new student, record the run as `name`, save the student and return its trainer.

        Args:
            name: Name of the run.
            student: timm name of the student. Default: the preset's first.
            **arguments: As for [`distillation_trainer`].
        """
        trainer = self.distillation_trainer(name, student, **arguments)
        self.results.train(name, trainer)
        trainer.save_model()
        return trainer

    def distilled(self, name: str, **arguments) -> Record:
        """Return the record of a run, a finished one if the recipe is resumed, else a new one; see [`distill`]."""
        return self.results.find(name) or self.distill(name, eval_strategy="no", **arguments).record()

    def distillation_trainer(
        self,
        name: str,
        student: str | None = None,
        *,
        train_dataset: Dataset | None = None,
        images: Dataset | None = None,
        trainer_class: type[NoiseKDTrainer] = NoiseKDTrainer,
        **arguments,
    ) -> NoiseKDTrainer:
        """Return the trainer of a new student, ready to train; see [`distill`].

        Args:
            name: Name of the run.
            student: timm name of the student, which the recipe builds, or the trainer if `arguments` have
                `model_init_kwargs`. Default: the preset's first, or none if they have `keep`.
            train_dataset: Training images. Default: white noise, or what the argument `noise` names.
            images: Unlabelled images that the trainer may use. Default: none.
            trainer_class: The trainer's class, which may have a loss of its own.
            **arguments: Arguments of [`NoiseKDConfig`] that differ from the preset's.
        """
        model: str | nn.Module | None = None
        if "keep" not in arguments:
            student = student or self.preset["students"][0]
            model = student if "model_init_kwargs" in arguments else self.build(student)
        arguments = self.preset["distillation"] | arguments
        arguments["max_steps"] = min(arguments["max_steps"], self.options.max_steps or arguments["max_steps"])
        folder = self._folder(name, student)
        input_size = list(self.train_dataset.pretrained_cfg["input_size"])
        args = NoiseKDConfig.paper(folder, **(self._shared() | {"input_size": input_size} | arguments))
        datasets = {"train_dataset": train_dataset, "eval_dataset": self.test_dataset, "images": images}
        return trainer_class(model, self.teacher, args, **datasets)

    def real_images(self, number: int, seed: int | None = None) -> DataLoader:
        """Return batches of up to `number` training images, drawn with a seed, by default the recipe's, as they are."""
        number = min(number, len(self.train_dataset))
        images = self.train_dataset.subset(number, self.options.seed if seed is None else seed)
        return DataLoader(images, batch_size=256, collate_fn=collate_images)

    def recalibrated_accuracy(self, model: nn.Module, images: Iterable) -> float:
        """Return the test accuracy in percent under running statistics re-estimated from images.

        Args:
            model: The classifier. It comes back unchanged.
            images: As for [`recalibrate_batch_norm`].
        """
        model = copy.deepcopy(model)
        recalibrate_batch_norm(model, images)
        return evaluate(model, self.test_dataset)["running"]["accuracy"]

    def _photo_cfg(self) -> dict:
        """Return how the teacher, the given one or the one to be trained, wants its images."""
        if self.teacher is None:
            return timm.get_pretrained_cfg(self.preset["teacher"]).to_dict() | self.preset.get("cfg", {})
        cfg = preprocessing_of(self.teacher)
        if not {"mean", "std"} <= cfg.keys():
            raise ValueError(
                f"The teacher {self.options.teacher} does not say how it wants its images: save an image processor "
                "into its folder, with AutoImageProcessor's save_pretrained."
            )
        return {"input_size": declared_input_size(self.teacher)} | cfg

    def _shared(self) -> dict:
        shared = {"seed": self.options.seed, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 0.25}
        return shared | self._loading()

    def _loading(self) -> dict:
        """Return how images are loaded: processes decode photos; small images lie on the device already."""
        if not self.preset.get("photos"):
            return {"dataloader_pin_memory": False}
        return {"dataloader_num_workers": min(8, max(1, usable_cores() // PartialState().num_processes))}

    def _folder(self, name: str, architecture: str | None = None) -> Path:
        if name == "teacher":
            return self.options.output_dir / name
        return self.options.output_dir / re.sub(r"[^a-z0-9]+", "-", f"{name} {architecture or 'cut'}".lower())


def share_of_macs(trainer: NoiseKDTrainer) -> float:
    """Return the multiply-adds of a student for an image, relative to those of its teacher."""
    size = trainer.teacher.input_size
    return count_macs(trainer.model, size)[""] / count_macs(trainer.teacher_model, size)[""]
