"""A Gaussian process conditioned on values and gradients, as a model of BoTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from gpytorch.distributions import MultivariateNormal
from torch import Tensor

from hypertorch.search.kernels import Kernel, joint_covariance
from hypertorch.search.observations import Observations


@dataclass(frozen=True, kw_only=True, eq=False)
class GPParameters:
    """What is fitted of a Gaussian process, for standardised values.

    Args:
        lengthscales: shape `(dimension,)` (unit: sides of the cube).
        variance: of the function, scalar.
        value_noise: variance of the noise of a value, scalar.
        gradient_noise: variance of the noise of an entry of a gradient, scalar.
    """

    lengthscales: Tensor
    variance: Tensor
    value_noise: Tensor
    gradient_noise: Tensor

    def covariance(self, kernel: Kernel, observations: Observations) -> Tensor:
        """Returns the covariance of everything observed, noise included: values first, then gradients."""
        places = observations.places
        gradients = self.gradient_noise.expand(places[1].numel())
        noise = torch.cat([self.value_noise + observations.doubt, gradients])
        return self.variance * joint_covariance(kernel, self.lengthscales, places, places) + torch.diag(noise)


class GradientGP(Model):
    """A Gaussian process on values and gradients, whose posterior on values is one of BoTorch's.

    With K the covariance of everything observed, noise included, y the standardised observations and k(x) the
    covariance of f(x) with them:

        mean(x) = m + k(x)^T K^-1 (y - m)        cov(x, x') = k(x, x') - k(x)^T K^-1 k(x')

    `m` is the generalised least-squares estimate of the constant mean, which gradients do not feel.

    Acquisition functions of BoTorch and `optimize_acqf` work on it. Values and gradients share one standardisation.

    Cost: one Cholesky factorisation of order `n = points + gradients * dimension`, `n^3 / 3`; a posterior at q points
    `n^2 q`.

    Args:
        observations: what is conditioned on, float64, at least one.
        parameters: as fitted.
        kernel: of variance 1.
        standardisation: mean and deviation of the values; None for those of the observations.

    Raises:
        torch.linalg.LinAlgError: if the covariance is not positive definite in float64.

    References:
        Wu et al. (2017), Bayesian optimization with gradients, section 3.
    """

    def __init__(
        self,
        observations: Observations,
        parameters: GPParameters,
        kernel: Kernel,
        standardisation: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.observations, self.fitted, self.kernel = observations, parameters, kernel
        self.standardisation = standardise(observations.values) if standardisation is None else standardisation
        self._factor = torch.linalg.cholesky(parameters.covariance(kernel, observations))
        targets = observations.targets(*self.standardisation)
        self.mean = constant_mean(self._factor, targets, len(observations))
        self._residuals = targets - self.mean * _of_values(targets, len(observations))
        self._weights = torch.cholesky_solve(self._residuals.unsqueeze(1), self._factor).squeeze(1)

    @property
    def num_outputs(self) -> int:
        """One: the value."""
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: one process."""
        return torch.Size([])

    @property
    def precision(self) -> Tensor:
        """The inverse `K^-1` of the covariance of everything observed."""
        return torch.cholesky_inverse(self._factor)

    @property
    def residuals(self) -> Tensor:
        """What was observed less the mean, standardised: values first, then gradients."""
        return self._residuals

    def posterior(
        self,
        X: Tensor,  # noqa: N803 (BoTorch's name)
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Any:
        """Returns the posterior of the values at points, in the units of the values.

        Args:
            X: points of the unit cube, shape `(..., q, dimension)`.
            output_indices: there is one output: None or `[0]`.
            observation_noise: True adds the noise of a value.
            posterior_transform: applied to the posterior, as BoTorch has it.

        Returns:
            A posterior with mean of shape `(..., q, 1)` and a joint covariance over `q`.

        Raises:
            ValueError: if another output is asked for, or the noise is given as a tensor.
        """
        if output_indices not in (None, [0]) or isinstance(observation_noise, Tensor):
            raise ValueError(
                f"`output_indices` is {output_indices} and `observation_noise` is {observation_noise!r}: this process "
                "has one output, with one noise that is fitted. Pass None and a switch."
            )
        batch, dimension = X.shape[:-1], X.shape[-1]
        flat = X.reshape(-1, dimension)
        lengthscales, variance = self.fitted.lengthscales, self.fitted.variance
        # Values alone are predicted, so there is no place of a gradient among the rows.
        nowhere = flat[:0]
        cross = variance * joint_covariance(self.kernel, lengthscales, (flat, nowhere), self.observations.places)
        mean = (self.mean + cross @ self._weights).reshape(batch)
        # As (observations, points), so that one triangular solve serves the whole batch.
        solved = torch.linalg.solve_triangular(self._factor, cross.mT, upper=False)
        solved = solved.mT.reshape(*batch, -1)
        scaled = (X.unsqueeze(-2) - X.unsqueeze(-3)) / lengthscales
        prior, _, _ = self.kernel.profile(scaled.square().sum(dim=-1))
        covariance = variance * prior - solved @ solved.mT
        # Rounding may leave a variance below 0 beside an observation.
        least = torch.finfo(covariance.dtype).eps * variance
        lift = (least - covariance.diagonal(dim1=-2, dim2=-1)).clamp(min=0.0)
        if observation_noise:
            lift = lift + self.fitted.value_noise
        covariance = covariance + torch.diag_embed(lift)
        shift, scale = self.standardisation
        posterior = GPyTorchPosterior(MultivariateNormal(shift + scale * mean, scale**2 * covariance))
        return posterior if posterior_transform is None else posterior_transform(posterior)

    def with_values(self, points: Tensor, values: Tensor, *, doubt: float = 0.0) -> GradientGP:
        """Returns the process conditioned on further values, with the same parameters.

        Args:
            points: shape `(points, dimension)`.
            values: shape `(points,)`.
            doubt: variance added to their noise, in units of the standardised values.
        """
        more = self.observations + Observations.of(points, values, doubt=doubt)
        return GradientGP(more, self.fitted, self.kernel, self.standardisation)


def standardise(values: Tensor) -> tuple[float, float]:
    """Returns mean and standard deviation of values; 1 for the deviation where they are all the same."""
    deviation = float(values.std(correction=0))
    return float(values.mean()), deviation if deviation > 0.0 else 1.0


def constant_mean(factor: Tensor, targets: Tensor, num_values: int) -> Tensor:
    """Returns the generalised least-squares estimate `(1^T K^-1 y) / (1^T K^-1 1)`, where 1 is 0 for gradients.

    Args:
        factor: the lower Cholesky factor of K.
        targets: values, then gradients.
        num_values: how many of the targets are values.
    """
    ones = _of_values(targets, num_values)
    solved = torch.cholesky_solve(ones.unsqueeze(1), factor).squeeze(1)
    return (solved @ targets) / (solved @ ones)


def _of_values(targets: Tensor, num_values: int) -> Tensor:
    ones = torch.zeros_like(targets)
    # The gradient of a constant mean is 0.
    ones[:num_values] = 1.0
    return ones
