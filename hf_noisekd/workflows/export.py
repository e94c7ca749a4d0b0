"""From the name of a model to one ONNX file, in float32, float16 or int8."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from hf_noisekd.batches import collate_images
from hf_noisekd.calibration.calibration_images import STEPS
from hf_noisekd.files import check_output_file
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.onnx.floats import export_onnx, halve_onnx
from hf_noisekd.onnx.int8 import BATCH_SIZE, has_vnni, quantize_onnx
from hf_noisekd.workflows.inputs import UsageError, check_same_kind, made_images, unlabelled_images, usable_model

PRECISIONS = ("float32", "float16", "int8")
RANGES_STEPS = STEPS // 2  # of calibration images: ranges need fewer than statistics


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file that [`export`] wrote."""

    path: Path
    precision: str
    megabytes: float
    agreement: float | None = None  # of int8: images in percent for which float32 has the same top-1 prediction
    num_compared: int | None = None  # of how many
    vnni: bool | None = None  # whether the CPU that ran both has VNNI, as `has_vnni` says


def export(
    model: str | Path | nn.Module,
    path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    precision: str = "float32",
    input_size: Sequence[int] | None = None,
    teacher_model: str | Path | nn.Module | None = None,
    images: str | Path | None = None,
    images_split: str = "train",
    num_images: int = 256,
    calibration_steps: int = 900,
    trust_remote_code: bool = False,
) -> ExportedFile:
    """Write a classifier with its running statistics as one ONNX file, for batches of any size, without data.

    Input: `pixel_values`, float32 `[B, C, H, W]`, preprocessed as for the model; output: `logits`, `[B, num_classes]`,
    which are compared with torch's first. Metadata hold class names and preprocessing.

    Args:
        model: The classifier, as [`load_teacher`] takes it. A module is left as it is.
        path: The file; one of that name is replaced.
        checkpoint: File of weights for the timm architecture that `model` names, as [`load_teacher`] takes it.
        precision: `"float32"`; `"float16"` for the weights; or `"int8"`, with the ranges on images, made or given.
        input_size: `(channels, height, width)` of the images. Default: what the model declares.
        teacher_model: For int8 the model from whose stored statistics images are made. Default: the model itself.
        images: For int8 unlabelled images of its task: the name of a data set as [`load_images`] takes it, or a folder.
        images_split: Their split.
        num_images: Number of images to make in at most `calibration_steps` steps, or to draw at random.
        calibration_steps: Steps at most to make images; it ends where more would not do.
        trust_remote_code: Run the Python code that a transformers model on the Hub brings along.

    Raises:
        UsageError: The precision is none of the three, or a teacher or images are given for another than int8.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: `path` is a folder; or the model is to be used with batch statistics, cannot be one ONNX file, or
            has no statistics to make good images of for int8.
        RuntimeError: The file would give other predictions; none is left.
    """
    _check_options(precision, teacher_model, images)
    check_output_file(path := Path(path))
    classifier = usable_model(model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    source = usable_model(classifier if teacher_model is None else teacher_model, trust_remote_code=trust_remote_code)
    check_same_kind(classifier, source)
    if precision == "int8" and images is None:
        _check_has_statistics(source)
    with tempfile.TemporaryDirectory() as folder:
        float32 = path if precision == "float32" else Path(folder) / "float32.onnx"
        export_onnx(classifier, float32, input_size=input_size, name="..." if model is classifier else str(model))
        if precision == "float16":
            halve_onnx(float32, path)
        if precision != "int8":
            return _exported(path, precision)
        if images is not None:
            drawn = unlabelled_images(images, classifier, split=images_split, at_most=num_images, input_size=input_size)
            loader: Any = DataLoader(drawn, batch_size=BATCH_SIZE, collate_fn=collate_images)
            return _exported(path, precision, quantize_onnx(float32, path, loader), len(drawn), has_vnni())
        size = input_size_of(classifier, input_size)
        made = made_images(source, num_images, size, RANGES_STEPS, calibration_steps)
        return _exported(path, precision, quantize_onnx(float32, path, made), len(made.held_out), has_vnni())


def _check_options(precision: str, teacher_model: object, images: object) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {precision!r}: use one of {', '.join(PRECISIONS)}.")
    if precision != "int8" and not (teacher_model is None and images is None):
        raise UsageError("A teacher, or images, are for int8, which takes the ranges of activations from images.")
    if teacher_model is not None and images is not None:
        raise UsageError("Give either a teacher, for images made without data, or real images.")


def _check_has_statistics(source: nn.Module) -> None:
    if not stored_statistics(source):
        raise ValueError(
            f"int8 takes images made of stored BatchNorm statistics, and {type(source).__name__} has none: give real "
            "images, or a teacher that has some."
        )


def _exported(path: Path, precision: str, *compared) -> ExportedFile:
    return ExportedFile(path, precision, path.stat().st_size / 1e6, *compared)
