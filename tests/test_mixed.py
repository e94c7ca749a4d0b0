import random

import numpy as np
import pytest
import torch
from conftest import TinyCNN
from harness.datasets import ImageDataset
from torch.utils.data import TensorDataset

from hf_noisekd import MixedDataset, NoiseDataset, NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.release.card import render_model_card

SIZE = (1, 8, 8)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, *SIZE), generator=generator).to(torch.uint8)
    facts = {"mean": (0.5,), "std": (0.25,), "label_names": list("abc"), "name": "five"}
    return ImageDataset(pixels, torch.arange(5) % 3, crop_padding=2, flip=True, **facts)


def test_noise_and_images_take_turns(images):
    mixed = MixedDataset(SIZE, 16, images=images, seed=3)
    images.crop_padding, images.flip = 0, False
    known = [image["pixel_values"] for image in images]
    assert torch.equal(mixed.draw(4), NoiseDataset(SIZE, 16, seed=3).draw(4))
    batch = mixed.draw(5)
    assert batch.shape == (16, *SIZE)
    found = [next(index for index, image in enumerate(known) if torch.equal(image, drawn)) for drawn in batch]
    assert len(set(found)) > 1


def test_a_share_of_the_steps_uses_images(images):
    for share, steps in ((0.25, [3, 7]), (0.5, [1, 3, 5, 7]), (1, range(8))):
        mixed, noise = MixedDataset(SIZE, 4, images=images, share=share), NoiseDataset(SIZE, 4)
        assert [step for step in range(8) if not torch.equal(mixed.draw(step), noise.draw(step))] == list(steps)
    with pytest.raises(ValueError, match="share is 0"):
        MixedDataset(SIZE, 4, images=images, share=0)


def test_a_step_is_a_function_of_seed_rank_and_step_alone(images):
    torch.manual_seed(1)
    expected = MixedDataset(SIZE, 16, images=images, seed=3).draw(5)
    before = torch.random.get_rng_state()
    assert torch.equal(MixedDataset(SIZE, 16, images=images, seed=3).draw(5), expected)
    assert torch.equal(torch.random.get_rng_state(), before)
    for other in ({"seed": 4}, {"seed": 3, "rank": 1}):
        assert not torch.equal(MixedDataset(SIZE, 16, images=images, **other).draw(5), expected)
    assert not torch.equal(MixedDataset(SIZE, 16, images=images, seed=3).draw(7), expected)


class Shaken(TensorDataset):
    """Images with augmentation out of every global generator."""

    def __getitem__(self, index):
        noise = torch.rand(1) + random.random() + np.random.random()
        return {"pixel_values": self.tensors[0][index] + noise.float()}


def test_augmentation_is_a_function_of_the_step_whatever_it_draws_from():
    mixed = MixedDataset(SIZE, 4, images=Shaken(torch.zeros(3, *SIZE)))
    expected = mixed.draw(1)
    assert len(expected.unique()) > 1
    for advance in (lambda: torch.rand(1), random.random, np.random.random):
        advance()
        before = random.getstate(), str(np.random.get_state())
        assert torch.equal(mixed.draw(1), expected)
        assert (random.getstate(), str(np.random.get_state())) == before


def test_images_that_do_not_fit_the_noise_are_refused(images):
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) .*\(1, 9, 9\)"):
        MixedDataset((1, 9, 9), 4, images=images)
    with pytest.raises(ValueError, match=r"images .*empty"):
        MixedDataset(SIZE, 4, images=[])


def test_images_without_batched_access_will_do():
    mixed = MixedDataset(SIZE, 4, images=TensorDataset(torch.ones(3, *SIZE), torch.zeros(3)), dtype=torch.bfloat16)
    assert torch.equal(mixed.draw(1), torch.ones(4, *SIZE, dtype=torch.bfloat16))


def test_the_record_and_the_card_name_the_images(images, tiny_cnn, tmp_path):
    mixed = MixedDataset(SIZE, 16, 10, images=images, seed=3)
    args = NoiseKDConfig(
        tmp_path, max_steps=4, per_device_train_batch_size=16, save_strategy="no", report_to="none", disable_tqdm=True
    )
    student = TinyCNN()
    trainer = NoiseKDTrainer(student, tiny_cnn, args, train_dataset=mixed)
    trainer.train()
    section = student.noisekd
    assert section["method"] == "distillation with noise and real images"
    assert section["real_images"] == {"dataset": "five", "images": 5}
    card = render_model_card(trainer.record())
    assert "white noise and 5 real images of five" in card.text
    assert "no image and no label was used" not in card.text
    assert "data-free" not in card.data.tags
    assert "It is neither data-free nor private" in card.text
    assert trainer.record().class_frequencies is None
