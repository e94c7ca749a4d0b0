"""Checks that are made before the first step, so that a run does not fail in its last one.

Each raises a `ValueError` that says what was found and what to do about it.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import has_length

from hf_noisekd.batches import check_labels
from hf_noisekd.models.classifier import (
    check_finite,
    declared_input_size,
    format_size,
    logits_of_blanks,
    other_task_of,
)
from hf_noisekd.models.saving import check_can_be_saved
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.spec import noise_name, parse_noise, parse_resolutions
from hf_noisekd.training.config import ClassifierConfig, NoiseKDConfig
from hf_noisekd.training.evaluation import evaluation_loader
from hf_noisekd.training.teacher import Teacher

logger = logging.getLogger(__name__)


def check_trainer_arguments(args: ClassifierConfig) -> None:
    """Check what torch and transformers would refuse after minutes: reporters, optimizer and schedule."""
    get_reporting_integration_callbacks(args.report_to)
    if args.optim_target_modules:
        return  # they are looked for in the student
    one_weight = nn.Linear(1, 1)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, one_weight)
        if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, torch.optim.Optimizer):
            return  # it is built of the whole model
        learning_rate = args.learning_rate or 1e-2  # the default, which depends on the student, is as good for this
        optimizer = optimizer_class(one_weight.parameters(), **options | {"lr": learning_rate})
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except Exception as error:  # of many kinds
        raise ValueError(f"The optimizer or its schedule cannot be built: {error}") from error


def check_teacher(model: nn.Module, input_size: tuple[int, int, int], *, explicit_size: bool) -> None:
    """Check that a model can teach on images of a size; nothing has to be made for that.

    `explicit_size` means that somebody chose that size for both models, rather than the teacher.
    """
    if task := other_task_of(model):
        raise ValueError(
            f"The teacher's problem_type is {task}, and its predictions are compared as probabilities of one class "
            "among all, which lose what its single logits say: give a teacher of single_label_classification."
        )
    if _checked_num_classes(model, "teacher", input_size, explicit_size=explicit_size) < 2:
        raise ValueError("The teacher has one class: distillation compares logits over two classes or more.")


def check_student(model: nn.Module, teacher: Teacher, *, explicit_size: bool) -> None:
    """Check that a student can learn the teacher's logits for images of the teacher's input size, and be saved."""
    check_nothing_shared(model, teacher.model)
    found = _checked_num_classes(model, "student", teacher.input_size, explicit_size=explicit_size)
    if found != teacher.num_classes:
        raise ValueError(
            f"The teacher has {teacher.num_classes} classes and the student {found}: build the "
            f"student with num_classes={teacher.num_classes}, or give it by its timm name, which is built to fit."
        )
    check_trainable(model)
    check_can_be_saved(model, teacher.input_size, teacher_model=teacher.model)


def _checked_num_classes(model: nn.Module, role: str, input_size: tuple[int, int, int], *, explicit_size: bool) -> int:
    """Return the number of classes of a model, called `role`, after a check of its weights, images and logits."""
    check_bare(model, role)
    check_finite(model, role)
    declared = declared_input_size(model) or input_size
    if declared[0] != input_size[0] or (declared != input_size and not explicit_size):
        raise ValueError(
            f"The {role} takes images of {format_size(declared)} and the noise has {format_size(input_size)}: give "
            f"the student by its timm name to have it built to fit, build it with in_chans={input_size[0]}, or set "
            "input_size to choose a height and width for both."
        )
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(
            f"The {role}'s weights are of type {dtype}: give it as {role}.float(). With bf16 or fp16 in the "
            "arguments it computes in half precision all the same."
        )
    logits = logits_of_blanks(model, input_size, role)
    if not logits.isfinite().all():
        raise ValueError(f"The {role}'s logits for blank images are NaN or infinite: look for what is damaged.")
    if logits.shape[1] > 1 and logits.min() >= 0 and torch.allclose(logits.sum(1), torch.ones(()).to(logits)):
        raise ValueError(f"The {role} returns probabilities, which add up to 1: take off its softmax. It needs logits.")
    return logits.shape[-1]


def check_bare(model: nn.Module, role: str) -> None:
    """Check that a model, called `role`, is not wrapped: its weights would be saved under the wrapper's names."""
    if extract_model_from_parallel(model, keep_torch_compile=False) is not model:
        raise ValueError(
            f"The {role} is wrapped in {type(model).__name__}: give the model in it, and torch_compile=True to compile."
        )


