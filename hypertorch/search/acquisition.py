"""Chooses the next point: the greatest expected improvement, found by BoTorch."""

from __future__ import annotations

import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.optim import optimize_acqf
from torch import Tensor
from torch.quasirandom import SobolEngine

from hypertorch.search.gradient_gp import GradientGP

_EVERYWHERE, _NEAR = 512, 128
_RESTARTS = 2  # of each kind
_WIDTHS = (-4.0, -0.5)  # of steps around the best point, as powers of ten


def next_point(model: GradientGP, *, seed: int, box: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Returns the point of the unit cube with the greatest logarithm of the expected improvement, `(dimension,)`.

    The improvement is that over the least posterior mean at the observed points. The search starts from the best
    points of a Sobol sequence over the cube, and from the best of small steps around the best point.

    Args:
        model: of the values, to be minimised.
        seed: of the starts.
        box: lower and upper ends of the part of the cube to search, each `(dimension,)`; None for all of it.

    References:
        Ament et al. (2023), Unexpected improvements to expected improvement for Bayesian optimization.
    """
    points = model.observations.points
    dimension = points.shape[1]
    with torch.no_grad():
        means = model.posterior(points.unsqueeze(1)).mean.flatten()
    low, high = (torch.zeros_like(points[0]), torch.ones_like(points[0])) if box is None else box
    acquisition = LogExpectedImprovement(model, best_f=means.min(), maximize=False)
    draws = SobolEngine(dimension, scramble=True, seed=seed).draw(_EVERYWHERE, dtype=torch.float64)
    draws = low + draws * (high - low)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn((_NEAR, dimension), generator=generator, dtype=torch.float64)
    widths = 10.0 ** torch.linspace(*_WIDTHS, _NEAR, dtype=torch.float64).unsqueeze(1)
    # The expected improvement may have a narrow peak beside the best point, which draws over the whole cube miss.
    near = (points[means.argmin()] + widths * steps).clamp(low, high)
    starts = torch.cat([_best(acquisition, draws), _best(acquisition, near)])
    found, _ = optimize_acqf(
        acquisition,
        bounds=torch.stack([low, high]),
        q=1,
        num_restarts=len(starts),
        batch_initial_conditions=starts.unsqueeze(1),
        # A second attempt would draw new starts from the global generator.
        retry_on_optimization_warning=False,
    )
    return found.squeeze(0).detach()


def _best(acquisition: LogExpectedImprovement, points: Tensor) -> Tensor:
    with torch.no_grad():
        return points[acquisition(points.unsqueeze(1)).topk(_RESTARTS).indices]
