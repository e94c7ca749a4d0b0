import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from hf_noisekd import NoiseDataset
from hf_noisekd.noise.dataset import MAX_RANKS, MAX_STEPS, draw_seed
from hf_noisekd.noise.distributions import white
from hf_noisekd.noise.spec import STRUCTURED_RESOLUTIONS, parse_resolutions


def test_white_noise_has_zero_mean_and_unit_variance():
    x = white(torch.Generator().manual_seed(0), (64, 3, 32, 32))
    # Five standard errors of the mean and of the variance of n normal numbers.
    assert abs(x.mean()) < 5 / x.numel() ** 0.5
    assert abs(x.var() - 1) < 5 * (2 / x.numel()) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 0.1


def test_a_step_is_a_function_of_seed_rank_and_step():
    first = NoiseDataset((3, 8, 8), 4, 10, seed=5, rank=2)
    second = NoiseDataset((3, 8, 8), 4, 10, seed=5, rank=2)
    list(first)
    torch.randn(3)
    assert torch.equal(first.draw(7), second.draw(7))
    assert torch.equal(first.draw(7), NoiseDataset((3, 8, 8), 4, 10, seed=np.int64(5), rank=2).draw(7))
    assert torch.equal(list(second)[7]["pixel_values"], first.draw(7))


def test_no_two_draws_share_a_batch():
    draws = {}
    for seed in (0, 1):
        for rank in range(3):
            for held_out in (False, True):
                noise = NoiseDataset((1, 4, 4), 2, seed=seed, rank=rank, held_out=held_out)
                draws |= {(seed, rank, held_out, step): noise.draw(step).flatten() for step in range(20)}
    # Compare image by image: not even one image may recur.
    images = torch.stack(list(draws.values())).view(-1, 16)
    assert len(torch.unique(images, dim=0)) == len(images)


def test_cpu_seeds_never_collide_within_a_seed():
    # torch's CPU generator uses 32 bits. A hash would give about 12 collisions here.
    seeds = {
        draw_seed(3, rank, step, held_out) & 0xFFFFFFFF
        for rank in (0, 1, 2, MAX_RANKS - 1)
        for step in range(40_000)
        for held_out in (False, True)
    }
    assert len(seeds) == 4 * 40_000 * 2


def test_neighbouring_draws_are_uncorrelated():
    noise = NoiseDataset((3, 16, 16), 16)
    x = torch.stack([noise.draw(step).flatten() for step in range(8)])
    correlations = torch.corrcoef(x).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / x.shape[1] ** 0.5


def test_epochs_continue_and_length_is_that_of_an_epoch():
    noise = NoiseDataset((1, 2, 2), 2, num_steps=3)
    assert len(noise) == 3
    assert list(noise.steps()) == [0, 1, 2]
    noise.set_epoch(2)
    assert list(noise.steps()) == [6, 7, 8]
    assert torch.equal(next(iter(noise))["pixel_values"], NoiseDataset((1, 2, 2), 2).draw(6))


def test_unbounded_form_has_no_length_and_no_end():
    noise = NoiseDataset((1, 2, 2), 2)
    with pytest.raises(TypeError, match="num_steps"):
        len(noise)
    assert [step for step, _ in zip(noise.steps(), range(5), strict=False)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("epoch", [0, 1])
def test_loader_workers_give_the_same_batches(epoch):
    noise = NoiseDataset((1, 4, 4), 2, num_steps=5)
    noise.set_epoch(epoch)
    alone = [batch["pixel_values"] for batch in noise]
    shared = [batch["pixel_values"] for batch in DataLoader(noise, batch_size=None, num_workers=2)]
    assert len(alone) == len(shared)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one, other)


def test_dtype_and_memory_format():
    batch = NoiseDataset((3, 8, 8), 4, dtype=torch.bfloat16).draw(0)
    assert batch.dtype == torch.bfloat16
    assert batch.is_contiguous(memory_format=torch.channels_last)
    plain = NoiseDataset((3, 8, 8), 4, memory_format=torch.contiguous_format).draw(0)
    assert plain.is_contiguous()
    assert torch.equal(plain.bfloat16(), batch)


def test_size_and_scale_come_from_the_model():
    teacher = timm.create_model("resnet10_cifar", width=4, in_chans=1, pretrained_cfg_overlay={"input_size": (1, 8, 8)})
    noise = NoiseDataset.for_model(teacher, batch_size=4)
    assert (noise.input_size, noise.mean, noise.std) == ((1, 8, 8), 0.0, 1.0)
    assert NoiseDataset.for_model(teacher, input_size=(1, 16, 16)).input_size == (1, 16, 16)
    raw = {"mean": (0.0,), "std": (1.0,), "input_size": (1, 8, 8)}
    teacher = timm.create_model("resnet10_cifar", width=4, in_chans=1, pretrained_cfg_overlay=raw)
    x = NoiseDataset.for_model(teacher).draw(0)
    assert abs(x.mean() - 0.5) < 0.02
    assert abs(x.std() - 0.25) < 0.02
    assert NoiseDataset.for_model(teacher, mean=0.0, std=1.0).std == 1.0


