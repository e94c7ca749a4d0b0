"""The teacher: how it is asked, and by which BatchNorm statistics it answers."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn

from hf_noisekd.models.batch_norm import batch_statistics, find_batch_norm, has_batch_norm
from hf_noisekd.models.classifier import (
    answer_to_blanks,
    class_names,
    compute_logits,
    declared_input_size,
    teacher_identity,
)


class Teacher:
    """A trained classifier that is asked, and never changed.

    One rule says how it answers. Noise, and whatever takes the place of noise in training, it answers with BatchNorm
    layers on the statistics of the batch (Raikwar & Mishra 2022, Algorithm 1). Images that a student is measured on it
    answers as it is deployed, with running statistics.

    Whoever asks it sees to its device and its evaluation mode; see [`Teacher.settle`].

    Args:
        model: The classifier.
        input_size: `(channels, height, width)` of the training batches. Default: what the model declares.
        batch_norm_fraction: Share of its BatchNorm layers that go by the statistics of the batch; see
            [`batch_statistics`].
        seed: Seed of their choice.

    Attributes:
        model: The classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_size: tuple[int, int, int] | None = None,
        batch_norm_fraction: float = 1.0,
        seed: int = 0,
    ):
        self.model = model
        self._input_size = input_size
        self._statistics = batch_statistics(model, batch_norm_fraction, seed) if has_batch_norm(model) else None
        self._forward: nn.Module | Callable = model

    def settle(self, device: torch.device, memory_format: torch.memory_format, **compile_options) -> "Teacher":
        """Bring the model to the device that trains, in evaluation mode.

        Args:
            device: Where to.
            memory_format: Memory format of its weights.
            **compile_options: Options of `torch.compile` for the answers to training batches; none: not compiled.
        """
        self.model.to(device=device, memory_format=memory_format).eval()  # type: ignore[call-overload]
        self._forward = torch.compile(self.model, **compile_options) if compile_options else self.model
        return self

    def check_statistics(self) -> None:
        """Check that the model can use the statistics of the batch.

        Raises:
            ValueError: It has no BatchNorm layer; the message names the normalisation layers that were found.
        """
        find_batch_norm(self.model)

    @torch.no_grad()
    def teach(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, num_classes]` for a training batch `[B, C, H, W]`, in float32."""
        return self._answer(self._forward, pixel_values, noise=True)

    @torch.no_grad()
    def answer(self, pixel_values: torch.Tensor, *, noise: bool) -> torch.Tensor:
        """Return the logits `[B, num_classes]` for pixels `[B, C, H, W]` to measure by, in float32.

        Args:
            pixel_values: Held-out noise, or images.
            noise: Which of the two.

        Raises:
            ValueError: It is noise, and the model has no BatchNorm layer.
        """
        return self._answer(self.model, pixel_values, noise=noise)

    def _answer(self, forward: nn.Module | Callable, pixel_values: torch.Tensor, *, noise: bool) -> torch.Tensor:
        if not noise:
            return compute_logits(forward, pixel_values).float()
        with self._statistics or batch_statistics(self.model):
            return compute_logits(forward, pixel_values).float()

    @property
    def input_size(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the training batches.

        Raises:
            ValueError: None was given, and the model declares none.
        """
        size = self._input_size or declared_input_size(self.model)
        if size is None:
            raise ValueError(f"{type(self.model).__name__} does not say what input size it takes: pass input_size.")
        return size

    @cached_property
    def num_classes(self) -> int:
        """The number of its classes.

        Raises:
            ValueError: It does not take images of its input size, or gives something else than logits.
        """
        return answer_to_blanks(self.model, self.input_size, "teacher").shape[-1]

    @property
    def class_names(self) -> list[str]:
        """The names of its classes, or their numbers."""
        return class_names(self.model, self.num_classes)

    @cached_property
    def identity(self) -> dict:
        """What identifies it; see [`teacher_identity`]. It takes a look at all weights, once."""
        return teacher_identity(self.model)
