import pytest
import timm
import torch
from conftest import TinyCNN, digest
from harness.activations import HIDDEN_EDGES, hidden_activations, pooled_features

from hf_noisekd import batch_statistics


def test_batch_statistics_bring_hidden_activations_back_to_zero_and_one(tiny_cnn):
    noise = torch.randn(64, 1, 8, 8)  # the running statistics are of noise with mean 1 and standard deviation 2
    before = digest(tiny_cnn)
    running = hidden_activations(tiny_cnn, noise, "running")
    batch = hidden_activations(tiny_cnn, noise, "batch")
    assert [layer["layer"] for layer in running] == [layer["layer"] for layer in batch] == ["bn1", "bn2", "bn3"]
    for layer in batch:
        assert layer["mean"] == pytest.approx(0, abs=1e-4)
        assert layer["std"] == pytest.approx(1, abs=0.02)
    assert running[0]["std"] < 0.9
    assert running[0]["mean"] > 0.1
    widths = HIDDEN_EDGES.diff()
    for layer in running + batch:
        assert (torch.tensor(layer["density"]) * widths).sum() == pytest.approx(1, abs=0.02)
    assert digest(tiny_cnn) == before


def test_running_statistics_are_taken_as_they_are_stored():
    model = TinyCNN().eval()
    model.bn1.running_mean.fill_(3.0)
    model.bn1.running_var.fill_(4.0)
    x = torch.randn(64, 1, 8, 8)
    first = hidden_activations(model, x, "running")[0]
    expected = (model.conv1(x) - 3) / 2
    assert first["mean"] == pytest.approx(expected.mean((0, 2, 3)).abs().mean().item(), abs=1e-3)
    assert first["std"] == pytest.approx(expected.transpose(0, 1).flatten(1).std(1).mean().item(), abs=1e-3)


@pytest.mark.parametrize("name", ["resnet10_cifar", "mobilenetv2_cifar", "wide_resnet16_8_cifar"])
def test_pooled_features_are_what_the_classifier_gets(name):
    model = timm.create_model(name, **({"width": 4} if name == "resnet10_cifar" else {})).eval()
    x = torch.randn(3, 3, 16, 16)
    for statistics in ("running", "batch"):
        features, logits = pooled_features(model, x, statistics)
        assert features.shape == (3, model.num_features)
        with torch.no_grad(), batch_statistics(model, fraction=float(statistics == "batch")):
            assert torch.allclose(logits, model(x), atol=1e-5)
