"""Checks that are made before the first step, so that a run does not fail in its last one.

Each raises a `ValueError` that says what is wrong and what to do about it.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.func import functional_call
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_utils import has_length

from hf_noisekd.batches import check_labels
from hf_noisekd.models.classifier import (
    check_finite,
    compute_logits,
    declared_input_size,
    declared_num_classes,
    evaluation_mode,
    format_size,
    logits_of_blanks,
    to_device_of,
)
from hf_noisekd.models.saving import check_can_be_saved, warn_of_lost_activations
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.spec import noise_name, parse_noise, parse_resolutions, resolutions_text
from hf_noisekd.release.licenses import card_license
from hf_noisekd.training.config import ClassifierConfig, NoiseKDConfig
from hf_noisekd.training.evaluation import evaluation_loader, metric_names
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)


def check_models(model: nn.Module, teacher: Teacher, *, explicit_size: bool) -> None:
    """Check that the student can learn the teacher's answers to images of the teacher's input size, and be saved.

    `explicit_size` says that somebody chose that size for both, rather than the teacher.
    """
    input_size, num_classes = teacher.input_size, teacher.num_classes
    check_bare(teacher.model, "teacher")
    check_bare(model, "student")
    check_nothing_shared(model, teacher.model)
    check_finite(teacher.model, "teacher")
    check_finite(model, "student")
    for role, candidate in (("teacher", teacher.model), ("student", model)):
        declared = declared_input_size(candidate) or input_size
        if declared[0] != input_size[0]:
            raise ValueError(
                f"The {role} takes {declared[0]} input channels and the noise has {input_size[0]}: build the student "
                f"with in_chans={input_size[0]}, or give it by its timm name to have it built to fit."
            )
        if declared != input_size and not explicit_size:
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
    for role, candidate in (("teacher", teacher.model), ("student", model)):
        answers = logits_of_blanks(candidate, input_size, role)
        if not answers.isfinite().all():
            raise ValueError(f"The {role} answers blank images with a NaN or an infinity: look for what is damaged.")
    if (student_classes := answers.shape[-1]) != num_classes:
        raise ValueError(
            f"The teacher has {num_classes} classes and the student {student_classes}: build the student with "
            f"num_classes={num_classes}."
        )
    if declared_num_classes(model) not in (None, num_classes):
        raise ValueError(
            f"The student answers with {num_classes} classes and says that it has {declared_num_classes(model)}, so it "
            f"could not be loaded again once it is saved: build it with num_classes={num_classes}."
        )
    check_trainable(model, input_size)
    warn_of_lost_activations(teacher.model, input_size)
    check_can_be_saved(model, input_size, teacher_model=teacher.model)
    said = card_license(license := getattr(teacher.model, "origin", {}).get("license"))
    if "license_name" in said:
        logger.warning(
            "The teacher's licence is %r, which the Hub does not list: the student's card will say `license: other` "
            "with the name %r. Read its terms before you publish the student.",
            license,
            said["license_name"],
        )


def check_bare(model: nn.Module, role: str) -> None:
    """Check that a model, called `role`, is not wrapped by torch.compile or for parallel training."""
    if extract_model_from_parallel(model, keep_torch_compile=False) is not model:
        raise ValueError(
            f"The {role} is wrapped in {type(model).__name__}: give the model in it. The trainer wraps it as "
            "torch_compile=True and the number of processes ask for."
        )


def check_trainable(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Check that a model has a weight to train, and gives logits in training mode as in evaluation mode."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("There is no weight to train: all are frozen. Call requires_grad_(True) on the model.")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # running statistics change
    with torch.no_grad(), evaluation_mode(model):  # which restores all modes
        model.train()
        blanks = to_device_of(model, torch.zeros(2, *input_size))
        logits = compute_logits(partial(functional_call, model, buffers), blanks)
    if not torch.is_tensor(logits):
        raise ValueError(
            f"In training mode {type(model).__name__} gives a {type(logits).__name__} in place of logits, such as with "
            "auxiliary classifiers: build it without them."
        )


def check_last_batch(dataset: Any, args: ClassifierConfig) -> None:
    """Check that no batch of a training on images has only one of them, which has no batch statistics."""
    if isinstance(dataset, NoiseDataset) or not has_length(dataset):
        return
    images, batch_size = len(dataset), args.train_batch_size
    if args.dataloader_drop_last and images < batch_size:
        raise ValueError(f"There are {images} training images, less than a batch: lower per_device_train_batch_size.")
    # With several processes Accelerate fills the last batches.
    if args.world_size == 1 and images % batch_size == 1 and not args.dataloader_drop_last:
        raise ValueError(
            f"The last batch of an epoch has one image, of which there are no batch statistics: of {images} images in "
            f"batches of {batch_size}. Set dataloader_drop_last=True, or another per_device_train_batch_size."
        )


def check_nothing_shared(model: nn.Module, teacher_model: nn.Module) -> None:
    """Check that no parameter or buffer of the student lies in memory of the teacher's."""
    taught_by = {tensor.untyped_storage().data_ptr() for tensor in teacher_model.state_dict().values()} - {0}
    for name, tensor in model.state_dict().items():
        if tensor.untyped_storage().data_ptr() in taught_by:
            raise ValueError(
                f"The student shares {name!r} with the teacher, which training would change: give one of the two as a "
                "copy, copy.deepcopy(model)."
            )


