"""Whether a model can be a teacher, and how its answers to noise spread over the classes."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

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
)
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.training.teacher import Teacher

NUM_BATCHES = 2


def describe_teacher(model: nn.Module, input_size: Sequence[int] | None = None, *, batch_size: int = 256) -> dict:
    """Return what decides whether a model can be a teacher: what it is, and how it answers the default noise.

    The noise is two batches in full size; `input_size` is by default what the model declares, else a `ValueError`. Of
    the result `class_names` are the first of them, `batch_norm` is the number of BatchNorm layers by kind, `answers`
    are as of [`describe_probs`] by kind of statistics, as far as there are any, and `verdict` is a sentence.
    """
    noise = full_size_noise(model, "structured", input_size=input_size, batch_size=batch_size, num_steps=NUM_BATCHES)
    num_classes = logits_of_blanks(model, noise.input_size, "model").shape[-1]
    layers, obstacle = find_batch_norm(model), ""
    try:
        check_leaves_stored_statistics(model, noise.input_size)
    except ValueError as error:
        obstacle = f" by default: {error}"
    if num_classes < 2:
        obstacle = ": it has one class, and nothing to tell about it."
    answers = {}
    if nonfinite := nonfinite_tensor(model):
        obstacle = f": its {nonfinite!r} holds a NaN or an infinity, so its checkpoint is damaged."
    else:
        for statistics in ("running", "batch") if layers else ("running",):
            probs = probs_of_noise(Teacher(model), noise, statistics)
            if probs.isfinite().all():
                answers[statistics] = describe_probs(probs)
            else:
                obstacle = f": with {statistics} statistics it answers noise with a NaN."
    return {
        "architecture": architecture_of(model),
        "parameters": count_parameters(model),
        "input_size": list(noise.input_size),
        "num_classes": num_classes,
        "class_names": class_names(model, num_classes)[:5],
        "batch_norm": dict(Counter(type(layer).__name__ for layer in layers.values())),
        "noise_images": NUM_BATCHES * batch_size,
        "answers": answers,
        "can_teach": not obstacle,
        "verdict": f"cannot be a teacher{obstacle}" if obstacle else _verdict(answers, num_classes),
    }


def full_size_noise(model: nn.Module, distribution: str, **kwargs) -> NoiseDataset:
    """Return noise in the full size that suits `model`, to be drawn where that is; see [`NoiseDataset.for_model`]."""
    dtype = next(model.parameters()).dtype
    return NoiseDataset.for_model(
        model, distribution=distribution, resolutions={1.0: 1.0}, device=device_of(model), dtype=dtype, **kwargs
    )


def probs_of_noise(teacher: Teacher, noise: NoiseDataset, statistics: str) -> torch.Tensor:
    """Return the answers `[N, num_classes]` of a teacher to all batches of `noise`, in float32.

    `statistics` are `"batch"`, by which it answers noise, or `"running"`, by which it answers images.
    """
    with evaluation_mode(teacher.model):
        logits = [teacher.logits(noise.draw(step), noise=statistics == "batch") for step in noise.steps()]
    return torch.cat(logits).softmax(-1)


def describe_probs(probs: torch.Tensor) -> dict[str, float]:
    """Return how answers `[N, num_classes]` spread over the classes.

    `class_balance` is the entropy of the mean answer, and `flatness` the mean entropy of an answer, both relative to
    that of all classes equally likely; `top_class_share` is that of the class answered most often, in percent; and
    `classes_answered` is the number of different answers.
    """
    num_classes = probs.shape[-1]
    most = math.log(max(num_classes, 2))
    counts = probs.argmax(-1).bincount(minlength=num_classes)
    return {
        "class_balance": probs.mean(0).xlogy(probs.mean(0)).sum().neg().item() / most,
        "flatness": probs.xlogy(probs).sum(-1).mean().neg().item() / most,
        "top_class_share": 100 * counts.max().item() / len(probs),
        "classes_answered": counts.count_nonzero().item(),
    }


def _verdict(answers_by: Mapping[str, Mapping[str, float]], num_classes: int) -> str:
    """Return what to say of a teacher that answers noise with `answers_by` kind of statistics."""
    way = "with batch statistics it answers" if "batch" in answers_by else "it has no BatchNorm, and as it is answers"
    answers = answers_by.get("batch") or answers_by["running"]
    verdict = f"can be a teacher: {way} noise with {answers['classes_answered']:,} of its {num_classes:,} classes."
    # Rules of thumb; a CIFAR-10 ResNet has a class balance of 1.00 and a flatness of 0.39, an ImageNet EfficientNet
    # 1.00 and 0.91.
    if answers["class_balance"] < 0.5:
        verdict += " But noise hardly reaches most of them: expect a poor student."
    elif answers["flatness"] > 0.9:
        verdict += (
            " But each answer is nearly flat, and the default softens it further: a --temperature below 1 may help."
        )
    return verdict