def check_trainable(model: nn.Module) -> None:
    """Check that a model has a weight to train."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("There is no weight to train: all are frozen. Call requires_grad_(True) on the model.")


def check_last_batch(dataset: Any, args: ClassifierConfig) -> None:
    """Check that no batch of a training on images has only one of them, which has no batch statistics."""
    # With several processes Accelerate fills the last batches.
    if isinstance(dataset, NoiseDataset) or not has_length(dataset) or args.world_size > 1 or args.dataloader_drop_last:
        return
    if len(dataset) % args.train_batch_size == 1:
        raise ValueError(
            f"The last batch of an epoch has one image, of which there are no batch statistics: of {len(dataset)} "
            f"images in batches of {args.train_batch_size}. Set dataloader_drop_last=True, or another "
            "per_device_train_batch_size."
        )


def check_nothing_shared(model: nn.Module, teacher_model: nn.Module) -> None:
    """Check that no parameter or buffer of the student lies in memory of the teacher's."""
    of_teacher = {tensor.untyped_storage().data_ptr() for tensor in teacher_model.state_dict().values()} - {0}
    for name, tensor in model.state_dict().items():
        if tensor.untyped_storage().data_ptr() in of_teacher:
            raise ValueError(
                f"The student shares {name!r} with the teacher, which training would change: give one of the two as a "
                "copy, copy.deepcopy(model)."
            )


def check_train_noise(dataset: Any, args: NoiseKDConfig, teacher: Teacher) -> None:
    """Check that noise of the user's own is what the arguments name, where they name something.

    White noise is warned of where the teacher does not normalise it by the statistics of the batch.
    """
    if not isinstance(dataset, NoiseDataset):
        if args.max_hours:
            raise ValueError(f"max_hours is {args.max_hours:g}, and the training is not on noise: give max_steps.")
        return
    if not teacher.weight_of_batch and noise_name(dataset.distribution) == "white":
        logger.warning(
            "White noise teaches little where the teacher does not normalise it by the statistics of the batch: use "
            "structured noise."
        )
    named: dict[str, tuple] = {"per_device_train_batch_size": (args.per_device_train_batch_size, dataset.batch_size)}
    if args.noise != NoiseKDConfig.noise:
        named["noise"] = (noise_name(parse_noise(args.noise)), noise_name(dataset.distribution))
    if args.noise_std is not None:
        named["noise_std"] = (args.noise_std, dataset.std)
    if args.resolutions is not None:
        wanted, own = parse_resolutions(args.resolutions), dataset.resolutions
        named["resolutions"] = (list(wanted.items()), list(own.items()))  # the order counts
    for name, (wanted, found) in named.items():
        if wanted != found:
            raise ValueError(
                f"The NoiseDataset has {found}, and {name} is {wanted}: make them equal, or leave train_dataset out to "
                "have the noise made from the arguments."
            )


def check_eval_datasets(eval_dataset: Dataset | Mapping[str, Dataset], teacher: Teacher, collate_fn: Callable) -> None:
    """Check what the first image of each evaluation data set tells; all labels are checked when they are used."""
    if isinstance(eval_dataset, Mapping) and not eval_dataset:
        raise ValueError("eval_dataset is an empty mapping: leave it out to evaluate on held-out noise.")
    for dataset in eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]:
        evaluation_loader(dataset, batch_size=2)  # or the error that there are no or too few images
        if isinstance(dataset, NoiseDataset):
            dataset.image_size(0)  # or the error that it does not know how many steps its sizes are shares of
            batch, channels = {}, dataset.input_size[0]
        else:
            batch = collate_fn([dataset[0]])
            channels = batch["pixel_values"].shape[1]
        if channels != teacher.input_size[0]:
            raise ValueError(
                f"The evaluation images have {channels} channels and the models take {teacher.input_size[0]}: give "
                "images as the teacher takes them."
            )
        if "labels" in batch:
            check_labels(batch["labels"], teacher.num_classes)


def check_batch_norm_is_local(model: nn.Module, world_size: int) -> None:
    """Check that no layer waits for all of several processes, which may have other numbers of batches."""
    if world_size > 1 and any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has SyncBatchNorm layers, which take their statistics over all {world_size} "
            "processes: build it with nn.BatchNorm2d, and take larger batches in each process if they are too small."
        )
