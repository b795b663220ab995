"""Arnoldi's method for the largest eigenvalue of linear maps that are given by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypertorch.diagnostics.balancing import balancing

# In units of the machine epsilon, relative to the product. The first: the rest of a product that lies in the space
# already, which is rounding only. The second: the smallest residual that rounding allows.
_BREAKDOWN = 10.0
_SMALLEST_RESIDUAL = 50.0
_SPANNED = 1e-10  # a singular value below it, relative to the largest, is rounding and spans no direction


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """The leading eigenvalue of each map, and the outline of its spectrum.

    Attributes:
        eigenvalues: of largest modulus, complex, shape `(maps,)`.
        residuals: `|A y - eigenvalue y| / |eigenvalue y|` in the balanced basis, shape `(maps,)`.
        vectors: the real part of its eigenvector `y`, which spans a real one, and with its image the plane of a
            complex pair; shape `(maps, entries)`.
        ritz_values: eigenvalue estimates of the first Krylov space, largest first, complex, `(maps, dimension)`.
    """

    eigenvalues: Tensor
    residuals: Tensor
    vectors: Tensor
    ritz_values: Tensor


def leading_spectrum(
    apply: Callable[[Tensor], Tensor], start: Tensor, *, dimension: int, max_restarts: int, tolerance: float
) -> Spectrum:
    """Returns the eigenvalue of largest modulus of each of a batch of real linear maps.

    An orthonormal basis `V` of the Krylov space `start, A start, A^2 start, ...` gives `A V = V H + v h'` with a small
    matrix `H`, whose eigenpairs `(z, x)` are Ritz pairs `(z, V x)` of `A` with the residual `|h'x|`. Until that is
    small for the leading pair, the space is cut down to its leading half and grown again from `v`. The basis is one in
    which the map is balanced.

    Cost: five products, `dimension` for the first space and half as many for each restart; memory of `dimension + 1`
    vectors.

    Args:
        apply: the product of each map with its vector, `(maps, entries)` to `(maps, entries)`.
        start: the first vectors, shape `(maps, entries)`.
        dimension: of the space, at least 4; cut to the number of entries.
        max_restarts: how often it may be cut down and grown again.
        tolerance: relative residual at which no more restarts are made.

    References:
        Saad (2011), Numerical methods for large eigenvalue problems, algorithm 6.2; Stewart (2002), A Krylov-Schur
        algorithm for large eigenproblems, section 3 (restarts).
    """
    # There is no larger space than the whole one.
    dimension = min(dimension, start.shape[1])
    # In single precision the default tolerance is below rounding, and no restart would reach it.
    enough = max(tolerance, _SMALLEST_RESIDUAL * torch.finfo(start.dtype).eps)
    # Without it, the rounding of the largest entries hides eigenvalues (Adam's second moments beside params).
    scale = balancing(apply, start)
    space = _Space(lambda vectors: apply(vectors * scale) / scale, start / scale, dimension)
    space.grow(0)
    best, coordinates = space.spectrum()
    for _ in range(max_restarts):
        if bool((best.residuals <= enough).all()):
            break
        # One less than half: `cut` keeps one vector more, for the partner of a complex number at the edge.
        space.grow(space.cut(coordinates, dimension // 2 - 1))
        last, coordinates = space.spectrum()
        best = _better(last, best)
    return replace(best, vectors=best.vectors * scale)  # back in the map's own units


def _better(last: Spectrum, best: Spectrum) -> Spectrum:
    """Returns for each map the spectrum of the smaller residual: a restart may make it larger."""
    improved = last.residuals < best.residuals
    return Spectrum(
        eigenvalues=torch.where(improved, last.eigenvalues, best.eigenvalues),
        residuals=torch.where(improved, last.residuals, best.residuals),
        vectors=torch.where(improved[:, None], last.vectors, best.vectors),
        # Those of the first space, which no restart has narrowed to the leading ones: they outline the spectrum.
        ritz_values=best.ritz_values,
    )


class _Space:
    """Krylov spaces of a batch of maps: `A V = V H + v h'`, with `v` the last row of `basis` and `h` that of `matrix`.

    Where a space is invariant under its map, the vectors after it and their columns of `H` are zero.
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], start: Tensor, dimension: int) -> None:
        self._apply = apply
        self._dimension = dimension
        # Of full size from the start: where the space of one map is used up its vectors are zero, and the batch is one
        # tensor.
        self._basis = start.new_zeros(len(start), dimension + 1, start.shape[1])
        self._matrix = start.new_zeros(len(start), dimension + 1, dimension)
        self._basis[:, 0] = start / _length(start)

    def grow(self, first: int) -> None:
        """Adds the products of the vectors from `first` on."""
        smallest = _BREAKDOWN * torch.finfo(self._basis.dtype).eps
        for column in range(first, self._dimension):
            product = rest = self._apply(self._basis[:, column])
            known = self._basis[:, : column + 1]
            # Gram-Schmidt twice: after one pass, rounding leaves parts of the basis in a short rest; two are enough.
            for _ in range(2):
                parts = torch.einsum("tkn,tn->tk", known, rest)
                rest = rest - torch.einsum("tk,tkn->tn", parts, known)
                self._matrix[:, : column + 1, column] += parts
            length = rest.norm(dim=-1, keepdim=True)
            # Relative to the product: an invariant space shows itself by a rest that is rounding, which must not be
            # normalised.
            is_new = length > smallest * product.norm(dim=-1, keepdim=True)
            self._matrix[:, column + 1, column] = torch.where(is_new, length, 0.0).squeeze(-1)
            self._basis[:, column + 1] = torch.where(is_new, rest / _length(rest), 0.0)

    def spectrum(self) -> tuple[Spectrum, Tensor]:
        """Returns the Ritz values and the leading pair, and the eigenvectors of `H` as columns, largest first."""
        values, coordinates = torch.linalg.eig(self._matrix[:, :-1])
        # `eig` gives no order. The modulus decides, because the product of maps grows by it.
        order = values.abs().argsort(dim=-1, descending=True)
        values = values.gather(-1, order)
        coordinates = coordinates.gather(-1, order[:, None].expand_as(coordinates))
        leading = coordinates[:, :, 0]
        # The residual of a Ritz pair without a product of the map: it is `|h'x|`, with `h` the last row.
        left_over = torch.einsum("tk,tk->t", self._matrix[:, -1].to(leading.dtype), leading).abs()
        spectrum = Spectrum(
            eigenvalues=values[:, 0],
            # A map that is zero has no eigenvalue to divide by.
            residuals=left_over / values[:, 0].abs().clamp(min=torch.finfo(left_over.dtype).tiny),
            vectors=torch.einsum("tk,tkn->tn", leading.real, self._basis[:, :-1]),
            ritz_values=values,
        )
        return spectrum, coordinates

    def cut(self, coordinates: Tensor, count: int) -> int:
        """Keeps the span of the leading `count` Ritz vectors and `v`; returns the column to grow from.

        The span is invariant under `H`. It has another dimension where it would part a complex pair; where it does
        not, the last of its `count + 1` basis vectors is zero.
        """
        leading = coordinates[:, :, :count]
        # A complex pair appears twice, as a vector and its conjugate: real and imaginary parts then span each plane
        # twice, and the singular values tell how many directions there are.
        turned, sizes, _ = torch.linalg.svd(torch.cat([leading.real, leading.imag], dim=-1), full_matrices=False)
        # One more than asked for, so that the partner of a complex number at the edge stays.
        turned, sizes = turned[:, :, : count + 1], sizes[:, : count + 1]
        turned = torch.where((sizes > _SPANNED * sizes[:, :1])[:, None], turned, 0.0)
        kept = turned.shape[-1]
        basis, matrix = torch.zeros_like(self._basis), torch.zeros_like(self._matrix)
        basis[:, :kept] = torch.einsum("tkj,tkn->tjn", turned, self._basis[:, :-1])
        basis[:, kept] = self._basis[:, -1]
        # A Krylov decomposition needs no triangular matrix: any real basis of the span serves, without complex numbers.
        matrix[:, :kept, :kept] = turned.mT @ self._matrix[:, :-1] @ turned
        matrix[:, kept, :kept] = torch.einsum("tk,tkj->tj", self._matrix[:, -1], turned)
        self._basis, self._matrix = basis, matrix
        return kept


def _length(vectors: Tensor) -> Tensor:
    """Returns the norms `(maps, 1)`, never zero."""
    return vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
