import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TinyCNN, made_by_noise, modes, snapshot
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from hf_noisekd import batch_statistics, recalibrate, recalibrate_batch_norm
from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.models.batch_norm import find_batch_norm
from hf_noisekd.record.plain import to_dict
from hf_noisekd.record.schema import ImagesFacts, Provenance


def test_recalibration_equals_one_training_pass_over_all_images(tiny_cnn):
    images = 0.5 + torch.randn(37, 1, 8, 8)
    reference = copy.deepcopy(tiny_cnn)
    for layer in find_batch_norm(reference).values():
        layer.momentum = 1.0
        layer.train()
    reference(images)
    counts = {name: layer.num_batches_tracked.clone() for name, layer in find_batch_norm(tiny_cnn).items()}
    recalibrate_batch_norm(tiny_cnn, [images])
    for name, layer in find_batch_norm(tiny_cnn).items():
        expected = find_batch_norm(reference)[name]
        # Training mode normalises by the biased variance and stores the unbiased one; the first layer is exact.
        tolerance = 1e-6 if name == "bn1" else 2e-2
        torch.testing.assert_close(layer.running_mean, expected.running_mean, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(layer.running_var, expected.running_var, atol=tolerance, rtol=tolerance)
        assert torch.equal(layer.num_batches_tracked, counts[name])


@given(st.sets(st.integers(1, 36)))
@example(set(range(1, 37)))
def test_recalibration_does_not_depend_on_the_batches(tiny_cnn, ends):
    images = 0.5 + torch.randn(37, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = copy.deepcopy(tiny_cnn), copy.deepcopy(tiny_cnn)
    recalibrate_batch_norm(whole, [images])
    # One-shot iterators and mappings are fine, too.
    recalibrate_batch_norm(parts, iter([{"pixel_values": batch} for batch in images.tensor_split(sorted(ends))]))
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], expected, atol=1e-6, rtol=1e-6)


def test_many_images_go_in_chunks_and_few_passes(tiny_cnn, monkeypatch):
    images = 0.5 + torch.randn(1300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:600] *= 3  # the chunks differ
    whole, parts, sizes = copy.deepcopy(tiny_cnn), copy.deepcopy(tiny_cnn), []
    with monkeypatch.context() as patch:
        patch.setattr("hf_noisekd.calibration.moments.CHUNK_SIZE", 1300)
        recalibrate_batch_norm(whole, [images])
    for model, cut in ((tiny_cnn, images.split(100)), (parts, images.split(7))):
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        recalibrate_batch_norm(model, cut)
    passes = len(sizes) // 5
    assert sizes == [256, 256, 256, 256, 276] * passes
    assert 4 <= passes <= 2 * 4
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tiny_cnn.state_dict()[name])
        torch.testing.assert_close(tiny_cnn.state_dict()[name], expected, atol=0.01, rtol=0.01)


def test_recalibration_restores_modes_and_changes_running_statistics_only(tiny_cnn):
    tiny_cnn.train()
    tiny_cnn.bn2.eval()
    before, modes_before = snapshot(tiny_cnn), modes(tiny_cnn)
    recalibrate_batch_norm(tiny_cnn, [torch.randn(8, 1, 8, 8)])
    assert modes(tiny_cnn) == modes_before
    changed = {name for name, tensor in tiny_cnn.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"bn{i}.running_{kind}" for i in (1, 2, 3) for kind in ("mean", "var")}
    assert not tiny_cnn.bn1._forward_pre_hooks


def test_recalibration_brings_running_to_batch_accuracy_on_whole_images(tiny_cnn):
    images = 3 + torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        with batch_statistics(tiny_cnn):
            expected = tiny_cnn(images)
        recalibrate_batch_norm(tiny_cnn, [images])
        torch.testing.assert_close(tiny_cnn(images), expected, atol=2e-2, rtol=2e-2)


class Twice(TinyCNN):
    """One that calls a layer twice."""

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn1(self.conv2(x) * 3 + 1).relu()
        return self.fc(self.bn3(x.mean((2, 3))))


def test_statistics_are_those_that_evaluation_sees_where_a_layer_is_called_twice():
    torch.manual_seed(0)
    model, images, seen = Twice().eval(), torch.randn(200, 1, 8, 8), []
    recalibrate_batch_norm(model, images)
    model.bn3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    torch.testing.assert_close(model.bn3.running_mean, seen[0].mean(0), atol=0.01, rtol=0.01)
    torch.testing.assert_close(model.bn3.running_var, seen[0].var(0), atol=0.01, rtol=0.01)


