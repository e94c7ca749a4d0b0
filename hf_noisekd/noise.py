"""Noise to distil with: distributions as pure functions, and the data set that serves them.

A distribution takes a generator and a shape `[B, C, H, W]` and returns a float32 tensor on the generator's device, with
about zero mean and unit variance. [`NoiseDataset`] makes training batches of it that depend on the seed, the rank and
the step alone, so a resumed run, a second rank and a held-out evaluation need no stored state.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from .classifier import declared_input_size, pretrained_cfg_of

Distribution = Callable[[torch.Generator, tuple[int, int, int, int]], torch.Tensor]

# Layout of the 32 bits that tell the draws of one seed apart; see `draw_seed`.
_STEP_BITS, _RANK_BITS = 23, 8
MAX_STEPS, MAX_RANKS = 2**_STEP_BITS, 2**_RANK_BITS


def white(generator: torch.Generator, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """White Gaussian noise, N(0, 1) in every pixel: `G` in Algorithm 1 of Raikwar & Mishra (2022)."""
    return torch.randn(shape, generator=generator, device=generator.device)


class NoiseDataset(IterableDataset):
    """Batches of noise, drawn on the device that trains on them.

    Iterating gives mappings `{"pixel_values": [B, C, H, W]}`: whole batches, so a `DataLoader` over it needs
    `batch_size=None`, and no worker processes. With worker processes each draws its share; the batches are the same.

    Step `k` of a rank is a function of `(seed, rank, k)` alone. Under one seed no two steps or ranks, nor the held-out
    noise, ever share a batch. Two kinds of device give different numbers for the same step.

    Args:
        input_size: `(channels, height, width)` of one image.
        batch_size: Images in a batch.
        num_steps: Batches in an epoch, which is then the length. None for an unbounded data set without length.
        seed: Any integer.
        rank: Process that this copy serves, in [0, 255].
        held_out: Draw from a stream apart from the training noise of this seed, whatever its rank and step.
        mean: Mean of the noise, in the units of the network's input.
        std: Standard deviation of the noise, in the same units.
        distribution: What to draw; see the module's text.
        device: Where to draw.
        dtype: Type of the pixels, for example `torch.bfloat16` under autocast, which saves a conversion.
        memory_format: Memory format of a batch.

    Raises:
        ValueError: A size is not positive, or the rank or a step is out of range.
    """

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
        distribution: Distribution = white,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
    ):
        super().__init__()
        if len(input_size) != 3 or min(input_size) < 1:
            raise ValueError(f"input_size must be (channels, height, width), all positive, got {tuple(input_size)}.")
        if batch_size < 1 or (num_steps is not None and num_steps < 1):
            raise ValueError(f"batch_size and num_steps must be positive, got {batch_size} and {num_steps}.")
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}.")
        draw_seed(seed, rank, 0, held_out)  # checks the rank
        self.input_size = tuple(input_size)
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.rank = rank
        self.held_out = held_out
        self.mean = mean
        self.std = std
        self.distribution = distribution
        self.device = torch.device(device)
        self.dtype = dtype
        self.memory_format = memory_format
        self.epoch = 0

    @classmethod
    def for_model(cls, model: nn.Module, **kwargs) -> "NoiseDataset":
        """Build the noise that suits the input of `model`, usually the teacher.

        The size is the one the model declares (timm's `pretrained_cfg["input_size"]`, transformers'
        `config.image_size`). The paper's N(0, 1) fits inputs that were standardised. A model whose `pretrained_cfg`
        says that it takes raw pixels in [0, 1] (mean 0, standard deviation 1) gets mean 0.5 and standard deviation
        0.25, which is about what photos have.

        Args:
            model: The classifier that will answer the noise.
            **kwargs: Anything the constructor takes, and overrides of what was read off the model.

        Raises:
            ValueError: The model does not declare an input size and none was given.
        """
        if kwargs.get("input_size") is None:
            kwargs["input_size"] = declared_input_size(model)
            if kwargs["input_size"] is None:
                raise ValueError(
                    f"{type(model).__name__} does not say what input size it takes (no `pretrained_cfg`, no "
                    "`config.image_size`): pass input_size=(channels, height, width)."
                )
        cfg = pretrained_cfg_of(model)
        if cfg and set(cfg.get("mean", (0.5,))) == {0.0} and set(cfg.get("std", (0.5,))) == {1.0}:
            kwargs = {"mean": 0.5, "std": 0.25} | kwargs
        return cls(**kwargs)

    def draw(self, step: int) -> torch.Tensor:
        """Return the batch `[B, C, H, W]` of training step `step`, counted from 0 over all epochs."""
        generator = torch.Generator(self.device).manual_seed(draw_seed(self.seed, self.rank, step, self.held_out))
        noise = self.distribution(generator, (self.batch_size, *self.input_size))
        if (self.mean, self.std) != (0.0, 1.0):
            noise = noise * self.std + self.mean
        return noise.to(dtype=self.dtype, memory_format=self.memory_format)

    def set_epoch(self, epoch: int) -> None:
        """Continue with the steps of `epoch`, counted from 0. Accelerate's data loaders call it."""
        self.epoch = epoch

    def steps(self) -> Iterator[int]:
        """Yield the step numbers of this epoch, without drawing anything."""
        step = self.epoch * (self.num_steps or 0)
        end = None if self.num_steps is None else step + self.num_steps
        while end is None or step < end:
            yield step
            step += 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # A DataLoader takes from its workers in turn, so every n-th step from each keeps the order.
        worker = get_worker_info()
        for step in self.steps():
            if worker is None or step % worker.num_workers == worker.id:
                yield {"pixel_values": self.draw(step)}

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("This NoiseDataset is unbounded: it has no length. Pass num_steps for one that has.")
        return self.num_steps


def draw_seed(seed: int, rank: int, step: int, held_out: bool) -> int:
    """Return the generator's seed for one draw.

    torch's CPU generator looks at the low 32 bits of its seed only, too few for a hash: 300,000 draws would collide
    about ten times. So the low half is a bijection of (held_out, rank, step), and the high half the seed's hash.
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
