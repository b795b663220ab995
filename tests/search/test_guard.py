"""Leaving points out in closed form, and what the guard says of gradients that mislead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hypertorch.search.evidence import fit_gradient_gp
from hypertorch.search.gradient_gp import GradientGP
from hypertorch.search.guard import gradients_help, left_out_log_densities
from hypertorch.search.kernels import Kernel, Matern52
from hypertorch.search.observations import Observations
from tests.search.models import F64, KERNELS, observed, parameters


def kept(seen: Observations, index: Tensor) -> Observations:
    return Observations(
        points=seen.points[index], values=seen.values[index], gradients=seen.gradients[index], doubt=seen.doubt[index]
    )


def left_out_one_by_one(model: GradientGP) -> Tensor:
    """Conditions anew on all points but one, with the same parameters, mean and standardisation."""
    shift, scale = model.standardisation
    seen, found = model.observations, []
    for point in range(len(seen)):
        rest = kept(seen, torch.tensor([other for other in range(len(seen)) if other != point]))
        own = kept(seen, torch.tensor([point]))
        covariance = model.fitted.covariance(model.kernel, rest + own)
        joint = (rest + own).targets(shift, scale)
        count = len(rest)
        values = [*range(count)]
        gradients = [count + 1 + row for row in range(int(rest.has_gradient.sum()) * 2)]
        others = torch.tensor([*values, *gradients])
        residuals = joint - model.mean * torch.tensor([1.0] * (count + 1) + [0.0] * (len(joint) - count - 1), dtype=F64)
        cross = covariance[count, others]
        solved = torch.linalg.solve(covariance[others][:, others], cross)
        mean, variance = solved @ residuals[others], covariance[count, count] - solved @ cross
        found.append(torch.distributions.Normal(mean, variance.sqrt()).log_prob(residuals[count]))
    return torch.stack(found)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("known", ["all", "some", "none"])
def test_the_closed_form_is_leaving_each_point_out(kernel: Kernel, known: str) -> None:
    seen = observed(6, with_gradients=known != "none")
    if known == "some":
        seen = seen.with_newest_gradients(13)
        assert int(seen.has_gradient.sum()) == 3
    model = GradientGP(seen, parameters(), kernel)
    torch.testing.assert_close(left_out_log_densities(model), left_out_one_by_one(model), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("factor", "help_expected"), [(1.0, True), (-1.0, False), (0.1, False), (10.0, False)])
def test_gradients_that_mislead_are_found_out(factor: float, help_expected: bool) -> None:
    seen = observed(14)
    scaled = replace(seen, gradients=factor * seen.gradients)
    with_gradients = fit_gradient_gp(scaled, Matern52())
    without = fit_gradient_gp(seen.without_gradients(), Matern52())
    assert gradients_help(with_gradients, without) is help_expected


@pytest.mark.parametrize(("count", "help_expected"), [(4, True), (5, False)])
def test_a_tie_is_for_the_gradients_while_there_are_few_values(count: int, help_expected: bool) -> None:
    model = GradientGP(observed(count), parameters(), Matern52())
    assert gradients_help(model, model) is help_expected
