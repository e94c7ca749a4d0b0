"""Re-estimate the running statistics of a student from images, real or made without data."""

from dataclasses import replace

from torch import nn

from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.calibration.moments import Batches, as_batches, store_statistics
from hf_noisekd.models.batch_norm import check_has_batch_norm, num_frozen, stored_statistics
from hf_noisekd.record.schema import ImagesFacts, Provenance


def recalibrate_batch_norm(
    model: nn.Module, batches: CalibrationImages | Batches, *, dataset: str | None = None, split: str | None = None
) -> None:
    """Re-estimate the running statistics of every BatchNorm layer from images, in place.

    A student trained on noise has running statistics of noise, so single real images are classified badly. Statistics
    of [`calibration_images`], which need no data, or of a few real images ("adjusting" in Raikwar & Mishra 2022)
    correct that; its [`Provenance`] records them. Each layer in the forward pass gets the mean and the unbiased
    variance of its input over all images and positions, while earlier layers use their new statistics. Up to 511 images
    take one forward pass, under batch statistics. More go in chunks of 256: in a first pass each chunk uses its own
    statistics, in further ones those of all images, until they hardly change. `num_batches_tracked` stays.

    Args:
        model: The model. Its modes do not change.
        batches: [`calibration_images`], or batches of shape `[B, C, H, W]`, preprocessed as for the model, or mappings
            with `pixel_values`. Every iteration must give the same images; an iterator is read into memory first.
        dataset: Name of the data set of the images, for the provenance.
        split: Its split, likewise.

    Raises:
        ValueError: The model has no BatchNorm layer that stores statistics, there is no image, a layer sees one value
            per channel or a NaN, or the calibration images are not good enough. Nothing is changed then.
    """
    provenance = Provenance.of(model)
    check_recalibration(model)
    checked = batches.check() if isinstance(batches, CalibrationImages) else None
    batches = as_batches(batches)
    if iter(batches) is batches:
        batches = list(batches)
    num_images = store_statistics(model, batches)
    if provenance:
        real = checked.real if checked else ImagesFacts(images=num_images, dataset=dataset, split=split)
        made = checked.facts if checked else None
        replace(provenance, batch_norm="running", recalibration=real, calibration=made).attach(model)


def check_recalibration(model: nn.Module) -> None:
    """Raise a `ValueError` if [`recalibrate_batch_norm`] has nothing to re-estimate in `model`."""
    try:
        check_has_batch_norm(model)
    except ValueError as error:
        advice = "" if num_frozen(model) else " Its predictions for single images need no recalibration."
        raise ValueError(f"There is nothing to recalibrate: {error}{advice}") from error
    if not stored_statistics(model):
        raise ValueError("The BatchNorm layers store no running statistics: build them with track_running_stats=True.")
