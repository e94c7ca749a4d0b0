"""A training whose numbers are no longer finite: it ends, and the last checkpoint from before is named."""

import math
from collections.abc import Mapping

from torch import nn

from hf_noisekd.models.classifier import nonfinite_tensor
from hf_noisekd.training.checkpoints import name_last_checkpoint
from hf_noisekd.training.config import ClassifierConfig


def check_loss(logs: Mapping[str, float], model: nn.Module, args: ClassifierConfig, step: int, cause: str = "") -> None:
    """Raise a `FloatingPointError` if the loss of a log entry is a NaN or an infinity.

    Args:
        logs: The entry of a step, or that of the end, with the mean loss of all steps.
        model: The model that is trained.
        args: Its arguments.
        step: The step.
        cause: What is known of the cause; by default what is likely, given the arguments.
    """
    loss = logs.get("loss", logs.get("train_loss", 0.0))
    if not math.isfinite(loss):
        raise FloatingPointError(_text(f"The loss is {loss}", model, args, step, cause))


def check_weights(model: nn.Module, args: ClassifierConfig, step: int) -> None:
    """Raise a `FloatingPointError` if a weight or a buffer of the model that is trained holds a NaN or an infinity."""
    if name := nonfinite_tensor(model):
        raise FloatingPointError(_text(f"The model's {name!r} holds a NaN or an infinity", model, args, step))


def _text(what: str, model: nn.Module, args: ClassifierConfig, step: int, cause: str = "") -> str:
    causes = [f"a learning rate of {args.learning_rate} that is too high"]
    if not args.max_grad_norm:
        causes.append("gradients that are not clipped (max_grad_norm=1 does that)")
    if args.fp16:
        causes.append("the small range of fp16 (bf16 has a larger one)")
    causes.append("images with such values")
    cause = cause or f"Likely causes: {', or '.join(causes)}."
    return f"{what} at step {step:,}. {cause} {name_last_checkpoint(args.output_dir, model)}"
