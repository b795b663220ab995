"""The eigenvalues of largest modulus against those of dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypertorch.diagnostics.arnoldi import leading_spectrum
from tests.helpers.problems import normal


def spectrum_of(matrices: Tensor, **options):
    start = normal(matrices.shape[-1], seed=1).expand(len(matrices), -1)
    settings = {"dimension": 20, "max_restarts": 20, "tolerance": 1e-10, **options}
    return leading_spectrum(lambda vectors: torch.einsum("tij,tj->ti", matrices, vectors), start, **settings)


def dense_radii(matrices: Tensor) -> Tensor:
    return torch.linalg.eigvals(matrices).abs().amax(dim=-1)


def test_a_batch_of_nonsymmetric_maps() -> None:
    matrices = normal(6, 60, 60, seed=2)
    result = spectrum_of(matrices, max_restarts=200)
    torch.testing.assert_close(result.eigenvalues.abs(), dense_radii(matrices), rtol=1e-8, atol=0)
    assert float(result.residuals.max()) <= 1e-10
    # Both kinds are among them.
    complex_ones = result.eigenvalues.imag.abs() > 1e-6
    assert complex_ones.any()
    assert not complex_ones.all()


@pytest.mark.parametrize("seed", range(3))
def test_a_residual_is_that_of_the_leading_pair(seed: int) -> None:
    """Of a symmetric map the vector is an eigenvector, or nearly: `|A v - z v| / |z|`, by its definition."""
    half = normal(3, 40, 40, seed=seed)
    matrices = half + half.mT
    result = spectrum_of(matrices, dimension=8, max_restarts=0)
    values, vectors = result.eigenvalues.real, result.vectors
    left_over = torch.einsum("tij,tj->ti", matrices, vectors) - values[:, None] * vectors
    expected = left_over.norm(dim=-1) / vectors.norm(dim=-1) / values.abs()
    torch.testing.assert_close(result.residuals, expected, rtol=1e-8, atol=0)
    assert float(expected.min()) > 1e-3


def test_a_small_space_is_the_whole_spectrum() -> None:
    matrices = normal(3, 7, 7, seed=3)
    result = spectrum_of(matrices)
    expected = torch.linalg.eigvals(matrices)
    assert result.ritz_values.shape == (3, 7)
    for found, dense in zip(result.ritz_values, expected, strict=True):
        torch.testing.assert_close(found.abs(), dense.abs().sort(descending=True).values, rtol=1e-9, atol=0)


def test_a_clustered_edge_needs_restarts() -> None:
    # Eigenvalues 1 - k/1000: the first space cannot tell them apart.
    rotation = torch.linalg.qr(normal(100, 100, seed=4)).Q
    matrix = (rotation * (1 - torch.arange(100, dtype=torch.float64) / 1000)) @ rotation.T
    first = spectrum_of(matrix[None], max_restarts=0)
    last = spectrum_of(matrix[None], max_restarts=50, tolerance=1e-9)
    assert float(first.residuals) > 1e-5
    assert float(last.residuals) <= 1e-9
    torch.testing.assert_close(last.eigenvalues.abs(), torch.ones(1, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("size", "dimension"), [(12, 12), (60, 12)])
def test_the_vector_spans_the_invariant_space(size: int, dimension: int) -> None:
    matrices = normal(4, size, size, seed=5)
    result = spectrum_of(matrices, dimension=dimension, max_restarts=300, tolerance=1e-11)
    for matrix, value, vector in zip(matrices, result.eigenvalues, result.vectors, strict=True):
        # A real map sends Re(y) into the span of Re(y) and Im(y): (A^2 - 2 Re(z) A + |z|^2) Re(y) = 0.
        once = matrix @ vector
        left = matrix @ once - 2 * value.real * once + value.abs() ** 2 * vector
        assert float(left.norm() / (value.abs() ** 2 * vector.norm())) < 1e-9


@pytest.mark.parametrize("dimension", [4, 5, 6, 9])
def test_restarts_may_part_a_complex_pair(dimension: int) -> None:
    # Three pairs of nearly the same modulus: at most one of them fits into the half that is kept.
    blocks = [r * torch.tensor([[c, -s], [s, c]]) for r, c, s in ((1.0, 0.6, 0.8), (0.9, 0.8, 0.6), (0.8, 0.0, 1.0))]
    change = normal(40, 40, seed=7)
    rest = torch.diag(0.5 * torch.linspace(0, 1, 34))
    matrix = change @ torch.block_diag(*blocks, rest).double() @ torch.linalg.inv(change)
    result = spectrum_of(matrix[None], dimension=dimension, max_restarts=500)
    assert complex(result.eigenvalues[0]).real == pytest.approx(0.6, rel=1e-6)
    assert abs(complex(result.eigenvalues[0]).imag) == pytest.approx(0.8, rel=1e-6)


def test_units_that_differ_do_not_hide_an_eigenvalue() -> None:
    # As Adam's: the second half of the state is of the size of squared gradients, and acts on the first by its inverse.
    units = torch.cat([torch.ones(40), torch.logspace(-9, -5, 40)]).double()
    plain = torch.eye(80, dtype=torch.float64) * 0.9 + 0.05 * normal(80, 80, seed=8)
    matrix = units[:, None] * plain / units
    result = spectrum_of(matrix[None], max_restarts=200)
    assert float(result.eigenvalues.abs()) == pytest.approx(float(dense_radii(plain[None])), rel=1e-7)
    # The vector is that of the map as it was given.
    value, vector = result.eigenvalues[0], result.vectors[0]
    once = matrix @ vector
    left = matrix @ once - 2 * value.real * once + value.abs() ** 2 * vector
    assert float((left / units).norm() / (vector / units).norm()) < 1e-6


def test_maps_that_end_the_space_early() -> None:
    identity, zero = torch.eye(8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    rank_one = torch.outer(torch.ones(8), torch.arange(8)).double()
    result = spectrum_of(torch.stack([identity, zero, rank_one]), dimension=5)
    torch.testing.assert_close(result.eigenvalues.abs(), torch.tensor([1.0, 0.0, 28.0], dtype=torch.float64))
    assert float(result.residuals.max()) < 1e-10


def test_noise_after_the_end_of_a_space_is_no_vector() -> None:
    # Two eigenvalues: every space ends after two vectors, up to rounding.
    rotation = torch.linalg.qr(normal(30, 30, seed=9)).Q
    matrix = (rotation * torch.tensor([2.0] * 10 + [1.0] * 20, dtype=torch.float64)) @ rotation.T
    values = spectrum_of(matrix[None], dimension=8, max_restarts=0).ritz_values[0].abs()
    torch.testing.assert_close(
        values, torch.tensor([2.0, 1.0] + [0.0] * 6, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_more_restarts_are_never_worse() -> None:
    # Pairs on a circle that nearly fall together, as momentum makes them: residuals go up and down.
    blocks = [torch.tensor([[1.8 - 0.01 * k, -0.81], [1.0, 0.0]], dtype=torch.float64) for k in range(40)]
    rotation = torch.linalg.qr(normal(80, 80, seed=10)).Q
    matrix = rotation @ torch.block_diag(*blocks) @ rotation.T
    residuals = [
        float(spectrum_of(matrix[None], dimension=12, max_restarts=count, tolerance=0.0).residuals)
        for count in range(25)
    ]
    assert residuals == sorted(residuals, reverse=True)
    assert len(set(residuals)) < 25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restarts_end_where_rounding_allows_no_more(dtype: torch.dtype) -> None:
    products = 0
    matrix = torch.diag(torch.linspace(0.1, 2.0, 50)).to(dtype)

    def apply(vectors: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return vectors @ matrix

    start = normal(1, 50, seed=6).to(dtype)
    result = leading_spectrum(apply, start, dimension=25, max_restarts=1000, tolerance=0.0)
    assert products < 25 * 20
    assert result.eigenvalues.abs().item() == pytest.approx(2.0, rel=20 * torch.finfo(dtype).eps)
