"""Fits a Gaussian process to values and gradients: the most probable parameters, by L-BFGS-B."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from hypertorch.search.gradient_gp import GPParameters, GradientGP, constant_mean, standardise
from hypertorch.search.kernels import Kernel
from hypertorch.search.observations import Observations

# All of logarithms. A gradient whose noise may grow without bound is explained away, and the fit is that of the values.
_LENGTHSCALE = (math.log(1e-2), math.log(1e2))
_VARIANCE = (math.log(1e-2), math.log(1e4))
_VALUE_NOISE = (math.log(1e-6), math.log(1e-2))
_GRADIENT_NOISE = (math.log(1e-6), 2.0)
# Of the logarithm of a length scale: mean for one dimension, and deviation.
_LENGTHSCALE_PRIOR = (math.log(0.4), 1.0)
# Of the logarithm of the variance of standardised values.
_VARIANCE_PRIOR = (0.0, 2.0)
# First length scales as a share of the side of the cube for one dimension, and first noises.
_STARTS = ((0.3, 1e-4, 1e-4), (1.0, 1e-2, 1e-1))
_FAILED = 1e12


def fit_gradient_gp(observations: Observations, kernel: Kernel, *, max_iterations: int = 100) -> GradientGP:
    """Returns the process with the most probable parameters, given what was observed.

    The evidence is that of values and gradients together. Values have one noise, and entries of gradients another. The
    prior of a length scale is log-normal, with the median `0.4 sqrt(dimension)` and the deviation 1 of the logarithm:
    distances in the cube grow with the square root of its dimension.

    The same observations give the same process: nothing is drawn.

    Cost: 20 to 200 evaluations, each one Cholesky factorisation, one inverse and one gradient of the covariance.

    Args:
        observations: at least one.
        kernel: of variance 1.
        max_iterations: of the optimiser, from each of two starts.

    References:
        Hvarfner et al. (2024), Vanilla Bayesian optimization performs great in high dimensions, section 5.
    """
    dimension = observations.points.shape[1]
    targets = observations.targets(*standardise(observations.values))
    bounds = [_LENGTHSCALE] * dimension + [_VARIANCE, _VALUE_NOISE, _GRADIENT_NOISE]

    def objective(logarithms: np.ndarray) -> tuple[float, np.ndarray]:
        variables = torch.from_numpy(logarithms).requires_grad_()
        loss = negative_log_posterior(variables, observations, targets, kernel)
        if not math.isfinite(loss):
            return _FAILED, np.zeros_like(logarithms)
        assert variables.grad is not None
        return loss, variables.grad.numpy()

    found = []
    # Two optima are common: short length scales with little noise, and long ones with more.
    for share, value_noise, gradient_noise in _STARTS:
        first = [math.log(share * math.sqrt(dimension))] * dimension + [
            0.0,
            *map(math.log, (value_noise, gradient_noise)),
        ]
        found.append(
            minimize(
                objective,
                np.array(first),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"maxiter": max_iterations},
            )
        )
    best = min(found, key=lambda result: result.fun)
    return GradientGP(observations, _parameters(torch.from_numpy(best.x)), kernel)


def negative_log_posterior(logarithms: Tensor, observations: Observations, targets: Tensor, kernel: Kernel) -> float:
    """Returns the negative logarithm of evidence and prior, and adds its gradient to `logarithms.grad`.

        1/2 r^T K^-1 r + 1/2 log det K + n/2 log 2 pi - log prior,    with the derivative  1/2 (K^-1 - a a^T) in K

    where `r` is what was observed less the constant mean and `a = K^-1 r`. The mean is the best for each K, so that
    its own derivative is 0.

    Args:
        logarithms: of the length scales, the variance, the value noise and the gradient noise.
        observations: what was observed.
        targets: the same, standardised.
        kernel: of variance 1.

    Returns:
        Infinity, without a gradient, if the covariance is not positive definite in float64.
    """
    covariance = _parameters(logarithms).covariance(kernel, observations)
    with torch.no_grad():
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):
            return math.inf
        residuals = targets.clone()
        residuals[: len(observations)] -= constant_mean(factor, targets, len(observations))
        weights = torch.cholesky_solve(residuals.unsqueeze(1), factor)
        # The determinant of K is the square of the factor's, which takes the place of the 1/2.
        evidence = 0.5 * (residuals @ weights.squeeze(1)) + factor.diagonal().log().sum()
        slope = 0.5 * (torch.cholesky_inverse(factor) - weights @ weights.mT)
    # Not through the factorisation: its derivative in closed form costs a third.
    covariance.backward(slope)
    prior = _negative_log_prior(logarithms)
    prior.backward()
    return float(evidence) + 0.5 * len(targets) * math.log(2.0 * math.pi) + float(prior.detach())


def _negative_log_prior(logarithms: Tensor) -> Tensor:
    dimension = len(logarithms) - 3
    mean, deviation = _LENGTHSCALE_PRIOR
    lengths = (logarithms[:dimension] - mean - 0.5 * math.log(dimension)) / deviation
    variance = (logarithms[dimension] - _VARIANCE_PRIOR[0]) / _VARIANCE_PRIOR[1]
    return 0.5 * (lengths.square().sum() + variance.square())


def _parameters(logarithms: Tensor) -> GPParameters:
    values = logarithms.exp()
    return GPParameters(
        lengthscales=values[:-3], variance=values[-3], value_noise=values[-2], gradient_noise=values[-1]
    )
