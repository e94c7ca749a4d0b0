"""Linear layers solved for in closed form: ridge regression from moments that are pooled over batches."""

from typing import NamedTuple

import torch

# Weights of the penalty, relative to the mean square of an input; the best on held-out images is taken.
RIDGES = (0.03, 0.3, 3.0)
ROWS = 2**15  # positions of feature maps in a fit
HELD_OUT = 4  # every so many images
CHUNK_SIZE = 32  # images in a forward pass, as unfolded feature maps are large


class Solution(NamedTuple):
    """Weights `[G, D, O]` and offsets `[G, O]`, and what is left of the held-out squared error, 1 without them."""

    weights: torch.Tensor
    offsets: torch.Tensor
    error: float
    without_held_out: tuple[torch.Tensor, torch.Tensor]  # weights and offsets for the other images, which it is of


class Moments:
    """Moments of inputs `[N, G, D]` and targets `[N, G, O]` of `G` groups of linear functions, in float64."""

    def __init__(self):
        self.count: int = 0
        self._inputs = self._targets = self._gram = self._cross = self._power = torch.zeros(())

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Pool in the moments of further rows."""
        x, y = (rows.double().cpu().transpose(0, 1) for rows in (inputs, targets))  # [G, N, ...]
        self.count += x.shape[1]
        self._inputs = self._inputs + x.sum(1)
        self._targets = self._targets + y.sum(1)
        self._gram = self._gram + x.mT @ x
        self._cross = self._cross + x.mT @ y
        self._power = self._power + y.square().sum((1, 2))

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments()
        for name, value in vars(self).items():
            setattr(both, name, value + getattr(other, name))
        return both

    def solve(self, ridge: float, *, has_offset: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights `[G, D, O]` and offsets `[G, O]` of the least squared error, plus `ridge` times the penalty.

        The penalty is the square of the weights times the mean square of the inputs, without their mean where
        `has_offset`. Without an offset that is 0.
        """
        gram, cross = self._gram / self.count, self._cross / self.count
        mean, target = self._inputs / self.count, self._targets / self.count
        if has_offset:
            gram = gram - mean[:, :, None] * mean[:, None]
            cross = cross - mean[:, :, None] * target[:, None]
        size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
        weights = torch.linalg.solve(gram + ridge * size[:, None, None] * identity, cross)
        offsets = target - (mean[:, None] @ weights)[:, 0] if has_offset else torch.zeros_like(target)
        return weights, offsets

    def error(self, weights: torch.Tensor, offsets: torch.Tensor) -> float:
        """Return the squared error of a solution, relative to that of zeros; 0 where all targets are zero."""
        predicted = self._gram @ weights + self._inputs[:, :, None] * offsets[:, None]
        square = (weights * predicted).sum((1, 2)) + (offsets * (self._inputs[:, None] @ weights)[:, 0]).sum(1)
        square = square + self.count * offsets.square().sum(1)
        product = (weights * self._cross).sum((1, 2)) + (offsets * self._targets).sum(1)
        power = self._power.sum().item()
        return (self._power - 2 * product + square).sum().item() / power if power > 0 else 0.0


class RidgeFit:
    """A fit on feature maps of images, of which every fourth is for the choice of the ridge.

    `images` is how many there will be; of each so many positions are taken that all are about [`ROWS`].
    """

    def __init__(self, images: int):
        self._positions = -(-ROWS // images)
        self._moments = Moments(), Moments()  # of the images that are fitted, and of those held out
        self._seen = 0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in inputs `[B, L, G, D]` and targets `[B, L, G, O]` at `L` positions of `B` images."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(inputs.shape[1], generator=generator)[: self._positions].to(inputs.device)
        held_out = torch.arange(self._seen, self._seen + len(inputs)) % HELD_OUT == HELD_OUT - 1
        self._seen += len(inputs)
        for moments, images in zip(self._moments, (~held_out, held_out), strict=True):
            if images.any():
                moments.add(*(rows[images.to(rows.device)][:, chosen].flatten(0, 1) for rows in (inputs, targets)))

    def solve(self, *, has_offset: bool) -> Solution | None:
        """Return the solution of all images with the ridge that is best for those held out; None if none helps."""
        fitted, held_out = self._moments
        if not (fitted.count and held_out.count):
            return None
        solutions = {ridge: fitted.solve(ridge, has_offset=has_offset) for ridge in RIDGES}
        errors = {ridge: held_out.error(*solution) for ridge, solution in solutions.items()}
        best = min(errors, key=lambda ridge: errors[ridge])
        if not errors[best] < 1:
            return None
        return Solution(*(fitted + held_out).solve(best, has_offset=has_offset), errors[best], solutions[best])
