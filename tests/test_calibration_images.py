import copy
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import TinyCNN, digest, made_by_noise, modes
from torch import nn

from hf_noisekd import calibration_images, recalibrate_batch_norm
from hf_noisekd.calibration import calibration_images as module
from hf_noisekd.calibration.calibration_images import _rounds
from hf_noisekd.calibration.matching import _ChannelMoments
from hf_noisekd.models.batch_norm import find_batch_norm
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.noise.distributions import low_resolution
from hf_noisekd.record.schema import CalibrationFacts, Provenance

SIZE = (1, 8, 8)
LITE0 = Path(__file__).parents[2] / "shared" / "models" / "tf_efficientnet_lite0"


class NoBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 1)
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(self.norm(x).flatten(1))


@pytest.fixture
def tiny_cnn(tiny_cnn):
    """One that was trained on smooth images with the mean and the variance of noise."""
    images = low_resolution(torch.Generator().manual_seed(0), (256, *SIZE))
    recalibrate_batch_norm(tiny_cnn, [images])
    return tiny_cnn


def made(teacher, **kwargs):
    defaults = {"num_images": 32, "input_size": SIZE, "steps": 60, "max_steps": 60, "show_progress": False}
    return calibration_images(teacher, **defaults | kwargs)


def test_images_show_a_teacher_what_it_stores(tiny_cnn):
    few, many = made(tiny_cnn, steps=1, max_steps=1), made(tiny_cnn)
    assert many.distance < few.distance / 10
    assert many.pixel_values.shape == (32, *SIZE)
    assert many.held_out.shape == (16, *SIZE)
    assert many.problem is None
    assert many.self_agreement >= 90
    changed = copy.deepcopy(tiny_cnn)
    recalibrate_batch_norm(changed, many)
    for name, layer in find_batch_norm(changed).items():
        stored = find_batch_norm(tiny_cnn)[name]
        shift = (layer.running_mean - stored.running_mean) / stored.running_var.sqrt()
        assert shift.abs().mean() < 0.2


def test_moments_of_channels_and_their_gradients():
    for shape in ((4, 3, 5, 5), (4, 3)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        mean, variance = _ChannelMoments.apply(x)
        others = [0, *range(2, x.ndim)]
        torch.testing.assert_close(mean, x.mean(others))
        torch.testing.assert_close(variance, x.var(others, correction=0))
        assert torch.autograd.gradcheck(_ChannelMoments.apply, x)


def test_a_seed_says_which_images_and_the_teacher_stays_as_it_is(tiny_cnn):
    tiny_cnn.train()
    before = digest(tiny_cnn), modes(tiny_cnn)
    first, again, other = (made(tiny_cnn, steps=3, max_steps=3, seed=seed) for seed in (0, 0, 1))
    assert (digest(tiny_cnn), modes(tiny_cnn)) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_cnn.parameters())
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.pixel_values, other.pixel_values)
    assert not torch.equal(first.pixel_values[:16], first.held_out)


def test_a_batch_bounds_the_memory(tiny_cnn, monkeypatch):
    sizes = []
    forward = TinyCNN.forward
    monkeypatch.setattr(TinyCNN, "forward", lambda self, x: sizes.append((len(x), x.requires_grad)) or forward(self, x))
    images = made(tiny_cnn, num_images=21, num_held_out=5, batch_size=8, steps=2, max_steps=2)
    assert max(size for size, with_gradient in sizes if with_gradient) == 7
    assert [len(batch) for batch in images] == [7, 7, 7]
    assert {size for size, _ in sizes} == {5, 7, 21} | {2}  # 5 and 2 of the batch that is tried first
    assert len(images) == 21
    assert len(images.held_out) == 5


def test_it_goes_on_until_the_images_are_good_enough(tiny_cnn):
    assert _rounds(120, 420) == [60, 60, 120, 180]
    assert _rounds(120, 100) == [60, 40]
    assert _rounds(120, 20) == [20]
    once = made(tiny_cnn, steps=10, max_steps=10)
    assert once.self_agreement < 90
    further = made(tiny_cnn, steps=20, max_steps=1000)
    assert further.steps in (20, 40, 80, 160)
    assert further.self_agreement >= 90


@pytest.mark.parametrize(
    ("agreements", "rounds"),
    [((56, 50, 50), 1), ((80, 78, 95), 2), ((80, 84, 95), 2), ((80, 86, 95), 3), ((92, 93), 2), ((math.nan,), 1)],
)
def test_no_round_is_begun_that_would_not_do(tiny_cnn, monkeypatch, agreements, rounds):
    found = iter(agreements)
    monkeypatch.setattr(module.CalibrationImages, "measure_self_agreement", lambda *_: next(found))
    images = made(tiny_cnn, steps=4, max_steps=16)
    assert images.steps == sum([2, 2, 4][:rounds])
    assert (images.problem is None) == (agreements[rounds - 1] >= 90)


def test_of_many_batches_one_is_tried_first(tiny_cnn, monkeypatch):
    monkeypatch.setattr(module.CalibrationImages, "measure_self_agreement", lambda *_: 50.0)
    images = made(tiny_cnn, num_images=32, batch_size=8, steps=2)
    assert (len(images), len(images.held_out)) == (6, 2)
    assert "50 %" in images.problem
    monkeypatch.setattr(module.CalibrationImages, "measure_self_agreement", lambda *_: 70.0)
    assert len(made(tiny_cnn, num_images=32, batch_size=8, steps=2)) == 32


