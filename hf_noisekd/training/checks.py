"""Checks that are made before the first step, so that a run does not fail in its last one."""

import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_utils import has_length

from hf_noisekd.batches import check_labels, collate_images
from hf_noisekd.files import WEIGHTS_NAME
from hf_noisekd.models.classifier import (
    answer_to_blanks,
    check_finite,
    declared_input_size,
    declared_num_classes,
    format_size,
)
from hf_noisekd.models.loading import differing
from hf_noisekd.models.saving import check_config_can_be_saved
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.spec import noise_name, parse_noise, parse_resolutions, resolutions_text
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.evaluation import evaluation_loader

logger = logging.getLogger(__name__)


def check_models(
    model: nn.Module,
    teacher_model: nn.Module,
    input_size: tuple[int, int, int],
    num_classes: int,
    *,
    explicit_size: bool,
) -> None:
    """Check that the student can learn the teacher's answers to images of `input_size`.

    Raises:
        ValueError: A teacher's weight is not finite, a model is not in float32, the models differ in input or in
            classes, there is only one class, or the student could not be saved.
    """
    check_finite(teacher_model, "teacher")
    for role, candidate in (("teacher", teacher_model), ("student", model)):
        declared = declared_input_size(candidate) or tuple(input_size)
        if declared[0] != input_size[0]:
            raise ValueError(
                f"The {role} takes {declared[0]} input channels and the noise has {input_size[0]}: build the student "
                f"with in_chans={input_size[0]}, or give it by its timm name to have it built to fit."
            )
        if declared != tuple(input_size) and not explicit_size:
            raise ValueError(
                f"The {role} takes images of {format_size(declared)} and the noise has {format_size(input_size)}: give "
                "the student by its timm name to have it built to fit, or set input_size in the arguments to choose a "
                "size for both."
            )
        dtype = next(candidate.parameters()).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"The {role}'s weights are of type {dtype}: give it as {role}.float(). With bf16 or fp16 in the "
                "arguments it computes in half precision all the same."
            )
    if num_classes < 2:
        raise ValueError("The teacher has one class: distillation compares answers over two classes or more.")
    student_classes = answer_to_blanks(model, input_size, "student").shape[-1]
    if student_classes != num_classes:
        raise ValueError(
            f"The teacher has {num_classes} classes and the student {student_classes}: build the student with "
            f"num_classes={num_classes}."
        )
    if declared_num_classes(model) not in (None, num_classes):
        raise ValueError(
            f"The student answers with {num_classes} classes and says that it has {declared_num_classes(model)}, so it "
            f"could not be loaded again once it is saved: build it with num_classes={num_classes}."
        )
    check_config_can_be_saved(model)


def check_batch_norm_is_local(model: nn.Module, world_size: int) -> None:
    """Check that the BatchNorm layers of `model` take their statistics within each of `world_size` processes.

    Raises:
        ValueError: There are several processes, and a layer that waits for all of them, which may have other numbers of
            batches.
    """
    if world_size > 1 and any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has SyncBatchNorm layers, which take their statistics over all {world_size} "
            "processes: build it with nn.BatchNorm2d, and take larger batches in each process if they are too small."
        )


