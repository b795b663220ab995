"""Between the user's box and the unit cube, with the chain rule against autograd."""

from __future__ import annotations

import pytest
import torch

from hypertorch.search.scale import Scale

F64 = torch.float64
SCALE = Scale([(-2.0, 6.0), (1e-4, 1e2)], log=[False, True])


def test_there_and_back() -> None:
    points = torch.tensor([[0.0, 1e-1], [-2.0, 1e-4], [6.0, 1e2]], dtype=F64)
    unit = SCALE.to_unit(points)
    torch.testing.assert_close(unit, torch.tensor([[0.25, 0.5], [0.0, 0.0], [1.0, 1.0]], dtype=F64))
    torch.testing.assert_close(SCALE.from_unit(unit), points)


def test_no_point_of_the_cube_is_outside_the_box() -> None:
    tight = Scale([(0.1, 0.3), (0.1, 0.7)], log=[True, True])
    corners = tight.from_unit(torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=F64))
    assert corners.tolist() == [[0.1, 0.1], [0.3, 0.7]]


def test_gradients_follow_the_chain_rule() -> None:
    unit = torch.rand((3, 2), generator=torch.Generator().manual_seed(0), dtype=F64)

    def function(points: torch.Tensor) -> torch.Tensor:
        return (points[:, 0] * points[:, 1]).sin().sum()

    leaves = unit.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(SCALE.from_unit(leaves)), leaves)
    points = SCALE.from_unit(unit).requires_grad_()
    (own,) = torch.autograd.grad(function(points), points)
    torch.testing.assert_close(SCALE.unit_gradients(points.detach(), own), expected)


@pytest.mark.parametrize(
    ("bounds", "log", "message"),
    [
        ([], None, "`bounds` has 0 axes"),
        ([(0.0, 1.0)], [True, False], "`bounds` has 1 axes and `log` 2"),
        ([(1.0, 1.0)], None, r"axis 0 are 1.0 and 1.0.*finite range"),
        ([(0.0, 1.0), (0.0, float("inf"))], None, "axis 1 are 0.0 and inf"),
        ([(0.0, 1.0)], [True], "axis 0 start at 0.0, which has no logarithm"),
    ],
)
def test_boxes_that_are_none_are_refused(bounds, log, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scale(bounds, log)


def test_points_outside_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`points` has \[200.0\] along axis 1, whose bounds are \[0.0001, 100.0\]"):
        SCALE.check_within(torch.tensor([[0.0, 200.0]], dtype=F64))
    with pytest.raises(ValueError, match="along axis 0"):
        SCALE.check_within(torch.tensor([[float("nan"), 1.0]], dtype=F64))
    SCALE.check_within(torch.tensor([[6.0, 1e-4]], dtype=F64))
