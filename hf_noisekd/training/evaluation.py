"""Evaluation: accuracy under running and under batch statistics, and agreement with the teacher.

A student that learnt from noise can be read in these two ways (Raikwar & Mishra 2022, Algorithm 2 and section 4).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers.trainer_utils import has_length

from hf_noisekd.batches import DrawnDataset, FullBatchSampler, check_labels, collate_images
from hf_noisekd.models.batch_norm import statistics_of_batch
from hf_noisekd.models.classifier import compute_logits, evaluation_mode, to_device_of
from hf_noisekd.record.schema import STATISTICS, Evaluation
from hf_noisekd.training.teacher import Teacher

METRICS = ("accuracy", "top5_accuracy", "loss", "agreement", "kl")


def measured(
    model: nn.Module,
    dataset: Dataset,
    *,
    name: str,
    step: int,
    split: str | None = None,
    teacher_model: nn.Module | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Evaluation:
    """Return what [`evaluate`] does, as a record has it; `name` is the data set's, and `step` that of the weights."""
    loader = evaluation_loader(dataset, batch_size, num_workers=num_workers)
    images = sum(counts_of(loader))
    scores = _compared(model, loader, teacher_model)
    return Evaluation(
        dataset=name,
        split=split,
        images=images,
        batch_size=dataset.batch_size if isinstance(dataset, DrawnDataset) else min(batch_size, images),
        step=step,
        precision="float32",
        running=scores["running"],
        batch=scores["batch"],
    )


def _compared(model: nn.Module, loader: DataLoader, teacher_model: nn.Module | None) -> dict[str, dict[str, float]]:
    if teacher_model is None:
        return evaluate_loader(model, loader)
    teacher, is_noise = Teacher(teacher_model), isinstance(evaluated_dataset(loader), DrawnDataset)

    def teacher_logits_of(pixel_values: torch.Tensor) -> torch.Tensor:
        return teacher.logits(to_device_of(teacher_model, pixel_values), noise=is_noise).to(pixel_values.device)

    with evaluation_mode(teacher_model):
        return evaluate_loader(model, loader, teacher_logits_of)


@torch.no_grad()
def evaluate_loader(
    model: nn.Module,
    loader: DataLoader,
    teacher_logits_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda totals: totals,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Return what [`evaluate`] does, of the batches of [`evaluation_loader`] in all processes.

    `teacher_logits_of` goes from pixels to the teacher's logits; `reduce` sums a tensor over all processes.
    """
    contexts: tuple[AbstractContextManager, ...] = nullcontext(), statistics_of_batch(model)  # as STATISTICS
    # Sums over images, and in the last row the images for which each metric was measured.
    totals = torch.zeros(len(STATISTICS) + 1, len(METRICS), dtype=torch.float64)
    with evaluation_mode(model):
        for batch, count in zip(loader, counts_of(loader), strict=True):
            pixel_values = to_device_of(model, batch["pixel_values"])
            _check_finite(pixel_values, "The images to evaluate on hold")
            labels = batch["labels"][:count].to(pixel_values.device) if "labels" in batch else None
            teacher_logits = None if teacher_logits_of is None else teacher_logits_of(pixel_values)[:count].float()
            if teacher_logits is not None:
                _check_finite(teacher_logits, "The teacher's logits hold")
            for row, context in enumerate(contexts):
                with context:
                    logits = compute_logits(model, pixel_values)[:count].float()
                _check_finite(logits, f"The model's logits with {STATISTICS[row]} statistics hold")
                sums = _sums(logits, labels, teacher_logits)
                for name, total in sums.items():
                    totals[row, METRICS.index(name)] += total.item()
            totals[-1, [METRICS.index(name) for name in sums]] += count
            on_batch()
    *rows, counts = reduce(totals).tolist()
    return {
        statistics: {name: total / count for name, total, count in zip(METRICS, row, counts, strict=True) if count}
        for statistics, row in zip(STATISTICS, rows, strict=True)
    }


def evaluation_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable = collate_images,
) -> DataLoader:
    """Build the loader of this rank's share of the evaluation batches, or raise the `ValueError` of [`evaluate`].

    Whole batches go to the ranks in turn, so each image counts once and batch statistics are those of one process.
    """
    if not has_length(dataset):
        raise ValueError(
            f"Cannot evaluate on {type(dataset).__name__}: it has no length. Pass a map-style data set; for a stream, "
            "take a number of images and keep them in a list; for noise, pass num_steps."
        )
    size = len(dataset)  # type: ignore[arg-type]
    if isinstance(dataset, DrawnDataset):
        return DataLoader(
            _DrawnBatches(dataset), batch_size=None, sampler=range(rank, size, world_size), generator=torch.Generator()
        )
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"Cannot evaluate on {type(dataset).__name__}: pass a map-style data set instead of a stream.")
    return DataLoader(
        dataset,
        batch_sampler=FullBatchSampler(size, batch_size, rank=rank, world_size=world_size),
        num_workers=num_workers,
        collate_fn=collate_fn,
        # A loader takes a number off its generator for its workers; the global one must go on as without evaluation.
        generator=torch.Generator(),
    )


def counts_of(loader: DataLoader) -> list[int]:
    """Return how many images of each batch of an [`evaluation_loader`] count."""
    if isinstance(loader.batch_sampler, FullBatchSampler):
        return loader.batch_sampler.counts
    dataset = evaluated_dataset(loader)
    assert isinstance(dataset, DrawnDataset)
    return [dataset.batch_size] * len(loader)


def evaluated_dataset(loader: DataLoader) -> Dataset:
    """Return the data set that an [`evaluation_loader`] was built for."""
    return loader.dataset.drawn if isinstance(loader.dataset, _DrawnBatches) else loader.dataset


def _check_finite(values: torch.Tensor, what: str) -> None:
    """Raise a `ValueError` if not all values are finite: the largest of them would still name a class."""
    if not values.isfinite().all():
        raise ValueError(f"{what} a NaN or an infinity, so nothing can be measured: look for what is damaged.")


def _sums(
    logits: torch.Tensor, labels: torch.Tensor | None, teacher_logits: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return each metric of a batch, summed over its images."""
    sums = {}
    if labels is None and teacher_logits is None:
        raise ValueError("Nothing to evaluate: the data set has no labels and there is no teacher_model.")
    if labels is not None:
        check_labels(labels, logits.shape[-1])
        sums["accuracy"] = 100 * (logits.argmax(-1) == labels).sum()
        if logits.shape[-1] > 5:
            sums["top5_accuracy"] = 100 * (logits.topk(5).indices == labels[:, None]).sum()
        sums["loss"] = F.cross_entropy(logits, labels, reduction="sum")
    if teacher_logits is not None:
        sums["agreement"] = 100 * (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
        log_probs, teacher_log_probs = F.log_softmax(logits, -1), F.log_softmax(teacher_logits, -1)
        sums["kl"] = F.kl_div(log_probs, teacher_log_probs, reduction="sum", log_target=True)
    return sums


class _DrawnBatches(Dataset):
    """A bounded DrawnDataset as a map from step to batch."""

    def __init__(self, drawn: DrawnDataset):
        self.drawn = drawn

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.drawn.draw(step)}

    def __len__(self) -> int:
        return len(self.drawn)