def check_train_noise(dataset: Dataset | IterableDataset, args: NoiseKDConfig) -> None:
    """Check that noise of the user's own is what the arguments say, where they say something.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(dataset, NoiseDataset):
        return
    said = {"per_device_train_batch_size": (args.per_device_train_batch_size, dataset.batch_size)}
    if args.noise != NoiseKDConfig.noise:
        said["noise"] = (noise_name(parse_noise(args.noise)), noise_name(dataset.distribution))
    if args.noise_std is not None:
        said["noise_std"] = (args.noise_std, dataset.std)
    if args.resolutions is not None:
        said["resolutions"] = tuple(
            resolutions_text(resolutions)  # their order counts
            for resolutions in (parse_resolutions(args.resolutions), dataset.resolutions)
        )
    for name, (wanted, found) in said.items():
        if wanted != found:
            raise ValueError(
                f"The NoiseDataset has {found} and the argument {name} says {wanted}: make them equal, or leave "
                "train_dataset out to have the noise made from the arguments."
            )


def check_image_sizes(noise: NoiseDataset, teacher_model: nn.Module, model: nn.Module) -> None:
    """Check that both models take images of the smaller sizes that the noise has in the course of the training.

    Raises:
        ValueError: One does not.
    """
    for size in {size for size, _ in noise.image_sizes()} - {noise.input_size[1:]}:
        for role, candidate in (("teacher", teacher_model), ("student", model)):
            try:
                answer_to_blanks(candidate, (noise.input_size[0], *size), role)
            except ValueError as error:
                raise ValueError(f"{error} Or train with noise of full size only: resolutions='1'.") from error


def check_eval_dataset(
    dataset: Dataset, input_size: tuple[int, int, int], num_classes: int, collate_fn: Callable = collate_images
) -> None:
    """Check what can be checked of an evaluation data set without loading all its images.

    Raises:
        ValueError: It is empty or has no length, its first image has no tensor or other channels than the models, or a
            label is out of range. Labels are checked up front where the data set keeps them as numbers in `labels`,
            `targets` or a tensor; elsewhere that of the first image, and all others when they are evaluated. Or it is
            noise of several sizes that does not know how many steps they are shares of.
    """
    evaluation_loader(dataset, batch_size=2)
    if isinstance(dataset, NoiseDataset):
        dataset.image_size(0)
        batch, channels = {}, dataset.input_size[0]
    else:
        batch = collate_fn([dataset[0]])
        channels = batch["pixel_values"].shape[1]
    if channels != input_size[0]:
        raise ValueError(f"The evaluation images have {channels} channels and the models take {input_size[0]}.")
    known = [batch.get("labels"), *getattr(dataset, "tensors", ())[1:2]]
    if getattr(dataset, "target_transform", None) is None:
        known += [getattr(dataset, name, None) for name in ("labels", "targets")]
    for labels in known:
        if isinstance(labels, list) and all(isinstance(label, int) for label in labels):
            labels = torch.tensor(labels)
        if torch.is_tensor(labels) and not labels.is_floating_point():
            check_labels(labels, num_classes)


def last_whole_checkpoint(output_dir: str, model: nn.Module) -> str:
    """Return the last checkpoint in a folder to resume from, passing over one that a kill left half written.

    Raises:
        ValueError: There is none.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    problems = []
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            check_checkpoint(str(path), model)
        except ValueError as error:
            logger.warning("Passing over a checkpoint. %s", error)
            problems.append(str(error))
        else:
            return str(path)
    raise ValueError(
        problems[0]
        if problems
        else f"There is no checkpoint to resume from in {output_dir!r}: train without resume_from_checkpoint first."
    )


def check_checkpoint(folder: str, model: nn.Module) -> None:
    """Check that `folder` holds a whole checkpoint of `model`.

    Raises:
        ValueError: A file is missing or damaged, or the weights are those of another model.
    """
    path = Path(folder)
    advice = "Resume from another checkpoint, or train without resume_from_checkpoint."
    if not path.is_dir():
        raise ValueError(f"There is no checkpoint folder {folder!r}. {advice}")
    missing = [
        name
        for name in (WEIGHTS_NAME, "optimizer.pt", "scheduler.pt", "trainer_state.json")
        if not (path / name).is_file()
    ]
    if missing:
        raise ValueError(f"The checkpoint {folder!r} is not whole: {', '.join(missing)} missing. {advice}")
    file = path / "trainer_state.json"
    try:
        json.loads(file.read_text())
        for file in [*path.glob("*.pt"), *path.glob("*.pth")]:
            with zipfile.ZipFile(file) as archive:  # torch's format; reading it this way unpickles nothing
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("wrong check sum")
        file = path / WEIGHTS_NAME
        with safetensors.safe_open(file, framework="pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{file.name} of the checkpoint {folder!r} is damaged ({error}). {advice}") from error
    model = getattr(model, "timm_model", model)  # transformers' wrapper is saved as the timm model that it wraps
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if names := differing(expected, shapes):
        raise ValueError(
            f"The checkpoint {folder!r} is of another model: {len(names)} tensors differ, first {names[0]!r}. {advice}"
        )


def check_length(folder: str, steps: int) -> None:
    """Check that the checkpoint in `folder` is of a training of `steps` steps.

    Raises:
        ValueError: It is not.
    """
    found = json.loads((Path(folder) / "trainer_state.json").read_text())["max_steps"]
    if found != steps:
        raise ValueError(
            f"The checkpoint {folder!r} is of a training of {found:,} steps, and this one has {steps:,}: the sizes of "
            f"its noise are shares of that number. Resume with max_steps={found}, or go on in full size with "
            "resolutions='1'."
        )


def teacher_input_size(
    args: NoiseKDConfig, teacher_model: nn.Module, train_dataset: Dataset | None, collate_fn: Callable
) -> tuple[int, int, int]:
    """Return the size of what the teacher will answer: the arguments', the training data's, or the declared one."""
    if isinstance(train_dataset, NoiseDataset):
        if args.input_size is not None and tuple(args.input_size) != train_dataset.input_size:
            raise ValueError(
                f"The NoiseDataset has images of {format_size(train_dataset.input_size)} and the arguments say "
                f"{format_size(args.input_size)}: leave input_size out."
            )
        return train_dataset.input_size
    if args.input_size is not None:
        return tuple(args.input_size)
    if train_dataset is not None and not isinstance(train_dataset, IterableDataset) and has_length(train_dataset):
        return tuple(collate_fn([train_dataset[0]])["pixel_values"].shape[1:])
    return NoiseDataset.for_model(teacher_model).input_size  # or the error that says what to pass
