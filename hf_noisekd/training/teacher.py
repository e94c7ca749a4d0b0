"""The teacher: its logits, and the BatchNorm statistics that they are computed with."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import nn
from transformers import TrainingArguments

from hf_noisekd.models.batch_norm import batch_statistics, has_batch_norm, num_frozen, statistics_of_batch
from hf_noisekd.models.classifier import compute_logits, logits_of_blanks, teacher_identity
from hf_noisekd.models.preprocessing import input_size_of


class Teacher:
    """A trained classifier that never changes.

    Its logits for noise, and for whatever takes the place of noise in training, are computed with BatchNorm layers on
    the statistics of the batch (Raikwar & Mishra 2022, Algorithm 1), or partly so: `statistics`, in [0, 1], is the
    weight of the batch, by default 1 with BatchNorm; `batch_norm_fraction` and `seed` choose the layers, see
    [`batch_statistics`]. `weight_of_batch` is how far these logits depend on the batch: 0 not at all, 1 wholly. Logits
    for images are computed as it is deployed, with running statistics. A teacher without BatchNorm is used as it is; to
    choose statistics of it is a `ValueError`. `input_size`, `(channels, height, width)`, is by default what the model
    declares.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_size: tuple[int, int, int] | None = None,
        statistics: float | None = None,
        batch_norm_fraction: float = 1.0,
        seed: int = 0,
    ):
        if not has_batch_norm(model) and (statistics or 0 < batch_norm_fraction < 1):
            advice = "set teacher_statistics=0" if num_frozen(model) else "leave teacher_statistics out"
            raise ValueError(
                f"{type(model).__name__} has no BatchNorm layer that can use batch statistics, so there are none to "
                f"choose: {advice}, and batch_norm_fraction at 1."
            )
        self.model = model
        self._input_size = input_size
        self.statistics = float(has_batch_norm(model)) if statistics is None else statistics
        self.batch_norm_fraction = batch_norm_fraction
        self._context = statistics_of_batch(model, fraction=batch_norm_fraction, seed=seed, weight=self.statistics)
        share = self._context.share if isinstance(self._context, batch_statistics) else 0.0
        self.weight_of_batch = self.statistics * share
        self._forward: nn.Module | Callable = model

    def settle(self, args: TrainingArguments, memory_format: torch.memory_format) -> "Teacher":
        """Bring the model to the device that trains, in evaluation mode, compiled if the arguments want it."""
        self.model.to(device=args.device, memory_format=memory_format).eval()  # type: ignore[call-overload]
        if args.torch_compile:
            self._forward = torch.compile(self.model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        return self

    def training_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, num_classes]` for a training batch `[B, C, H, W]`, in float32."""
        return self._logits(self._forward, pixel_values, noise=True)

    def logits(self, pixel_values: torch.Tensor, *, noise: bool) -> torch.Tensor:
        """Return the logits `[B, num_classes]` for noise or images `[B, C, H, W]` to measure by, in float32."""
        return self._logits(self.model, pixel_values, noise=noise)

    @torch.no_grad()
    def _logits(self, forward: nn.Module | Callable, pixel_values: torch.Tensor, *, noise: bool) -> torch.Tensor:
        with self._context if noise else nullcontext():
            return compute_logits(forward, pixel_values).float()

    @cached_property
    def input_size(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the training batches; a `ValueError` as of [`input_size_of`]."""
        return input_size_of(self.model, self._input_size)

    @cached_property
    def num_classes(self) -> int:
        """The number of its classes; a `ValueError` as of [`logits_of_blanks`]."""
        return logits_of_blanks(self.model, self.input_size, "teacher").shape[-1]

    @cached_property
    def identity(self) -> dict:
        """What identifies it; see [`teacher_identity`]. It takes a look at all weights, once."""
        return teacher_identity(self.model)
