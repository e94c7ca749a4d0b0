"""Quantise an ONNX file to int8, with activation ranges from calibration images."""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_noisekd.batches import DrawnDataset
from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.calibration.moments import Batches, as_batches, pixel_values_of
from hf_noisekd.files import check_output_file
from hf_noisekd.onnx.floats import onnx_logits, onnx_session, require_onnx

BATCH_SIZE = 64  # onnxruntime keeps all activations of a batch
MIN_AGREEMENT = 50.0  # of top-1 predictions with those of the float file, in percent; below it int8 is of no use


def quantize_onnx(source: str | Path, path: str | Path, images: CalibrationImages | Batches) -> float:
    """Quantise an ONNX file to int8, and compare its predictions with the original before the file gets its name.

    Static quantisation of onnxruntime with QDQ nodes: int8 weights with a scale for each output channel, and uint8
    activations between the minimum and the maximum on the images (Jacob et al., CVPR 2018). Weights take 7 bits, so
    that no kind of CPU saturates, see [`has_vnni`], and the first convolution stays in float. What rounded weights add
    to the outputs of a layer on average is taken from its biases (Nagel et al., ICCV 2019). Input, output and metadata
    stay the same. The images are [`calibration_images`], or batches as for [`recalibrate_batch_norm`]; noise, images of
    poor quality, no images, and no `source` are a `ValueError`. Returned is the share in percent of the held-out
    calibration images, or else of the given ones, on which the top-1 predictions of both files agree. If most differ,
    there is a `RuntimeError` and no file.
    """
    require_onnx()
    if isinstance(images, DrawnDataset):
        raise ValueError("Activations have other ranges on noise than on images: pass images for int8, not noise.")
    source, path = Path(source), Path(path)
    check_output_file(path)
    if not source.is_file():
        raise ValueError(f"There is no file {source}: export the model in float32 first.")
    batches = _on_cpu(pixel_values_of(batch) for batch in as_batches(images))
    if not batches:
        raise ValueError("There are no images to calibrate with: pass a few hundred.")
    measured = batches
    if isinstance(images, CalibrationImages):
        images.check()
        measured = _on_cpu([images.held_out])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / "int8.onnx"
        _quantize(source, temporary, batches)
        agreement = _agreement(source, temporary, measured)
        if not agreement >= MIN_AGREEMENT:
            raise RuntimeError(
                f"The top-1 predictions in int8 agree with the float ones on only {agreement:.0f} % of the images: no "
                "file was written. Calibrate on more images, or use float32 or float16."
            )
        os.replace(temporary, path)
    return agreement


def has_vnni() -> bool | None:
    """Return whether this x86 CPU has VNNI, instructions that add products of 8 bits in 32 bits.

    Without them onnxruntime adds pairs of products in 16 bits, which saturate if weights take 8 bits. None is for other
    processors, and for a torch without `torch.cpu.get_capabilities`.
    """
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64":
        return None
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def _on_cpu(batches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [part for batch in batches for part in batch.float().cpu().contiguous().split(BATCH_SIZE)]


def _quantize(source: Path, path: Path, batches: Sequence[torch.Tensor]) -> None:
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        inputs = ({"pixel_values": batch.numpy()} for batch in batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.inputs, None)

    prepared = path.with_name("prepared.onnx")
    # The exporter has already folded BatchNorm, and further optimisation would tie the file to this machine.
    quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    _add_biases(model, convolutions)
    onnx.save(model, prepared)
    rounded = path.with_name("rounded.onnx")
    quantization.quantize_static(
        prepared,
        rounded,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        nodes_to_exclude=[node.name for node in convolutions[:1]],
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    _correct_biases(prepared, rounded, path, batches)


def _add_biases(model: Any, convolutions: Iterable[Any]) -> None:
    """Give convolutions without biases some of zero, to be corrected."""
    from onnx import numpy_helper

    channels = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    for node in convolutions:
        if len(node.input) == 2 and node.input[1] in channels:
            node.input.append(f"{node.name}.bias")
            zeros = np.zeros(channels[node.input[1]], np.float32)
            model.graph.initializer.append(numpy_helper.from_array(zeros, node.input[2]))


def _correct_biases(prepared: Path, rounded: Path, path: Path, batches: Sequence[torch.Tensor]) -> None:
    """Take from the biases of a quantised file what its rounded weights add to their layer's outputs on average.

    That is the mean over images and places of the layer's outputs for its inputs in float, with the errors of the
    weights in place of the weights (Nagel et al., ICCV 2019, section 4.2). Layers without biases stay as they are.
    """
    import onnx
    from onnx import helper, numpy_helper

    original, quantized = onnx.load(prepared), onnx.load(rounded)
    layers = {node.name: node for node in original.graph.node}
    tensors = {tensor.name: tensor for tensor in quantized.graph.initializer}
    dequantized = [node for node in quantized.graph.node if node.op_type == "DequantizeLinear"]
    constants = {node.output[0]: node for node in dequantized if node.input[0] in tensors}
    rounded_layers = [
        node
        for node in quantized.graph.node
        if node.op_type in ("Conv", "Gemm") and len(node.input) == 3 and constants.keys() >= {*node.input[1:]}
    ]
    for weight in {node.input[1]: constants[node.input[1]] for node in rounded_layers}.values():  # layers may share one
        original.graph.node.append(weight)
        original.graph.initializer.extend(tensors[name] for name in weight.input)
    biases = {}
    for node in rounded_layers:
        added, error, mean = (f"{node.name}.{name}" for name in ("added", "error", "mean"))
        layer = onnx.NodeProto()
        layer.CopyFrom(layers[node.name])
        difference = helper.make_node("Sub", [node.input[1], layer.input[1]], [error])
        layer.name, layer.input[:], layer.output[:] = added, [layer.input[0], error], [added]
        pool = helper.make_node("GlobalAveragePool" if node.op_type == "Conv" else "Identity", [added], [mean])
        original.graph.node.extend([difference, layer, pool])
        original.graph.output.append(helper.make_tensor_value_info(mean, onnx.TensorProto.FLOAT, None))
        biases[mean] = constants[node.input[2]].input
    onnx.save(original, path)
    session = onnx_session(path)
    outputs = [session.run([*biases], {"pixel_values": batch.numpy()}) for batch in batches if biases]
    for (bias, scale, *_), parts in zip(biases.values(), zip(*outputs, strict=True), strict=True):
        mean = np.concatenate([part.reshape(len(part), -1) for part in parts]).mean(0, "float64")
        integers = numpy_helper.to_array(tensors[bias]) - (mean / numpy_helper.to_array(tensors[scale])).round()
        tensors[bias].CopyFrom(numpy_helper.from_array(integers.clip(-(2**31), 2**31 - 1).astype("int32"), bias))
    onnx.save(quantized, path)


def _agreement(source: Path, path: Path, batches: Iterable[torch.Tensor]) -> float:
    before, after = onnx_session(source), onnx_session(path)
    same = [onnx_logits(before, batch).argmax(-1) == onnx_logits(after, batch).argmax(-1) for batch in batches]
    return 100 * torch.cat(same).float().mean().item()
