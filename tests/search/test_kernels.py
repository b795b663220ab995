"""Covariances with gradients: against GPyTorch's, and against derivatives taken by autograd."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import Matern52KernelGrad, RBFKernelGrad
from torch import Tensor

from hypertorch.search.kernels import RBF, Kernel, Matern52, joint_covariance

F64 = torch.float64
KERNELS = [(RBF(), RBFKernelGrad), (Matern52(), Matern52KernelGrad)]
LENGTHS = torch.tensor([0.3, 0.7, 1.9], dtype=F64)


def points(count: int, seed: int = 0) -> Tensor:
    return torch.rand((count, 3), generator=torch.Generator().manual_seed(seed), dtype=F64)


def own_order(theirs: Tensor, count: int, other_count: int, dimension: int) -> Tensor:
    """GPyTorch has value and gradient of one point next to each other; ours has all values first."""

    def order(many: int) -> Tensor:
        index = torch.arange(many * (dimension + 1)).reshape(many, dimension + 1)
        return torch.cat([index[:, 0], index[:, 1:].flatten()])

    return theirs[order(count)][:, order(other_count)]


@pytest.mark.parametrize(("kernel", "theirs"), KERNELS, ids=repr)
def test_covariances_are_those_of_gpytorch(kernel: Kernel, theirs: type) -> None:
    x, y = points(5), points(4, seed=1)
    # The same place twice, where Matern's square root has no derivative.
    y[0] = x[2]
    module = theirs(ard_num_dims=3).double()
    module.lengthscale = LENGTHS
    expected = own_order(module(x, y).to_dense().detach(), 5, 4, 3)
    torch.testing.assert_close(joint_covariance(kernel, LENGTHS, (x, x), (y, y)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", [RBF(), Matern52()], ids=repr)
def test_covariances_are_derivatives_of_that_of_the_values(kernel: Kernel) -> None:
    x, y = points(1), points(1, seed=1)

    def value(x: Tensor, y: Tensor) -> Tensor:
        return joint_covariance(kernel, LENGTHS, (x[None], x[None, :][:0]), (y[None], y[None, :][:0]))[0, 0]

    own = joint_covariance(kernel, LENGTHS, (x, x), (y, y))
    by_x = torch.func.grad(value)(x[0], y[0])
    by_y = torch.func.grad(value, argnums=1)(x[0], y[0])
    by_both = torch.func.jacrev(torch.func.grad(value), argnums=1)(x[0], y[0])
    torch.testing.assert_close(own[0, 1:], by_y, atol=1e-12, rtol=0)
    torch.testing.assert_close(own[1:, 0], by_x, atol=1e-12, rtol=0)
    torch.testing.assert_close(own[1:, 1:], by_both, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", [RBF(), Matern52()], ids=repr)
def test_gradients_may_be_known_at_other_points_than_values(kernel: Kernel) -> None:
    x, y, z = points(4), points(3, seed=1), points(2, seed=2)
    everywhere = torch.cat([x, y])
    whole = joint_covariance(kernel, LENGTHS, (everywhere, everywhere), (z, z))
    # The values of the first four, the gradients of the last three.
    rows = torch.cat([torch.arange(4), 7 + 3 * 4 + torch.arange(9)])
    torch.testing.assert_close(joint_covariance(kernel, LENGTHS, (x, y), (z, z)), whole[rows])
    alone = joint_covariance(kernel, LENGTHS, (x, x[:0]), (z, z[:0]))
    torch.testing.assert_close(alone, whole[:4, :2])


@pytest.mark.parametrize("kernel", [RBF(), Matern52()], ids=repr)
def test_the_covariance_is_symmetric_and_positive(kernel: Kernel) -> None:
    x = points(6)
    whole = joint_covariance(kernel, LENGTHS, (x, x), (x, x))
    torch.testing.assert_close(whole, whole.mT, atol=1e-14, rtol=0)
    assert float(torch.linalg.eigvalsh(whole)[0]) > 0
    assert whole.diagonal()[:6].tolist() == pytest.approx([1.0] * 6)


def test_derivatives_stay_finite_where_two_points_meet() -> None:
    x = points(2).requires_grad_()
    whole = joint_covariance(Matern52(), LENGTHS, (x, x), (x, x))
    (gradient,) = torch.autograd.grad(whole.sum(), x)
    assert bool(gradient.isfinite().all())
