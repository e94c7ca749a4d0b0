"""How near a noise is to what a teacher was trained on, told without data.

A trained network remembers of its data the mean and variance of the input of each BatchNorm layer. Noise that causes
about the same in all layers exercises the network as its data did. [`noise_fit`] measures how far a distribution is
from that, with the layers on the statistics of the batch, as they are in distillation. It finds that dead leaves are
better than other noises, and ranks the others poorly, so nothing chooses by it.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from hf_noisekd.models.batch_norm import find_batch_norm
from hf_noisekd.models.classifier import answer_to_blanks, check_finite
from hf_noisekd.training.teacher import Teacher
from hf_noisekd.training.teacher_check import answer_noise, describe_answers, full_size_noise


@torch.no_grad()
def noise_fit(
    model: nn.Module,
    noise: str,
    *,
    std: float | None = None,
    input_size: Sequence[int] | None = None,
    num_batches: int = 2,
    batch_size: int = 256,
    seed: int = 0,
) -> dict:
    """Measure how well noise suits a teacher, on its answers and statistics alone.

    Args:
        model: The teacher. It comes back unchanged.
        noise: Text of the noise; see [`hf_noisekd.noise.spec`].
        std: Its standard deviation. Default: as [`NoiseDataset.for_model`] chooses it.
        input_size: `(channels, height, width)` of the noise. Default: what the model declares.
        num_batches: Batches to measure on.
        batch_size: Images in each.
        seed: Seed of the noise.

    Returns:
        `noise` and `std`; `distance`, see below, the lower the better; and of the answers with batch statistics
        `class_balance`, `flatness` and `information`, the mutual information of image and class relative to that of all
        classes told apart with certainty, which is the difference of the two; see [`describe_teacher`].

        The distance compares each channel that goes into a BatchNorm layer, its mean and variance over a batch, with
        the running statistics that the layer stored: the Kullback-Leibler divergence of the batch's normal distribution
        from the stored one, in nats, averaged over the channels of a layer, and then geometrically over the layers.

    Raises:
        ValueError: The model has no BatchNorm layer with running statistics, or a weight that is not finite; the noise
            is not known; or the size is not declared, or not one that the model takes.
    """
    layers = {name: layer for name, layer in find_batch_norm(model).items() if layer.running_mean is not None}
    if not layers:
        raise ValueError("No BatchNorm layer of the model has running statistics to compare with.")
    data = full_size_noise(
        model,
        noise,
        input_size=input_size,
        batch_size=batch_size,
        num_steps=num_batches,
        seed=seed,
        **({} if std is None else {"std": std}),
    )
    check_finite(model, "teacher")
    answer_to_blanks(model, data.input_size, "teacher")
    divergences = {name: [] for name in layers}

    def compare(name: str, layer: nn.Module, x: torch.Tensor) -> None:
        x = x.float().movedim(1, 0).flatten(1)
        variance, mean = torch.var_mean(x, 1)
        ratio = (variance + layer.eps) / (layer.running_var + layer.eps)
        shift = (mean - layer.running_mean).square() / (layer.running_var + layer.eps)
        divergences[name].append((ratio + shift - 1 - ratio.log()).mean() / 2)

    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda layer, inputs, name=name: compare(name, layer, inputs[0]))
            stack.callback(hook.remove)
        answers = describe_answers(answer_noise(Teacher(model), data, "batch"))
    distances = torch.stack([torch.stack(values).mean() for values in divergences.values() if values])
    # Rounding makes a distance of about 0 any number up to this, and 0 would make that of all layers 0.
    distances = distances.clamp(min=1e-6)
    return {
        "noise": noise,
        "std": data.std,
        "distance": distances.log().mean().exp().item(),
        "class_balance": answers["class_balance"],
        "flatness": answers["flatness"],
        "information": answers["class_balance"] - answers["flatness"],
    }
