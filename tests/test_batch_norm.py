import copy
import itertools
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import modes, snapshot
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.fx import symbolic_trace

from hf_noisekd import batch_statistics
from hf_noisekd.models.batch_norm import check_leaves_stored_statistics, find_batch_norm, num_frozen

BOTH_2D = [(nn.BatchNorm2d, (6, 4, 3, 3)), (BatchNormAct2d, (6, 4, 3, 3))]


def assert_unchanged(model, before):
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


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


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 4)), (nn.BatchNorm3d, (6, 4, 2, 3, 3)), *BOTH_2D])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_a_weight_mixes_the_moments_of_the_batch_with_the_stored_ones(kind, shape, weight):
    layer = kind(4).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.1, 3)
    nn.init.normal_(layer.weight)
    x, before = 5 + 3 * torch.randn(shape), snapshot(layer)
    pooled = x.transpose(0, 1).flatten(1)
    mean = weight * pooled.mean(1) + (1 - weight) * layer.running_mean
    variance = weight * pooled.var(1, correction=0) + (1 - weight) * layer.running_var
    expected = F.batch_norm(x, mean, variance, layer.weight, layer.bias)
    with batch_statistics(layer, weight=weight):
        found = layer(x)
    torch.testing.assert_close(found, expected.relu() if kind is BatchNormAct2d else expected)
    assert_unchanged(layer, before)
    assert "forward" not in vars(layer)


def test_a_weight_of_one_is_the_batch_and_mixtures_nest(tiny_cnn):
    pixels, modes_before = torch.randn(12, 1, 8, 8), modes(tiny_cnn)
    plain = tiny_cnn(pixels)
    batch, mixed, little = (batch_statistics(tiny_cnn, weight=weight) for weight in (1.0, 0.5, 0.1))
    expected = {}
    for context in (batch, mixed, little):
        with context:
            expected[context] = tiny_cnn(pixels)
    for outer, inner in itertools.product(expected, repeat=2):
        with outer:
            with inner:
                torch.testing.assert_close(tiny_cnn(pixels), expected[inner])
                tiny_cnn.eval()
                torch.testing.assert_close(tiny_cnn(pixels), expected[inner])
            torch.testing.assert_close(tiny_cnn(pixels), expected[outer])
    assert torch.equal(tiny_cnn(pixels), plain)
    assert modes(tiny_cnn) == modes_before
    assert not torch.allclose(expected[mixed], expected[batch])
    with batch_statistics(tiny_cnn):
        assert torch.equal(tiny_cnn(pixels), expected[batch])


def test_a_weight_of_zero_is_evaluation_mode(tiny_cnn):
    pixels = torch.randn(12, 1, 8, 8)
    pixels[0] = torch.inf  # of which the other images must not know
    expected = tiny_cnn(pixels)
    with batch_statistics(tiny_cnn, weight=0.5), batch_statistics(tiny_cnn, weight=0):
        inside = tiny_cnn(pixels)
    assert inside[1:].isfinite().all()
    torch.testing.assert_close(inside, expected, rtol=0, atol=0, equal_nan=True)


def test_a_compiled_model_notices_mixed_moments(tiny_cnn):
    pixels = torch.randn(12, 1, 8, 8)
    compiled, mixed = torch.compile(tiny_cnn, backend="eager", fullgraph=True), batch_statistics(tiny_cnn, weight=0.5)
    plain = tiny_cnn(pixels)
    with mixed:
        expected = tiny_cnn(pixels)
    for _ in range(2):
        torch.testing.assert_close(compiled(pixels), plain)
        with mixed:
            torch.testing.assert_close(compiled(pixels), expected)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    layer = nn.BatchNorm2d(4).eval()
    own = layer.forward = lambda x: 2 * nn.BatchNorm2d.forward(layer, x)
    x = torch.randn(6, 4, 3, 3)
    whole = nn.BatchNorm2d(4)(x)
    with batch_statistics(layer, weight=0.5):
        doubled = layer(x)
        with batch_statistics(layer):
            torch.testing.assert_close(layer(x), 2 * whole)
    assert layer.forward is own
    del layer.forward
    with batch_statistics(layer, weight=0.5):
        torch.testing.assert_close(doubled, 2 * layer(x))


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


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.booleans()), max_size=8))
def test_holds_whatever_mode_is_set_inside(tiny_cnn, steps):
    pixels = torch.randn(12, 1, 8, 8)
    with batch_statistics(tiny_cnn.eval()):
        expected = tiny_cnn(pixels)
    before, modules = snapshot(tiny_cnn), list(tiny_cnn.modules())
    asked = {module: module.training for module in modules}
    with batch_statistics(tiny_cnn):
        for index, mode, nested in steps:
            with batch_statistics(tiny_cnn, fraction=0.4) if nested else nullcontext():
                modules[index].train(mode)
            asked |= dict.fromkeys(modules[index].modules(), mode)
            tiny_cnn.drop.eval()
            torch.testing.assert_close(tiny_cnn(pixels), expected)
            tiny_cnn.drop.train(asked[tiny_cnn.drop])
    assert {module: module.training for module in modules} == asked
    assert_unchanged(tiny_cnn, before)


def test_a_forward_pass_that_leaves_the_batch_is_found(tiny_cnn):
    class WithStatistics(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return F.batch_norm(self.model(x), torch.zeros(3), torch.ones(3), training=self.training)

    for model in (tiny_cnn, nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten())):
        check_leaves_stored_statistics(model, (1, 8, 8))
    for mode in (True, False):
        traced = symbolic_trace(
            nn.Sequential(nn.Conv2d(1, 4, 3), BatchNormAct2d(4), nn.BatchNorm2d(4), nn.Flatten()).train(mode)
        )
        with pytest.raises(ValueError, match="1 of 2"):
            check_leaves_stored_statistics(traced, (1, 8, 8))
    with pytest.raises(ValueError, match="1 of 4"):
        check_leaves_stored_statistics(WithStatistics(tiny_cnn), (1, 8, 8))


def test_a_frozen_layer_among_others_is_found(tiny_cnn):
    tiny_cnn.bn2 = FrozenBatchNormAct2d(8, apply_act=False)
    assert num_frozen(tiny_cnn) == 1
    with pytest.raises(ValueError, match=r"1 frozen .*teacher_statistics=0"):
        check_leaves_stored_statistics(tiny_cnn, (1, 8, 8))


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
    with pytest.raises(ValueError, match=f"{fraction}"):
        batch_statistics(tiny_cnn, fraction)


def test_says_what_was_found_where_there_is_no_batch_norm():
    with pytest.raises(ValueError, match="2 LayerNorm"):
        batch_statistics(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.LayerNorm(3)))
    with pytest.raises(ValueError, match=r"\d LayerNorm2d, \d LayerNorm"):
        batch_statistics(timm.create_model("test_convnext"))
    with pytest.raises(ValueError, match=r"FrozenBatchNormAct2d.*nn\.BatchNorm2d"):
        batch_statistics(nn.Sequential(FrozenBatchNormAct2d(3)))
    with pytest.raises(ValueError, match="no normalisation"):
        batch_statistics(nn.Linear(3, 3))
