import json

import numpy as np
import pytest
import torch
from torch import nn

from hf_noisekd import NoiseDataset, calibration_images, evaluate
from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.onnx import int8
from hf_noisekd.onnx.floats import OnnxClassifier, export_onnx, halve_onnx, onnx_logits, onnx_session
from hf_noisekd.onnx.int8 import has_vnni, quantize_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(digits_teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "float.onnx"
    export_onnx(digits_teacher, path)
    return path


@pytest.fixture(scope="module")
def images(digits_teacher):
    return calibration_images(digits_teacher, 64, show_progress=False)


def accuracy(path, dataset):
    return evaluate(OnnxClassifier(path), dataset)["running"]["accuracy"]


def types(path):
    model = onnx.load(path)
    return {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}


def test_int8_without_data_answers_like_float(exported, images, digits, tmp_path):
    path = tmp_path / "new" / "int8.onnx"
    agreement = quantize_onnx(exported, path, images)
    assert [file.name for file in path.parent.iterdir()] == ["int8.onnx"]
    assert agreement >= 90
    assert accuracy(path, digits[1]) > accuracy(exported, digits[1]) - 2
    assert path.stat().st_size < exported.stat().st_size / 2
    before, after = onnx.load(exported), onnx.load(path)
    operators = [node.op_type for node in after.graph.node]
    assert "QuantizeLinear" in operators
    assert "DequantizeLinear" in operators
    assert {prop.key: prop.value for prop in before.metadata_props}.items() <= {
        prop.key: prop.value for prop in after.metadata_props
    }.items()
    assert json.loads(next(prop.value for prop in after.metadata_props if prop.key == "label_names"))[9] == "9"
    # One scale for each output channel of a convolution.
    assert [8] in [list(tensor.dims) for tensor in after.graph.initializer if tensor.name.endswith("_scale")]
    for size in (1, 3):
        assert onnx_logits(onnx_session(path), torch.randn(size, 1, 32, 32)).shape == (size, 10)


def test_no_kind_of_cpu_saturates_and_the_pixels_stay_float(exported, images, tmp_path):
    path = tmp_path / "int8.onnx"
    quantize_onnx(exported, path, images)
    graph = onnx.load(path).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [values.astype(int) for values in tensors.values() if values.dtype == np.int8 and values.ndim > 1]
    assert len(weights) > 5
    # Without VNNI, CPUs add two products of uint8 and int8 in 16 bits.
    assert max(2 * 255 * np.abs(values).max() for values in weights) < 2**15
    assert [node.op_type for node in graph.node if "pixel_values" in node.input] == ["Conv"]


class OneSided(nn.Module):
    """Nearly all weights of the second convolution and of the classifier are rounded to zero in int8."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, bias=bias), nn.Linear(16, 4)
        for layer in (self.second, self.last):
            nn.init.constant_(layer.weight, 0.3 / 127)
            layer.weight.data.flatten(1)[:, 0] = 1

    def forward(self, pixel_values):
        hidden = self.second(self.first(pixel_values).relu()).relu()
        return self.last(hidden.mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
def test_rounded_weights_do_not_shift_the_logits(bias, tmp_path):
    torch.manual_seed(0)
    source, path = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    export_onnx(OneSided(bias), source, input_size=(1, 8, 8))
    batches = torch.rand(100, 1, 8, 8).split([70, 30])
    quantize_onnx(source, path, batches)
    before, after = (onnx_logits(onnx_session(file), torch.cat(batches)) for file in (source, path))
    assert (after - before).mean(0).abs().max() < 0.01 * before.abs().mean()


def test_the_report_is_of_the_images_held_out(exported, images, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(int8, "_agreement", lambda *args: measured.append(torch.cat(list(args[2]))) or 100.0)
    quantize_onnx(exported, tmp_path / "int8.onnx", images)
    assert torch.equal(measured[0], images.held_out)
    quantize_onnx(exported, tmp_path / "int8.onnx", [images.held_out[:8], images.held_out[8:16]])
    assert torch.equal(measured[1], images.held_out[:16])
    quantize_onnx(exported, tmp_path / "int8.onnx", images.held_out[:16])  # one batch alone
    assert torch.equal(measured[2], measured[1])


def test_noise_and_images_that_are_not_good_enough_are_refused(exported, images, tmp_path):
    with pytest.raises(ValueError, match="noise"):
        quantize_onnx(exported, tmp_path / "int8.onnx", NoiseDataset((1, 32, 32), 8, 2))
    poor = CalibrationImages(images.pixel_values, images.held_out, batch_size=8, seed=0, distance=1, self_agreement=40)
    with pytest.raises(ValueError, match="40"):
        quantize_onnx(exported, tmp_path / "int8.onnx", poor)
    with pytest.raises(ValueError, match="no image"):
        quantize_onnx(exported, tmp_path / "int8.onnx", [])
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_differently_is_not_left(exported, images, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "_agreement", lambda *args: 30.0)
    with pytest.raises(RuntimeError, match="30 %"):
        quantize_onnx(exported, tmp_path / "int8.onnx", images)
    assert not list(tmp_path.iterdir())


def test_float16_halves_the_weights_and_keeps_the_answers(exported, digits, tmp_path):
    path = tmp_path / "half.onnx"
    halve_onnx(exported, path)
    assert types(path) >= {"FLOAT16"}
    assert path.stat().st_size < exported.stat().st_size * 0.6
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert accuracy(path, digits[1]) == pytest.approx(accuracy(exported, digits[1]), abs=0.5)


def test_has_vnni(monkeypatch):
    for capabilities, expected in (
        ({"architecture": "x86_64", "avx2": True, "avx_vnni": False}, False),
        ({"architecture": "x86_64", "avx512_vnni": True}, True),
        ({"architecture": "x86_64", "avx_vnni": True}, True),
        ({"architecture": "aarch64", "neon": True}, None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert has_vnni() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_vnni() is None
