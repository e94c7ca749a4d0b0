"""What goes on inside a classifier: its normalised hidden activations and its pooled features."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from hf_noisekd.models.batch_norm import batch_statistics, find_batch_norm
from hf_noisekd.models.classifier import compute_logits, evaluation_mode

# Edges of the bins in which hidden activations are counted, in standard deviations.
HIDDEN_EDGES = torch.linspace(-6, 6, 97)


@torch.no_grad()
def hidden_activations(model: nn.Module, pixel_values: torch.Tensor, statistics: str) -> list[dict]:
    """Describe the normalised activations in each BatchNorm layer, in the order of the forward pass.

    These are what a layer makes of its input before its scale and shift. By the statistics of the batch they have mean
    0 and standard deviation 1 in each channel; by running statistics only as far as the input is like the training data
    (Raikwar & Mishra 2022, Fig. 2).

    Args:
        model: The classifier.
        pixel_values: A batch `[B, C, H, W]`.
        statistics: `"running"` or `"batch"`.

    Returns:
        For each call of a layer: `layer`, its name; `mean`, the absolute mean of a channel, averaged over channels;
        `std`, the standard deviation of a channel, likewise; and `density`, the share of all activations that lies in
        each bin between `HIDDEN_EDGES`, per unit.
    """
    described = []

    def describe(name: str, layer: nn.Module, x: torch.Tensor) -> None:
        stored = (None, None) if statistics == "batch" else (layer.running_mean, layer.running_var)
        normalised = F.batch_norm(x.float(), *stored, training=statistics == "batch", eps=layer.eps)
        channels = normalised.movedim(1, 0).flatten(1).cpu()
        density = torch.histogram(channels.flatten(), HIDDEN_EDGES).hist / (channels.numel() * HIDDEN_EDGES.diff())
        described.append(
            {
                "layer": name,
                "mean": channels.mean(1).abs().mean().item(),
                "std": channels.std(1).mean().item(),
                "density": [round(value, 6) for value in density.tolist()],
            }
        )

    with ExitStack() as stack, _by_statistics(model, statistics):
        for name, layer in find_batch_norm(model).items():
            hook = layer.register_forward_pre_hook(lambda layer, inputs, name=name: describe(name, layer, inputs[0]))
            stack.callback(hook.remove)
        compute_logits(model, pixel_values)
    return described


@torch.no_grad()
def pooled_features(model: nn.Module, pixel_values: torch.Tensor, statistics: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features `[B, D]` that a timm model's classifier gets, and the logits `[B, num_classes]`.

    Args:
        model: A timm classifier.
        pixel_values: A batch `[B, C, H, W]`.
        statistics: `"running"` or `"batch"`.

    Raises:
        ValueError: It is no timm classifier.
    """
    if not hasattr(model, "forward_head"):
        raise ValueError(f"{type(model).__name__} does not say where its classifier begins: use a timm model.")
    with _by_statistics(model, statistics):
        features = model.forward_features(pixel_values)
        return model.forward_head(features, pre_logits=True).flatten(1), model.forward_head(features).flatten(1)


@contextmanager
def _by_statistics(model: nn.Module, statistics: str) -> Iterator[None]:
    with evaluation_mode(model), batch_statistics(model) if statistics == "batch" else nullcontext():
        yield
