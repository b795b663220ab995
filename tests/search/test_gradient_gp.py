"""The process: its posterior against formulas written out, and BoTorch's tools on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.means import ConstantMean
from torch import Tensor

from hypertorch.search.gradient_gp import GPParameters, GradientGP
from hypertorch.search.kernels import RBF, Kernel
from hypertorch.search.observations import Observations
from tests.search.models import F64, KERNELS, function, gradients, observed, parameters, process

X = torch.rand((5, 2), generator=torch.Generator().manual_seed(9), dtype=F64)
UNIT = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=F64)


def covariance_written_out(kernel: Kernel, own: GPParameters, x: Tensor, y: Tensor) -> Tensor:
    """Values and gradients at x against those at y, by automatic differentiation, all values first."""

    def value(x: Tensor, y: Tensor) -> Tensor:
        square = ((x - y) / own.lengthscales).square().sum()
        # Where two points meet autograd stops at the root, and both functions are 1 - c s + o(s).
        slope = 0.5 if kernel == RBF() else 5.0 / 6.0
        return own.variance * (1.0 - slope * square if torch.equal(x, y) else kernel.profile(square)[0])

    def block(x: Tensor, y: Tensor) -> Tensor:
        by_y = torch.func.grad(value, argnums=1)(x, y)
        by_x = torch.func.grad(value)(x, y)
        both = torch.func.jacrev(torch.func.grad(value), argnums=1)(x, y)
        return torch.cat([torch.cat([value(x, y)[None], by_y])[None], torch.cat([by_x[:, None], both], dim=1)])

    rows = torch.stack([torch.stack([block(a, b) for b in y]) for a in x])  # (x, y, 1 + d, 1 + d)
    corner, right = rows[:, :, 0, 0], rows[:, :, 0, 1:].flatten(1)
    below = rows[:, :, 1:, 0].transpose(1, 2).flatten(0, 1)
    rest = rows[:, :, 1:, 1:].permute(0, 2, 1, 3).reshape(below.shape[0], right.shape[1])
    return torch.cat([torch.cat([corner, right], dim=1), torch.cat([below, rest], dim=1)])


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_the_posterior_is_the_closed_form(kernel: Kernel) -> None:
    seen, own = observed(4), parameters()
    model = GradientGP(seen, own, kernel)
    shift, scale = float(seen.values.mean()), float(seen.values.std(correction=0))
    y = torch.cat([(seen.values - shift) / scale, seen.gradients.flatten() / scale])
    noise = torch.tensor([1e-3] * 4 + [1e-2] * 8, dtype=F64)
    k = covariance_written_out(kernel, own, seen.points, seen.points) + noise.diag()
    ones = torch.tensor([1.0] * 4 + [0.0] * 8, dtype=F64)
    mean = (ones @ k.inverse() @ y) / (ones @ k.inverse() @ ones)
    cross = covariance_written_out(kernel, own, X, seen.points)[:5]
    prior = covariance_written_out(kernel, own, X, X)[:5, :5]
    posterior = model.posterior(X)
    torch.testing.assert_close(
        posterior.mean.squeeze(-1), shift + scale * (mean + cross @ k.inverse() @ (y - mean * ones)), rtol=1e-9, atol=0
    )
    expected = scale**2 * (prior - cross @ k.inverse() @ cross.mT)
    torch.testing.assert_close(posterior.distribution.covariance_matrix, expected, rtol=1e-7, atol=1e-10)


def test_values_alone_give_the_process_of_botorch() -> None:
    seen, own = observed(6, with_gradients=False), parameters()
    model = GradientGP(seen, own, RBF())
    # Theirs has a mean that is given.
    shift, scale = model.standardisation
    constant = ConstantMean().double()
    constant.constant.data.copy_(shift + scale * model.mean)
    covariance = ScaleKernel(RBFKernel(ard_num_dims=2)).double()
    covariance.outputscale, covariance.base_kernel.lengthscale = scale**2 * own.variance, own.lengthscales
    noise = torch.full((6, 1), 1e-3, dtype=F64) * scale**2
    theirs = SingleTaskGP(
        seen.points,
        seen.values[:, None],
        noise,
        mean_module=constant,
        covar_module=covariance,
        outcome_transform=None,
    )
    theirs.eval()
    expected = theirs.posterior(X)
    torch.testing.assert_close(model.posterior(X).mean, expected.mean.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(model.posterior(X).variance, expected.variance.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_the_posterior_goes_through_values_and_slopes(kernel: Kernel) -> None:
    seen = observed(5)
    model = GradientGP(seen, parameters(value_noise=1e-9, gradient_noise=1e-9), kernel)
    points = seen.points.clone().requires_grad_()
    mean = model.posterior(points.unsqueeze(1)).mean.flatten()
    torch.testing.assert_close(mean, function(seen.points), rtol=1e-6, atol=0)
    (slopes,) = torch.autograd.grad(mean.sum(), points)
    torch.testing.assert_close(slopes, gradients(seen.points), rtol=1e-4, atol=1e-4)
    # Without gradients the slopes are other ones.
    (guessed,) = torch.autograd.grad(
        GradientGP(seen.without_gradients(), model.fitted, kernel).posterior(points.unsqueeze(1)).mean.sum(), points
    )
    assert float((guessed - slopes).abs().max()) > 0.1


def test_batches_are_as_points_one_by_one() -> None:
    model = process()
    batch = torch.rand((2, 3, 4, 2), generator=torch.Generator().manual_seed(1), dtype=F64)
    whole = model.posterior(batch)
    assert whole.mean.shape == (2, 3, 4, 1)
    alone = model.posterior(batch[1, 2])
    torch.testing.assert_close(whole.mean[1, 2], alone.mean)
    torch.testing.assert_close(
        whole.distribution.covariance_matrix[1, 2], alone.distribution.covariance_matrix, atol=1e-12, rtol=1e-9
    )


def test_the_noise_of_a_value_is_added_where_it_is_asked_for() -> None:
    model = process()
    scale = model.standardisation[1]
    added = model.posterior(X, observation_noise=True).variance - model.posterior(X).variance
    torch.testing.assert_close(added, torch.full_like(added, 1e-3 * scale**2))
    with pytest.raises(ValueError, match=r"`output_indices` is \[1\] .* one output.*Pass None"):
        model.posterior(X, output_indices=[1])


def test_further_values_are_conditioned_on_with_the_same_parameters() -> None:
    seen = observed(6)
    model = GradientGP(seen, parameters(), RBF())
    more = model.with_values(X[:2], torch.tensor([20.0, 21.0], dtype=F64), doubt=0.5)
    assert len(more.observations) == 8 and int(more.observations.has_gradient.sum()) == 6
    assert more.standardisation == model.standardisation
    noise = more.fitted.covariance(RBF(), more.observations).diagonal()
    assert noise[:8].tolist() == pytest.approx([1.701] * 6 + [2.201] * 2)
    # What is believed exactly is predicted.
    own = model.posterior(X[:1]).mean.flatten()
    believed = model.with_values(X[:1], own)
    torch.testing.assert_close(believed.posterior(X[:1]).mean.flatten(), own, rtol=1e-3, atol=0)
    assert float(believed.posterior(X[:1]).variance) < 0.5 * float(model.posterior(X[:1]).variance)


def test_acquisition_functions_of_botorch_work() -> None:
    model = process(8)
    best = model.observations.values.min()
    single = LogExpectedImprovement(model, best_f=best, maximize=False)
    point, value = optimize_acqf(single, UNIT, q=1, num_restarts=4, raw_samples=64)
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 41, dtype=F64)] * 2).unsqueeze(1)
    with torch.no_grad():
        assert float(value) >= float(single(grid).max())
        # The improvement of a normal variable, written out.
        posterior = model.posterior(point)
        deviation = posterior.variance.sqrt().squeeze()
        z = (best - posterior.mean.squeeze()) / deviation
        normal = torch.distributions.Normal(0.0, 1.0)
        expected = deviation * (z * normal.cdf(z) + normal.log_prob(z).exp())
    assert float(value.exp()) == pytest.approx(float(expected), rel=1e-6)
    sampler = SobolQMCNormalSampler(torch.Size([64]), seed=0)
    from botorch.acquisition.objective import GenericMCObjective

    negative = GenericMCObjective(lambda samples, X=None: -samples.squeeze(-1))
    batch, _ = optimize_acqf(
        qLogExpectedImprovement(model, best_f=-best, sampler=sampler, objective=negative),
        UNIT,
        q=2,
        num_restarts=2,
        raw_samples=32,
    )
    assert batch.shape == (2, 2) and bool(((batch >= 0) & (batch <= 1)).all())


def test_the_oldest_gradients_are_dropped() -> None:
    seen = observed(6)
    assert seen.with_newest_gradients(18) is seen
    fewer = seen.with_newest_gradients(11)
    assert fewer.has_gradient.tolist() == [False] * 4 + [True] * 2
    assert torch.equal(fewer.values, seen.values) and torch.equal(fewer.gradients[4:], seen.gradients[4:])
    assert not bool(seen.with_newest_gradients(3).has_gradient.any())
    assert len(fewer.targets(0.0, 1.0)) == 10


def test_what_nearly_diverged_does_not_set_the_scale() -> None:
    seen = observed(6)
    wild = replace(seen, values=seen.values.clone(), gradients=seen.gradients.clone())
    wild.values[2], wild.gradients[2] = 1e9, 1e12
    tamed = wild.without_outliers()
    kept = torch.tensor([0, 1, 3, 4, 5])
    assert tamed.has_gradient.tolist() == [True, True, False, True, True, True]
    assert torch.equal(tamed.values[kept], seen.values[kept])
    quartile, least = float(wild.values.quantile(0.75)), float(seen.values.min())
    assert float(tamed.values[2]) == pytest.approx(quartile + 30 * (quartile - least))
    untouched = seen.without_outliers()
    assert torch.equal(untouched.values, seen.values) and torch.equal(untouched.gradients, seen.gradients)


def test_values_that_are_all_the_same_have_a_process() -> None:
    points = observed(3).points
    same = Observations.of(points, torch.full((3,), 2.5, dtype=F64))
    mean = GradientGP(same, parameters(), RBF()).posterior(X).mean
    torch.testing.assert_close(mean, torch.full_like(mean, 2.5))
