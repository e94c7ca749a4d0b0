"""From the name of a model to one ONNX file, in float32, float16 or int8."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hf_noisekd.calibration.calibration_images import calibration_images
from hf_noisekd.files import check_output_file
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.onnx.floats import export_onnx, halve_onnx
from hf_noisekd.onnx.int8 import quantize_onnx
from hf_noisekd.workflows.inputs import UsageError, check_same_kind, usable_model

PRECISIONS = ("float32", "float16", "int8")


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file that [`export`] wrote."""

    path: Path
    precision: str
    megabytes: float
    agreement: float | None = None  # of int8: images in percent for which float32 has the same top-1 prediction
    num_compared: int | None = None  # of how many


def export(
    model: str | Path | nn.Module,
    path: str | Path,
    *,
    precision: str = "float32",
    input_size: Sequence[int] | None = None,
    teacher_model: str | Path | nn.Module | None = None,
    num_images: int = 256,
    calibration_steps: int = 900,
    trust_remote_code: bool = False,
) -> ExportedFile:
    """Write a classifier with its running statistics as one ONNX file, for batches of any size, without data.

    The input is `pixel_values`, float32 `[B, C, H, W]`, preprocessed as for the model; the output is `logits`, float32
    `[B, num_classes]`. Metadata hold class names and preprocessing. The logits are compared with torch's first.

    Args:
        model: The classifier, as [`load_teacher`] takes it. A module is left as it is.
        path: The file; one of that name is replaced.
        precision: `"float32"`; `"float16"` for the weights; or `"int8"` for weights and activations, whose ranges are
            those of [`calibration_images`].
        input_size: `(channels, height, width)` of the images. Default: what the model declares.
        teacher_model: For int8 the model from whose stored statistics images are made. Default: the model itself.
        num_images: Number of these images.
        calibration_steps: Steps at most to make them; large inputs and many classes need more.
        trust_remote_code: Run the Python code that a transformers model on the Hub brings along.

    Raises:
        UsageError: The precision is none of the three, or a teacher is given for another than int8.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: `path` is a folder; or the model is to be used with batch statistics, cannot be one ONNX file, or
            has no statistics to make good enough images of for int8.
        RuntimeError: The file would give other predictions; none is left.
    """
    path = Path(path)
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {precision!r}: use one of {', '.join(PRECISIONS)}.")
    if teacher_model is not None and precision != "int8":
        raise UsageError("A teacher is for int8, which needs images.")
    check_output_file(path)
    classifier = usable_model(model, trust_remote_code=trust_remote_code)
    source = usable_model(classifier if teacher_model is None else teacher_model, trust_remote_code=trust_remote_code)
    check_same_kind(classifier, source)
    if precision == "int8" and not stored_statistics(source):
        raise ValueError(
            f"int8 takes images made of stored BatchNorm statistics, and {type(source).__name__} has none: give a "
            "teacher that has, or quantise with real images by hf_noisekd.onnx.int8.quantize_onnx."
        )
    name = "..." if isinstance(model, nn.Module) else str(model)
    with tempfile.TemporaryDirectory() as folder:
        float32 = path if precision == "float32" else Path(folder) / "float32.onnx"
        export_onnx(classifier, float32, input_size=input_size, name=name)
        if precision == "float16":
            halve_onnx(float32, path)
        if precision != "int8":
            return _exported(path, precision)
        size = input_size_of(classifier, input_size)
        images = calibration_images(source, num_images, input_size=size, max_steps=calibration_steps)
        return _exported(path, precision, quantize_onnx(float32, path, images), len(images.held_out))


def _exported(path: Path, precision: str, *compared) -> ExportedFile:
    return ExportedFile(path, precision, path.stat().st_size / 1e6, *compared)
