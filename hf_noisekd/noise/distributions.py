"""Noise distributions: pure functions of a generator and a shape.

A distribution takes a generator and a shape `[B, C, H, W]`, of any number of channels and any size, and returns a
float32 tensor on the generator's device, with about zero mean and unit variance over a batch.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Shape = tuple[int, int, int, int]
Distribution = Callable[[torch.Generator, Shape], torch.Tensor]


def white(generator: torch.Generator, shape: Shape) -> torch.Tensor:
    """White Gaussian noise, N(0, 1) in every pixel: `G` in Algorithm 1 of Raikwar & Mishra (2022)."""
    return normal(generator, shape)


def low_resolution(generator: torch.Generator, shape: Shape, factor: float = 4.0) -> torch.Tensor:
    """White noise of a size `factor` (1 or more) times smaller, enlarged by bilinear interpolation."""
    if factor < 1:
        raise ValueError(f"the factor must be at least 1, got {factor:g}")
    batch, channels, height, width = shape
    small = (batch, channels, math.ceil(height / factor), math.ceil(width / factor))
    return _standardise(F.interpolate(normal(generator, small), (height, width), mode="bilinear"))


def spectrum(generator: torch.Generator, shape: Shape, exponent: float | None = None) -> torch.Tensor:
    """Gaussian fields whose amplitude falls as `1 / f^a` with the frequency `f`; that of photos has `a` near 1.

    Without `exponent`, in [0, 10], each image has its own `a`, uniform in [0, 2]. The channels of an image are
    correlated, by a number uniform in [0, 1].
    """
    if exponent is not None and not 0 <= exponent <= 10:
        raise ValueError(f"the exponent must be in [0, 10], got {exponent:g}")
    batch, channels, height, width = shape
    device = generator.device
    fy = torch.fft.fftfreq(height, device=device)[:, None]
    fx = torch.fft.rfftfreq(width, device=device)[None]
    # 0 for the lowest frequency, so that no amplitude overflows.
    log_frequency = (fy.square() + fx.square()).clamp(min=1e-12).log() / 2 + math.log(max(height, width))
    exponents = uniform(generator, (batch, 1, 1, 1), 0, 2) if exponent is None else exponent
    amplitude = torch.exp(-exponents * log_frequency).expand(batch, 1, -1, -1).clone()
    amplitude[..., 0, 0] = 0
    # In the half spectrum the first column, and for an even width the last, count once, all others twice.
    own = slice(None, None, width // 2 if width % 2 == 0 else width)
    power = 2 * amplitude.square().sum((-2, -1), keepdim=True)
    power = (power - amplitude[..., own].square().sum((-2, -1), keepdim=True)) / (height * width)
    amplitude = amplitude / power.clamp(min=1e-12).sqrt()
    size = (batch, channels, height, width // 2 + 1)
    field = torch.randn(size, dtype=torch.complex64, generator=generator, device=device)
    if channels > 1:
        shared = torch.randn((batch, 1, *size[2:]), dtype=torch.complex64, generator=generator, device=device)
        correlation = uniform(generator, (batch, 1, 1, 1))
        field = field * (1 - correlation).sqrt() + shared * correlation.sqrt()
    # These columns must be conjugate symmetric, or the result of a GPU is undefined.
    column = field[..., own]
    field[..., own] = (column + column.flip(-2).roll(1, -2).conj()) / math.sqrt(2)
    return torch.fft.irfft2(field * amplitude, s=(height, width), norm="ortho")


def fractal(generator: torch.Generator, shape: Shape, iterations: float = 3) -> torch.Tensor:
    """Patterns of a sine map of the pixels, `z <- sin(W z + b)`, iterated 1 to 20 times, with random `W`, `b`."""
    batch, channels, height, width = shape
    iterations = _whole(iterations, "iterations", 20)
    hidden = 8
    x, y = (torch.linspace(-1, 1, side, device=generator.device) for side in (width, height))
    z = torch.stack(torch.meshgrid(x, y, indexing="xy")).view(1, 2, -1).expand(batch, -1, -1)
    gain = torch.exp(uniform(generator, (batch, 1, 1), math.log(0.7), math.log(5)))
    for iteration in range(iterations):
        scale = 1 if iteration == 0 else math.sqrt(hidden) * 0.7
        weight = normal(generator, (batch, hidden, z.shape[1])) * gain / scale
        bias = uniform(generator, (batch, hidden, 1), -math.pi, math.pi)
        z = torch.sin(torch.baddbmm(bias, weight, z))
    z = torch.bmm(normal(generator, (batch, channels, hidden)), z)
    return _standardise(z.reshape(shape), dims=(1, 2, 3))


def dead_leaves(generator: torch.Generator, shape: Shape, leaves: float = 6) -> torch.Tensor:
    """Overlapping regions, `leaves` of them (1 to 100), each with its own colour and texture.

    The dead leaves of Matheron, with smooth random outlines instead of discs and the textures of [`spectrum`]: unlike
    Gaussian fields they have sharp edges and even areas, as photos do.
    """
    batch, channels, height, width = shape
    leaves = _whole(leaves, "leaves", 100)
    device, count = generator.device, leaves + 1
    texture = spectrum(generator, shape)
    leaf = torch.zeros((batch, 1, height, width), dtype=torch.int64, device=device)
    for index, region in enumerate(_regions(generator, (leaves, batch, 1, height, width)), start=1):
        leaf.masked_fill_(region, index)
    leaf = leaf.flatten(2)
    color = normal(generator, (batch, channels, count)) * 0.5 + normal(generator, (batch, 1, count)) * 0.65
    strength = uniform(generator, (batch, 1, count))
    # Each leaf shows a part of a random image's texture, the part at the position of the leaf.
    source = torch.randint(batch, (batch, 1, count), generator=generator, device=device) * texture[0].numel()
    place = torch.arange(texture[0].numel(), device=device).view(1, channels, -1)
    texture = texture.take(source.gather(2, leaf) + place)
    color = color.gather(2, leaf.expand(-1, channels, -1))
    return torch.addcmul(color, strength.gather(2, leaf), texture).view(shape)


def _regions(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Return random regions `[..., H, W]` with smooth outlines: where a sum of low cosines is high."""
    *number, height, width = shape
    device = generator.device
    order = torch.arange(5.0, device=device)
    vertical = torch.cos(torch.pi / height * (torch.arange(height, device=device)[:, None] + 0.5) * order)
    horizontal = torch.cos(torch.pi / width * (torch.arange(width, device=device)[:, None] + 0.5) * order)
    weight = normal(generator, (*number, len(order), len(order))) / (1 + torch.hypot(order[:, None], order))
    weight[..., 0, 0] = 0
    return vertical @ (weight @ horizontal.T) > uniform(generator, (*number, 1, 1), -0.2, 1.2)


def _whole(number: float, of: str, most: int) -> int:
    if number not in range(1, most + 1):
        raise ValueError(f"the number of {of} must be whole, at least 1 and at most {most}, got {number:g}")
    return int(number)


def _standardise(x: torch.Tensor, dims: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
    std, mean = torch.std_mean(x, dims, keepdim=True, correction=0)
    return (x - mean) / std.clamp(min=1e-6)


def normal(generator: torch.Generator, shape: Sequence[int]) -> torch.Tensor:
    """Return numbers of N(0, 1), on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def uniform(generator: torch.Generator, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Return numbers that are uniform in [low, high), on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low
