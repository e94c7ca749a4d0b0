"""Whether a model can be a teacher, and how its predictions for noise spread over the classes."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from hf_noisekd.models.batch_norm import check_leaves_stored_statistics, find_batch_norm
from hf_noisekd.models.classifier import (
    architecture_of,
    class_names,
    count_parameters,
    device_of,
    evaluation_mode,
    logits_of_blanks,
    nonfinite_tensor,
    other_task_of,
)
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.training.teacher import Teacher
from hf_noisekd.workflows.inputs import usable_model

MIN_BATCHES, MIN_BATCH = 2, 64
BATCH_PIXELS = 2**22  # more take memory alone


def describe_teacher(
    source: str | Path | nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    checkpoint: str | Path | None = None,
    num_images: int = 512,
    trust_remote_code: bool = False,
) -> dict:
    """Return what decides whether a model can be a teacher: what it is, and what it predicts for the default noise.

    `source` and `checkpoint` are as for [`load_teacher`], and `input_size` is by default what the model declares. The
    noise has full size, and is read in two batches, or in more where these would have over four million pixels. Among
    the results are `predictions`, as of [`describe_probs`] by kind of statistics, as far as there are any; `can_teach`;
    and `verdict`, a sentence. Without such a model, or an input size, there is a `ValueError`.
    """
    model = usable_model(source, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    batch_size, input_size = num_images // MIN_BATCHES, input_size_of(model, input_size)
    while batch_size >= 2 * MIN_BATCH and batch_size * math.prod(input_size[1:]) > BATCH_PIXELS:
        batch_size //= 2
    batches = {"batch_size": batch_size, "num_steps": num_images // batch_size}
    noise = full_size_noise(model, "structured", input_size=input_size, **batches)
    num_classes = logits_of_blanks(model, noise.input_size, "model").shape[-1]
    layers, obstacle = find_batch_norm(model), ""
    try:
        check_leaves_stored_statistics(model, noise.input_size)
    except ValueError as error:
        obstacle = f" by default: {error}".replace("teacher_statistics=0", "--teacher-statistics 0")
    if num_classes < 2:
        obstacle = ": it has one class only."
    if task := other_task_of(model):
        obstacle = f": its problem_type is {task}, not single_label_classification."
    predictions = {}
    if nonfinite := nonfinite_tensor(model):
        obstacle = f": its {nonfinite!r} holds a NaN or an infinity, so its checkpoint is damaged."
    else:
        kinds = ("running", "batch") if layers else ("running",)
        for statistics, probs in zip(kinds, probs_of_noise(Teacher(model), noise, kinds), strict=True):
            if probs.isfinite().all():
                predictions[statistics] = describe_probs(probs)
            else:
                obstacle = f": with {statistics} statistics its logits for noise are NaN."
    return {
        "architecture": architecture_of(model),
        "parameters": count_parameters(model),
        "input_size": list(noise.input_size),
        "num_classes": num_classes,
        "class_names": class_names(model, num_classes)[:5],
        "batch_norm": dict(Counter(type(layer).__name__ for layer in layers.values())),
        "noise_images": batches["num_steps"] * batch_size,
        "predictions": predictions,
        "can_teach": not obstacle,
        "verdict": f"cannot be a teacher{obstacle}" if obstacle else _verdict(predictions, num_classes),
    }


def full_size_noise(model: nn.Module, distribution: str, **kwargs) -> NoiseDataset:
    """Return noise in the full size that suits `model`, to be drawn where that is; see [`NoiseDataset.for_model`]."""
    dtype = next(model.parameters()).dtype
    return NoiseDataset.for_model(
        model, distribution=distribution, resolutions={1.0: 1.0}, device=device_of(model), dtype=dtype, **kwargs
    )


def probs_of_noise(teacher: Teacher, noise: NoiseDataset, kinds: Sequence[str]) -> list[torch.Tensor]:
    """Return a teacher's float32 predictions `[N, num_classes]` for `noise`, by each of some kinds of statistics."""
    logits: list[list[torch.Tensor]] = [[] for _ in kinds]
    with evaluation_mode(teacher.model):
        for step in noise.steps():
            images = noise.draw(step)
            for found, statistics in zip(logits, kinds, strict=True):
                found.append(teacher.logits(images.clone(), noise=statistics == "batch"))
    return [torch.cat(found).softmax(-1) for found in logits]


def describe_probs(probs: torch.Tensor) -> dict[str, float]:
    """Return how predictions `[N, num_classes]` spread over the classes.

    `class_balance` is the entropy of the mean prediction, and `flatness` the mean entropy of a prediction, both
    relative to that of all classes equally likely; `top_class_share` is that of the class predicted most often, in
    percent; and `classes_predicted` is the number of classes that are ever predicted.
    """
    num_classes = probs.shape[-1]
    most = math.log(max(num_classes, 2))
    counts = probs.argmax(-1).bincount(minlength=num_classes)
    return {
        "class_balance": probs.mean(0).xlogy(probs.mean(0)).sum().neg().item() / most,
        "flatness": probs.xlogy(probs).sum(-1).mean().neg().item() / most,
        "top_class_share": 100 * counts.max().item() / len(probs),
        "classes_predicted": counts.count_nonzero().item(),
    }


def _verdict(predictions_by: Mapping[str, Mapping[str, float]], num_classes: int) -> str:
    """Return a sentence on a teacher by its predictions for noise with each kind of statistics."""
    way = "with batch statistics" if "batch" in predictions_by else "as it is, without BatchNorm,"
    predictions = predictions_by.get("batch") or predictions_by["running"]
    verdict = (
        f"can be a teacher: {way} it predicts {predictions['classes_predicted']:,} of its {num_classes:,} classes for "
        "noise."
    )
    # Rules of thumb; a CIFAR-10 ResNet has a class balance of 1.00 and a flatness of 0.39, an ImageNet EfficientNet
    # 1.00 and 0.91.
    if predictions["class_balance"] < 0.5:
        verdict += " But most of them are hardly ever predicted: expect a poor student."
    elif predictions["flatness"] > 0.9:
        verdict += " But each prediction is nearly flat, so noise teaches little: give distill unlabelled images, too."
    return verdict
