"""The change of units that makes a map's entries alike: mixed units are found, and what is alike is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hypertorch.diagnostics.balancing import balancing
from tests.helpers.problems import normal

F64 = torch.float64
UNITS = 256.0 ** torch.tensor([0.0, 2.0, -1.0, 0.0, 1.0, -2.0], dtype=F64)


def product(*matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the product of each matrix with its own vector, counted."""
    return lambda vectors: torch.einsum("mij,mj->mi", torch.stack(matrices), vectors)


def in_mixed_units(matrix: Tensor) -> Tensor:
    return UNITS[:, None] * matrix / UNITS


def row_sizes(matrix: Tensor, scale: Tensor) -> Tensor:
    return (matrix * scale / scale[:, None]).abs().sum(1)


def test_mixed_units_are_found() -> None:
    alike = normal(6, 6, seed=1) + 3.0
    mixed = in_mixed_units(alike)
    (scale,) = balancing(product(mixed), torch.zeros(1, 6, dtype=F64))
    assert row_sizes(mixed, torch.ones(6, dtype=F64)).log10().std() > 2
    # Up to a common factor and the rounding to powers of 256.
    ratio = (scale / UNITS).log() / torch.log(torch.tensor(256.0, dtype=F64))
    assert float(ratio.max() - ratio.min()) <= 1.0
    exponents = scale.log() / torch.log(torch.tensor(256.0, dtype=F64))
    torch.testing.assert_close(exponents, exponents.round(), rtol=0, atol=1e-12)


def test_what_is_alike_is_left_alone() -> None:
    scale = balancing(product(normal(6, 6, seed=1) + 3.0, 1e4 * torch.eye(6, dtype=F64)), torch.zeros(2, 6, dtype=F64))
    assert torch.equal(scale, torch.ones(2, 6, dtype=F64))


def test_a_map_of_one_entry_has_nothing_to_balance() -> None:
    assert float(balancing(product(torch.full((1, 1), 1e4, dtype=F64)), torch.zeros(1, 1, dtype=F64))) == 1.0


def test_maps_are_balanced_each_on_its_own() -> None:
    alike = normal(6, 6, seed=1) + 3.0
    like = torch.zeros(2, 6, dtype=F64)
    both = balancing(product(in_mixed_units(alike), 1e6 * alike), like)
    assert torch.equal(both[0], balancing(product(in_mixed_units(alike)), like[:1])[0])
    assert torch.equal(both[1], torch.ones(6, dtype=F64))


def test_entries_that_nothing_reaches_keep_their_unit() -> None:
    matrix = torch.zeros(3, 3, dtype=F64)
    matrix[0, 1], matrix[1, 0] = 1e6, 1e-6
    scale = balancing(product(matrix), torch.zeros(1, 3, dtype=F64))[0]
    assert float(scale[2]) == 1.0
    assert float(scale[0] / scale[1]) == 256.0**2


def test_it_takes_five_products() -> None:
    calls: list[Tensor] = []

    def apply(vectors: Tensor) -> Tensor:
        calls.append(vectors)
        return vectors

    balancing(apply, torch.zeros(1, 4, dtype=F64))
    assert len(calls) == 5
    assert {float(value) for call in calls for value in call.flatten()} == {-1.0, 1.0}


def test_units_too_far_apart_for_one_product_are_reached_in_five() -> None:
    """Each product moves an entry by at most the square root of a thousand; five of them go 1e7.5 each way."""
    far = torch.tensor([[0.0, 1e14], [1e-14, 0.0]], dtype=F64)
    (scale,) = balancing(product(far), torch.zeros(1, 2, dtype=F64))
    assert row_sizes(far, scale).tolist() == pytest.approx([1.0, 1.0], rel=300)
    assert scale.log().div(math.log(256.0)).round().tolist() == [3.0, -3.0]
