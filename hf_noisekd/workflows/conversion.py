"""From the name of a model, or a file of weights, to a folder that timm and transformers load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_noisekd.models.classifier import declared_input_size, logits_of_blanks
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.models.saving import check_can_be_saved, save_model
from hf_noisekd.workflows.inputs import check_unused


def convert(
    model: str | Path,
    output_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Save a model as a folder, with its preprocessing, which all that takes a model takes; return it.

    The arguments are those of [`load_teacher`]; `output_dir` is new or empty.

    Raises:
        UsageError: The folder is in use.
        ValueError: There is no such model, it is damaged, it does not take images of `input_size`, or it could not be
            loaded again unchanged.
    """
    check_unused(output_dir)
    loaded = load_teacher(model, checkpoint=checkpoint, input_size=input_size, trust_remote_code=trust_remote_code)
    size: Any = input_size or declared_input_size(loaded)
    if size:
        logits_of_blanks(loaded, size, "model")
    check_can_be_saved(loaded, size)
    save_model(loaded, output_dir)
    return loaded
