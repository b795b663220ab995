"""The constraint family: each projection is feasible, repeatable, and nearest among the set's points."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypertorch import constraints as module
from hypertorch.constraints import BoundedSum, Box, Constraint, Positive, Simplex

CASES = {
    "positive": Positive(),
    "positive above 0.3": Positive(minimum=0.3),
    "box": Box(lower=-0.1, upper=0.7),
    "half-open box": Box(lower=0.1),
    "point": Box(lower=0.1, upper=0.1),
    "simplex": Simplex(),
    "simplex of 2.5": Simplex(total=2.5),
    "bounded sum": BoundedSum(total=1.5),
    "bounded sum, tight": BoundedSum(total=0.0),
    "bounded sum, slack": BoundedSum(total=1e6),
    "bounded sum, above a bound": BoundedSum(lower=0.2, upper=0.9, total=1.7),
    "bounded sum, signed": BoundedSum(lower=-0.3, upper=0.4, total=-0.2),
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
each_case = pytest.mark.parametrize("constraint", CASES.values(), ids=CASES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    normals = [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) + shift
        for shape in [(1,), (2,), (7,), (3, 4, 5), ()]
        for scale, shift in [(0.01, 0.0), (1.0, 0.0), (1.0, 5.0), (30.0, -10.0)]
    ]
    ties = [torch.full((6,), value, dtype=torch.float64) for value in (-1.0, 0.0, 0.25, 1.0, 4.0)]
    return [value.to(dtype) for value in normals + ties]


def points_of(constraint: Constraint, like: Tensor) -> list[Tensor]:
    """Random points of the set, made without the projection under test, in float64."""
    generator = torch.Generator().manual_seed(11)
    count = like.numel()
    points = []
    for _ in range(20):
        weights = torch.rand(count, generator=generator, dtype=torch.float64)
        if isinstance(constraint, Positive):
            point = constraint.minimum + 3 * weights * (weights > 0.3)
        elif isinstance(constraint, Box):
            upper = min(constraint.upper, 10.0)
            point = constraint.lower + (upper - constraint.lower) * weights
        elif isinstance(constraint, Simplex):
            exponential = -(torch.log1p(-weights) ** 2)
            point = constraint.total * exponential / exponential.sum()
        else:
            assert isinstance(constraint, BoundedSum)
            room = weights * (constraint.upper - constraint.lower)
            budget = constraint.total - count * constraint.lower
            share = min(1.0, budget / max(float(room.sum()), 1e-12))
            point = constraint.lower + room * share
        points.append(point.reshape(like.shape))
    return points


@each_case
@each_dtype
def test_projection_is_feasible_and_repeatable(constraint: Constraint, dtype: torch.dtype) -> None:
    for value in inputs(dtype):
        if isinstance(constraint, BoundedSum) and value.numel() * constraint.lower > constraint.total:
            continue
        projected = constraint.project(value)
        assert constraint.feasible(projected)
        assert projected.dtype == dtype
        assert projected.shape == value.shape
        assert torch.equal(constraint.project(projected), projected)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_projection_is_nearest(constraint: Constraint, dtype: torch.dtype) -> None:
    """The variational inequality `<x - Px, z - Px> <= 0` for points z of the set holds at the nearest point only."""
    for value in inputs(dtype):
        if isinstance(constraint, BoundedSum) and value.numel() * constraint.lower > constraint.total:
            continue
        value64, projected = value.double(), constraint.project(value).double()
        for point in points_of(constraint, value):
            scale = float((value64 - projected).norm() * (1 + projected.norm() + point.norm()))
            assert float(((value64 - projected) * (point - projected)).sum()) <= 64 * torch.finfo(dtype).eps * scale


@each_case
def test_feasible_points_come_back_bit_for_bit(constraint: Constraint) -> None:
    for value in points_of(constraint, torch.zeros(2, 3)):
        assert constraint.feasible(value)
        assert torch.equal(constraint.project(value), value)


@each_case
def test_infeasible_points_are_seen(constraint: Constraint) -> None:
    assert not constraint.feasible(torch.full((3,), math.nan))
    assert not constraint.feasible(torch.tensor([-5.0, 0.2, 0.2]))


@each_case
def test_nan_stays_and_is_left_to_the_finiteness_check(constraint: Constraint) -> None:
    projected = constraint.project(torch.tensor([0.1, math.nan, 0.2]))
    assert projected.isnan().any()


@each_case
def test_projection_has_no_graph_and_leaves_its_argument(constraint: Constraint) -> None:
    value = torch.tensor([5.0, -4.0, 0.3], requires_grad=True)
    projected = constraint.project(value)
    assert not projected.requires_grad
    assert value.tolist() == pytest.approx([5.0, -4.0, 0.3])
    assert projected.data_ptr() != value.data_ptr()


def test_simplex_against_the_sorting_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in [1, 2, 5, 1000]:
        value = torch.randn(count, generator=generator, dtype=torch.float64) * 2
        ordered = value.sort(descending=True).values
        thetas = (ordered.cumsum(0) - 1.0) / torch.arange(1, count + 1, dtype=torch.float64)
        theta = thetas[(ordered > thetas).nonzero().max()]
        torch.testing.assert_close(Simplex().project(value), (value - theta).clamp(min=0.0), rtol=1e-12, atol=1e-14)


def test_simplex_known_values() -> None:
    value = torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64)
    torch.testing.assert_close(Simplex().project(value), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    value = torch.tensor([0.6, 0.8, -1.0], dtype=torch.float64)
    torch.testing.assert_close(Simplex().project(value), torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64))


def test_bounded_sum_satisfies_the_optimality_conditions() -> None:
    """`Px = clamp(x - theta, 0, 1)` with one theta >= 0, and theta > 0 only if the sum is at its bound."""
    value = 2 * torch.randn(5000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    projected = BoundedSum(total=900.0).project(value)
    free = (projected > 0) & (projected < 1)
    theta = (value - projected)[free]
    assert float(theta.min()) > 0
    assert float(theta.max() - theta.min()) < 1e-12
    torch.testing.assert_close(projected, (value - theta[0]).clamp(0, 1), rtol=0, atol=1e-12)
    assert float(projected.sum()) == pytest.approx(900.0, rel=1e-13)
    slack = BoundedSum(total=4000.0).project(value)
    assert torch.equal(slack, value.clamp(0, 1))


@pytest.mark.parametrize("shift", [0.0, 1e6, -1e6])
def test_large_inputs_lose_no_sum(shift: float) -> None:
    value = torch.linspace(-1, 1, 1001, dtype=torch.float64) + shift
    assert float(Simplex().project(value).sum()) == pytest.approx(1.0, rel=1e-13)
    expected = min(250.0, float(value.clamp(0, 1).sum()))
    assert float(BoundedSum(total=250.0).project(value).sum()) == pytest.approx(expected, rel=1e-13)


def test_many_entries_in_single_precision() -> None:
    value = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    assert float(Simplex().project(value).double().sum()) == pytest.approx(1.0, rel=2e-6)
    assert float(BoundedSum(total=1000.0).project(value).double().sum()) == pytest.approx(1000.0, rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9),
    st.floats(0.0, 5.0),
)
def test_bounded_sum_of_anything(entries: list[float], total: float) -> None:
    value = torch.tensor(entries, dtype=torch.float64)
    constraint = BoundedSum(total=total)
    projected = constraint.project(value)
    assert constraint.feasible(projected)
    assert torch.equal(constraint.project(projected), projected)
    assert float(projected.sum()) >= min(total, float(value.clamp(0, 1).sum())) - 1e-9


def test_a_positive_half_is_never_rounded_to_zero() -> None:
    assert float(Positive().project(torch.tensor(0.0, dtype=torch.float16))) > 0


def test_an_empty_tensor() -> None:
    assert BoundedSum(total=1.0).project(torch.empty(0)).shape == (0,)
    assert BoundedSum(total=1.0).feasible(torch.empty(0))
    with pytest.raises(ValueError, match=r"`Simplex` got an empty tensor"):
        Simplex().project(torch.empty(0))


def test_refused_settings() -> None:
    for minimum in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"`minimum` of `Positive` is .*use `Box\(lower=0.0\)`"):
            Positive(minimum=minimum)
    for bounds in ((1.0, 0.0), (math.nan, 0.0)):
        with pytest.raises(ValueError, match=r"`lower` and `upper` of `Box` are .*no number lies between"):
            Box(lower=bounds[0], upper=bounds[1])
    for total in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"`total` of `Simplex` is"):
            Simplex(total=total)
    with pytest.raises(ValueError, match=r"`lower` and `upper` of `BoundedSum`"):
        BoundedSum(lower=1.0, upper=0.0, total=1.0)
    with pytest.raises(ValueError, match=r"`upper` of `BoundedSum` is inf.*use `Box`"):
        BoundedSum(upper=math.inf, total=1.0)
    with pytest.raises(ValueError, match=r"`total` of `BoundedSum` is nan"):
        BoundedSum(total=math.nan)
    with pytest.raises(ValueError, match=r"`total` of `BoundedSum` is 1.0, but the tensor has 5 entries"):
        BoundedSum(lower=0.5, total=1.0).project(torch.zeros(5))


@each_case
def test_integers_are_refused(constraint: Constraint) -> None:
    with pytest.raises(TypeError, match=r"got a tensor of dtype torch.int64"):
        constraint.project(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"got a tensor of dtype torch.int64"):
        constraint.feasible(torch.tensor([1, 2]))


def test_every_leaf_is_listed() -> None:
    leaves = {kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Constraint)}
    assert leaves - {Constraint} == {type(constraint) for constraint in CASES.values()}