def test_batches_come_in_several_forms(tiny_cnn):
    images = torch.randn(40, 1, 8, 8)
    others = []
    loader = DataLoader(TensorDataset(images, torch.zeros(40)), batch_size=8)
    for batches in ([images], images, {"pixel_values": images}, loader):
        others.append(copy.deepcopy(tiny_cnn))
        recalibrate_batch_norm(others[-1], batches)
    for other in others[1:]:
        torch.testing.assert_close(other.state_dict(), others[0].state_dict())
    recalibrate_batch_norm(tiny_cnn, [images, torch.randn(8, 1, 12, 12)])  # of several sizes


class Failing:
    """Batches that can be read once."""

    def __iter__(self):
        yield torch.randn(600, 1, 8, 8)
        if hasattr(self, "read"):
            raise OSError("gone")
        self.read = True


@pytest.mark.parametrize(
    ("batches", "error"),
    [([torch.full((8, 1, 8, 8), torch.nan)], "'bn1' .*NaN"), (Failing(), "gone")],
)
def test_whatever_fails_changes_nothing(tiny_cnn, batches, error):
    before = snapshot(tiny_cnn)
    with pytest.raises((ValueError, OSError), match=error):
        recalibrate_batch_norm(tiny_cnn, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_cnn.state_dict().items())


def test_a_model_that_stores_no_statistics_is_refused():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1, track_running_stats=False))
    with pytest.raises(ValueError, match="track_running_stats"):
        recalibrate_batch_norm(model, [torch.randn(8, 1, 8, 8)])


def test_recalibration_refuses_too_few_images(tiny_cnn):
    with pytest.raises(ValueError, match="no batch"):
        recalibrate_batch_norm(tiny_cnn, [])
    with pytest.raises(ValueError, match=r"'bn3' .*one value"):
        recalibrate_batch_norm(tiny_cnn, [torch.randn(1, 1, 8, 8)])


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_recalibrated_student_knows_that_it_is(tiny_cnn, library):
    provenance = made_by_noise(batch_norm="batch", steps=3)
    if library == "timm":
        provenance.attach(tiny_cnn)
    else:
        tiny_cnn.config = SimpleNamespace(noisekd=to_dict(provenance))
    recalibrate_batch_norm(tiny_cnn, [torch.randn(8, 1, 8, 8), torch.randn(4, 1, 8, 8)], dataset="digits")
    images = ImagesFacts(images=12, dataset="digits")
    assert Provenance.of(tiny_cnn) == made_by_noise(batch_norm="running", steps=3, recalibration=images)


def test_a_student_whose_making_cannot_be_read_is_left_alone(tiny_cnn):
    tiny_cnn.noisekd = {"batch_norm": "batch"}
    before = snapshot(tiny_cnn)
    with pytest.raises(ValueError, match=r"'noisekd' .*config\.json"):
        recalibrate_batch_norm(tiny_cnn, [torch.randn(8, 1, 8, 8)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_cnn.state_dict().items())


def test_recalibrates_a_model_in_half_precision(tiny_cnn):
    images = torch.randn(16, 1, 8, 8)
    recalibrate_batch_norm(tiny_cnn.bfloat16(), [images])
    assert tiny_cnn.bn1.running_var.dtype == torch.bfloat16
    expected = tiny_cnn.conv1(images.bfloat16()).float().mean((0, 2, 3))
    torch.testing.assert_close(tiny_cnn.bn1.running_mean.float(), expected, atol=0.02, rtol=0.02)


def test_given_images_are_recorded_as_real_ones_and_made_ones_beside_them(tiny_cnn):
    made_by_noise(batch_norm="batch").attach(tiny_cnn)
    pixels = torch.randn(48, 1, 8, 8)
    made = CalibrationImages(torch.randn(8, 1, 8, 8), torch.randn(4, 1, 8, 8), 8, steps=2, self_agreement=95.0)
    images = CalibrationImages(
        pixels[:36], pixels[36:], 36, given=ImagesFacts(images=48, dataset="photos"), self_agreement=99.0
    )
    for one, calibration in ((images, None), (replace(images, made=made), made.facts)):
        recalibrate_batch_norm(tiny_cnn, one)
        found = Provenance.of(tiny_cnn)
        assert (found.recalibration, found.calibration) == (ImagesFacts(images=36, dataset="photos"), calibration)


@pytest.mark.parametrize(("fit", "dtype"), [(True, torch.float16), (True, torch.float32), (False, torch.float32)])
def test_statistics_of_other_images_than_a_models_own_are_warned_of(
    digits_teacher, digits, tmp_path, caplog, fit, dtype
):
    (tmp_path / "photos").mkdir()
    for index in range(32):
        pixels = digits[0].images[index, 0] if fit else digits[0].images[0, 0] // 4 + index
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{index}.png")
    recalibrate(copy.deepcopy(digits_teacher).to(dtype), tmp_path / "new", images=tmp_path / "photos")
    assert ("keep it as it was" in caplog.text) != fit
