"""The last step alone: closed form on ridge, equality with a window of one, and the order of the finite difference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge, net_problem, normal, scalars, task_problem

OneStep, Reverse, Truncated = ht.hypergradients.OneStep, ht.hypergradients.Reverse, ht.hypergradients.Truncated
SGD, Hyper = ht.dynamics.SGD, ht.Hyper
F64 = torch.float64
EXACT, DIFFERENCE = OneStep(), OneStep(finite_difference=True)
INITIAL = ("init.first", "init.second")


def assert_equal(actual: TensorDict, expected: TensorDict, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=1e-14)


def compute(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> ht.HypergradientResult:
    torch.manual_seed(0)
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend)


def net(dynamics: ht.Dynamics, extra: TensorDict, **options: object) -> ht.BilevelProblem:
    return replace(net_problem(dynamics, extra, **options), allow_unused=INITIAL)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_steps", [1, 2, 12])
@pytest.mark.parametrize("backend", [EXACT, DIFFERENCE])
def test_gradient_descent_on_ridge_equals_the_formula(num_steps: int, backend: OneStep) -> None:
    """df/dlam = -eta E' w_{T-1}; the loss is quadratic in w, so that the central difference has no error."""
    ridge = Ridge()
    problem = ridge.problem(num_steps)
    hparams = problem.init_hparams()
    before = ridge.params_after(num_steps - 1, hparams["lam"], hparams["eta"])
    outward = ridge.outer_gradient(ridge.params_after(num_steps, hparams["lam"], hparams["eta"]))
    inner_gradient = ridge.a.T @ (ridge.a @ before - ridge.y) / len(ridge.a) + hparams["lam"] * before
    expected = {"lam": -hparams["eta"] * outward @ before, "eta": -outward @ inner_gradient}
    assert_equal(compute(problem, backend).grads, expected)


@pytest.mark.parametrize("step_terms", [False, True])
def test_the_exact_form_is_a_window_of_one(step_terms: bool) -> None:
    settings = scalars(lr=0.3, momentum=0.6, dampening=0.1, weight_decay=0.02)
    dynamics = SGD(**{name: Hyper(name) for name in settings})
    problem = net(dynamics, settings, dropout=0.4, step_terms=step_terms)
    one, window = compute(problem, EXACT), compute(problem, Truncated(window=1))
    assert_equal(one.grads, window.grads, 1e-13)
    assert torch.equal(one.outer_loss, window.outer_loss)
    assert one.stats == window.stats


def dynamics_of(kind: str) -> tuple[ht.Dynamics, TensorDict]:
    if kind == "sgd":
        settings = scalars(lr=0.3)
        return SGD(lr=Hyper("lr")), settings
    if kind == "nesterov":
        settings = scalars(lr=0.3, momentum=0.6, weight_decay=0.02)
        return SGD(**{name: Hyper(name) for name in settings}, nesterov=True), settings
    settings = scalars(lr=0.05, beta1=0.8, beta2=0.95, eps=1e-3)
    return ht.dynamics.Adam(**{name: Hyper(name) for name in settings}), settings


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("step_terms", [False, True])
def test_the_error_of_the_finite_difference_is_of_second_order(kind: str, dropout: float, step_terms: bool) -> None:
    dynamics, settings = dynamics_of(kind)
    problem = net(dynamics, settings, dropout=dropout, step_terms=step_terms)
    exact = compute(problem, EXACT)
    errors = []
    for epsilon in (0.08, 0.04, 0.02):
        result = compute(problem, OneStep(finite_difference=True, epsilon=epsilon))
        torch.testing.assert_close(result.outer_loss, exact.outer_loss, rtol=1e-13, atol=0)
        # The rule's own derivative is no difference, nor is the direct term.
        for name in settings:
            torch.testing.assert_close(result.grads[name], exact.grads[name], rtol=1e-12, atol=1e-15)
        errors.append([float((result.grads[name] - exact.grads[name]).norm()) for name in ("weights", "log_l2")])
    in_weights, in_penalty = zip(*errors, strict=True)
    # A penalty is quadratic in the params: exact.
    assert max(in_penalty) < 1e-12
    assert in_weights[0] / in_weights[1] == pytest.approx(4.0, rel=0.05)
    assert in_weights[1] / in_weights[2] == pytest.approx(4.0, rel=0.05)
    assert in_weights[2] < 0.01 * float(exact.grads["weights"].norm())


@pytest.mark.parametrize("backend", [EXACT, DIFFERENCE])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_an_initialisation_is_refused_at_any_number_of_steps(backend: OneStep, num_steps: int) -> None:
    problem = net_problem(SGD(lr=0.3), {}, num_steps=num_steps)
    with pytest.raises(IncompatibleBackendError, match=r"`hparams\['init.first'\]` reaches .* `OneStep\(.*Reverse"):
        compute(problem, backend)


