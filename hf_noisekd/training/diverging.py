"""A training whose numbers are no longer finite: it ends, and the last checkpoint from before is named."""

from torch import nn

from hf_noisekd.models.classifier import nonfinite_tensor
from hf_noisekd.training.checkpoints import name_last_checkpoint
from hf_noisekd.training.config import ClassifierConfig


def check_weights(model: nn.Module, args: ClassifierConfig, step: int) -> None:
    """Raise a `FloatingPointError` if a weight or a buffer of the model that is trained holds a NaN or an infinity."""
    if name := nonfinite_tensor(model):
        raise diverged(f"The model's {name!r} holds a NaN or an infinity", model, args, step)


def diverged(what: str, model: nn.Module, args: ClassifierConfig, step: int, cause: str = "") -> FloatingPointError:
    """Return the error that says what is not finite after which step, and why; by default what is likely."""
    causes = [f"a learning rate of {args.learning_rate} that is too high", "images with such values"]
    if args.fp16:
        causes.append("the small range of fp16 (bf16 has a larger one)")
    cause = cause or f"Likely causes: {', or '.join(causes)}."
    return FloatingPointError(f"{what} at step {step:,}. {cause} {name_last_checkpoint(args.output_dir, model)}")
