"""How near a noise is to what a teacher was trained on, told without data.

A trained network remembers of its data the mean and variance of the input of each BatchNorm layer. Noise that causes
about the same in all layers exercises the network as its data did. [`noise_fit`] measures how far a distribution is
from that, with the layers on the statistics of the batch, as they are in distillation. It finds that dead leaves are
better than other noises, and ranks the others poorly, so nothing chooses by it.
"""

from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from hf_noisekd import NoiseKDTrainer
from hf_noisekd.calibration.moments import gaussian_kl
from hf_noisekd.models.batch_norm import channel_moments, stored_statistics
from hf_noisekd.models.classifier import check_finite, logits_of_blanks
from hf_noisekd.training.teacher import Teacher
from hf_noisekd.workflows.teacher_report import describe_probs, full_size_noise, probs_of_noise


@torch.no_grad()
def noise_fit(
    model: nn.Module, noise: str, *, input_size: tuple[int, int, int] | None = None, seed: int = 0
) -> dict[str, str | float]:
    """Measure how well noise suits a teacher, on its answers and statistics alone.

    Args:
        model: The teacher. It comes back unchanged.
        noise: Text of the noise; see [`hf_noisekd.noise.spec`].
        input_size: `(channels, height, width)` of the noise. Default: what the model declares.
        seed: Seed of the noise.

    Returns:
        `noise` and its `std`; `distance`, the [`gaussian_kl`] of a layer's input from what it stores, averaged over two
        batches of 256 and geometrically over the layers, the lower the better; and of the predictions with batch
        statistics `class_balance`, `flatness` and `information`, the mutual information of image and class relative to
        that of all classes told apart with certainty, which is the difference of the two; see [`describe_teacher`].

    Raises:
        ValueError: The model has no BatchNorm layer with running statistics, or a weight that is not finite; the noise
            is not known; or the size is not declared, or not one that the model takes.
    """
    layers = stored_statistics(model)
    if not layers:
        raise ValueError("No BatchNorm layer of the model has running statistics to compare with.")
    data = full_size_noise(model, noise, input_size=input_size, batch_size=256, num_steps=2, seed=seed)
    check_finite(model, "teacher")
    logits_of_blanks(model, data.input_size, "teacher")
    divergences = {name: [] for name in layers}

    def compare(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        moments = channel_moments(inputs[0])
        divergences[name].append(gaussian_kl(*moments, layer.running_mean, layer.running_var, layer.eps))

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(compare, name)).remove)
        answers = describe_probs(*probs_of_noise(Teacher(model), data, ["batch"]))
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


def answers_of(trainer: NoiseKDTrainer) -> dict[str, float]:
    """Return what the teacher's answers to two batches of a training's noise tell."""
    noise, args = trainer.train_dataset, trainer.args
    probs = probs_of_noise(
        trainer.teacher,
        full_size_noise(trainer.teacher_model, args.noise, std=noise.std, mean=noise.mean, batch_size=256, num_steps=2),
        ["batch"],
    )
    found = describe_probs(*probs)
    return {key: found[key] for key in ("class_balance", "flatness")} | {
        "information": found["class_balance"] - found["flatness"]
    }