@pytest.mark.parametrize("backend", [EXACT, DIFFERENCE])
def test_a_step_size_of_an_early_step_gets_exact_zeros(backend: OneStep) -> None:
    schedule = {"lr": torch.linspace(0.1, 0.4, 7, dtype=F64)}
    result = compute(net(SGD(lr=Hyper("lr", per="step")), schedule), backend)
    assert torch.equal(result.grads["lr"][:-1], torch.zeros(6, dtype=F64))
    assert float(result.grads["lr"][-1].abs()) > 1e-4


def norm_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()


class PenalisedTasks(ht.InnerProblem):
    """Another inner problem with a penalty that is no quadratic, and per-task data."""

    def __init__(self, inner: ht.InnerProblem) -> None:
        self.inner = inner
        self.buffers = inner.buffers

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self.inner.init_params(hparams)

    def batch(self, step: int) -> Batch:
        return self.inner.batch(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
        loss, buffers = self.inner.loss(params, hparams, batch)
        penalty = sum(params[name].cosh().sum() for name in ("0.weight", "3.weight"))
        return loss + hparams["penalty"].exp() * penalty, buffers


@pytest.mark.parametrize("epsilon", [0.01, 0.5])
def test_vectorised_tasks_with_running_statistics_equal_a_loop(epsilon: float) -> None:
    plain = task_problem(norm_net(), item=(4,))
    hparams = {**plain.init_hparams(), **scalars(penalty=-1.0)}
    names = tuple(name for name in hparams if name not in ("lr", "penalty"))
    problem = replace(plain, inner=PenalisedTasks(plain.inner), allow_unused=names)
    backend = OneStep(finite_difference=True, epsilon=epsilon)
    vmap, loop = (
        ht.hypergradient(problem, hparams, backend=backend, execution=ht.Execution(tasks=route))
        for route in ("vmap", "loop")
    )
    assert_equal(vmap.grads, loop.grads, 1e-9)
    assert_equal(vmap.params, loop.params)
    exact = ht.hypergradient(problem, hparams, backend=EXACT)
    error = float((vmap.grads["penalty"] - exact.grads["penalty"]) / exact.grads["penalty"])
    # The tasks' norms differ, so that only the right distance for each has the error of each.
    assert 0 < abs(error) < epsilon**2


def test_each_task_is_moved_by_the_same_distance() -> None:
    """L = c w^5 / 5 and E = a w: the difference at distance e has the relative error (2 e^2 w^2 + e^4/5) / w^4."""
    epsilon, slopes, starts = 0.1, torch.tensor([1.0, 50.0], dtype=F64), torch.tensor([0.7, 1.3], dtype=F64)

    class Inner(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": hparams["starts"] + 0.0}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return hparams["c"] * params["w"] ** 5 / 5

    class Outer(ht.OuterProblem):
        def init_hparams(self) -> TensorDict:
            return scalars(c=2.0)

        def batch(self, outer_step: int) -> Batch:
            return slopes, starts

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return batch[0] * params["w"]

    problem = ht.BilevelProblem(
        Inner(), Outer(), dynamics=SGD(lr=0.01), num_steps=1, num_tasks=2,
        context=lambda hparams, batch: {"starts": batch[1]},
    )  # fmt: skip
    backend = OneStep(finite_difference=True, epsilon=epsilon)
    expected = (-0.01 * slopes * (starts**4 + 2 * epsilon**2 * starts**2 + epsilon**4 / 5)).mean()
    for route in ("vmap", "loop"):
        result = ht.hypergradient(problem, problem.init_hparams(), backend=backend, execution=ht.Execution(tasks=route))
        torch.testing.assert_close(result.grads["c"], expected, rtol=1e-10, atol=0)


def test_a_flat_outer_loss_has_no_distance_to_move_by() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones(2, dtype=F64)}, lambda p, h, b: h["c"] * p["w"].pow(4).sum()),
        LambdaOuter(scalars(c=1.5), lambda p, h, b: 0.0 * p["w"].sum() + h["c"]),
        dynamics=SGD(lr=0.1),
        num_steps=2,
    )
    assert float(compute(problem, DIFFERENCE).grads["c"]) == 1.0


