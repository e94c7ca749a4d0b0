"""Repair a cut network in closed form: block by block, its layers are solved for the features of its teacher.

Both networks see the same images. From the first block to the last, with the features that the student itself has by
then, the last linear layers of a block are solved for the difference to what the teacher has there, in front of the
last activation: `W += (G + r I)^-1 R`, with the covariance `G` of what these layers get and `R` that with the
difference. Where blocks were left out, the block before them is solved for the output of the last one of them. No class
of a network is known here: which layers reach the output of a block linearly is found by trial.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.calibration.moments import store_statistics
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import compute_logits, copied_state, evaluation_mode, to_device_of
from hf_noisekd.shrinking.blocks import WEIGHTED, Place, remove_blocks, stages_of
from hf_noisekd.shrinking.least_squares import CHUNK_SIZE, RidgeFit
from hf_noisekd.shrinking.ranking import Comparison, running_statistics

TRIED_IMAGES = 4
TOLERANCE = 1e-3


class Pair(NamedTuple):
    """A block of the student, and the block of the teacher whose output it is to have."""

    student: str
    teacher: str


def pairs_of(teacher: nn.Module, removed: Collection[Place]) -> list[Pair]:
    """Return the blocks that are left without those `removed`, each with the last one up to the next that is left."""
    pairs = []
    name_before = remove_blocks(copy.deepcopy(teacher), removed)
    name_after = {before: after for after, before in name_before.items()}
    for stage, keys in stages_of(teacher).items():
        left = [index for index, key in enumerate(keys) if Place(stage, key) not in removed]
        for index, end in zip(left, [*(index - 1 for index in left[1:]), len(keys) - 1], strict=True):
            name = Place(stage, keys[index]).name
            if name in name_after:  # not in a block that was removed
                pairs.append((end > index, Pair(name_after[name], Place(stage, keys[end]).name)))
    names = {pair.student for _, pair in pairs}
    # A block of blocks ends where the last of these does.
    return [one for absorbs, one in pairs if absorbs or not any(name.startswith(f"{one.student}.") for name in names)]


class Cut(NamedTuple):
    """How a network was cut out of its teacher."""

    removed: Collection[Place]  # blocks of the teacher that were left out
    kept: Mapping[str, Sequence[int]]  # of narrowed layers, by name, the teacher's channels that they output

    @property
    def is_whole(self) -> bool:
        """Whether nothing was cut."""
        return not self.removed and not self.kept


@torch.no_grad()
def repair(
    student: nn.Module, teacher: nn.Module, cut: Cut, images: Iterable[torch.Tensor], *, recalibrates: bool = False
) -> int:
    """Solve the blocks of a cut network for the features of its teacher, in place; return how many became better.

    Both use running statistics, and `images` are batches `[B, C, H, W]`. A block stays as it is where that gives a
    smaller squared error on images that it was not solved for, or where no layer reaches its output linearly. With
    `recalibrates` each BatchNorm layer first gets statistics of the images, once all before its block is repaired;
    later ones would undo the repair.
    """
    batches = [to_device_of(student, batch) for batch in images]
    sample = batches[0][:TRIED_IMAGES]
    pairs = {pair.student: pair for pair in pairs_of(teacher, cut.removed)}
    norms = stored_statistics(student) if recalibrates else {}
    better, waiting = 0, list[str]()
    with evaluation_mode(student, teacher):
        for name in _in_order(student, [*pairs, *norms], sample):
            if name in norms:
                waiting.append(name)
                continue
            if waiting:
                store_statistics(student, batches, waiting)
                waiting = []
            solver = _Solver.of(student, teacher, pairs[name], cut.kept, sample)
            better += solver is not None and solver.solve(batches)
        if waiting:
            store_statistics(student, batches, waiting)
    return better


def fit_to_teacher(
    student: nn.Module, teacher: nn.Module, cut: Cut, images: CalibrationImages | None
) -> tuple[bool, int]:
    """Give a cut network statistics of images, where these are good enough, and repair it; in place.

    What is best on the held-out images stays: the network as it was cut, with other statistics, or repaired, too.
    Return whether it has other statistics now, and how many blocks were solved for. Without images nothing is done.
    """
    if images is None:
        return False, 0
    held_out = Comparison([*images.to_compare_on.split(CHUNK_SIZE)], running_statistics)
    expected = held_out.log_probs(teacher)
    recalibrates = bool(stored_statistics(student)) and not images.problem
    states = [copied_state(student)]
    solved = repair(student, teacher, cut, images, recalibrates=recalibrates)
    states.append(copied_state(student))
    if recalibrates:
        student.load_state_dict(states[0])
        store_statistics(student, images)
        states.append(copied_state(student))
    divergences = []
    for state in states:
        student.load_state_dict(state)
        divergences.append(held_out.divergence(expected, student))
    best = min(range(len(states)), key=lambda index: divergences[index])
    student.load_state_dict(states[best])
    return recalibrates and best > 0, solved if best == 1 else 0


def _in_order(model: nn.Module, names: Iterable[str], sample: torch.Tensor) -> list[str]:
    """Return those of the named modules that are called once, in the order in which they end."""
    modules, ended = dict(model.named_modules()), list[str]()
    with ExitStack() as stack:
        for name in names:
            if name in modules:
                note: Any = lambda *_, name=name: ended.append(name)  # noqa: E731
                stack.enter_context(modules[name].register_forward_hook(note))
        compute_logits(model, sample.clone())
    return [name for name in ended if ended.count(name) == 1]


class _BlockEnd(Exception):  # noqa: N818 - it ends a forward pass
    pass


class _Block:
    """A block in its network: what is in front of the activation that ends it, if one does, else its output."""

    def __init__(self, model: nn.Module, name: str, sample: torch.Tensor):
        self.model, self.block = model, model.get_submodule(name)
        self.activation = self._last_activation(sample)

    def run(self, batch: torch.Tensor, layers: Iterable[nn.Module] = (), added: tuple | None = None) -> tuple:
        """Return the features at the end, and the inputs of `layers`; `added` is a layer and what its output gains."""
        seen: dict[nn.Module | str, torch.Tensor] = {}
        with ExitStack() as stack:
            for layer in layers:
                keep: Any = lambda module, args: seen.__setitem__(module, args[0].clone())  # noqa: E731
                stack.enter_context(layer.register_forward_pre_hook(keep))
            if added:
                add: Any = lambda _, __, output: output + added[1]  # noqa: E731
                stack.enter_context(added[0].register_forward_hook(add))
            if self.activation:
                end: Any = lambda _, args: seen.__setitem__("end", args[0].clone())  # noqa: E731
                stack.enter_context(self.activation.register_forward_pre_hook(end))
            stack.enter_context(self.block.register_forward_hook(self._end))
            try:
                compute_logits(self.model, batch.clone())
            except _BlockEnd as stop:
                output = stop.args[0]
        return seen.get("end", output), [seen[layer] for layer in layers]

    @staticmethod
    def _end(block: nn.Module, args: tuple, output: torch.Tensor) -> None:
        raise _BlockEnd(output)

    def _last_activation(self, sample: torch.Tensor) -> nn.Module | None:
        """Return the module without weights that ends the block, if its output has the shape of its input."""
        self.activation = None
        found: dict[nn.Module, torch.Tensor] = {}

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            if args and torch.is_tensor(args[0]) and torch.is_tensor(output) and args[0].shape == output.shape:
                found[module] = output

        with ExitStack() as stack:
            for module in self.block.modules():
                if not [*module.children()] and not [*module.parameters()] and not isinstance(module, nn.Identity):
                    stack.enter_context(module.register_forward_hook(note))
            output, _ = self.run(sample)
        return next((module for module, tensor in reversed(found.items()) if tensor is output), None)


@dataclass
class _Linear:
    """A layer whose output reaches the end of a block as `scale * output`, channel by channel."""

    module: Any
    scale: torch.Tensor  # [C]
    dim: int  # of the channels at the end of the block


@dataclass
class _Solver:
    """Solves the last linear layers of a block together."""

    student: _Block
    teacher: _Block
    layers: Sequence[_Linear]
    shift: _Linear | None  # whose bias takes the offset
    channels: Sequence[int] | None  # of the teacher that the student has; None for all

    @classmethod
    def of(
        cls, student: nn.Module, teacher: nn.Module, pair: Pair, kept: Mapping[str, Sequence[int]], sample: torch.Tensor
    ) -> "_Solver | None":
        """Return the solver of a pair of blocks, or None if there is nothing to solve."""
        block, goal = _Block(student, pair.student, sample), _Block(teacher, pair.teacher, sample)
        if not all(torch.is_tensor(one.run(sample)[0]) for one in (block, goal)):
            return None
        if (block.activation is None) != (goal.activation is None) or _are_close(block, goal, sample):
            return None
        found = [one for one in _linear_layers(block, sample) if one.scale.abs().min() > 0]
        layers = [one for one in found if isinstance(one.module, WEIGHTED)]
        dense = [one for one in layers if getattr(one.module, "groups", 1) == 1] or layers[-1:]
        if not dense:
            return None
        names = {module: name for name, module in student.named_modules()}
        shift = next((one for one in reversed(found) if one.module.bias is not None), None)
        solver = cls(block, goal, dense, shift, kept.get(names[dense[0].module]))
        return solver if solver.goal(sample).shape == block.run(sample)[0].shape else None

    def goal(self, batch: torch.Tensor) -> torch.Tensor:
        """Return what the student is to have at the end of its block."""
        features, _ = self.teacher.run(batch)
        if self.channels is None:
            return features
        return features.index_select(self.layers[0].dim, torch.tensor(self.channels, device=features.device))

    def solve(self, batches: Sequence[torch.Tensor]) -> bool:
        """Solve the layers; return whether that helps on held-out images."""
        fit = RidgeFit(sum(map(len, batches)))
        for batch in batches:
            for chunk in batch.split(CHUNK_SIZE):
                features, inputs = self.student.run(chunk, [one.module for one in self.layers])
                difference = _channels_last(self.goal(chunk) - features, self.layers[0].dim)
                columns = [unfolded(one.module, x) for one, x in zip(self.layers, inputs, strict=True)]
                fit.add(torch.cat(columns, -1), difference.reshape(*columns[0].shape[:3], -1))
        solution = fit.solve(has_offset=self.shift is not None)
        if solution is None:
            return False
        self._apply(solution.weights, solution.offsets)
        return True

    def _apply(self, weights: torch.Tensor, offsets: torch.Tensor) -> None:
        start = 0
        for one in self.layers:
            weight = one.module.weight
            size = weight[0].numel()
            change = weights[:, start : start + size].mT.reshape(len(weight), size).to(weight)
            weight.add_((change / one.scale[:, None]).reshape(weight.shape))
            start += size
        if self.shift:
            self.shift.module.bias.add_(offsets.flatten().to(self.shift.scale) / self.shift.scale)


def _are_close(block: _Block, goal: _Block, sample: torch.Tensor) -> bool:
    """Return whether two blocks give the same: nothing was cut so far."""
    features, wanted = block.run(sample)[0], goal.run(sample)[0]
    tolerance = TOLERANCE * wanted.std().item()
    return features.shape == wanted.shape and torch.allclose(features, wanted, rtol=0, atol=tolerance)


def _linear_layers(block: _Block, sample: torch.Tensor) -> list[_Linear]:
    """Return the layers, in order of their calls, whose outputs reach the end of the block scaled by channel."""
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    with ExitStack() as stack:
        for module in block.block.modules():
            if isinstance(module, (*WEIGHTED, _BatchNorm)) and module.weight is not None:
                note: Any = lambda module, args, output: calls.append((module, args[0].clone(), output.clone()))  # noqa: E731
                stack.enter_context(module.register_forward_hook(note))
        features, _ = block.run(sample)
    modules = [module for module, *_ in calls]
    found = []
    for module, x, output in calls:
        if modules.count(module) > 1 or (isinstance(module, WEIGHTED) and not _is_linear(module, x, output)):
            continue
        added = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output) * output.std()
        change = block.run(sample, added=(module, added))[0] - features
        rows = _channels_last(added, -1 if isinstance(module, nn.Linear) else 1).flatten(0, -2)
        for dim in (1, -1):
            changes = _channels_last(change, dim).flatten(0, -2)
            if changes.shape == rows.shape:
                scale = (changes * rows).sum(0) / rows.square().sum(0)
                if (changes - scale * rows).abs().max() <= TOLERANCE * changes.abs().max():
                    found.append(_Linear(module, scale, dim))
                    break
    return found


def _is_linear(layer: Any, x: torch.Tensor, output: torch.Tensor) -> bool:
    """Return whether a layer computes what [`unfolded`] and its weights give: not with padding of another kind."""
    try:
        columns = unfolded(layer, x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    weight = layer.weight.reshape(columns.shape[2], -1, columns.shape[3])
    expected = torch.einsum("nlgd,god->nlgo", columns, weight).flatten(2)
    if layer.bias is not None:
        expected = expected + layer.bias
    rows = _channels_last(output, -1 if isinstance(layer, nn.Linear) else 1).flatten(1, -2)
    return rows.shape == expected.shape and torch.allclose(
        rows, expected, rtol=1e-2, atol=1e-3 * rows.abs().max().item()
    )


def unfolded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer multiplies by its weights, `[B, L, G, D]`, for an input of `L` output positions."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, 1, x.shape[-1])
    size = layer.kernel_size
    columns = F.unfold(x, size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride)
    return columns.reshape(len(x), layer.groups, -1, columns.shape[-1]).permute(0, 3, 1, 2)


def _channels_last(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.movedim(dim, -1)
