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
CHUNK_PIXELS = 2**21  # of the images in a forward pass
MEMORY = 2**29  # bytes of features that a walk keeps; what needs more is computed again, from images


class Walk:
    """A network on the same images `[N, C, H, W]`, and with `mirrors` on their mirror images, from block to block."""

    block: Block  # at hand

    def __init__(self, model: nn.Module, images: torch.Tensor, *, mirrors: bool = False):
        self.model, self.num_images, self.image_size = model, len(images), images.shape[2:]
        self._sample, self._copies = images[:TRIED_IMAGES], 1 + mirrors
        self._size = min(max(CHUNK_PIXELS // images[0, 0].numel(), 1), CHUNK_SIZE)
        self._chunks = images.split(self._size)
        self._number = self._copies * len(self._chunks)
        # What the block at hand gets, and once it is left, what it outputs; of as many chunks as there is room for.
        self.features: list[torch.Tensor] = []

    @property
    def chunks(self) -> range:
        """The indices of the chunks of images, without mirror images."""
        return range(0, self._number, self._copies)

    @property
    def num_kept(self) -> int:
        """The number of images of which the features are kept, as of their mirror images."""
        return sum(map(len, self.features[self._copies - 1 :: self._copies]))

    def features_of(self, images: Iterable[int], mirrored: Iterable[int]) -> torch.Tensor:
        """Return what is kept of images, by their indices, or of their mirror images where `mirrored` is 1."""
        places = zip(images, mirrored, strict=True)
        return torch.stack(
            [self.features[image // self._size * self._copies + copy][image % self._size] for image, copy in places]
        )

    def enter(self, name: str) -> None:
        """Go to a block that ends behind the last one."""
        self.block = block = Block(self.model, name, self._sample)
        if not (block.is_alone and self._has_inputs()):
            self.features = []
        if not block.is_alone:
            return
        for index in range(len(self.features), self._number):
            call = block.call(self._images(index))
            if call.values != block.called.values:
                self.features, block.is_alone = [], False
                break
            if not _add(self.features, call.tensors[0]):
                break

    def _has_inputs(self) -> bool:
        """Return whether the block at hand gets what the last one outputs, by the first and the last images kept."""
        called, last = self.block.called, len(self.features) - 1
        if last < 0 or not are_close(self.features[0][:TRIED_IMAGES], called.tensors[0]):
            return False
        call = self.block.call(self._images(last))
        return call.values == called.values and are_close(self.features[last], call.tensors[0])

    def store_statistics(self, names: Collection[str]) -> None:
        """Store the statistics of the images in BatchNorm layers of the block, by their names in the network."""
        block, inputs = self.block, self.features[:: self._copies]
        if len(self.features) == self._number and not block.called.kwargs and len(block.called.args) == 1:
            store_statistics(block.block, inputs, [name.removeprefix(f"{block.name}.") for name in names])
        else:
            store_statistics(self.model, self._chunks, names)

    def leave(self, *, needs_outputs: bool = False) -> None:
        """Go to the end of the block at hand; where that needs the network, what it outputs is kept only if needed."""
        outputs = list[torch.Tensor]()
        for index in range(self._number if self.block.is_alone or needs_outputs else 0):
            is_kept = index < len(self.features)
            block = self.block
            output = block.output(self.features[index]) if is_kept else block.call(self._images(index)).output
            if not torch.is_tensor(output) or not _add(outputs, output):
                break
            if is_kept:
                self.features[index] = output  # frees what it got
        self.features = outputs

    def run(self, index: int, layers: Iterable[nn.Module] = ()) -> tuple:
        """Return the features at the end of the block for a chunk of images, and the inputs of `layers`."""
        alone = index < len(self.features)
        return self.block.run(self.features[index] if alone else self._images(index), layers, alone=alone)

    def _images(self, index: int) -> torch.Tensor:
        images = self._chunks[index // self._copies]
        return images.flip(-1) if index % self._copies else images


@dataclass
class BlockPair:
    """A student at one of its blocks, and its teacher at the block whose features that is to have."""

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
