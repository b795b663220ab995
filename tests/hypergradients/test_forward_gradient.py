"""Forward gradients: each is a directional derivative times its direction, and their mean is the hypergradient."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch import tree
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError, ReplayError
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.tasks import task_slices
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge, net_problem, normal, task_problem

ForwardGradient, Reverse = ht.hypergradients.ForwardGradient, ht.hypergradients.Reverse
SGD = ht.dynamics.SGD
F64 = torch.float64
DISTRIBUTIONS = ["normal", "rademacher"]


def flat(grads: TensorDict) -> Tensor:
    return torch.cat([value.reshape(-1) for value in grads.values()])


def learnt_problem(**options: object) -> ht.BilevelProblem:
    extra = {"lr": torch.tensor(0.3, dtype=F64), "momentum": torch.tensor(0.6, dtype=F64)}
    return net_problem(SGD(lr=ht.Hyper("lr"), momentum=ht.Hyper("momentum")), extra, num_steps=4, **options)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("step_terms", [False, True])
def test_one_sample_is_the_directional_derivative_times_the_direction(distribution: str, step_terms: bool) -> None:
    problem = learnt_problem(dropout=0.4, step_terms=step_terms)
    hparams = problem.init_hparams()
    backend = ForwardGradient(distribution=distribution)
    loop = BoundProblem(problem, hparams, 3, None).loop(None, {})
    direction = flat({name: value[0] for name, value in backend._directions(loop, hparams).items()})
    exact = ht.hypergradient(problem, hparams, backend=Reverse(), outer_step=3)
    result = ht.hypergradient(problem, hparams, backend=backend, outer_step=3)
    expected = (flat(exact.grads) @ direction) * direction
    torch.testing.assert_close(flat(result.grads), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(result.outer_loss, exact.outer_loss, rtol=1e-12, atol=0)
    for name, value in exact.params.items():
        torch.testing.assert_close(result.params[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chunks_are_the_mean_over_the_same_directions(distribution: str) -> None:
    problem = learnt_problem(dropout=0.4)
    hparams = problem.init_hparams()
    results = {
        size: ht.hypergradient(
            problem, hparams, backend=ForwardGradient(num_samples=5, distribution=distribution, chunk_size=size)
        )
        for size in (None, 2, 1)
    }
    for result in results.values():
        torch.testing.assert_close(flat(result.grads), flat(results[None].grads), rtol=1e-10, atol=1e-13)
    costs = {
        size: (result.stats.steps, result.stats.jvps, result.stats.stored_states) for size, result in results.items()
    }
    assert costs == {None: (4, 20, 6), 2: (12, 20, 3), 1: (20, 20, 2)}


def estimates(problem: ht.BilevelProblem, distribution: str, count: int) -> Tensor:
    """One estimate from one direction at each of many outer steps, of shape `(count, entries)`."""
    backend = ForwardGradient(distribution=distribution)
    hparams = problem.init_hparams()
    return torch.stack(
        [flat(ht.hypergradient(problem, hparams, backend=backend, outer_step=step).grads) for step in range(count)]
    )


class Quadratic(ht.InnerProblem):
    """Descends `|w - c|^2 / 2`, with a hyperparameter of four entries and a step size."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.zeros(4, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["c"]).square().sum() / 2


QUADRATIC = ht.BilevelProblem(
    Quadratic(),
    LambdaOuter(
        {"c": torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=F64), "lr": torch.tensor(0.3, dtype=F64)},
        lambda p, h, b: (p["w"] - 1.0).square().sum() / 2,
    ),
    dynamics=SGD(lr=ht.Hyper("lr")),
    num_steps=2,
)
COUNT = 600