@pytest.mark.parametrize("backend", [EXACT, DIFFERENCE])
def test_the_context_is_chained(backend: OneStep) -> None:
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.ones((), dtype=F64)}, lambda p, h, b: h["scale"] * (p["w"] - 3.0).square() / 2
        ),
        LambdaOuter(scalars(raw=0.7), lambda p, h, b: p["w"] + h["scale"]),
        dynamics=SGD(lr=0.1),
        num_steps=5,
        context=lambda hparams, batch: {"scale": hparams["raw"].square(), "labels": torch.arange(2)},
    )
    expected = 1.4 * (1.0 + 0.1 * 2 * (1 - 0.1 * 0.49) ** 4)
    assert float(compute(problem, backend).grads["raw"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", [EXACT, DIFFERENCE])
def test_a_warm_started_run_of_one_step_follows_the_training_run(backend: OneStep) -> None:
    """One outer step per inner step, as in the paper: minus eta E' w_{t-1} for the penalty at every step."""
    ridge = Ridge()
    problem = replace(ridge.problem(1), warm_start=True)
    hparams = problem.init_hparams()
    carry: TensorDict = {}
    for step in range(1, 5):
        result = ht.hypergradient(problem, hparams, backend=backend, carry=carry)
        carry = result.carry
        before = ridge.params_after(step - 1, hparams["lam"], hparams["eta"])
        outward = ridge.outer_gradient(ridge.params_after(step, hparams["lam"], hparams["eta"]))
        expected = -hparams["eta"] * outward @ before
        torch.testing.assert_close(result.grads["lam"], expected, rtol=1e-10, atol=1e-14)


@dataclass(frozen=True, kw_only=True)
class Twice(ht.Dynamics):
    """The extragradient method: a gradient at a place that a gradient led to; with `ahead` only at that place."""

    ahead: float | None = None

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def step(
        self, loss: InnerLoss, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        if self.ahead is None:
            first = loss.gradient(params, hparams)
            halfway = {name: value - 0.1 * first[name] for name, value in params.items()}
        else:
            halfway = {name: value + self.ahead * hparams["lam"] for name, value in params.items()}
        second = loss.gradient(halfway, hparams)
        return {name: value - 0.1 * second[name] for name, value in params.items()}, {}


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        (Twice(), r"Twice\(ahead=None\), which evaluate the gradient 2 times in a step.* Use `OneStep\(\)`"),
        (Twice(ahead=0.1), r"Twice\(ahead=0.1\), which evaluate the gradient elsewhere.* Use `OneStep\(\)`"),
    ],
)
def test_dynamics_with_gradients_in_other_places_are_refused_by_the_finite_difference(
    dynamics: Twice, message: str
) -> None:
    problem = replace(Ridge().problem(3, dynamics), allow_unused=("eta",))
    with pytest.raises(IncompatibleBackendError, match=message):
        compute(problem, DIFFERENCE)
    assert_equal(compute(problem, EXACT).grads, compute(problem, Truncated(window=1)).grads)


@pytest.mark.parametrize("backend", [EXACT, DIFFERENCE])
def test_a_diverged_run_is_reported_as_such(backend: OneStep) -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": normal(3, seed=1)}, lambda p, h, b: h["c"] * p["w"].pow(4).sum()),
        LambdaOuter(scalars(c=1.0), lambda p, h, b: p["w"].sum()),
        dynamics=SGD(lr=10.0),
        num_steps=20,
    )
    with pytest.raises(ht.errors.NonFiniteError, match=r"inner step"):
        compute(problem, backend)


def test_a_problem_without_a_step_is_refused() -> None:
    with pytest.raises(IncompatibleBackendError, match=r"`num_steps` = 0: there is no last step.*`Reverse\(\)`"):
        compute(Ridge().closed_form_problem(), EXACT)


@pytest.mark.parametrize("num_steps", [1, 8])
def test_costs_are_as_documented(num_steps: int) -> None:
    problem = net(SGD(lr=0.3), {}, num_steps=num_steps)
    exact, difference = compute(problem, EXACT).stats, compute(problem, DIFFERENCE).stats
    assert (exact.steps, exact.vjps, exact.graph_steps, exact.stored_states) == (num_steps, 1, 1, 0)
    assert (difference.steps, difference.vjps, difference.graph_steps) == (num_steps + 2, 1, 1)


def test_the_finite_difference_takes_no_second_derivative() -> None:
    """Where PyTorch has none, the exact form alone is refused."""
    target, slope = normal(3, seed=1), normal(3, seed=2)
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.zeros(3, dtype=F64)},
            lambda p, h, b: h["c"] * torch.cdist(p["w"][None], target[None]).square().sum(),
        ),
        LambdaOuter(scalars(c=1.0), lambda p, h, b: slope @ p["w"]),
        dynamics=SGD(lr=0.1),
        num_steps=1,
    )
    expected = 0.1 * slope @ (2 * target)
    torch.testing.assert_close(compute(problem, DIFFERENCE).grads["c"], expected, rtol=1e-10, atol=0)
    with pytest.raises(IncompatibleBackendError, match=r"`_cdist_backward`, which PyTorch cannot differentiate"):
        compute(problem, EXACT)


@pytest.mark.parametrize("epsilon", [0.0, -0.1, float("nan")])
def test_the_distance_is_validated(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"`epsilon` is .*a difference needs two places.*above 0"):
        OneStep(epsilon=epsilon)
