"""The noise that a training draws: its sizes, its kind, and what a teacher makes of it."""

import math
from pathlib import Path

import pytest
import torch
from conftest import TinyCNN, config, student

from hf_noisekd import NoiseDataset, NoiseKDTrainer, batch_statistics, evaluate
from hf_noisekd.models.loading import load_teacher


class SizeRecorder:
    """Keeps the widths of the images that a model was fed."""

    def __init__(self, model):
        self.sizes = []
        model.register_forward_pre_hook(lambda module, inputs: self.sizes.append(inputs[0].shape[-1]))


def test_noise_is_drawn_in_the_precision_of_the_training(tiny_cnn, tmp_path):
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        noise = NoiseDataset((1, 8, 8), 16, num_steps=2, dtype=torch.float64)
        trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, bf16=bf16, max_steps=1), train_dataset=noise)
        assert trainer.train_dataset.draw(0).dtype == dtype
        trainer.train()


def answers_to_noise(teacher, count=512):
    """Share of each class among the answers to white noise, under running and under batch statistics."""
    noise = NoiseDataset.for_model(teacher, batch_size=count, held_out=True).draw(0)
    with torch.no_grad():
        running = teacher(noise)
        with batch_statistics(teacher):
            batch = teacher(noise)
    return [logits.argmax(1).bincount(minlength=logits.shape[1]) / count for logits in (running, batch)]


def test_running_statistics_collapse_on_noise_and_batch_statistics_do_not(digits_teacher, digits):
    """The finding that the method rests on, on a teacher trained on real digits for a few seconds."""
    assert evaluate(digits_teacher, digits[1])["running"]["accuracy"] > 90
    running, batch = answers_to_noise(digits_teacher)
    assert running.topk(2).values.sum() > 0.9
    assert (running > 0.02).sum() <= 4
    assert batch.max() < 0.25
    assert (batch > 0.02).sum() == 10


@pytest.mark.slow
def test_running_statistics_collapse_on_noise_at_imagenet_size():
    folder = Path(__file__).parents[2] / "shared" / "models" / "tf_efficientnet_lite0"
    if not folder.is_dir():
        pytest.skip(f"needs the trained teacher in {folder}")
    running, batch = answers_to_noise(load_teacher(str(folder)).eval(), count=256)
    assert running.max() == 1.0
    assert (batch > 0).sum() > 100


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"max_steps": 10}, 10),
        ({"max_steps": 5, "gradient_accumulation_steps": 2}, 10),
        ({"max_steps": -1, "num_train_epochs": 2.5}, 10),
        # The last update of an epoch of 4 batches has one batch.
        ({"max_steps": 5, "gradient_accumulation_steps": 3}, 11),
    ],
)
def test_resolutions_are_shares_of_the_whole_training(tiny_cnn, tmp_path, options, batches):
    args = config(tmp_path, **{"input_size": [1, 32, 32], "noise": "white", "resolutions": "0.5:3,1:2"} | options)
    recorder = SizeRecorder(tiny_cnn)
    NoiseKDTrainer(student(), tiny_cnn, args).train()
    small = math.ceil(0.6 * batches)
    assert recorder.sizes[-batches:] == [16] * small + [32] * (batches - small)


def test_resolutions_follow_a_length_that_is_changed_before_training(tiny_cnn, tmp_path):
    args = config(tmp_path, input_size=[1, 32, 32], noise="white", resolutions="0.5:1,1:1")
    recorder = SizeRecorder(tiny_cnn)
    trainer = NoiseKDTrainer(student(), tiny_cnn, args)
    recorder.sizes.clear()
    trainer.args.max_steps = 8
    trainer.train()
    assert recorder.sizes == [16] * 4 + [32] * 4


def test_structured_noise_is_the_default_and_begins_small(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, input_size=[1, 32, 32], max_steps=20))
    assert trainer.train_dataset.distribution.name == "structured"
    assert trainer.train_dataset.image_size(0) == (16, 16)
    assert trainer.train_dataset.image_size(19) == (32, 32)
    assert trainer.eval_dataset.image_sizes() == [((32, 32), 1.0)]
    noise = trainer.provenance().noise
    assert noise.distribution.startswith("structured (")
    assert noise.image_sizes == [((16, 16), 0.6), ((24, 24), 0.25), ((32, 32), 0.15)]


def test_held_out_noise_is_of_the_kind_of_the_training_noise(tiny_cnn, tmp_path):
    noise = NoiseDataset((1, 8, 8), 16, 4, distribution="fractal", mean=0.5, std=2.0)
    held_out = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, input_size=None), train_dataset=noise).eval_dataset
    assert (held_out.distribution.name, held_out.mean, held_out.std) == ("fractal", 0.5, 2.0)
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, noise_std=0.5))
    assert (trainer.train_dataset.std, trainer.eval_dataset.std) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("multiple", "sides"), [(1, [16, 30, 40]), (8, [16, 32, 40]), (10, [40]), (32, [32, 40]), (40, [40])]
)
def test_small_noise_comes_in_sizes_that_the_models_take(tmp_path, multiple, sides):
    class Picky(TinyCNN):
        def forward(self, x):
            if x.shape[-1] % multiple and x.shape[-1] != 40:
                raise ValueError("other sizes")
            return super().forward(x)

    args = config(tmp_path, input_size=[1, 40, 40], resolutions="0.3:1,0.74:1,1:1")
    trainer = NoiseKDTrainer(Picky(), TinyCNN().eval(), args)
    assert [size for size, _ in trainer.train_dataset.image_sizes()] == [(side, side) for side in sides]


def test_held_out_noise_is_apart_from_training_noise(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path))
    held_out = next(iter(trainer.get_eval_dataloader()))["pixel_values"]
    assert not any(torch.equal(held_out, trainer.train_dataset.draw(step)) for step in range(50))


def test_takes_a_noise_data_set_of_the_users(tiny_cnn, tmp_path):
    mine = NoiseDataset((1, 8, 8), 16, seed=11, std=2.0)
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, bf16=False, input_size=None), train_dataset=mine)
    assert torch.equal(trainer.train_dataset.draw(3), mine.draw(3))
    assert trainer.train().global_step == 6
