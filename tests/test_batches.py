import pytest
import torch

from hf_noisekd.batches import FullBatchSampler, collate_images


def test_full_batch_sampler():
    sampler = FullBatchSampler(10, 4)
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert sampler.counts == [4, 4, 2]
    assert list(FullBatchSampler(10, 4, rank=1, world_size=2)) == [[4, 5, 6, 7]]
    assert len(FullBatchSampler(3, 4)) == 1


def test_collates_mappings_pairs_and_whole_batches():
    pixels = torch.randn(1, 8, 8)
    for sample in ({"pixel_values": pixels, "labels": 2}, {"pixel_values": pixels, "label": 2}, (pixels, 2)):
        batch = collate_images([sample, sample])
        assert batch["pixel_values"].shape == (2, 1, 8, 8)
        assert batch["labels"].tolist() == [2, 2]
    assert collate_images([{"pixel_values": pixels}]).keys() == {"pixel_values"}
    whole = {"pixel_values": pixels[None]}
    assert collate_images(whole) is whole
    with pytest.raises(ValueError, match=r"\['image', 'label'\]"):
        collate_images([{"image": "a PIL image", "label": 1}])
    with pytest.raises(ValueError, match=r"\[1, 8, 8\] and \[1, 8, 4\]"):
        collate_images([{"pixel_values": pixels}, {"pixel_values": pixels[..., :4]}])
