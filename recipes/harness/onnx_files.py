"""ONNX files of a student in several precisions, and what onnxruntime answers by them."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.datasets import ImageDataset
from hf_noisekd.onnx.floats import export_onnx, halve_onnx, onnx_logits, onnx_session
from hf_noisekd.onnx.int8 import quantize_onnx


def write_files(model: nn.Module, folder: Path, ranges: Mapping[str, Any]) -> dict[str, Path]:
    """Write a model in float32, in float16, and in int8 with ranges of each kind of images; return files by name."""
    paths = {name: folder / f"{name}.onnx" for name in ("float32", "float16")}
    export_onnx(model, paths["float32"])
    halve_onnx(paths["float32"], paths["float16"])
    for name, images in ranges.items():
        paths[f"int8, ranges of {name}"] = path = folder / f"{name}.onnx"
        quantize_onnx(paths["float32"], path, images)
    return paths


def read_in_turns(paths: Mapping[str, Path], images: ImageDataset) -> tuple[dict, dict]:
    """Return the first answers of ONNX files to the images, and the seconds of each image, on one thread."""
    sessions = {name: onnx_session(path, num_threads=1) for name, path in paths.items()}
    answers: dict[str, list] = {name: [] for name in paths}
    seconds: dict[str, list] = {name: [] for name in paths}
    for index in range(len(images)):
        pixel_values = images[index]["pixel_values"][None].contiguous()
        for name, session in sessions.items():
            start = time.perf_counter()
            logits = onnx_logits(session, pixel_values)
            seconds[name].append(time.perf_counter() - start)
            answers[name].append(logits.argmax().item())
    return {name: torch.tensor(values) for name, values in answers.items()}, seconds


def exported_logits(model: nn.Module, path: Path, pixel_values: torch.Tensor) -> torch.Tensor:
    """Write a model in float32 to a file, and return the logits of that."""
    export_onnx(model, path)
    return onnx_logits(onnx_session(path), pixel_values)