@pytest.mark.parametrize("distribution", [DISTRIBUTIONS[0], pytest.param(DISTRIBUTIONS[1], marks=pytest.mark.slow)])
def test_is_unbiased_with_the_variance_of_the_formula(distribution: str) -> None:
    """Each of the five means, and the total variance, within 4 standard errors: false alarms in fewer than 1 of 1000.

    By hand: w_2 = c (1 - (1 - lr)^2), so that df/dc = (w - 1) (1 - (1 - lr)^2), df/dlr = sum (w - 1) c 2 (1 - lr).
    """
    hparams = QUADRATIC.init_hparams()
    rate = 1.0 - (1.0 - 0.3) ** 2
    residual = hparams["c"] * rate - 1.0
    exact = torch.cat([residual * rate, ((residual * hparams["c"]).sum() * 2 * 0.7)[None]])
    found = estimates(QUADRATIC, distribution, COUNT)
    sign = 1.0 if distribution == "normal" else -1.0
    variance = exact.square().sum() + sign * exact.square()
    deviations = (found.mean(0) - exact) / (variance / COUNT).sqrt()
    assert deviations.abs().max() < 4.0, deviations
    # |g - df|^2, whose mean is the total variance; its own spread is estimated from the sample.
    squares = (found - exact).square().sum(1)
    assert abs(float(squares.mean() - variance.sum())) < 4.0 * float(squares.std()) / math.sqrt(COUNT)


def test_rademacher_directions_are_signs_and_normal_ones_are_not() -> None:
    problem = learnt_problem()
    hparams = problem.init_hparams()
    loop = BoundProblem(problem, hparams, 0, None).loop(None, {})
    signs = flat(ForwardGradient(num_samples=50, distribution="rademacher")._directions(loop, hparams))
    assert set(signs.tolist()) == {1.0, -1.0}
    assert abs(float(signs.mean())) < 4.0 / math.sqrt(signs.numel())
    numbers = flat(ForwardGradient(num_samples=50)._directions(loop, hparams))
    assert abs(float(numbers.mean())) < 4.0 / math.sqrt(numbers.numel())
    assert abs(float(numbers.var()) - 1.0) < 4.0 * math.sqrt(2.0 / numbers.numel())


def test_many_samples_come_near_the_hypergradient() -> None:
    exact = flat(ht.hypergradient(QUADRATIC, QUADRATIC.init_hparams(), backend=Reverse()).grads)
    found = flat(
        ht.hypergradient(QUADRATIC, QUADRATIC.init_hparams(), backend=ForwardGradient(num_samples=20_000)).grads
    )
    error = ((exact.square().sum() + exact.square()) / 20_000).sqrt()
    assert ((found - exact).abs() < 4.0 * error).all()


def test_directions_differ_between_outer_steps_and_are_repeatable() -> None:
    problem = learnt_problem()
    hparams = problem.init_hparams()
    first, again, other = (
        flat(ht.hypergradient(problem, hparams, backend=ForwardGradient(), outer_step=step).grads) for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    seeded = dataclasses.replace(problem, seed=1)
    assert not torch.allclose(flat(ht.hypergradient(seeded, hparams, backend=ForwardGradient()).grads), first)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_route_moves_all_tasks_along_the_same_directions(distribution: str) -> None:
    problem = task_problem(torch.nn.Linear(2, 3).double(), item=(2,), num_tasks=3, num_steps=2)
    hparams = problem.init_hparams()
    backend = ForwardGradient(num_samples=3, distribution=distribution)
    routes = [
        ht.hypergradient(problem, hparams, backend=backend, execution=ht.Execution(tasks=route))
        for route in ("vmap", "loop")
    ]
    torch.testing.assert_close(flat(routes[0].grads), flat(routes[1].grads), rtol=1e-10, atol=1e-13)
    exact = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    torch.testing.assert_close(routes[0].outer_loss, exact.outer_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_context_is_estimated_without_bias(distribution: str) -> None:
    """The estimate of theta is `(a . v) (b . v)`, with `a` the derivative in hyperparameters and context and `b` the
    derivative of those in theta; its variance is `|a|^2 |b|^2 + (a . b)^2`, less `2 |a b|^2` for signs.
    """
    values = {"theta": torch.tensor(0.7, dtype=F64), "scale": torch.tensor(1.3, dtype=F64)}
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["centre"]}, lambda p, h, b: (p["w"] - 2.0 * h["centre"] * h["scale"]).square()),
        LambdaOuter(values, lambda p, h, b: (p["w"] - h["scale"]).square()),
        dynamics=SGD(lr=0.1),
        num_steps=2,
        num_tasks=2,
        context=lambda h, b: {"centre": torch.arange(1.0, 3.0, dtype=F64) * h["theta"], "kind": torch.arange(2)},
    )
    exact = ht.hypergradient(problem, values, backend=Reverse(), execution=ht.Execution(tasks="vmap")).grads["theta"]
    bound, whole = BoundProblem(problem, values, 0, None), task_slices(problem.num_tasks, ht.Execution(tasks="vmap"))[0]
    variables = tree.leaves_requiring_grad({**values, **bound.context(values, whole)})
    parts = Reverse().compute(bound.loop(whole, {"centre": values["theta"], "kind": values["theta"]}), variables).grads
    a = torch.cat([torch.zeros(1, dtype=F64), parts["scale"].reshape(1), parts["centre"]])
    b = torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=F64)
    assert float(a @ b) == pytest.approx(float(exact), rel=1e-12)
    variance = a.square().sum() * b.square().sum() + exact.square()
    if distribution == "rademacher":
        variance = variance - 2 * (a * b).square().sum()
    backend = ForwardGradient(num_samples=4_000, distribution=distribution)
    found = ht.hypergradient(problem, values, backend=backend, execution=ht.Execution(tasks="vmap")).grads["theta"]
    assert abs(float(found - exact)) < 4.0 * math.sqrt(float(variance) / 4_000)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_hyperparameter_that_does_nothing_is_named(num_samples: int) -> None:
    idle = {**QUADRATIC.init_hparams(), "idle": torch.zeros(3, dtype=F64)}
    problem = dataclasses.replace(QUADRATIC, outer=LambdaOuter(idle, lambda p, h, b: p["w"].square().sum()))
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach"):
        ht.hypergradient(problem, idle, backend=ForwardGradient(num_samples=num_samples))


