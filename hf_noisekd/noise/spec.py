"""Noise by name: mixtures of distributions with weights, and augmentations of their images.

A text such as `"dead_leaves:3,spectrum:1|cutmix:0.5,mixup:0.25"` says what to draw: three quarters of the images of a
batch are dead leaves and one quarter has a power spectrum; then each image is cut and pasted into with probability 0.5,
and mixed with another one with probability 0.25. A weight or probability that is left out is 1. A number in brackets
is the parameter of a distribution: `"spectrum(1.5)"` has that exponent; see [`hf_noisekd.noise.distributions`].
"""

import difflib
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hf_noisekd.noise import distributions
from hf_noisekd.noise.distributions import Distribution, Shape, uniform

Augmentation = Callable[[torch.Generator, torch.Tensor, float], torch.Tensor]

# What `noise="structured"` stands for.
STRUCTURED = "dead_leaves"

# The resolutions of `distribution="structured"`, unless others are asked for.
STRUCTURED_RESOLUTIONS = {0.5: 0.6, 0.75: 0.25, 1.0: 0.15}

BUILT_IN = ("white", "low_resolution", "spectrum", "pyramid", "fractal", "dead_leaves")
DISTRIBUTIONS: dict[str, Distribution] = {name: getattr(distributions, name) for name in BUILT_IN}


def cutmix(generator: torch.Generator, images: torch.Tensor, probability: float) -> torch.Tensor:
    """Paste a rectangle of another image, of uniform area and place, as CutMix does (Yun et al., 2019)."""
    batch, _, height, width = images.shape
    device = generator.device
    side = uniform(generator, (batch, 1)).sqrt()
    center = uniform(generator, (2, batch, 1))
    rows = (torch.arange(height, device=device) + 0.5) / height
    columns = (torch.arange(width, device=device) + 0.5) / width
    inside = ((rows - center[0]).abs() < side / 2)[:, :, None] & ((columns - center[1]).abs() < side / 2)[:, None]
    inside &= _chosen(generator, batch, probability)[:, None, None]
    return torch.where(inside[:, None], _others(generator, images), images)


def mixup(generator: torch.Generator, images: torch.Tensor, probability: float) -> torch.Tensor:
    """Mix with another image, by `cos(t)` and `sin(t)` with uniform `t`, which keep the variance of a batch."""
    angle = uniform(generator, (len(images),)) * (math.pi / 2)
    angle = torch.where(_chosen(generator, len(images), probability), angle, 0.0).view(-1, 1, 1, 1)
    return images * angle.cos() + _others(generator, images) * angle.sin()


AUGMENTATIONS: dict[str, Augmentation] = {"cutmix": cutmix, "mixup": mixup}


def _chosen(generator: torch.Generator, batch: int, probability: float) -> torch.Tensor:
    return uniform(generator, (batch,)) < probability


def _others(generator: torch.Generator, images: torch.Tensor) -> torch.Tensor:
    return images[torch.randperm(len(images), generator=generator, device=generator.device)]


@dataclass(frozen=True)
class Mixture:
    """A distribution made of several, with augmentations; a [`Distribution`] itself.

    Attributes:
        name: What it was asked for by: "structured", or the text of its parts.
        weights: Weight of each distribution by its registered name.
        augmentations: Probability of each augmentation by its name; applied in this order.
    """

    name: str
    weights: Mapping[str, float]
    augmentations: Mapping[str, float]

    def __call__(self, generator: torch.Generator, shape: Shape) -> torch.Tensor:
        """Return images `[B, C, H, W]`, those of each distribution side by side."""
        batch, channels, height, width = shape
        counts = _counts(batch, list(self.weights.values()), generator.initial_seed())
        parts = [
            _call(name, generator, (count, channels, height, width))
            for name, count in zip(self.weights, counts, strict=True)
            if count
        ]
        images = parts[0] if len(parts) == 1 else torch.cat(parts)
        for name, probability in self.augmentations.items():
            images = AUGMENTATIONS[name](generator, images, probability)
        return images

    def __str__(self) -> str:
        parts = (self.weights, self.augmentations) if self.augmentations else (self.weights,)
        return "|".join(
            ",".join(name if number == 1 else f"{name}:{number:g}" for name, number in part.items()) for part in parts
        )


def parse_noise(text: str) -> Mixture:
    """Return the mixture that a text means; see the module's.

    Raises:
        ValueError: The text cannot be read, a name is not registered, or a number is out of range.
    """
    parts = (STRUCTURED if text == "structured" else text).split("|")
    if len(parts) > 2:
        raise ValueError(f"noise is {text!r}: use one '|', between distributions and augmentations.")
    weights = parse_weights(parts[0])
    augmentations = parse_weights(parts[1]) if len(parts) > 1 else {}
    for name in weights:
        _check_distribution(name)
    for name in augmentations:
        _check_known(name, name, AUGMENTATIONS)
    if too_large := [name for name, probability in augmentations.items() if probability > 1]:
        raise ValueError(f"noise is {text!r}: the probability of {too_large[0]} must be in (0, 1].")
    return Mixture(text, weights, augmentations)


