"""Unlabelled images of a user's, in the place of calibration images or beside them."""

import hashlib
import logging
from dataclasses import replace

import torch
from torch import nn

from hf_noisekd.calibration.calibration_images import MIN_BATCH, CalibrationImages, calibration_images
from hf_noisekd.calibration.moments import Batches, as_batches, pixel_values_of
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.classifier import device_of, evaluation_mode
from hf_noisekd.models.preprocessing import preprocessing_of
from hf_noisekd.record.schema import ImagesFacts

logger = logging.getLogger(__name__)

HELD_OUT, BATCH_SIZE = 4, 256  # one of so many, and those of a forward pass
MIN_IMAGES = 16
MIN_OF_GIVEN = 50.0  # percent, of maybe four that are held out, for others to be made beside them
FAR_OUT = 4  # pixels are refused if they lie, on average, so many half ranges of the teacher's from its middle


def given_images(teacher: nn.Module, pixel_values: torch.Tensor, name: str | None = None) -> CalibrationImages:
    """Return unlabelled images `[N, C, H, W]` of a teacher's task as calibration images; `name` is the data set's.

    A fourth is held out, drawn at random. Whether the teacher agrees with itself under statistics of the others tells
    if these are enough to re-estimate statistics on; see [`CalibrationImages.problem`]. Copies of an image count once.
    Too few images, and pixels that cannot be those of images, are a `ValueError`.
    """
    _check_pixels(pixel_values, teacher)
    pixel_values = _without_copies(pixel_values)
    # The order may be one of classes, or of views of one thing.
    order = torch.randperm(len(pixel_values), generator=torch.Generator().manual_seed(0))
    held_out = torch.arange(len(order)) % HELD_OUT == HELD_OUT - 1
    images, others = (
        pixel_values[order[chosen].to(pixel_values.device)].detach().to(device_of(teacher), torch.float32)
        for chosen in (~held_out, held_out)
    )
    facts = ImagesFacts(images=len(order), dataset=name)
    given = CalibrationImages(images, others, batch_size=BATCH_SIZE, given=facts)
    if not stored_statistics(teacher):
        return given
    with evaluation_mode(teacher):
        return replace(given, self_agreement=given.measure_self_agreement(teacher))


def _without_copies(pixel_values: torch.Tensor) -> torch.Tensor:
    """Return each image once: held out, a copy would be one that the student was fitted to."""
    rows = pixel_values.detach().float().cpu().numpy()
    places = {hashlib.sha256(row.tobytes()).digest(): index for index, row in reversed([*enumerate(rows)])}
    copies = len(rows) - len(places)
    if not copies:
        return pixel_values
    logger.warning("%d of the %d images are copies of others: they are left out.", copies, len(rows))
    check_enough(len(places))
    return pixel_values[sorted(places.values())]


def check_enough(number: int) -> None:
    """Raise a `ValueError` if a user gives too few images."""
    if number < MIN_IMAGES:
        raise ValueError(f"There are {number} images: give at least {MIN_IMAGES}, better some hundreds.")


def _check_pixels(pixel_values: torch.Tensor, teacher: nn.Module) -> None:
    """Raise a `ValueError` for images that are not preprocessed as for a model; warn where it looks like that."""
    check_enough(len(pixel_values))
    if not pixel_values.is_floating_point():
        raise ValueError(f"The images are of type {pixel_values.dtype}: preprocess them as for the model.")
    if not pixel_values.isfinite().all():
        index = int((~pixel_values.isfinite().flatten(1).all(1)).nonzero()[0])
        raise ValueError(f"Image {index} has a NaN or an infinity: replace or remove it.")
    known = preprocessing_of(teacher)
    if not {"mean", "std"} <= known.keys():
        return
    black, white = ((value - torch.tensor(known["mean"])) / torch.tensor(known["std"]) for value in (0, 1))
    low, high, (least, most) = black.min().item(), white.max().item(), pixel_values.aminmax()
    found = f"{least:.3g} to {most:.3g}, and those of the model's preprocessing are of {low:.3g} to {high:.3g}"
    if (pixel_values - (low + high) / 2).abs().mean() > FAR_OUT * (high - low) / 2:
        raise ValueError(
            f"The images have pixels of {found}: normalise them, or correct mean and std in its `pretrained_cfg`."
        )
    if least >= 0 > low:
        logger.warning("The images have pixels of %s. Are they normalised as for the model?", found)


def with_made_images(teacher: nn.Module, given: CalibrationImages, num_images: int, **options) -> CalibrationImages:
    """Return given images, and beside them, where these are fewer than `num_images`, calibration images for the rest.

    Statistics of a few dozen images are poor, and a repair on them is too. Nothing is made where they spoil the
    teacher: so it is at many classes, where images made without data do that, too. `options` are those of
    [`calibration_images`].
    """
    missing = num_images - len(given)
    if missing < MIN_BATCH or not (given.self_agreement or 0) >= MIN_OF_GIVEN:
        return given
    made = calibration_images(teacher, missing, **options)
    if made.problem:
        return given
    both = replace(given, made=made)
    with evaluation_mode(teacher):
        both = replace(both, self_agreement=both.measure_self_agreement(teacher))
    return given if both.problem else both


def pixels_of_batches(batches: Batches | torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Return the images of batches, or raise a `ValueError` if they have another size, or are no batches."""
    images = [pixel_values_of(batch) for batch in as_batches(batches)]
    check_enough(sum(map(len, images)))
    for found in (tuple(batch.shape) for batch in images):
        if found[1:] != size:
            raise ValueError(f"The images have the shape {found}: give batches {('B', *size)}.")
    return torch.cat(images)
