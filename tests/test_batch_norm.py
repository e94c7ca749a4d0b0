import copy
import itertools
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn

from hf_noisekd import batch_statistics, recalibrate_batch_norm
from hf_noisekd.models.batch_norm import find_batch_norm
from hf_noisekd.models.classifier import noisekd_section


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


def modes(model):
    return [
        (module.training, getattr(module, "track_running_stats", None), len(module._buffers))
        for module in model.modules()
    ]


def test_gives_the_logits_of_training_mode_without_touching_a_buffer(tiny_cnn):
    pixels = torch.randn(12, 1, 8, 8)
    reference = copy.deepcopy(tiny_cnn).train()
    reference.drop.eval()
    expected = reference(pixels)
    before, modes_before = snapshot(tiny_cnn), modes(tiny_cnn)
    running = tiny_cnn(pixels)
    with batch_statistics(tiny_cnn):
        torch.testing.assert_close(tiny_cnn(pixels), expected)
        assert not tiny_cnn.drop.training
    assert_unchanged(tiny_cnn, before)
    assert modes(tiny_cnn) == modes_before
    assert torch.equal(tiny_cnn(pixels), running)
    assert not torch.allclose(running, expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm2d(4), (6, 4, 3, 3)),
        (nn.BatchNorm3d(4), (6, 4, 2, 3, 3)),
        (BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(0.5)), (6, 4, 3, 3)),
        (nn.BatchNorm2d(4, momentum=None), (6, 4, 3, 3)),
        (nn.BatchNorm2d(4, affine=False, track_running_stats=False), (6, 4, 3, 3)),
    ],
)
def test_every_kind_of_layer_normalises_by_the_batch(layer, shape):
    layer.eval()
    x = 5 + 3 * torch.randn(shape)
    before = snapshot(layer)
    with batch_statistics(layer):
        out = layer(x)
    expected = (x - x.transpose(0, 1).flatten(1).mean(1).view(1, -1, *[1] * (x.ndim - 2))) / x.transpose(0, 1).flatten(
        1
    ).std(1, correction=0).view(1, -1, *[1] * (x.ndim - 2))
    if isinstance(layer, BatchNormAct2d):
        expected = expected.relu()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert_unchanged(layer, before)


def test_sync_batch_norm_counts_as_batch_norm():
    layer = nn.SyncBatchNorm(4).eval()
    with batch_statistics(layer):
        assert layer.training
    assert not layer.training


def test_restores_after_an_exception_and_from_a_mixed_state(tiny_cnn):
    tiny_cnn.bn2.train()
    before = modes(tiny_cnn)
    with pytest.raises(KeyError), batch_statistics(tiny_cnn):
        raise KeyError
    assert modes(tiny_cnn) == before


def test_nests_also_with_itself(tiny_cnn):
    before = modes(tiny_cnn)
    outer, inner = batch_statistics(tiny_cnn), batch_statistics(tiny_cnn, fraction=0.4)
    with outer:
        within = modes(tiny_cnn)
        with inner, outer:
            pass
        assert modes(tiny_cnn) == within
        assert tiny_cnn.bn1.training
    assert modes(tiny_cnn) == before


def test_fraction_chooses_layers_by_a_seeded_order():
    model = timm.create_model("resnet18_cifar", width=4).eval()
    total = len(find_batch_norm(model))
    chosen = [batch_statistics(model, fraction).layer_names for fraction in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)]
    assert [len(names) for names in chosen] == [round(share * total) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
    for smaller, larger in itertools.pairwise(chosen):
        assert set(smaller) < set(larger)
    assert batch_statistics(model, 0.5).layer_names == chosen[3]
    assert batch_statistics(model, 0.5, seed=1).layer_names != chosen[3]
    with batch_statistics(model, 0.5):
        assert sorted(name for name, layer in find_batch_norm(model).items() if layer.training) == sorted(chosen[3])


def test_drop_path_stays_off():
    model = timm.create_model("resnet18_cifar", width=4, drop_path_rate=0.9, drop_rate=0.9).eval()
    pixels = torch.randn(8, 3, 32, 32)
    with batch_statistics(model):
        assert torch.equal(model(pixels), model(pixels))


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_refuses_a_fraction_out_of_range(tiny_cnn, fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        batch_statistics(tiny_cnn, fraction)


def test_says_what_was_found_where_there_is_no_batch_norm():
    with pytest.raises(ValueError, match="2 LayerNorm"):
        batch_statistics(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.LayerNorm(3)))
    with pytest.raises(ValueError, match=r"FrozenBatchNormAct2d.*replace it by nn.BatchNorm2d"):
        batch_statistics(nn.Sequential(FrozenBatchNormAct2d(3)))
    with pytest.raises(ValueError, match="no normalisation layer at all"):
        batch_statistics(nn.Linear(3, 3))


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


@pytest.mark.parametrize("sizes", [[37], [1, 36], [10, 10, 10, 7], [1] * 37])
def test_recalibration_does_not_depend_on_the_batches(tiny_cnn, sizes):
    images = 0.5 + torch.randn(37, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(tiny_cnn)
    recalibrate_batch_norm(reference, [images])
    # One-shot iterators and mappings are fine, too.
    recalibrate_batch_norm(tiny_cnn, iter([{"pixel_values": batch} for batch in images.split(sizes)]))
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(tiny_cnn.state_dict()[name], expected, atol=1e-6, rtol=1e-6)


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


def test_recalibration_refuses_too_few_images(tiny_cnn):
    with pytest.raises(ValueError, match="got no batch"):
        recalibrate_batch_norm(tiny_cnn, [])
    with pytest.raises(ValueError, match="'bn3' saw one value a channel"):
        recalibrate_batch_norm(tiny_cnn, [torch.randn(1, 1, 8, 8)])


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_recalibrated_student_knows_that_it_is(tiny_cnn, library):
    section = {"batch_norm": "batch", "steps": 3}
    if library == "timm":
        tiny_cnn.noisekd = section
    else:
        tiny_cnn.config = SimpleNamespace(noisekd=section)
    recalibrate_batch_norm(tiny_cnn, [torch.randn(8, 1, 8, 8), torch.randn(4, 1, 8, 8)])
    assert noisekd_section(tiny_cnn) == {"batch_norm": "running", "steps": 3, "recalibration": {"images": 12}}


def test_recalibrates_a_model_in_half_precision(tiny_cnn):
    images = torch.randn(16, 1, 8, 8)
    recalibrate_batch_norm(tiny_cnn.bfloat16(), [images])
    assert tiny_cnn.bn1.running_var.dtype == torch.bfloat16
    expected = tiny_cnn.conv1(images.bfloat16()).float().mean((0, 2, 3))
    torch.testing.assert_close(tiny_cnn.bn1.running_mean.float(), expected, atol=0.02, rtol=0.02)
