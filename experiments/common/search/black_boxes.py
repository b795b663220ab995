"""Families of functions on the unit cube, to be minimised: draws of a Gaussian process, Branin's and Hartmann's."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from hypertorch.types import TensorDict

# What the classical functions are standardised by.
_PLACES = 4096


class Functions(ABC):
    """A family of functions, each given by its coefficients.

    Attributes:
        dimension: of the cube.
    """

    dimension: int

    @abstractmethod
    def draw(self, count: int, seed: int, like: Tensor) -> TensorDict:
        """Returns the coefficients of random functions, each of shape `(count, ...)`.

        Args:
            count: how many.
            seed: of the draw.
            like: a tensor of their dtype and device.
        """

    @abstractmethod
    def __call__(self, places: Tensor, coefficients: TensorDict) -> Tensor:
        """Returns the values of one function, shape `(...)`.

        Args:
            places: in the cube, shape `(..., dimension)`.
            coefficients: of the function, without the first axis.
        """


class GaussianProcess(Functions):
    """Draws of a Gaussian process of mean 0 and covariance `exp(-|x - y|^2 / (2 lengthscale^2))`, nearly.

    A draw is a sum of cosines of random frequencies, whose covariance is that in the mean over the frequencies. It is
    differentiable everywhere, which learning needs.

    Args:
        dimension: of the cube.
        lengthscale: as above.
        cosines: how many.

    References:
        Rahimi and Recht (2007), Random features for large-scale kernel machines.
    """

    def __init__(self, dimension: int, lengthscale: float, cosines: int = 200) -> None:
        self.dimension = dimension
        self._lengthscale, self._cosines = lengthscale, cosines

    def draw(self, count: int, seed: int, like: Tensor) -> TensorDict:
        """Returns frequencies, phases and amplitudes."""
        generator = torch.Generator().manual_seed(seed >> 1)
        normal = torch.randn((count, self._cosines, self.dimension + 1), generator=generator, dtype=torch.float64)
        phases = torch.rand((count, self._cosines), generator=generator, dtype=torch.float64)
        return {
            "frequencies": (normal[..., 1:] / self._lengthscale).to(like),
            "phases": (2 * math.pi * phases).to(like),
            "amplitudes": (normal[..., 0] * math.sqrt(2 / self._cosines)).to(like),
        }

    def __call__(self, places: Tensor, coefficients: TensorDict) -> Tensor:
        """Returns the sums of cosines."""
        angles = places @ coefficients["frequencies"].mT + coefficients["phases"]
        return angles.cos() @ coefficients["amplitudes"]


class Varied(Functions):
    """A classical function with mean 0 and variance 1 in the cube, shifted, flipped, with its axes in another order.

    Its values are multiplied by a number between 0.9 and 1.1; the shift of each axis is at most 0.1.

    Args:
        dimension: of the cube.
        function: from places in the cube to values.

    References:
        Chen et al. (2017), Learning to learn without gradient descent by gradient descent, section 3.3.
    """

    def __init__(self, dimension: int, function: Callable[[Tensor], Tensor]) -> None:
        self.dimension = dimension
        self._function = function
        values = function(SobolEngine(dimension).draw(_PLACES, dtype=torch.float64))
        self._mean, self._deviation = float(values.mean()), float(values.std())

    def draw(self, count: int, seed: int, like: Tensor) -> TensorDict:
        """Returns shifts, flips, orders of axes and factors."""
        generator = torch.Generator().manual_seed(seed >> 1)
        numbers = torch.rand((count, 3 * self.dimension + 1), generator=generator, dtype=torch.float64)
        shifts, flips, order = numbers[:, 1:].split(self.dimension, dim=1)
        return {
            "shifts": (0.2 * shifts - 0.1).to(like),
            "flips": flips.round().to(like),
            "order": order.argsort(dim=1).to(like.device),
            "factors": (0.9 + 0.2 * numbers[:, 0]).to(like),
        }

    def __call__(self, places: Tensor, coefficients: TensorDict) -> Tensor:
        """Returns the standardised values."""
        flips = coefficients["flips"]
        turned = (flips + (1 - 2 * flips) * places)[..., coefficients["order"]] + coefficients["shifts"]
        return coefficients["factors"] * (self._function(turned) - self._mean) / self._deviation


def branin(places: Tensor) -> Tensor:
    """Returns Branin's function of places in the unit square, whose three minima are 0.397887."""
    x, y = 15 * places[..., 0] - 5, 15 * places[..., 1]
    bent = y - 5.1 / (4 * math.pi**2) * x.square() + 5 / math.pi * x - 6
    return bent.square() + 10 * (1 - 1 / (8 * math.pi)) * x.cos() + 10


def hartmann3(places: Tensor) -> Tensor:
    """Returns Hartmann's function of places in the unit cube, whose minimum is -3.86278."""
    heights = places.new_tensor([1.0, 1.2, 3.0, 3.2])
    widths = places.new_tensor([[3.0, 10.0, 30.0], [0.1, 10.0, 35.0], [3.0, 10.0, 30.0], [0.1, 10.0, 35.0]])
    centres = places.new_tensor(
        [[3689, 1170, 2673], [4699, 4387, 7470], [1091, 8732, 5547], [381, 5743, 8828]]
    )  # fmt: skip
    distances = (widths * (places.unsqueeze(-2) - 1e-4 * centres).square()).sum(dim=-1)
    return -((-distances).exp() @ heights)