def noise_name(distribution: Distribution) -> str:
    """Return what a record says of a distribution: the text of a mixture, or the name of a function."""
    if isinstance(distribution, Mixture):
        return f"structured ({distribution})" if distribution.name == "structured" else str(distribution)
    return getattr(distribution, "__name__", type(distribution).__name__)


def _call(name: str, generator: torch.Generator, shape: Shape) -> torch.Tensor:
    name, number = _split_parameter(name)
    return DISTRIBUTIONS[name](generator, shape, *([] if number is None else [number]))


def _check_distribution(name: str) -> None:
    """Raise a `ValueError` if there is no such distribution, or if it does not take the parameter that it is given."""
    function, number = _split_parameter(name)
    if function == "structured":
        raise ValueError(f"'structured' stands alone: in mixtures use {STRUCTURED!r}, with resolutions of your choice.")
    if (known := function.partition("(")[0]) != function and known in DISTRIBUTIONS:
        raise ValueError(f"{name!r} has no parameter that can be read: use a plain number, such as {known}(2).")
    _check_known(name, function, DISTRIBUTIONS)
    if number is None:
        return
    try:
        _call(name, torch.Generator(), (2, 1, 4, 4))
    except TypeError as error:
        raise ValueError(f"{function} takes no parameter, found {number:g}: leave it out.") from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{function} does not take the parameter {number:g}: {error}.") from error


def _check_known(name: str, key: str, known: Mapping) -> None:
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1)
        advice = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{name!r} is none of {', '.join(sorted(known))}.{advice}")


def _split_parameter(name: str) -> tuple[str, float | None]:
    """Return the parts of a name such as `"spectrum(1.5)"`; an unreadable number leaves the name as it is."""
    match = re.fullmatch(r"(\w+)\((\d+\.?\d*|\.\d+)\)", name)
    return (match[1], float(match[2])) if match else (name, None)


def parse_weights(text: str) -> dict[str, float]:
    """Return the numbers by name that a text such as `"white:3,spectrum"` holds; one left out is 1.

    Raises:
        ValueError: It is not names with finite numbers above 0, each name once.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or name in weights or not 0 < weight < math.inf:
            raise ValueError(f"{text!r} must be names with numbers above 0, each once, such as 'white:3,spectrum:1'.")
        weights[name] = weight
    return weights


def parse_resolutions(text: str) -> dict[float, float]:
    """Return the resolutions that a text such as `"0.5:0.6,1:0.4"` means; see [`NoiseDataset`].

    Raises:
        ValueError: The text cannot be read, or a number is out of range.
    """
    try:
        shares = parse_weights(text)
        resolutions = check_resolutions({float(scale): share for scale, share in shares.items()})
        if len(resolutions) < len(shares):
            raise ValueError("a size is there twice")
        return resolutions
    except ValueError as error:
        raise ValueError(
            f"resolutions is {text!r}: use sizes in (0, 1], each once, with shares above 0, such as '0.5:0.6,1:0.4'."
        ) from error


def resolutions_text(resolutions: Mapping[float, float]) -> str:
    """Return the text that [`parse_resolutions`] reads as `resolutions`."""
    return ",".join(f"{scale:g}:{share:g}" for scale, share in resolutions.items())


def check_resolutions(resolutions: Mapping[float, float]) -> dict[float, float]:
    """Return resolutions as a new mapping, or say what is wrong with them.

    Raises:
        ValueError: There is none, a size is not in (0, 1], or a share is not above 0.
    """
    if not resolutions or not all(0 < scale <= 1 and 0 < share < math.inf for scale, share in resolutions.items()):
        raise ValueError(
            f"resolutions must map sizes in (0, 1] to shares above 0, such as {{0.5: 0.6, 1: 0.4}}, got {resolutions}."
        )
    return {float(scale): float(share) for scale, share in resolutions.items()}


def register_noise(name: str, distribution: Distribution) -> None:
    """Make a distribution known by `name` in this process, to be used in mixtures.

    Args:
        name: A Python identifier that none of this package's noises has. One that was registered before is replaced.
        distribution: A pure function of a generator and a shape; see [`hf_noisekd.noise.distributions`].

    Raises:
        ValueError: The name is one of this package's or no identifier.

    Example:
        ```python
        def stripes(generator, shape):
            batch, channels, height, width = shape
            return torch.randn((batch, channels, 1, width), generator=generator, device=generator.device).expand(shape)

        register_noise("stripes", stripes)
        noise = NoiseDataset((3, 32, 32), distribution="stripes:1,white:1")
        ```
    """
    if name in (*BUILT_IN, *AUGMENTATIONS, "structured") or not name.isidentifier():
        raise ValueError(f"{name!r} is one of this package's names, or no identifier: choose another one.")
    DISTRIBUTIONS[name] = distribution


def _counts(batch: int, weights: Sequence[float], seed: int) -> list[int]:
    """Return the number of images for each weight, in proportion on average (systematic sampling).

    Even batches of 2 meet every distribution now and then. The draw is made on the host, so that no device waits.
    """
    offset = random.Random(seed).random()
    ends = [math.floor(end * batch / sum(weights) + offset) for end in itertools.accumulate(weights)]
    ends[-1] = batch
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
