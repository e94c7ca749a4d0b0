import pytest
import torch

from hf_noisekd.calibration.given_images import given_images


def images_of(number):
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_real_images_that_statistics_are_of_are_counted_without_those_held_out(tiny_cnn):
    given = given_images(tiny_cnn, images_of(64), "photos")
    assert (given.given.images, given.real.images, len(given.held_out), given.real.dataset) == (64, 48, 16, "photos")


def test_copies_count_once_and_none_of_them_is_held_out(tiny_cnn, caplog):
    images = images_of(40)
    given = given_images(tiny_cnn, torch.cat([images, images[:24]]).requires_grad_())
    assert (given.given.images, len(given.pixel_values), len(given.held_out)) == (40, 30, 10)
    assert not (given.pixel_values[:, None] == given.held_out).flatten(2).all(-1).any()
    assert "24 of the 64 images are copies" in caplog.text
    with pytest.raises(ValueError, match="There are 10 images"):
        given_images(tiny_cnn, images[:10].repeat(4, 1, 1, 1))
