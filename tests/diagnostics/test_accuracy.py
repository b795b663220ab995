"""Relative errors and angles, and the law that an error follows."""

from __future__ import annotations

import math

import pytest
import torch

from hypertorch.diagnostics.accuracy import Accuracy
from hypertorch.diagnostics.geometric_fit import fit_geometric

EXACT = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor(4.0)}


def test_errors_are_relative_to_all_entries_and_to_each_name() -> None:
    accuracy = Accuracy.of({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor(2.0)}, EXACT)
    assert accuracy.error == pytest.approx(math.sqrt(1 + 4) / 5)
    assert accuracy.errors == {"a": pytest.approx(1 / 3), "b": pytest.approx(0.5)}
    assert accuracy.cosine == pytest.approx((9 + 8) / (5 * math.sqrt(9 + 1 + 4)))


def test_the_exact_value_itself_and_its_opposite() -> None:
    same = Accuracy.of(EXACT, EXACT)
    assert (same.error, same.cosine) == (0.0, pytest.approx(1.0))
    opposite = Accuracy.of({name: -value for name, value in EXACT.items()}, EXACT)
    assert (opposite.error, opposite.cosine) == (pytest.approx(2.0), pytest.approx(-1.0))


def test_zeros_have_no_direction_and_no_scale() -> None:
    zeros = {name: torch.zeros_like(value) for name, value in EXACT.items()}
    assert Accuracy.of(zeros, zeros).error == 0.0
    assert Accuracy.of(EXACT, zeros).error == math.inf
    assert Accuracy.of(zeros, EXACT).error == 1.0
    assert math.isnan(Accuracy.of(zeros, EXACT).cosine)


def test_small_differences_of_single_precision_are_seen_in_double() -> None:
    value = torch.tensor([1.0e4], dtype=torch.float32)
    above = torch.nextafter(value, value + 1)
    assert Accuracy.of({"a": above}, {"a": value}).error == pytest.approx(2.0**-10 / 1e4, rel=1e-12)


def test_complex_values_count_by_both_parts() -> None:
    exact = {"a": torch.tensor([3.0 + 4.0j])}
    assert Accuracy.of({"a": torch.tensor([3.0 + 3.0j])}, exact).error == pytest.approx(0.2)


def test_a_law_that_holds_is_found() -> None:
    lengths = list(range(0, 40, 3))
    fit = fit_geometric(lengths, [5.0 * 0.8**length for length in lengths])
    assert fit is not None
    assert (fit.rate, fit.factor) == (pytest.approx(0.8, rel=1e-12), pytest.approx(5.0, rel=1e-10))
    assert fit.spread < 1e-12
    assert "falls by 0.8 per step, from 5 at none" in str(fit)


def test_a_floor_and_what_falls_faster_are_left_out() -> None:
    lengths = list(range(0, 200, 5))
    errors = [max(0.9**length + 3 * 0.5**length, 1e-6) for length in lengths]
    fit = fit_geometric(lengths, errors)
    assert fit is not None
    assert fit.rate == pytest.approx(0.9, rel=1e-4)
    # 0.9^110 = 9e-6 is within ten times the floor: of the 22 points before it the later half.
    assert fit.num_points == 11


@pytest.mark.parametrize(
    "errors",
    [[], [1.0, 0.5], [1.0, 0.9, 0.8, 0.7, 0.6], [1e-9, 1e-6, 1e-3, 1.0, 10.0], [math.inf, 1.0, 0.0, 0.0]],
)
def test_no_rate_where_none_can_be_told(errors: list[float]) -> None:
    assert fit_geometric(range(len(errors)), errors) is None
