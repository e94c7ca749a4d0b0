"""From the name of a model to one ONNX file, in float32, float16 or int8."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from hf_noisekd.calibration.calibration_images import calibration_images
from hf_noisekd.files import check_output_file
from hf_noisekd.image_datasets import load_images
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.input_size import input_size_of
from hf_noisekd.onnx.floats import OnnxClassifier, export_onnx, halve_onnx
from hf_noisekd.onnx.int8 import quantize_onnx
from hf_noisekd.training.evaluation import measured
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
    accuracy: float | None = None  # in percent, on the evaluation images


def export(
    model: str | Path | nn.Module,
    path: str | Path,
    *,
    precision: str = "float32",
    input_size: Sequence[int] | None = None,
    teacher_model: str | Path | nn.Module | None = None,
    num_images: int = 256,
    calibration_steps: int = 900,
    eval_dataset: str | Path | Dataset | None = None,
    eval_split: str = "test",
    eval_label_column: str | None = None,
    trust_remote_code: bool = False,
) -> ExportedFile:
    """Write a classifier with its running statistics as one ONNX file, for batches of any size, without data.

    The input is `pixel_values`, float32 `[B, C, H, W]`, preprocessed as for the model; the output is `logits`, float32
    `[B, num_classes]`. Metadata hold class names and preprocessing. The file's logits are compared with torch's before
    it gets its name.

    Args:
        model: The classifier, as [`load_teacher`] takes it. A module is left as it is.
        path: The file; one of that name is replaced.
        precision: `"float32"`; `"float16"` for the weights; or `"int8"` for weights and activations, whose ranges are
            those of [`calibration_images`].
        input_size: `(channels, height, width)` of the images. Default: that of [`input_size_of`].
        teacher_model: For int8 the model from whose stored statistics the images are made. Default: the model itself.
        num_images: For int8 the number of images.
        calibration_steps: For int8 steps at most to make them; large inputs and many classes need more.
        eval_dataset: Images with labels to measure the file on: a data set, or a name as [`load_images`] takes it.
        eval_split: Split of a data set given by name.
        eval_label_column: Its column of classes, where it has several.
        trust_remote_code: Run the Python code that a transformers model on the Hub brings along.

    Returns:
        The file, its size, and what was measured of it.

    Raises:
        UsageError: The precision is none of the three, or a folder is in the way of the file.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: The model is to be used with batch statistics, cannot be one ONNX file, or, for int8, there are no
            statistics to make images of, or the images are not good enough.
        RuntimeError: The file would give other predictions. None is left.
    """
    path = Path(path)
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {precision!r}: use one of {', '.join(PRECISIONS)}.")
    if teacher_model is not None and precision != "int8":
        raise UsageError("A teacher is for int8, which needs images.")
    try:
        check_output_file(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    name = "..." if isinstance(model, nn.Module) else str(model)
    classifier = usable_model(model, trust_remote_code=trust_remote_code)
    source = classifier
    if teacher_model is not None:
        source = usable_model(teacher_model, trust_remote_code=trust_remote_code)
        check_same_kind(classifier, source)
    if precision == "int8" and not stored_statistics(source):
        raise ValueError(
            f"int8 takes images made of stored BatchNorm statistics, and {type(source).__name__} has none: give a "
            "teacher that has, or quantise with real images by `quantize_onnx` of hf_noisekd.onnx.int8."
        )
    images = eval_dataset
    if isinstance(images, str | Path):
        images = load_images(str(images), classifier, split=eval_split, label_column=eval_label_column)
    agreement = num_compared = accuracy = None
    with tempfile.TemporaryDirectory() as folder:
        float32 = path if precision == "float32" else Path(folder) / "float32.onnx"
        export_onnx(classifier, float32, input_size=input_size, name=name)
        if precision == "float16":
            halve_onnx(float32, path)
        elif precision == "int8":
            size = input_size_of(classifier, input_size)
            made = calibration_images(source, num_images, input_size=size, max_steps=calibration_steps)
            agreement, num_compared = quantize_onnx(float32, path, made), len(made.held_out)
    if images is not None:
        accuracy = measured(OnnxClassifier(path), images, name="", step=0).running["accuracy"]
    megabytes = path.stat().st_size / 1e6
    return ExportedFile(path, precision, megabytes, agreement, num_compared, accuracy)
