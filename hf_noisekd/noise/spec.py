"""Noise by name: mixtures of distributions with weights, and augmentations of their images.

In `"dead_leaves:3,spectrum(1.5)|cutmix:0.5,mirror"` three quarters of the images of a batch are dead leaves, and a
quarter has a power spectrum of the exponent 1.5, its parameter; see [`hf_noisekd.noise.distributions`]. Then each image
is cut and pasted into with probability 0.5, and made symmetric. A weight or probability left out is 1.
"""

import difflib
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from hf_noisekd.noise import distributions
from hf_noisekd.noise.distributions import Distribution, Shape, uniform

Augmentation = Callable[[torch.Generator, torch.Tensor, float], torch.Tensor]

# What `noise="structured"` stands for, and its default resolutions.
STRUCTURED = "dead_leaves"
STRUCTURED_RESOLUTIONS = {0.5: 0.6, 0.75: 0.25, 1.0: 0.15}

BUILT_IN = ("white", "low_resolution", "spectrum", "fractal", "dead_leaves")
DISTRIBUTIONS: dict[str, Distribution] = {name: getattr(distributions, name) for name in BUILT_IN}


def cutmix(generator: torch.Generator, images: torch.Tensor, probability: float) -> torch.Tensor:
    """Paste a rectangle of another image, of uniform area and place, as CutMix does (Yun et al., 2019)."""
    batch = len(images)
    side = uniform(generator, (batch, 1)).sqrt()
    center = uniform(generator, (2, batch, 1))
    rows, columns = ((torch.arange(size, device=generator.device) + 0.5) / size for size in images.shape[2:])
    inside = ((rows - center[0]).abs() < side / 2)[:, :, None] & ((columns - center[1]).abs() < side / 2)[:, None]
    inside &= (uniform(generator, (batch,)) < probability)[:, None, None]
    others = images[torch.randperm(batch, generator=generator, device=generator.device)]
    return torch.where(inside[:, None], others, images)


def mirror(generator: torch.Generator, images: torch.Tensor, probability: float) -> torch.Tensor:
    """Make the right half the mirror image of the left one."""
    half = images.shape[-1] // 2
    symmetric = torch.cat([images[..., : images.shape[-1] - half], images[..., :half].flip(-1)], -1)
    return torch.where(uniform(generator, (len(images), 1, 1, 1)) < probability, symmetric, images)


AUGMENTATIONS: dict[str, Augmentation] = {"cutmix": cutmix, "mirror": mirror}


@dataclass(frozen=True)
class Mixture:
    """A [`Distribution`] made of several, with augmentations."""

    name: str  # "structured", or the string that was parsed
    weights: Mapping[str, float]  # of each distribution by its registered name
    augmentations: Mapping[str, float]  # the probability of each by its name; applied in this order

    def __call__(self, generator: torch.Generator, shape: Shape) -> torch.Tensor:
        """Return images `[B, C, H, W]`, those of each distribution side by side."""
        counts = _counts(shape[0], self.weights, generator.initial_seed())
        parts = [_call(name, generator, (count, *shape[1:])) for name, count in counts.items() if count]
        images = parts[0] if len(parts) == 1 else torch.cat(parts)
        for name, probability in self.augmentations.items():
            images = AUGMENTATIONS[name](generator, images, probability)
        return images

    def __str__(self) -> str:
        parts = (self.weights, self.augmentations) if self.augmentations else (self.weights,)
        return "|".join(
            ",".join(name if number == 1 else f"{name}:{_number_text(number)}" for name, number in part.items())
            for part in parts
        )


def parse_noise(text: str) -> Mixture:
    """Return the mixture for a string, see the top of this module, or raise a `ValueError`."""
    parts = (STRUCTURED if text == "structured" else text).split("|")
    if len(parts) > 2:
        raise ValueError(f"noise is {text!r}: use one '|', between distributions and augmentations.")
    weights, *rest = map(parse_weights, parts)
    augmentations = rest[0] if rest else {}
    for name in weights:
        _check_distribution(name)
    for name, probability in augmentations.items():
        _check_known(name, name, AUGMENTATIONS)
        if probability > 1:
            raise ValueError(f"noise is {text!r}: the probability of {name} must be in (0, 1].")
    return Mixture(text, weights, augmentations)


def noise_name(distribution: Distribution) -> str:
    """Return the name of a distribution for records: the string of a mixture, or the name of a function."""
    if isinstance(distribution, Mixture):
        return f"structured ({distribution})" if distribution.name == "structured" else str(distribution)
    return getattr(distribution, "__name__", type(distribution).__name__)