@pytest.mark.parametrize(
    ("most", "sizes", "steps"), [(0, (6, 2), 2), (24, (8, 4), 2), (96, (32, 16), 2), (288, (32, 16), 6)]
)
def test_images_and_steps_go_by_what_they_may_cost(tiny_cnn, monkeypatch, most, sizes, steps):
    after = {1: 80.0, 2: 85.0, 4: 89.0, 6: 89.0}  # it grows, so that further rounds could do
    monkeypatch.setattr(module.CalibrationImages, "measure_self_agreement", lambda images, _: after[images.steps])
    images = made(tiny_cnn, batch_size=8, steps=2, max_steps=6, max_image_steps=most)
    assert ((len(images), len(images.held_out)), images.steps) == (sizes, steps)


@pytest.mark.parametrize("library", ["timm", "plain"])
def test_images_that_are_not_good_enough_change_nothing(tiny_cnn, library):
    student = copy.deepcopy(tiny_cnn)
    if library == "timm":
        made_by_noise().attach(student)
    before = digest(student)
    images = made(tiny_cnn, steps=1, max_steps=1)
    with pytest.raises(ValueError, match=r"1 steps .*\d+ % .*90 %"):
        recalibrate_batch_norm(student, images)
    assert digest(student) == before
    assert getattr(student, "noisekd", {}).get("calibration") is None


def test_a_teacher_that_stores_nothing_gets_noise_and_a_word(caplog, tiny_cnn):
    with caplog.at_level(logging.WARNING):
        images = made(NoBatchNorm())
    assert "NoBatchNorm stores no" in caplog.text
    assert (images.steps, images.self_agreement) == (0, None)
    with pytest.raises(ValueError, match="no stored BatchNorm"):
        recalibrate_batch_norm(tiny_cnn, images)


def test_a_recalibrated_student_knows_what_its_statistics_are_of(tiny_cnn):
    images = made(tiny_cnn)
    student = copy.deepcopy(tiny_cnn)
    made_by_noise().attach(student)
    recalibrate_batch_norm(student, images)
    facts = CalibrationFacts(images=32, held_out=16, steps=60, seed=0, self_agreement=images.self_agreement)
    assert Provenance.of(student) == made_by_noise(batch_norm="running", calibration=facts)
    recalibrate_batch_norm(student, [images.held_out], dataset="photos")
    assert Provenance.of(student).calibration is None
    assert Provenance.of(student).recalibration.images == 16


def test_a_teacher_of_raw_pixels_in_half_precision(tiny_cnn):
    tiny_cnn.pretrained_cfg = {"input_size": SIZE, "mean": (0.0,), "std": (1.0,)}
    images = made(tiny_cnn.bfloat16(), steps=2, max_steps=2, input_size=None)
    assert images.pixel_values.dtype == torch.float32
    assert images.pixel_values.mean() == pytest.approx(0.5, abs=0.1)
    assert images.pixel_values.std() < 0.4


class InPlace(TinyCNN):
    def forward(self, x):
        return super().forward(x.sub_(1).mul_(0.5))


def test_a_teacher_that_changes_its_input_in_place(tiny_cnn):
    teacher = InPlace().eval()
    teacher.load_state_dict(tiny_cnn.state_dict())
    for size in (SIZE, (1, 3, 3)):
        first = made(teacher, steps=3, max_steps=3, input_size=size)
        held_out = first.held_out.clone()
        assert torch.equal(made(teacher, steps=3, max_steps=3, input_size=size).held_out, held_out)
    within = made(teacher)
    outside = made(tiny_cnn)
    assert within.self_agreement == pytest.approx(outside.self_agreement, abs=15)


@pytest.mark.parametrize("damage", ["negative variance", "one class"])
def test_images_that_cannot_be_checked_are_refused(tiny_cnn, damage):
    with torch.no_grad():
        if damage == "negative variance":
            tiny_cnn.bn1.running_var[0] = -1.0
        else:
            tiny_cnn.fc.bias[0] = 1e3
    images = made(tiny_cnn, steps=2, max_steps=2)
    assert "calibration images" in images.problem
    with pytest.raises(ValueError, match=re.escape(images.problem)):
        recalibrate_batch_norm(copy.deepcopy(tiny_cnn), images)


def test_it_works_within_inference_mode_and_autocast(tiny_cnn):
    expected = made(tiny_cnn, steps=2, max_steps=2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = made(tiny_cnn, steps=2, max_steps=2)
    torch.testing.assert_close(found.pixel_values, expected.pixel_values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 1}, "num_images is 1"),
        ({"num_held_out": 1}, "num_held_out is 1"),
        ({"steps": 0}, "steps is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"input_size": None}, "input_size"),
    ],
)
def test_numbers_out_of_range(tiny_cnn, arguments, message):
    with pytest.raises(ValueError, match=message):
        made(tiny_cnn, **arguments)


def test_a_damaged_teacher(tiny_cnn):
    with torch.no_grad():
        tiny_cnn.conv1.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"'conv1\.weight' .*NaN"):
        made(tiny_cnn)


@pytest.mark.slow
def test_an_imagenet_teacher_refuses_images_that_have_had_too_few_steps():
    """The statistics of a student would be ruined by them, as its own are."""
    if not LITE0.is_dir():
        pytest.skip(f"the teacher is not there: {LITE0}")
    teacher = load_teacher(str(LITE0)).eval()
    images = calibration_images(teacher, 32, input_size=(3, 128, 128), steps=10, max_steps=10, show_progress=False)
    assert images.self_agreement < 50
    student = copy.deepcopy(teacher)
    before = digest(student)
    with pytest.raises(ValueError, match="10 steps"):
        recalibrate_batch_norm(student, images)
    assert digest(student) == before


def test_a_few_images_and_many_to_compare_on(tiny_cnn):
    images = made(tiny_cnn, num_images=2, num_held_out=48, batch_size=16, steps=2, max_steps=2)
    assert (len(images), len(images.held_out)) == (2, 48)
