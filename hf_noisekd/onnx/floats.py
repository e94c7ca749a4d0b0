"""Export a classifier, with its *running* statistics, to one ONNX file in float32 or float16."""

import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_noisekd.files import check_output_file
from hf_noisekd.models.classifier import architecture_of, class_names, compute_logits, nonfinite_tensor
from hf_noisekd.models.preprocessing import input_size_of, preprocessing_of
from hf_noisekd.record.schema import Provenance

MAX_BYTES = 3 * 2**29  # torch puts the weights of a larger model into a second file
CHECKED_BATCH_SIZES = (1, 2, 5)  # exporters may take a size of 1 for a constant
TOLERANCE = 1e-3  # for the logits, relative to the largest of them; rounding gives about 1e-6
HALF_TOLERANCE = 5e-2  # in float16; rounding gives about 1e-3


def export_onnx(
    model: nn.Module, path: str | Path, *, input_size: Sequence[int] | None = None, name: str | Path = "..."
) -> None:
    """Export a classifier to ONNX in float32, and compare its logits with torch's before the file gets its name.

    The input is `pixel_values`, float32 `[B, C, H, W]` for any B; the output is `logits`, float32 `[B, num_classes]`.
    The file's metadata hold, each as JSON, `label_names` and what is known of `input_size`, `mean`, `std`,
    `interpolation`, `crop_pct`, `crop_mode`. A missing folder is created. `name`, a path or id of the model, is for the
    advice in an error. A model that needs batch statistics, has no known input size, is too large, or is not finite is
    a `ValueError`; other logits than torch's are a `RuntimeError`, and no file is written.
    """
    require_onnx()
    path = Path(path)
    check_output_file(path)
    input_size = _check_exportable(model, input_size, name)

    # A copy, so that the model keeps its mode, device, precision and memory format.
    classifier = _Logits(copy.deepcopy(model)).float().cpu().to(memory_format=torch.contiguous_format).eval()
    program = _exported(classifier, input_size)
    _describe(program.model, model, input_size)

    with _whole_file(path) as temporary:
        program.save(temporary)
        advice = "Check that the model draws no random numbers, or update onnxruntime and onnxscript."
        _compare(temporary, classifier, input_size, TOLERANCE, advice)


def halve_onnx(source: str | Path, path: str | Path) -> None:
    """Convert a file of [`export_onnx`] to float16, except input and output; a `RuntimeError` if the logits differ."""
    require_onnx()
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    session = onnx_session(source)
    with _whole_file(Path(path)) as temporary:
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), temporary)
        advice = "Values may be out of the range of float16: export it in float32."
        input_size = session.get_inputs()[0].shape[1:]
        _compare(temporary, partial(onnx_logits, session), input_size, HALF_TOLERANCE, advice)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Context with a temporary file to write, which becomes `path` unless there is an exception."""
    check_output_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_onnx() -> None:
    """Raise an `ImportError` if a package for ONNX is missing."""
    needed = ("onnx", "onnxscript", "onnxruntime")
    if missing := " and ".join(name for name in needed if importlib.util.find_spec(name) is None):
        raise ImportError(f'Export to ONNX needs {missing}: install with `pip install "hf-noisekd[export]"`.')


def onnx_session(path: str | Path, num_threads: int = 0) -> Any:
    """Open an ONNX file in onnxruntime on the CPU, with `num_threads` threads; 0 for one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx_logits(session: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the logits `[B, num_classes]` of a session of [`onnx_session`] for images `[B, C, H, W]` on the CPU."""
    return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


class OnnxClassifier(nn.Module):
    """A file of [`export_onnx`] as a module from pixels `[B, C, H, W]` to logits `[B, num_classes]`, on the CPU.

    Any other file is a `ValueError`.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self._session = onnx_session(path)
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "label_names" not in metadata:
            raise ValueError(f"{path} has no label_names in its metadata: give a file that `export` wrote.")
        # The keys of onnxruntime's quantisation begin with "onnx.", and their values are not JSON.
        own = {key: value for key, value in metadata.items() if not key.startswith("onnx.")}
        self.pretrained_cfg = {key: json.loads(value) for key, value in own.items()}
        self.num_classes = len(self.pretrained_cfg["label_names"])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits of onnxruntime."""
        return onnx_logits(self._session, pixel_values.contiguous())


def _exported(classifier: nn.Module, input_size: tuple[int, int, int]) -> Any:
    """Return torch's ONNX program of a classifier for batches of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch 2.13 about its own functions
        return torch.onnx.export(
            classifier,
            (torch.zeros(2, *input_size),),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )


class _Logits(nn.Module):
    """A classifier whose output is the tensor of logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return compute_logits(self.model, pixel_values)


def _check_exportable(model: nn.Module, input_size: Sequence[int] | None, name: str | Path) -> tuple[int, int, int]:
    """Return the input size of a model, after a check that its running statistics and weights are of use."""
    if not Provenance.has_statistics_of_images(model):
        raise ValueError(
            f"This {architecture_of(model)} needs batch statistics, and an ONNX file has only the running ones, here "
            f"those of noise. Re-estimate them first with `noisekd recalibrate --model {name} --output-dir ...` and "
            "`--teacher ...` or, for real images, `--images ...`, and export the result."
        )
    for layer, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"BatchNorm layer {layer!r} keeps no running statistics, so logits depend on the other images of the "
                "batch: build the model with track_running_stats=True."
            )
    size = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    if size > MAX_BYTES:
        raise ValueError(f"The model takes {size / 2**30:.1f} GiB in float32, and an ONNX file holds at most 1.5 GiB.")
    if broken := nonfinite_tensor(model):
        raise ValueError(f"{broken!r} of the model holds a NaN or an infinity: export an earlier checkpoint.")
    return input_size_of(model, input_size)


def _describe(onnx_model: Any, model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Store the metadata in an ONNX model, and remove those of torch."""
    names = class_names(model, onnx_model.graph.outputs[0].shape[1])
    values = {"label_names": names} | preprocessing_of(model) | {"input_size": input_size}
    onnx_model.producer_name, onnx_model.producer_version = "hf_noisekd", version("hf-noisekd")
    onnx_model.metadata_props.update({key: json.dumps(value) for key, value in values.items()})
    for part in (onnx_model.graph, *onnx_model.graph):
        part.metadata_props.clear()  # stack traces, with paths of this machine


@torch.no_grad()
def _compare(path: Path, classifier: Callable, input_size: Sequence[int], tolerance: float, advice: str) -> None:
    """Compare onnxruntime's logits with those of the original on random images."""
    session = onnx_session(path)
    generator = torch.Generator().manual_seed(0)
    for batch_size in CHECKED_BATCH_SIZES:
        pixel_values = torch.randn(batch_size, *input_size, generator=generator)
        expected = classifier(pixel_values)
        found = onnx_logits(session, pixel_values)
        difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        # `not <=` rather than `>`, so that NaN is a difference too.
        if not difference <= tolerance * scale:
            raise RuntimeError(
                f"onnxruntime's logits differ by {difference:.3g} from the model's, which reach {scale:.3g}, on "
                f"a batch of {batch_size}: no file was written. {advice}"
            )