def _call(name: str, generator: torch.Generator, shape: Shape) -> torch.Tensor:
    name, number = _split_parameter(name)
    return DISTRIBUTIONS[name](generator, shape, *([] if number is None else [number]))


def _check_distribution(name: str) -> None:
    """Raise a `ValueError` if there is no such distribution, or if it does not take this parameter."""
    function, number = _split_parameter(name)
    if function == "structured":
        raise ValueError(f"'structured' stands alone: in mixtures use {STRUCTURED!r}, and set resolutions.")
    if (known := function.partition("(")[0]) != function and known in DISTRIBUTIONS:
        raise ValueError(f"The parameter of {name!r} is no plain number: use one, such as {known}(2).")
    _check_known(name, function, DISTRIBUTIONS)
    if number is not None:
        try:
            _call(name, torch.Generator(), (2, 1, 4, 4))
        except (TypeError, ValueError, RuntimeError) as error:  # a TypeError if it has no parameter
            raise ValueError(f"{function} does not take the parameter {number:g}: {error}.") from error


def _check_known(name: str, key: str, known: Mapping) -> None:
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1)
        advice = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{name!r} is none of {', '.join(sorted(known))}.{advice}")


def _split_parameter(name: str) -> tuple[str, float | None]:
    """Return name and number of a string like `"spectrum(1.5)"`, or the whole string if it has no valid number."""
    match = re.fullmatch(r"(\w+)\((\d+\.?\d*|\.\d+)\)", name)
    return (match[1], float(match[2])) if match else (name, None)


def parse_weights(text: str) -> dict[str, float]:
    """Return the numbers by name in a string such as `"white:3,spectrum"`; the default is 1."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or name in weights or not 0 < weight < math.inf or weight + sum(weights.values()) == math.inf:
            raise ValueError(f"{text!r} must be names with numbers above 0, each once, such as 'white:3,spectrum:1'.")
        weights[name] = weight
    return weights


def _number_text(number: float) -> str:
    """Return the shortest string for a number without a loss of precision."""
    return short if float(short := f"{number:g}") == number else repr(float(number))


def parse_resolutions(text: str) -> dict[float, float]:
    """Return the resolutions for a string such as `"0.5:0.6,1:0.4"`; see [`NoiseDataset`]."""
    with suppress(ValueError):
        shares = parse_weights(text)
        resolutions = check_resolutions({float(scale): share for scale, share in shares.items()})
        if len(resolutions) == len(shares):
            return resolutions
    advice = "use sizes in (0, 1], each once, with shares above 0, such as '0.5:0.6,1:0.4'."
    raise ValueError(f"resolutions is {text!r}: {advice}")


def check_resolutions(resolutions: Mapping[float, float]) -> dict[float, float]:
    """Return resolutions as a new mapping, or raise a `ValueError`."""
    valid = all(0 < scale <= 1 and share > 0 for scale, share in resolutions.items())
    if not valid or not 0 < sum(resolutions.values()) < math.inf:
        raise ValueError(
            f"resolutions must map sizes in (0, 1] to shares above 0, such as {{0.5: 0.6, 1: 0.4}}, got {resolutions}."
        )
    return {float(scale): float(share) for scale, share in resolutions.items()}


def register_noise(name: str, distribution: Distribution) -> None:
    """Register a distribution by name in this process, for use in mixtures.

    Args:
        name: A Python identifier. It may replace one registered before, but none of this package's.
        distribution: A pure function of a generator and a shape; see [`hf_noisekd.noise.distributions`].

    Raises:
        ValueError: The name is one of this package's, or not an identifier.
    """
    if name in (*BUILT_IN, *AUGMENTATIONS, "structured") or not name.isidentifier():
        raise ValueError(f"{name!r} is one of this package's names, or no identifier: choose another one.")
    DISTRIBUTIONS[name] = distribution


def _counts(batch: int, weights: Mapping[str, float], seed: int) -> dict[str, int]:
    """Return the number of images for each name, proportional to its weight, on average also in small batches."""
    # Systematic sampling, on the CPU, so that no device waits.
    offset, total = random.Random(seed).random(), sum(weights.values())
    ends = [math.floor(end * batch / total + offset) for end in itertools.accumulate(weights.values())]
    ends[-1] = batch  # also after rounding
    return {name: end - start for name, start, end in zip(weights, [0, *ends], ends, strict=False)}
