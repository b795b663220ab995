"""A smooth function with its gradient, and processes that have seen it."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch.search.gradient_gp import GPParameters, GradientGP
from hypertorch.search.kernels import RBF, Kernel, Matern52
from hypertorch.search.observations import Observations

F64 = torch.float64
KERNELS: list[Kernel] = [RBF(), Matern52()]


def function(points: Tensor) -> Tensor:
    return 20.0 + 3.0 * (4.0 * points[..., 0]).sin() + points[..., 1].square() * points[..., 0]


def gradients(points: Tensor) -> Tensor:
    leaves = points.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaves).sum(), leaves)
    return found


def observed(count: int = 6, *, seed: int = 0, with_gradients: bool = True) -> Observations:
    points = torch.rand((count, 2), generator=torch.Generator().manual_seed(seed), dtype=F64)
    return Observations.of(points, function(points), gradients(points) if with_gradients else None)


def parameters(*, value_noise: float = 1e-3, gradient_noise: float = 1e-2) -> GPParameters:
    numbers = [torch.tensor(number, dtype=F64) for number in (1.7, value_noise, gradient_noise)]
    return GPParameters(
        lengthscales=torch.tensor([0.4, 0.8], dtype=F64),
        variance=numbers[0],
        value_noise=numbers[1],
        gradient_noise=numbers[2],
    )


def process(count: int = 6, *, kernel: Kernel | None = None, **options: bool) -> GradientGP:
    return GradientGP(observed(count, **options), parameters(), Matern52() if kernel is None else kernel)
