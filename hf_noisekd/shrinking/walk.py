"""A network and its teacher on the same images, from block to block.

What a block outputs is kept, as what the next one gets. So each block is run alone, and not the whole network up to it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hf_noisekd.calibration.moments import store_statistics
from hf_noisekd.shrinking.block_features import Block, are_close
from hf_noisekd.shrinking.least_squares import CHUNK_SIZE

TRIED_IMAGES = 4
MEMORY = 2**29  # bytes of features that a walk keeps; what needs more is computed again, from images


class Walk:
    """A network on the same images `[N, C, H, W]`, and with `mirrors` on their mirror images, from block to block."""

    block: Block  # at hand

    def __init__(self, model: nn.Module, images: torch.Tensor, *, mirrors: bool = False):
        self.model, self.num_images, self.image_size = model, len(images), images.shape[2:]
        self._sample, self._copies = images[:TRIED_IMAGES], 1 + mirrors
        chunks = images.split(CHUNK_SIZE)
        self._chunks = [x for chunk in chunks for x in (chunk, chunk.flip(-1))[: self._copies]]
        # What the block at hand gets, and once it is left, what it outputs; of as many chunks as there is room for.
        self.kept: list[torch.Tensor] = []

    @property
    def chunks(self) -> range:
        """The indices of the chunks of images, without mirror images."""
        return range(0, len(self._chunks), self._copies)

    @property
    def num_kept(self) -> int:
        """The number of images of which the features are kept, as of their mirror images."""
        return sum(map(len, self.kept[self._copies - 1 :: self._copies]))

    def features_of(self, images: Iterable[int], mirrored: Iterable[int]) -> torch.Tensor:
        """Return what is kept of images, by their indices, or of their mirror images where `mirrored` is 1."""
        places = zip(images, mirrored, strict=True)
        return torch.stack(
            [self.kept[image // CHUNK_SIZE * self._copies + copy][image % CHUNK_SIZE] for image, copy in places]
        )

    def enter(self, name: str) -> None:
        """Go to a block behind the last one."""
        self.block = block = Block(self.model, name, self._sample)
        if not block.is_alone:
            self.kept = []
            return
        x = block.called.tensors[0]
        if not (self.kept and are_close(self.kept[0][: len(x)], x)):
            self.kept = []
        for images in self._chunks[len(self.kept) :]:
            call = block.call(images)
            if call.values != block.called.values:
                self.kept, block.is_alone = [], False
                break
            if not _add(self.kept, call.tensors[0]):
                break

    def store_statistics(self, names: Collection[str]) -> None:
        """Store the statistics of the images in BatchNorm layers of the block, by their names in the network."""
        block, inputs = self.block, self.kept[:: self._copies]
        if len(self.kept) == len(self._chunks) and not block.called.kwargs and len(block.called.args) == 1:
            store_statistics(block.block, inputs, [name.removeprefix(f"{block.name}.") for name in names])
        else:
            store_statistics(self.model, [self._chunks[index] for index in self.chunks], names)

    def leave(self) -> None:
        """Go to the end of the block at hand."""
        outputs = list[torch.Tensor]()
        for index, images in enumerate(self._chunks):
            is_kept = index < len(self.kept)
            output = self.block.output(self.kept[index]) if is_kept else self.block.call(images).output
            if not torch.is_tensor(output) or not _add(outputs, output):
                break
            if is_kept:
                self.kept[index] = output  # frees what it got
        self.kept = outputs

    def run(self, index: int, layers: Iterable[nn.Module] = ()) -> tuple:
        """Return the features for a chunk of images, and the inputs of `layers`."""
        alone = index < len(self.kept)
        return self.block.run(self.kept[index] if alone else self._chunks[index], layers, alone=alone)


@dataclass
class BlockPair:
    """A block of a student, and that of its teacher whose features it is to have."""

    student: Walk
    teacher: Walk
    dim: int = 1  # of the channels
    channels: Sequence[int] | None = None  # of the teacher that the student has; None for all

    @classmethod
    def of(cls, student: Walk, teacher: Walk, kept: Mapping[str, Sequence[int]]) -> "BlockPair | None":
        """Return the blocks at hand, or None if their ends do not compare, or are alike: nothing was cut so far.

        `kept` has, of narrowed layers of the student, the teacher's channels that they output.
        """
        features, wanted = student.block.run_sample(), teacher.block.run_sample()
        if not (torch.is_tensor(features) and torch.is_tensor(wanted)):
            return None
        if (student.block.activation is None) != (teacher.block.activation is None) or are_close(features, wanted):
            return None
        if features.shape == wanted.shape:
            return cls(student, teacher)
        # Which layer's channels reach the end is not known here: those of no other come as close.
        pairs = [
            cls(student, teacher, dim, channels)
            for layer, channels in kept.items()
            for dim in (1, -1)
            if layer.startswith(f"{student.block.name}.") and max(channels) < wanted.shape[dim]
        ]
        fitting = [pair for pair in pairs if pair.of_student(wanted).shape == features.shape]
        return min(fitting, key=lambda pair: F.mse_loss(pair.of_student(wanted), features).item(), default=None)

    def of_student(self, features: torch.Tensor) -> torch.Tensor:
        """Return those of the teacher's features whose channels the student has."""
        if self.channels is None:
            return features
        return features.index_select(self.dim, torch.tensor(self.channels, device=features.device))


def _add(features: list[torch.Tensor], more: torch.Tensor) -> bool:
    """Append features where there is room for them; return whether there is."""
    has_room = sum(x.nbytes for x in features) + more.nbytes <= MEMORY
    if has_room:
        features.append(more)
    return has_room
