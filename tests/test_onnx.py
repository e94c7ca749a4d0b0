import json
import sys

import pytest
import timm
import torch
from conftest import TinyCNN, digest, made_by_noise
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_noisekd import export
from hf_noisekd.models.classifier import compute_logits
from hf_noisekd.models.saving import save_model
from hf_noisekd.onnx.floats import OnnxClassifier, export_onnx, onnx_session
from hf_noisekd.record.schema import NoiseFacts

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def with_statistics(model: nn.Module) -> nn.Module:
    """Give the BatchNorm layers running statistics that are neither a new model's nor those of white noise."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def timm_model(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(timm.create_model(name, **kwargs))


def transformers_model() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=4, layer_type="basic")
    config.image_size = 32
    return with_statistics(ResNetForImageClassification(config))


def answers(path, pixel_values: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


@pytest.fixture
def exportable(tiny_cnn):
    tiny_cnn.pretrained_cfg = {"input_size": (1, 8, 8)}
    return tiny_cnn


@pytest.mark.parametrize(
    ("build", "input_size"),
    [
        (lambda: timm_model("resnet18", pretrained_cfg_overlay={"input_size": (3, 64, 64)}), (3, 64, 64)),
        pytest.param(
            lambda: timm_model("mobilenetv3_small_100", pretrained_cfg_overlay={"input_size": (3, 64, 64)}),
            (3, 64, 64),
            marks=pytest.mark.slow,
        ),
        (transformers_model, (3, 32, 32)),
    ],
    ids=["resnet18", "mobilenetv3", "transformers"],
)
def test_the_file_answers_like_the_model_on_running_statistics(build, input_size, tmp_path, capfd):
    model = build().train()
    export_onnx(model, tmp_path / "new" / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert all(module.training for module in model.modules())

    pixel_values = 1 + torch.randn(7, *input_size)
    with torch.no_grad():
        expected = compute_logits(model.eval(), pixel_values)
    for batch in (slice(0, 1), slice(1, 4), slice(0, 7)):
        found = answers(tmp_path / "new" / "model.onnx", pixel_values[batch])
        assert (found - expected[batch]).abs().max() < 1e-5 * expected.abs().max()

    graph = onnx.load(tmp_path / "new" / "model.onnx").graph
    (pixels,), (logits,) = graph.input, graph.output
    assert [dim.dim_value for dim in pixels.type.tensor_type.shape.dim] == [0, *input_size]
    assert [dim.dim_value for dim in logits.type.tensor_type.shape.dim] == [0, expected.shape[1]]


def test_leaves_the_model_as_it_is(exportable, tmp_path):
    model = exportable.to(torch.bfloat16).to(memory_format=torch.channels_last).train()
    model.bn2.eval()
    modes = [module.training for module in model.modules()]
    before = digest(model.float())
    model.to(torch.bfloat16)
    random_state = torch.get_rng_state()
    export_onnx(model, tmp_path / "model.onnx")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert digest(model.float()) == before
    pixel_values = torch.randn(2, 1, 8, 8)
    assert torch.allclose(answers(tmp_path / "model.onnx", pixel_values), model.eval()(pixel_values), atol=1e-5)


@pytest.fixture
def student():
    """A model as a recipe makes one: it knows its classes and its preprocessing."""
    cfg = {"input_size": (1, 32, 32), "mean": (0.3,), "std": (0.2,), "num_classes": 3, "label_names": list("abc")}
    return timm_model("resnet10_cifar", width=8, in_chans=1, pretrained_cfg_overlay=cfg).eval()


def test_a_saved_student_answers_alike_and_tells_its_classes_and_preprocessing(student, tmp_path):
    made_by_noise(batch_norm="running").attach(student)
    save_model(student, tmp_path / "student")
    export(tmp_path / "student", tmp_path / "model.onnx")
    pixel_values = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(answers(tmp_path / "model.onnx", pixel_values), student(pixel_values), atol=1e-5)
    model = onnx.load(tmp_path / "model.onnx")
    assert model.producer_name == "hf_noisekd"
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["label_names"] == ["a", "b", "c"]
    assert metadata["input_size"] == [1, 32, 32]
    assert metadata["mean"] == [0.3]
    assert metadata["std"] == [0.2]
    # torch notes on each node where in which file of this machine it comes from.
    assert timm.__path__[0].encode() not in (tmp_path / "model.onnx").read_bytes()


def test_refuses_a_student_on_batch_statistics(student, exportable, tmp_path):
    made_by_noise(batch_norm="batch").attach(student)
    save_model(student, tmp_path / "student")
    with pytest.raises(ValueError, match=f"recalibrate --model {tmp_path / 'student'} "):
        export(tmp_path / "student", tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"recalibrate --model \.\.\. --output-dir"):
        export_onnx(student, tmp_path / "model.onnx")
    exportable.bn2.running_mean = None
    with pytest.raises(ValueError, match=r"'bn2' .*track_running_stats"):
        export_onnx(exportable, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_refuses_what_makes_no_file(exportable, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="not a file"):
        export_onnx(exportable, tmp_path)
    with pytest.raises(ValueError, match=r"TinyCNN .*input_size"):
        export_onnx(TinyCNN(), tmp_path / "model.onnx")
    monkeypatch.setattr("hf_noisekd.onnx.floats.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="GiB in float32"):
        export_onnx(exportable, tmp_path / "model.onnx")
    monkeypatch.undo()
    exportable.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'fc\.weight' .*NaN"):
        export_onnx(exportable, tmp_path / "model.onnx")


def test_a_file_that_answers_differently_is_not_left(exportable, tmp_path):
    class Noisy(TinyCNN):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    (tmp_path / "model.onnx").write_text("the file of yesterday")
    model = Noisy()
    model.pretrained_cfg = {"input_size": (1, 8, 8)}
    with pytest.raises(RuntimeError, match=r"logits differ .*batch of 1:"):
        export_onnx(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "the file of yesterday"


def test_reads_only_files_of_its_own(exportable, tmp_path):
    torch.onnx.export(exportable, (torch.zeros(1, 1, 8, 8),), tmp_path / "other.onnx", verbose=False)
    with pytest.raises(ValueError, match=r"other\.onnx .*label_names"):
        OnnxClassifier(tmp_path / "other.onnx")


def test_says_what_to_install(exportable, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'onnxruntime.*"hf-noisekd\[export\]"'):
        export_onnx(exportable, tmp_path / "model.onnx")


def test_a_transformers_student_is_exported_in_the_size_that_it_was_taught_with(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3, layer_type="basic")
    student = ResNetForImageClassification(config)
    noise = NoiseFacts(distribution="white", mean=0, std=1, input_size=[3, 16, 24])
    made_by_noise(batch_norm="running", noise=noise).attach(student)
    save_model(student, tmp_path / "student")
    export(tmp_path / "student", tmp_path / "student.onnx")
    assert onnx_session(tmp_path / "student.onnx").get_inputs()[0].shape[1:] == [3, 16, 24]