def test_another_distribution_plugs_in():
    noise = NoiseDataset((1, 2, 2), 3, distribution=lambda generator, shape: torch.ones(shape), mean=1.0, std=2.0)
    assert torch.equal(noise.draw(0), torch.full((3, 1, 2, 2), 3.0))


@pytest.mark.parametrize("distribution", ["fractal", "dead_leaves", "low_resolution|cutmix:0.5"])
def test_the_callers_autocast_does_not_change_the_noise(distribution):
    noise = NoiseDataset((3, 16, 16), 4, distribution=distribution)
    with torch.autocast("cpu", torch.bfloat16):
        inside = noise.draw(0)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, noise.draw(0))


def test_resolutions_follow_from_the_full_size():
    noise = NoiseDataset((3, 224, 160), 2, resolutions={0.25: 1, 0.5: 2, 1: 1}, total_steps=8)
    sizes = [noise.image_size(step) for step in range(9)]
    assert sizes == [(56, 40)] * 2 + [(112, 80)] * 4 + [(224, 160)] * 3
    assert noise.draw(3).shape == (2, 3, 112, 80)
    # Small images get no smaller.
    assert NoiseDataset((1, 8, 8), 2, resolutions={0.5: 1, 1: 1}).draw(0).shape[-2:] == (8, 8)
    assert NoiseDataset((1, 24, 24), 2, resolutions={0.25: 1, 0.5: 1}).image_sizes() == [((16, 16), 1.0)]
    back = NoiseDataset((1, 24, 24), 2, resolutions={0.25: 1, 1: 2, 0.5: 1}).image_sizes()
    assert back == [((16, 16), 0.25), ((24, 24), 0.5), ((16, 16), 0.25)]


def test_resolutions_of_structured_noise_are_on_by_default_and_can_be_turned_off():
    noise = NoiseDataset((3, 32, 32), 2, distribution="structured", total_steps=20)
    assert noise.image_sizes() == [((16, 16), 0.6), ((24, 24), 0.25), ((32, 32), 0.15)]
    assert [noise.draw(step).shape[-1] for step in (0, 11, 12, 16, 17, 19)] == [16, 16, 24, 24, 32, 32]
    assert NoiseDataset((3, 32, 32), distribution="structured").resolutions == STRUCTURED_RESOLUTIONS
    assert NoiseDataset((3, 32, 32), distribution="structured", resolutions={1: 1}).resolutions == {1: 1}
    for other in ({"distribution": "white"}, {"distribution": "dead_leaves"}, {}):
        assert NoiseDataset((3, 32, 32), **other).resolutions == {1: 1}
    # What is measured is measured at full size.
    assert NoiseDataset((3, 32, 32), distribution="structured", held_out=True).resolutions == {1: 1}


def test_resolutions_need_the_length_of_the_training():
    with pytest.raises(ValueError, match="total_steps"):
        NoiseDataset((3, 32, 32), 2, distribution="structured").draw(0)


def test_reads_resolutions():
    assert NoiseDataset((3, 32, 32), resolutions="0.5:0.6,1:0.4").resolutions == {0.5: 0.6, 1: 0.4}
    assert parse_resolutions("0.5:0.6,1:0.4") == {0.5: 0.6, 1: 0.4}
    assert parse_resolutions("1") == {1: 1}
    for text in ("half:1", "2:1", "0:1", "0.5:-1", "", "0.5:1,0.5:1", "1:1,0.5:1,1.0:1", "0.5:1:1"):
        with pytest.raises(ValueError, match=f"resolutions is {text!r}"):
            parse_resolutions(text)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_size": (3, 0, 8)}, "input_size"),
        ({"input_size": (8, 8)}, "input_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_steps": 0}, "num_steps"),
        ({"std": 0.0}, "std"),
        ({"std": float("nan")}, "std"),
        ({"resolutions": {0.5: 1, 1: float("inf")}}, r"\(0, 1\]"),
        ({"resolutions": "2:1"}, "resolutions is '2:1'"),
        ({"resolutions": {}}, r"\(0, 1\]"),
        ({"resolutions": {1.5: 1}}, r"\(0, 1\]"),
        ({"resolutions": {1: 0}}, r"\(0, 1\]"),
        ({"distribution": "wite"}, "'white'"),
        ({"rank": MAX_RANKS}, "rank"),
        ({"rank": -1}, "rank"),
    ],
)
def test_refuses_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NoiseDataset(**{"input_size": (1, 2, 2)} | kwargs)


def test_refuses_a_distribution_that_gives_another_shape():
    def half(generator, shape):
        return torch.zeros((*shape[:-1], shape[-1] // 2))

    with pytest.raises(ValueError, match=r"'half' .*\(2, 1, 4, 2\).* \(2, 1, 4, 4\)"):
        NoiseDataset((1, 4, 4), 2, distribution=half).draw(0)


def test_refuses_a_step_out_of_range_and_a_model_without_size():
    with pytest.raises(ValueError, match=f"step .*{MAX_STEPS - 1}"):
        NoiseDataset((1, 2, 2)).draw(MAX_STEPS)
    with pytest.raises(ValueError, match=r"Linear .*input_size"):
        NoiseDataset.for_model(nn.Linear(2, 2))