def check_train_noise(dataset: Dataset | IterableDataset | None, args: NoiseKDConfig, teacher: Teacher) -> None:
    """Check that noise of the user's own is what the arguments say, where they say something.

    White noise is warned of where the teacher does not answer it by the statistics of the batch.
    """
    if not isinstance(dataset, NoiseDataset):
        return
    if not teacher.weight_of_batch and noise_name(dataset.distribution) == "white":
        logger.warning(
            "White noise tells a student little about %s, which does not normalise it by the statistics of the batch: "
            "use structured noise.",
            type(teacher.model).__name__,
        )
    said: dict[str, tuple] = {"per_device_train_batch_size": (args.per_device_train_batch_size, dataset.batch_size)}
    if args.noise != NoiseKDConfig.noise:
        said["noise"] = (noise_name(parse_noise(args.noise)), noise_name(dataset.distribution))
    if args.noise_std is not None:
        said["noise_std"] = (args.noise_std, dataset.std)
    if args.resolutions is not None:
        resolutions = parse_resolutions(args.resolutions)
        said["resolutions"] = (resolutions_text(resolutions), resolutions_text(dataset.resolutions))  # the order counts
    for name, (wanted, found) in said.items():
        if wanted != found:
            raise ValueError(
                f"The NoiseDataset has {found} and the argument {name} says {wanted}: make them equal, or leave "
                "train_dataset out to have the noise made from the arguments."
            )


def check_eval_datasets(eval_dataset: Dataset | Mapping[str, Dataset], teacher: Teacher, collate_fn: Callable) -> None:
    """Check what can be checked of evaluation data sets without loading all their images.

    Labels are checked up front where a data set keeps them as numbers in `labels`, `targets` or a tensor; elsewhere
    that of the first image, and all others when they are evaluated.
    """
    if isinstance(eval_dataset, Mapping) and not eval_dataset:
        raise ValueError("eval_dataset is an empty mapping: leave it out to evaluate on held-out noise.")
    input_size, num_classes = teacher.input_size, teacher.num_classes
    for dataset in eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]:
        evaluation_loader(dataset, batch_size=2)  # or the error that says that there are no or too few images
        if isinstance(dataset, NoiseDataset):
            dataset.image_size(0)  # or the error that says that it does not know how many steps its sizes are shares of
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


def check_metric(
    args: ClassifierConfig,
    eval_dataset: Dataset | Mapping[str, Dataset],
    num_classes: int,
    *,
    has_teacher: bool,
    collate_fn: Callable,
) -> None:
    """Check that the metric by which the best model is chosen will be there."""
    metric = args.metric_for_best_model
    if metric is None:
        return
    names = metric_names(eval_dataset, num_classes, has_teacher=has_teacher, collate_fn=collate_fn)
    if metric.removeprefix("eval_") not in names:
        raise ValueError(
            f"metric_for_best_model is {metric!r}, which will not be measured on these images: use one of "
            f"{', '.join(names)}."
        )


def check_batch_norm_is_local(model: nn.Module, world_size: int) -> None:
    """Raise a `ValueError` if a layer waits for all of several processes, which may have other numbers of batches."""
    if world_size > 1 and any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has SyncBatchNorm layers, which take their statistics over all {world_size} "
            "processes: build it with nn.BatchNorm2d, and take larger batches in each process if they are too small."
        )
