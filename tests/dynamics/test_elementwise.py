"""The safe square root, and that the short forms for numbers equal the long ones for tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hypertorch.dynamics import elementwise
from hypertorch.dynamics.elementwise import safe_sqrt
from tests.helpers.problems import normal

F64 = torch.float64


def squares_root(scale: Tensor) -> Tensor:
    """The root of sums of squares that are zero, whatever the scale is, in two entries."""
    gradient = scale * torch.tensor([0.0, 2.0, 0.0, -0.5], dtype=F64)
    return (safe_sqrt(gradient.square()) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)).sum()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own, in jvp
def test_all_derivatives_are_right_where_entries_are_zero() -> None:
    """The figure is `6 |scale|`."""
    scale, one = torch.tensor(1.5, dtype=F64), torch.tensor(1.0, dtype=F64)
    first = torch.func.grad(squares_root)
    second, third = torch.func.grad(first), torch.func.grad(torch.func.grad(first))
    assert float(squares_root(scale)) == pytest.approx(9.0, rel=1e-15)
    assert float(first(scale)) == pytest.approx(6.0, rel=1e-15)
    assert float(second(scale)) == pytest.approx(0.0, abs=1e-14)
    assert float(third(scale)) == pytest.approx(0.0, abs=1e-14)
    assert float(torch.func.jvp(squares_root, (scale,), (one,))[1]) == pytest.approx(6.0, rel=1e-15)
    assert float(torch.func.jvp(first, (scale,), (one,))[1]) == pytest.approx(0.0, abs=1e-14)
    along = torch.func.vmap(first)(torch.stack([scale, -scale]))
    torch.testing.assert_close(along, torch.tensor([6.0, -6.0], dtype=F64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_are_those_of_the_square_root(dtype: torch.dtype) -> None:
    value = torch.tensor([0.0, 1e-30, 0.25, 7.0, math.inf], dtype=dtype)
    assert torch.equal(safe_sqrt(value), value.sqrt())
    assert safe_sqrt(value).dtype == dtype


def test_a_negative_number_is_zero_and_nan_stays_nan() -> None:
    value = torch.tensor([-1e-20, math.nan], dtype=F64)
    assert float(safe_sqrt(value)[0]) == 0.0
    assert math.isnan(float(safe_sqrt(value)[1]))


@pytest.mark.parametrize(
    "function",
    [
        elementwise.descend,
        elementwise.decayed,
        elementwise.running_mean,
        elementwise.running_square,
        lambda a, b, setting: elementwise.descend_quotient(a, b, b.square() + 0.1, setting),
    ],
)
@pytest.mark.parametrize("setting", [0.0, 0.3, 0.9])
def test_a_number_and_a_tensor_do_the_same(function: Callable[..., Tensor], setting: float) -> None:
    a, b = normal(3, 4, seed=1), normal(3, 4, seed=2)
    expected = function(a, b, torch.full((4,), setting, dtype=F64))
    torch.testing.assert_close(function(a, b, setting), expected, rtol=1e-14, atol=1e-15)
