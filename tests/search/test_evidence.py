"""The fit: evidence and its derivative against PyTorch's distributions, and what it finds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import LogNormal, MultivariateNormal

from hypertorch.search.evidence import fit_gradient_gp, negative_log_posterior
from hypertorch.search.gradient_gp import constant_mean, standardise
from hypertorch.search.kernels import RBF, Kernel, Matern52
from tests.search.models import F64, KERNELS, function, observed, parameters

LOGS = torch.tensor([-0.9, -0.2, 0.5, -5.0, -3.0], dtype=F64)


def written_out(logs: Tensor, kernel: Kernel) -> Tensor:
    """Minus the log density of what was observed, and of the prior, by PyTorch's distributions."""
    seen = observed(5)
    targets = seen.targets(*standardise(seen.values))
    own = logs.exp()
    settings = replace(parameters(), lengthscales=own[:2], variance=own[2], value_noise=own[3], gradient_noise=own[4])
    covariance = settings.covariance(kernel, seen)
    ones = torch.tensor([1.0] * 5 + [0.0] * 10, dtype=F64)
    solved = torch.linalg.solve(covariance, ones)
    mean = ones * (solved @ targets) / (solved @ ones)
    location, deviation = torch.tensor([math.log(0.4) + math.log(2) / 2, 1.0], dtype=F64)
    # Of the logarithm, without what does not depend on it.
    prior = LogNormal(location, deviation).log_prob(own[:2]) + logs[:2]
    prior = prior + 0.5 * math.log(2 * math.pi)
    variance = -0.5 * (logs[2] / 2.0).square()
    return -MultivariateNormal(mean, covariance).log_prob(targets) - prior.sum() - variance


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_evidence_and_derivative_are_those_of_the_distributions(kernel: Kernel) -> None:
    seen = observed(5)
    logs = LOGS.clone().requires_grad_()
    value = negative_log_posterior(logs, seen, seen.targets(*standardise(seen.values)), kernel)
    other = LOGS.clone().requires_grad_()
    expected = written_out(other, kernel)
    (slope,) = torch.autograd.grad(expected, other)
    assert value == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(logs.grad, slope, rtol=1e-7, atol=1e-9)


def test_the_fit_is_a_minimum_within_the_bounds() -> None:
    seen = observed(8)
    model = fit_gradient_gp(seen, Matern52())
    own = model.fitted
    logs = torch.cat([own.lengthscales, torch.stack([own.variance, own.value_noise, own.gradient_noise])]).log()
    targets = seen.targets(*standardise(seen.values))
    least = negative_log_posterior(logs.clone().requires_grad_(), seen, targets, Matern52())
    for entry in range(5):
        for step in (-0.3, 0.3):
            moved = logs.clone()
            moved[entry] += step
            # Noises lie on their floor, under which they may not go.
            if entry < 3 or step > 0:
                value = negative_log_posterior(moved.requires_grad_(), seen, targets, Matern52())
                assert value > least - 1e-3, (entry, step)
    assert float(own.value_noise) >= 0.99e-6


def test_gradient_noise_is_bounded_so_that_gradients_are_not_explained_away() -> None:
    seen = observed(8)
    wild = replace(seen, gradients=1e3 * seen.gradients.flip(0))
    assert float(fit_gradient_gp(wild, RBF()).fitted.gradient_noise) <= math.exp(2.0) * 1.001


def test_gradients_make_the_fit_better_and_nothing_is_drawn() -> None:
    seen = observed(6)
    places = torch.rand((200, 2), generator=torch.Generator().manual_seed(5), dtype=F64)

    def error(model) -> float:
        return float((model.posterior(places.unsqueeze(1)).mean.flatten() - function(places)).abs().mean())

    state = torch.random.get_rng_state()
    informed, plain = fit_gradient_gp(seen, Matern52()), fit_gradient_gp(seen.without_gradients(), Matern52())
    assert error(informed) < 0.2 * error(plain)
    again = fit_gradient_gp(seen, Matern52())
    assert torch.equal(informed.fitted.lengthscales, again.fitted.lengthscales)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_mean_is_that_of_generalised_least_squares() -> None:
    covariance = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.0], [0.1, 0.0, 3.0]], dtype=F64)
    targets = torch.tensor([1.0, 4.0, -2.0], dtype=F64)
    design = torch.tensor([[1.0], [1.0], [0.0]], dtype=F64)
    inverse = covariance.inverse()
    expected = torch.linalg.solve(design.mT @ inverse @ design, design.mT @ inverse @ targets[:, None])
    found = constant_mean(torch.linalg.cholesky(covariance), targets, 2)
    assert float(found) == pytest.approx(float(expected))


def test_a_covariance_that_cannot_be_factorised_has_no_density() -> None:
    seen = observed(5)
    twice = seen + seen
    logs = torch.tensor([5.0, 5.0, 9.0, -60.0, -60.0], dtype=F64, requires_grad=True)
    assert negative_log_posterior(logs, twice, twice.targets(0.0, 1.0), RBF()) == math.inf
    assert logs.grad is None
