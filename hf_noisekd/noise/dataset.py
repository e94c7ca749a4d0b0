"""Noise batches that depend on seed, rank and step alone, so that resuming a training needs no stored state."""

import itertools
import math
import operator
import statistics
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.utils.data import get_worker_info

from hf_noisekd.batches import DrawnDataset
from hf_noisekd.models.preprocessing import input_size_of, preprocessing_of
from hf_noisekd.noise import spec
from hf_noisekd.noise.distributions import Distribution

# Layout of the 32 bits that distinguish the draws of one seed; see `draw_seed`.
_STEP_BITS, _RANK_BITS = 23, 8
MAX_STEPS, MAX_RANKS = 2**_STEP_BITS, 2**_RANK_BITS

MIN_SIDE = 16  # of small noise images, unless the full ones are smaller


class NoiseDataset(DrawnDataset):
    """Batches of noise, drawn on the device that trains on them.

    Iterating gives whole batches, `{"pixel_values": [B, C, H, W]}`, so a `DataLoader` needs `batch_size=None`. It needs
    no worker processes; with some, the batches are the same.

    Step `k` of a rank is a function of `(seed, rank, k)` alone. With one seed, all steps, ranks and the held-out noise
    have different batches. CPU and GPU give different numbers for the same step.

    Args:
        input_size: `(channels, height, width)` of one image.
        batch_size: Images in a batch.
        num_steps: Batches in an epoch, which is then the length; None for no end.
        seed: Any integer.
        rank: Index of the process, in [0, 255].
        held_out: Draw noise that the training with this seed does not use.
        mean: Mean of the noise, in the units of the network's input.
        std: Standard deviation of the noise, likewise.
        distribution: A string such as "dead_leaves:3,spectrum:1", see [`hf_noisekd.noise.spec`], or a function, see
            [`hf_noisekd.noise.distributions`].
        resolutions: Share of the steps for each size of the images, in this order, as a mapping or a string such as
            "0.5:0.6,1:0.4". A size is relative to `input_size`, in (0, 1], with sides of at least 16 pixels, or full
            size if that is less. [`NoiseKDTrainer`] rounds sides up to what its models take. Default:
            `{0.5: 0.6, 0.75: 0.25, 1: 0.15}` for structured noise that is not held out, else `{1: 1}`.
        total_steps: Steps of the whole training, for these shares. [`NoiseKDTrainer`] sets it.
        device: Where to draw.
        dtype: Type of the pixels; `torch.bfloat16` saves a conversion under autocast.
        memory_format: Memory format of a batch.

    Raises:
        ValueError: A size is not positive, a share or name is invalid, or the rank or a step is out of range; when
            drawing, the distribution returned another shape.
    """

    name = "held-out noise"

    def __init__(
        self,
        input_size: tuple[int, int, int],
        batch_size: int = 256,
        num_steps: int | None = None,
        *,
        seed: int = 0,
        rank: int = 0,
        held_out: bool = False,
        mean: float = 0.0,
        std: float = 1.0,
        distribution: Distribution | str = "white",
        resolutions: Mapping[float, float] | str | None = None,
        total_steps: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
    ):
        super().__init__()
        if len(input_size) != 3 or min(input_size) < 1:
            raise ValueError(f"input_size must be (channels, height, width), all positive, got {tuple(input_size)}.")
        if batch_size < 1 or (num_steps is not None and num_steps < 1):
            raise ValueError(f"batch_size and num_steps must be positive, got {batch_size} and {num_steps}.")
        if not 0 < std < math.inf:
            raise ValueError(f"std must be positive and finite, got {std}.")
        self.seed = operator.index(seed)  # NumPy's integers overflow
        draw_seed(self.seed, rank, 0, held_out)  # checks the rank
        self.input_size = (*input_size,)
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.rank = rank
        self.held_out = held_out
        self.mean = mean
        self.std = std
        self.distribution = spec.parse_noise(distribution) if isinstance(distribution, str) else distribution
        if resolutions is None:
            structured = isinstance(self.distribution, spec.Mixture) and self.distribution.name == "structured"
            resolutions = spec.STRUCTURED_RESOLUTIONS if structured and not held_out else {1.0: 1.0}
        if isinstance(resolutions, str):
            resolutions = spec.parse_resolutions(resolutions)
        self.resolutions = spec.check_resolutions(resolutions)
        self.total_steps = total_steps
        self.device = torch.device(device)
        self.dtype = dtype
        self.memory_format = memory_format
        self.size_multiple = 1  # to which the sides of smaller images are rounded up
        self.epoch = 0

    @classmethod
    def for_model(cls, model: nn.Module, **kwargs) -> "NoiseDataset":
        """Build noise on the scale of the input of `model`, usually the teacher.

        The paper's N(0, 1) fits standardised inputs. For raw pixels in [0, 1] (mean 0, standard deviation 1) or
        [0, 255] the noise has mean and standard deviation of photos, about 0.5 and 0.25 of the range.

        Args:
            model: The classifier.
            **kwargs: Arguments of the constructor, which override those from the model.

        Raises:
            ValueError: The model does not declare an input size and none was given; see [`input_size_of`].
        """
        known = preprocessing_of(model)
        kwargs["input_size"] = input_size_of(model, kwargs.get("input_size"))
        if {"mean", "std"} <= known.keys():
            pairs = list(zip(known["mean"], known["std"], strict=True))
            # No pixels in [0, 1] have such statistics: mean and std only change the scale.
            if any(std**2 > 1.001 * mean * (1 - mean) for mean, std in pairs):
                means, stds = zip(*(((0.5 - mean) / std, 0.25 / abs(std)) for mean, std in pairs), strict=True)
                kwargs = {"mean": statistics.fmean(means), "std": statistics.fmean(stds)} | kwargs
        return cls(**kwargs)

    def draw(self, step: int) -> torch.Tensor:
        """Return the batch `[B, C, H, W]` of training step `step`, counted from 0 over all epochs."""
        generator = torch.Generator(self.device).manual_seed(draw_seed(self.seed, self.rank, step, self.held_out))
        shape = (self.batch_size, self.input_size[0], *self.image_size(step))
        with torch.autocast(self.device.type, enabled=False):  # the caller's would round products
            noise = self.distribution(generator, shape)
        if noise.shape != shape:
            raise ValueError(
                f"The noise {spec.noise_name(self.distribution)!r} returned the shape {tuple(noise.shape)}, expected "
                f"{shape}: a distribution takes a generator and a shape, and returns a tensor of that shape."
            )
        if (self.mean, self.std) != (0.0, 1.0):
            noise = noise * self.std + self.mean
        return noise.to(dtype=self.dtype, memory_format=self.memory_format)

    def image_size(self, step: int) -> tuple[int, int]:
        """Return height and width of the images of training step `step`."""
        *others, (last, _) = self.image_sizes()
        if not others:
            return last
        if self.total_steps is None:
            raise ValueError(
                f"The noise has several resolutions, {self.resolutions}, as shares of all steps, whose number is "
                "missing: pass total_steps, or resolutions={1: 1} for full size throughout."
            )
        end = 0.0
        for size, share in others:
            end += share
            if step < end * self.total_steps:
                return size
        return last

    def image_sizes(self) -> list[tuple[tuple[int, int], float]]:
        """Return the sizes `(height, width)` in order, each with its share of the steps; the sum is 1."""
        sizes: list[tuple[tuple[int, int], float]] = []
        for scale, share in self.resolutions.items():
            multiples = (math.ceil(max(round(x * scale), MIN_SIDE) / self.size_multiple) for x in self.input_size[1:])
            height, width = (
                min(n * self.size_multiple, x) for n, x in zip(multiples, self.input_size[1:], strict=True)
            )
            share /= sum(self.resolutions.values())
            if sizes and sizes[-1][0] == (height, width):
                share += sizes.pop()[1]
            sizes.append(((height, width), share))
        return sizes

    def set_epoch(self, epoch: int) -> None:
        """Continue with the steps of `epoch`, counted from 0. Accelerate's data loaders call it."""
        self.epoch = epoch

    def steps(self) -> Iterator[int]:
        """Yield the step numbers of this epoch, without drawing anything."""
        yield from itertools.islice(itertools.count(self.epoch * (self.num_steps or 0)), self.num_steps)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # A DataLoader takes batches from its workers in turn: with every n-th step from each, the order stays.
        worker = get_worker_info()
        for index, step in enumerate(self.steps()):
            if worker is None or index % worker.num_workers == worker.id:
                yield {"pixel_values": self.draw(step)}


def draw_seed(seed: int, rank: int, step: int, held_out: bool) -> int:
    """Return the generator's seed for one draw.

    torch's CPU generator uses only the low 32 bits of its seed, too few for a hash: 300,000 draws would collide about
    ten times. So the low half is a bijection of (held_out, rank, step), and the high half a hash of the seed.
    """
    if not 0 <= step < MAX_STEPS:
        raise ValueError(f"step must be in [0, {MAX_STEPS - 1}], got {step}.")
    if not 0 <= rank < MAX_RANKS:
        raise ValueError(f"rank must be in [0, {MAX_RANKS - 1}], got {rank}.")
    key = _mix64(seed)
    index = (held_out << (_RANK_BITS + _STEP_BITS)) | (rank << _STEP_BITS) | step
    return (key >> 32 << 32) | _mix32(index ^ (key & 0xFFFFFFFF))


def _mix32(x: int) -> int:
    """The 32-bit finaliser of MurmurHash3: a bijection in which every input bit changes half the output bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _mix64(x: int) -> int:
    """The finaliser of SplitMix64, likewise on 64 bits, so that neighbouring seeds give unrelated keys."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
