"""The input size of a model."""

import logging
from collections.abc import Sequence

from torch import nn

from hf_noisekd.models.classifier import declared_input_size, format_size
from hf_noisekd.models.preprocessing import preprocessing_of
from hf_noisekd.record.schema import noisekd_section

logger = logging.getLogger(__name__)


def input_size_of(model: nn.Module, given: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Return the `(channels, height, width)` of the images of a model.

    That is `given`, or else the size in timm's `pretrained_cfg` or in `config.image_size`, the output size of the image
    processor, as for transformers' ResNets, or the size of the noise that a student was trained with.

    Raises:
        ValueError: There is none of these.
    """
    if given is not None:
        channels, height, width = given
        return channels, height, width
    declared, made = declared_input_size(model), preprocessing_of(model).get("input_size")
    if declared and made and declared != tuple(made):
        logger.warning(
            "%s declares images of %s, but its image processor makes %s. The first is used: give input_size for "
            "another.",
            type(model).__name__,
            format_size(declared),
            format_size(made),
        )
    noise = noisekd_section(model).get("noise")
    size = declared or made or (noise.get("input_size") if isinstance(noise, dict) else None)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} does not declare its input size in `pretrained_cfg`, in `config.image_size` or by "
            "an image processor: give input_size, the channels, height and width, such as 3 224 224."
        )
    return tuple(size)
