import pytest
import torch

from hf_noisekd.shrinking.least_squares import Moments, RidgeFit


def rows(count=40, groups=2, inputs=3, outputs=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, groups, inputs, generator=generator) + 1
    weights = torch.randn(groups, inputs, outputs, generator=generator)
    return x, torch.einsum("nlgd,gdo->nlgo", x, weights) + 2.0


@pytest.mark.parametrize("has_offset", [True, False])
def test_a_solution_is_that_of_least_squares(has_offset):
    x, y = rows()
    moments = Moments()
    for part in (slice(0, 30), slice(30, 40)):
        moments.add(x[part, 0], y[part, 0])
    found, offsets = moments.solve(0.0, has_offset=has_offset)
    for group in range(2):
        columns = x[:, 0, group].double()
        if has_offset:
            columns = torch.cat([columns, torch.ones(len(columns), 1)], 1)
        expected = torch.linalg.lstsq(columns, y[:, 0, group].double()).solution
        torch.testing.assert_close(found[group], expected[:3], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(offsets[group], expected[3] if has_offset else torch.zeros(4).double())
    predicted = torch.einsum("ngd,gdo->ngo", x[:, 0].double(), found) + offsets
    error = (predicted - y[:, 0]).square().sum() / y.square().sum()
    assert moments.error(found, offsets) == pytest.approx(error.item(), abs=1e-6)


def test_an_error_counts_the_offset_as_well():
    x, y = rows()
    moments = Moments()
    moments.add(x[:, 0], y[:, 0])
    weights, offsets = torch.randn(2, 3, 4).double(), torch.randn(2, 4).double()
    predicted = torch.einsum("ngd,gdo->ngo", x[:, 0].double(), weights) + offsets
    error = (predicted - y[:, 0]).square().sum() / y.square().sum()
    assert moments.error(weights, offsets) == pytest.approx(error.item())


def test_a_fit_keeps_nothing_that_does_not_help_on_other_images():
    x, _ = rows(count=64, inputs=32)
    fit = RidgeFit(len(x))
    fit.add(x, torch.randn(64, 1, 2, 256, generator=torch.Generator().manual_seed(1)))
    assert fit.solve(has_offset=False) is None


def test_a_fit_takes_batches_and_few_positions_of_many():
    x, y = rows(count=64)
    whole, parts = RidgeFit(64), RidgeFit(64)
    whole.add(x, y)
    for part in range(0, 64, 10):
        parts.add(x[part : part + 10], y[part : part + 10])
    expected, found = whole.solve(has_offset=True), parts.solve(has_offset=True)
    torch.testing.assert_close(found.weights, expected.weights)
    assert found.error == pytest.approx(expected.error)
    assert found.error < 0.1


def test_too_few_images_for_some_to_be_held_out_are_no_fit():
    x, y = rows(count=3)
    fit = RidgeFit(3)
    fit.add(x, y)
    assert fit.solve(has_offset=True) is None
