"""Re-estimate the running statistics of a student from images, real or made without data."""

from dataclasses import replace

import torch
from torch import nn

from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.calibration.moments import Batches, store_statistics
from hf_noisekd.models.batch_norm import check_has_batch_norm, num_frozen, stored_statistics
from hf_noisekd.record.schema import ImagesFacts, Provenance


def recalibrate_batch_norm(
    model: nn.Module,
    batches: CalibrationImages | Batches,
    *,
    dataset: str | None = None,
    split: str | None = None,
) -> None:
    """Re-estimate the running statistics of every BatchNorm layer from images, in place.

    A student that learnt from noise has running statistics of noise. With those of [`calibration_images`], which take
    no data, or of a few real images ("adjusting" in Raikwar & Mishra 2022) it can answer single images; and its
    [`Provenance`] says so. Each layer that the forward pass reaches gets the mean and the unbiased variance of its
    input over all images and positions, while the layers before it normalise by the new statistics too. Up to 511
    images do that in one forward pass, under batch statistics. More go in chunks of 256, however they come: in a first
    pass each chunk normalises by its own statistics, and in further ones by those of all, until these hardly change.
    No `num_batches_tracked` changes.

    Args:
        model: The model. It comes back in the modes it had.
        batches: [`calibration_images`], or batches of shape `[B, C, H, W]`, preprocessed as for the model, or mappings
            with `pixel_values`. Must give the same images each time it is iterated over; a one-shot iterator is read
            into memory first.
        dataset: Name of the data set that the images are of, for the provenance.
        split: Its split, likewise.

    Raises:
        ValueError: The model has no BatchNorm layer that stores statistics, or there is no image, or a layer sees only
            one value a channel or something that is not finite, or the calibration images are not good enough. Nothing
            is changed then.
    """
    provenance = Provenance.of(model)
    check_recalibration(model)
    calibration = batches.check().facts if isinstance(batches, CalibrationImages) else None
    if isinstance(batches, torch.Tensor):
        batches = [batches]
    if iter(batches) is batches:
        batches = list(batches)
    num_images = store_statistics(model, batches)
    if provenance:
        images = None if calibration else ImagesFacts(images=num_images, dataset=dataset, split=split)
        replace(provenance, batch_norm="running", recalibration=images, calibration=calibration).attach(model)


def check_recalibration(model: nn.Module) -> None:
    """Raise a `ValueError` if [`recalibrate_batch_norm`] has nothing to re-estimate in `model`."""
    try:
        check_has_batch_norm(model)
    except ValueError as error:
        advice = "" if num_frozen(model) else " It answers single images as it is."
        raise ValueError(f"There is nothing to recalibrate: {error}{advice}") from error
    if not stored_statistics(model):
        raise ValueError("The BatchNorm layers store no running statistics: build them with track_running_stats=True.")
