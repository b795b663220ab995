"""Covariances of a random function and of its gradient, from one function of the squared distance."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_SQRT5 = math.sqrt(5.0)
# Under it the square root has no usable derivative. The covariances there differ from those at 0 by less than rounding.
_LEAST_SQUARE = 1e-30


class Kernel(ABC):
    """A covariance `k(x, y) = phi(s)`, where `s = sum_i (x_i - y_i)^2 / l_i^2` and `l` are the length scales.

    The variance is 1. The function must be differentiable once in the mean square: `phi` has two derivatives at 0.
    """

    @abstractmethod
    def profile(self, squared_distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `phi(s)`, `phi'(s)` and `phi''(s)`, each of the shape of `squared_distance`."""


@dataclass(frozen=True, kw_only=True)
class RBF(Kernel):
    """The squared exponential: `phi(s) = exp(-s / 2)`."""

    def profile(self, squared_distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `phi`, `-phi / 2` and `phi / 4`."""
        value = (-0.5 * squared_distance).exp()
        return value, -0.5 * value, 0.25 * value


@dataclass(frozen=True, kw_only=True)
class Matern52(Kernel):
    """Matern's kernel of smoothness 5/2: `phi(s) = (1 + sqrt(5 s) + 5 s / 3) exp(-sqrt(5 s))`.

    References:
        Rasmussen and Williams (2006), Gaussian processes for machine learning, equation 4.17.
    """

    def profile(self, squared_distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `phi`, `-5/6 (1 + sqrt(5 s)) exp(-sqrt(5 s))` and `25/12 exp(-sqrt(5 s))`."""
        scaled = _SQRT5 * squared_distance.clamp(min=_LEAST_SQUARE).sqrt()
        decay = (-scaled).exp()
        value = (1.0 + scaled + 5.0 / 3.0 * squared_distance) * decay
        return value, -5.0 / 6.0 * (1.0 + scaled) * decay, 25.0 / 12.0 * decay


def joint_covariance(
    kernel: Kernel,
    lengthscales: Tensor,
    points: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
) -> Tensor:
    """Returns the covariances of values and gradients at some points with those at others.

    With `z = (x - y) / l`:

        cov(f(x), f(y))             =  phi(s)
        cov(f(x), df(y)/dy_j)       = -2 phi'(s) z_j / l_j
        cov(df(x)/dx_i, f(y))       =  2 phi'(s) z_i / l_i
        cov(df(x)/dx_i, df(y)/dy_j) = -(4 phi''(s) z_i z_j + 2 phi'(s) [i = j]) / (l_i l_j)

    Cost: time and memory of the result's size.

    Args:
        kernel: of variance 1.
        lengthscales: shape `(dimension,)`.
        points: where the value is taken, shape `(values, dimension)`, and where the gradient is taken, shape
            `(gradients, dimension)`.
        others: the same, for the columns.

    Returns:
        Shape `(values + gradients * dimension, other values + other gradients * dimension)`: values first, then the
        gradients, one point after the other.

    References:
        Solak et al. (2002), Derivative observations in Gaussian process models of dynamic systems, section 2.
    """
    (values, gradients), (other_values, other_gradients) = points, others
    corner, _, _ = kernel.profile(_scaled(values, other_values, lengthscales).square().sum(dim=-1))
    if not len(gradients) and not len(other_gradients):
        return corner
    right = _value_gradient(kernel, values, other_gradients, lengthscales)
    # The derivative goes to the other argument: the sign of the difference turns.
    below = _value_gradient(kernel, other_values, gradients, lengthscales).mT
    rest = _gradient_gradient(kernel, gradients, other_gradients, lengthscales)
    return torch.cat([torch.cat([corner, right], dim=1), torch.cat([below, rest], dim=1)])


def _scaled(points: Tensor, others: Tensor, lengthscales: Tensor) -> Tensor:
    """Returns the scaled differences `z`, shape `(points, others, dimension)`."""
    return (points.unsqueeze(1) - others.unsqueeze(0)) / lengthscales


def _value_gradient(kernel: Kernel, points: Tensor, others: Tensor, lengthscales: Tensor) -> Tensor:
    scaled = _scaled(points, others, lengthscales)
    _, slope, _ = kernel.profile(scaled.square().sum(dim=-1))
    return (-2.0 * slope.unsqueeze(-1) * scaled / lengthscales).flatten(1)


def _gradient_gradient(kernel: Kernel, points: Tensor, others: Tensor, lengthscales: Tensor) -> Tensor:
    scaled = _scaled(points, others, lengthscales)
    _, slope, bend = kernel.profile(scaled.square().sum(dim=-1))
    over = scaled / lengthscales
    outer = -4.0 * bend[..., None, None] * over.unsqueeze(-1) * over.unsqueeze(-2)
    own = torch.diag_embed(-2.0 * slope.unsqueeze(-1) / lengthscales.square())
    # From (point, other, i, j) to rows (point, i) and columns (other, j).
    count, other_count, dimension = scaled.shape
    return (outer + own).transpose(1, 2).reshape(count * dimension, other_count * dimension)
