"""Quantise an ONNX file to int8, with the ranges of its activations taken from calibration images."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from hf_noisekd.batches import DrawnDataset
from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.calibration.moments import Batches, pixel_values_of
from hf_noisekd.files import check_output_file
from hf_noisekd.onnx.floats import onnx_logits, onnx_session, require_onnx

BATCH_SIZE = 64  # of a pass that looks for the ranges, which keeps all activations of a batch
# In percent, of the first answers to the images that the ranges are of: below it the file is of no use to anybody.
MIN_AGREEMENT = 50.0


def quantize_onnx(source: str | Path, path: str | Path, images: CalibrationImages | Batches) -> float:
    """Write an int8 version of an ONNX file, and compare its answers with those of the file before it gets its name.

    By onnxruntime's static quantisation, with QDQ nodes: weights are int8 with a scale for each output channel,
    activations are uint8 between the least and the greatest value that the images give (Jacob et al., CVPR 2018).
    Input and output stay as they are, and so does what the metadata say of the model.

    Args:
        source: A file of [`export_onnx`] in float32.
        path: The file to write; its folder is made if missing, and a file of that name is replaced.
        images: What the ranges are of: [`calibration_images`], or batches of real ones, as [`recalibrate_batch_norm`]
            takes them.

    Returns:
        The share in percent of images to which both files give the same first answer: of those held out of the
        calibration images, or else of the ones given.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: The images are noise, or not good enough, or there is none.
        RuntimeError: The int8 file answers most images differently. None is left.
    """
    require_onnx()
    if isinstance(images, DrawnDataset):
        raise ValueError("The ranges of int8 are not taken from noise, which has others than images: give images.")
    path = Path(path)
    check_output_file(path)
    if not Path(source).is_file():
        raise ValueError(f"There is no file {source}: export the model in float32 first.")
    batches = _on_cpu(pixel_values_of(batch) for batch in images)
    if not batches:
        raise ValueError("There is no image to calibrate with: give some hundred.")
    measured = batches
    if isinstance(images, CalibrationImages):
        images.check()
        measured = _on_cpu([images.held_out])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / "int8.onnx"
        _quantize(Path(source), temporary, batches)
        agreement = _agreement(Path(source), temporary, measured)
        if not agreement >= MIN_AGREEMENT:
            raise RuntimeError(
                f"In int8 the model gives its own first answer to {agreement:.0f} % of the images only: no file was "
                "written. Calibrate on more images, or keep it in float32 or float16."
            )
        os.replace(temporary, path)
    return agreement


def _on_cpu(batches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [part for batch in batches for part in batch.float().cpu().contiguous().split(BATCH_SIZE)]


def _quantize(source: Path, path: Path, batches: Iterable[torch.Tensor]) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        """Gives onnxruntime the images of a batch at a time."""

        def __init__(self):
            self._batches: Iterator[torch.Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"pixel_values": batch.numpy()}

    prepared = path.with_name("prepared.onnx")
    # The exporter has folded BatchNorm already, and what onnxruntime optimises more ties the file to this machine.
    quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def _agreement(source: Path, path: Path, batches: Iterable[torch.Tensor]) -> float:
    before, after = onnx_session(source), onnx_session(path)
    same = [onnx_logits(before, batch).argmax(-1) == onnx_logits(after, batch).argmax(-1) for batch in batches]
    return 100 * torch.cat(same).float().mean().item()
