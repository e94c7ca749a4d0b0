import logging
import re

import pytest
import torch
from conftest import TinyCNN, digest, modes

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.training import timed_steps
from hf_noisekd.training.cost import ImageCost, duration

COST = ImageCost(training=0.01, evaluation=0.0, memory=1000.0)


def trainer(folder, data=None, **options):
    defaults = {"input_size": [1, 8, 8], "disable_tqdm": True, "num_calibration_images": 0, "bf16": False}
    defaults |= {"save_strategy": "no", "per_device_train_batch_size": 16, "resolutions": "1"}
    torch.manual_seed(0)
    return NoiseKDTrainer(TinyCNN(), TinyCNN().eval(), NoiseKDConfig(str(folder), **defaults | options), **data or {})


def costs(monkeypatch, **changes):
    monkeypatch.setattr(timed_steps, "cost_of_an_image", lambda *_: ImageCost(**vars(COST) | changes))


def test_what_is_measured_stays_as_it_is(tmp_path):
    one = trainer(tmp_path, max_steps=3, num_calibration_images=32)
    before = digest(one.model), modes(one.model), digest(one.teacher_model), modes(one.teacher_model)
    state = torch.random.get_rng_state()
    estimate = one.estimate()
    assert (digest(one.model), modes(one.model), digest(one.teacher_model), modes(one.teacher_model)) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in one.model.parameters())
    assert estimate.steps == 3
    assert min(estimate.step, estimate.evaluation) > 0
    assert estimate.seconds > 3 * estimate.step
    # The input, and the output of each layer but the last.
    assert estimate.memory >= 4 * 16 * 8 * (8 + 2 * 8 * 8)
    assert re.match(r"About .* on a CPU of \d+ threads: 3 steps of .*, .* to evaluate", str(estimate))


@pytest.mark.parametrize(("steps", "expected"), [(2, logging.INFO), (100_000, logging.WARNING)])
def test_a_long_training_says_beforehand_what_it_takes(tmp_path, monkeypatch, caplog, steps, expected):
    monkeypatch.setattr(timed_steps, "MIN_PIXELS", 0)
    costs(monkeypatch)
    caplog.set_level(logging.INFO, "hf_noisekd")
    one = trainer(tmp_path, max_steps=steps)
    one.settle_time(None)
    (entry,) = (record for record in caplog.records if record.name == timed_steps.__name__)
    assert entry.levelno == expected
    assert f"{steps:,} steps of 160 ms" in entry.message


def test_a_run_fits_itself_into_a_time(tmp_path, monkeypatch):
    costs(monkeypatch, training=1e-3)
    one = trainer(tmp_path, max_hours=0.001)
    one.train()
    assert 3.6 / 16e-3 > one.state.global_step > 100
    assert one.provenance().steps == one.state.global_step


def test_batches_are_halved_where_there_would_be_few_steps(tmp_path, monkeypatch):
    costs(monkeypatch)
    one = trainer(tmp_path, max_hours=0.1, per_device_train_batch_size=256)
    one.settle_time(None)
    assert (one.train_dataset.batch_size, one.args.train_batch_size) == (128, 128)
    assert 220 < one.args.max_steps < 360 / 1.28
    with pytest.raises(ValueError, match=r"max_hours is 1e-05.* give more time"):
        trainer(tmp_path, max_hours=1e-5).settle_time(None)


def test_each_training_has_the_whole_time(tmp_path, monkeypatch):
    costs(monkeypatch, training=1e-2)
    one = trainer(tmp_path, max_hours=0.004, per_device_train_batch_size=128)
    steps = []
    for _ in range(2):
        one.train()
        steps.append((one.state.global_step, one.train_dataset.batch_size))
    assert steps[0][1] == steps[1][1] == 64
    assert steps[1][0] == pytest.approx(steps[0][0], rel=0.2)


@pytest.mark.parametrize(("options", "evaluations"), [({}, 1), ({"eval_strategy": "steps", "eval_steps": 5}, 5)])
def test_all_evaluations_are_counted(tmp_path, monkeypatch, options, evaluations):
    costs(monkeypatch, evaluation=1.0)
    images = [{"pixel_values": torch.zeros(1, 8, 8), "labels": 0}] * 50
    sets = {"eval_dataset": {"a": images, "b": images[:10]}}
    one = trainer(tmp_path, sets, max_steps=20, **options)
    assert one.estimate().evaluation == 60 * evaluations + 6  # and three candidates on two held-out images


def test_only_noise_is_timed(tmp_path):
    images = {"train_dataset": [{"pixel_values": torch.randn(1, 8, 8)}] * 32}
    with pytest.raises(ValueError, match=r"max_hours is 1.* not on noise"):
        trainer(tmp_path, images, max_hours=1.0)
    with pytest.raises(ValueError, match="Only a training on noise"):
        trainer(tmp_path, images, max_steps=1).estimate()


def test_a_resumed_run_has_the_steps_that_were_chosen(tmp_path, monkeypatch):
    costs(monkeypatch, training=0.05)
    options = {"max_hours": 0.01, "per_device_train_batch_size": 128, "save_strategy": "steps", "save_steps": 1}
    first = trainer(tmp_path, **options)
    first.train()
    costs(monkeypatch, training=0.0001)
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (again.state.global_step, again.args.train_batch_size) == (first.state.global_step, 64)
    assert digest(again.model) == digest(first.model)


def test_a_batch_that_does_not_fit_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(timed_steps, "MIN_PIXELS", 0)
    costs(monkeypatch, memory=2.0**30)
    monkeypatch.setattr(timed_steps, "free_memory", lambda _: 4 * 2.0**30)
    with pytest.raises(
        RuntimeError, match=r"16 images of 1x8x8 .*16\.0 GiB .*4\.0 GiB .*per_device_train_batch_size to 3"
    ):
        trainer(tmp_path, max_steps=2).train()
    assert not [*tmp_path.iterdir()]


def test_too_little_memory_in_a_step_is_said_in_a_line(tmp_path, monkeypatch):
    one = trainer(tmp_path, max_steps=2)
    monkeypatch.setattr(one, "compute_loss", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(RuntimeError, match=r"too little memory for a batch of 16 images: .* to 8 or less"):
        one.train()


def test_the_time_is_given_once():
    with pytest.raises(ValueError, match=r"max_hours is 2 and max_steps 5: give one"):
        NoiseKDConfig("out", max_hours=2, max_steps=5)


@pytest.mark.parametrize(("seconds", "text"), [(0.0123, "12 ms"), (1.26, "1.3 s"), (100, "100 s"), (200_000, "56 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