def test_limits_of_forward_mode_are_explained() -> None:
    target = normal(4, seed=0)
    problem = dataclasses.replace(
        QUADRATIC,
        inner=LambdaInner(lambda h: {"w": h["c"] * 0.0}, lambda p, h, b: F.huber_loss(p["w"] * h["c"], target)),
    )
    with pytest.raises(IncompatibleBackendError, match=r"`huber_loss_backward`, which has no forward derivative"):
        ht.hypergradient(problem, problem.init_hparams(), backend=ForwardGradient())

    def through_numpy(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return (p["w"] - h["c"]).square().sum() + float(p["w"].detach().numpy().sum() * 0.0)

    problem = dataclasses.replace(QUADRATIC, inner=LambdaInner(lambda h: {"w": h["c"] * 0.0}, through_numpy))
    one_by_one, rerouted = (
        ht.hypergradient(problem, problem.init_hparams(), backend=ForwardGradient(num_samples=2, chunk_size=chunk_size))
        for chunk_size in (1, None)
    )
    assert torch.equal(rerouted.grads["c"], one_by_one.grads["c"])


def test_data_that_change_are_noticed() -> None:
    ridge = Ridge().problem(3)

    class Forgetful(type(ridge.inner)):  # type: ignore[misc]
        calls = 0

        def batch(self, step: int) -> Batch:
            self.calls += step == 2  # the first step, which is looked at beforehand, is the same every time
            return float(self.calls + 1)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return super().loss(params, hparams, batch) * batch

    # Allowed to be unused, so that only this backend runs and not the search for a path.
    problem = dataclasses.replace(ridge, inner=Forgetful(Ridge()), allow_unused=("lam", "eta"))
    with pytest.raises(ReplayError, match="`w` after inner step 2 differs"):
        ht.hypergradient(problem, problem.init_hparams(), backend=ForwardGradient(num_samples=2, chunk_size=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "`num_samples` is 0: without a direction .* at least 1"),
        ({"num_samples": True}, "`num_samples` is True"),
        ({"distribution": "uniform"}, "`distribution` is 'uniform': .*Use 'normal' or 'rademacher'"),
        ({"chunk_size": 0}, "`chunk_size` is 0: it is the number of directions .* whole number of at least 1"),
    ],
)
def test_settings_are_validated(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForwardGradient(**settings)
