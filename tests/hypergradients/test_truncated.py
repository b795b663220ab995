"""Truncated reverse mode: whole window, closed form for every window, geometric bias, what a short window drops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge, net_problem, normal, task_problem

Reverse, Truncated = ht.hypergradients.Reverse, ht.hypergradients.Truncated
F64 = torch.float64
LEARNT = {
    "lr": torch.tensor(0.3, dtype=F64),
    "momentum": torch.tensor(0.6, dtype=F64),
    "weight_decay": torch.tensor(0.01, dtype=F64),
}
LEARNT_SGD = ht.dynamics.SGD(**{name: ht.Hyper(name) for name in LEARNT})


def assert_equal(actual: TensorDict, expected: TensorDict, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=1e-14)


@pytest.mark.parametrize("window", [7, 50])
@pytest.mark.parametrize("step_terms", [False, True])
def test_the_whole_window_is_reverse_mode_initialisation_included(window: int, step_terms: bool) -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, dropout=0.4, step_terms=step_terms)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=Reverse())
    result = ht.hypergradient(problem, hparams, backend=Truncated(window=window))
    assert_equal(result.grads, expected.grads)
    assert float(result.grads["init.first"].norm()) > 0.01
    torch.testing.assert_close(result.outer_loss, expected.outer_loss, rtol=1e-14, atol=0)
    assert result.stats == expected.stats


def truncated_ridge(ridge: Ridge, num_steps: int, window: int, lam: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """Returns df/dlam and df/deta through the last `window` of `num_steps` steps.

    In the eigenbasis, with `c = s + lam` and `r = 1 - eta c`, a step is `z' = r z + eta b`, so its own derivatives are
    `-eta z` in lam and `b - c z = b r^{t-1}` in eta; each is multiplied by r for every step that follows, and
    `z_t = (1 - r^t) b / c` makes both sums over the window geometric.
    """
    curvature = ridge.eigenvalues + lam
    rate = 1 - eta * curvature
    late = window * rate ** (num_steps - 1) * ridge.target
    in_lam = -(ridge.target / curvature * (1 - rate**window) / curvature - eta * late / curvature)
    outward = ridge.rotation.T @ ridge.outer_gradient(ridge.params_after(num_steps, lam, eta))
    return outward @ in_lam, outward @ late


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("num_steps", [1, 6, 25])
def test_every_window_on_ridge_equals_the_truncated_sum(seed: int, num_steps: int) -> None:
    ridge = Ridge(seed)
    problem = ridge.problem(num_steps)
    hparams = problem.init_hparams()
    for window in range(1, num_steps + 1):
        in_lam, in_eta = truncated_ridge(ridge, num_steps, window, hparams["lam"], hparams["eta"])
        result = ht.hypergradient(problem, hparams, backend=Truncated(window=window))
        assert_equal(result.grads, {"lam": in_lam, "eta": in_eta})


def test_the_bias_decays_geometrically_at_the_rate_of_the_contraction() -> None:
    ridge = Ridge()
    problem = ridge.problem(400)
    hparams = problem.init_hparams()
    exact = float(ridge.exact_hypergradient(hparams["lam"]))
    rates = 1 - hparams["eta"] * (ridge.eigenvalues + hparams["lam"])
    rate = float(rates.abs().max())
    assert 0.8 < rate < 0.95

    def bias(window: int) -> float:
        return exact - float(ht.hypergradient(problem, hparams, backend=Truncated(window=window)).grads["lam"])

    first, *others = [bias(window) for window in (1, 10, 100, 120)]
    assert all(abs(value) < 3 * abs(first) * rate**window for value, window in zip(others, (10, 100, 120), strict=True))
    # Where the window is long the slowest direction is alone, and the ratio is its own.
    assert others[2] / others[1] == pytest.approx(rate**20, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_window_of_one_step_is_a_descent_direction_on_a_strongly_convex_problem(seed: int) -> None:
    root = normal(6, 4, seed=seed)
    hessian = root.T @ root / 6 + 0.1 * torch.eye(4, dtype=F64)
    target = normal(4, seed=seed + 100)
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.zeros(4, dtype=F64)}, lambda p, h, b: p["w"] @ hessian @ p["w"] / 2 - h["c"] @ p["w"]
        ),
        LambdaOuter({"c": normal(4, seed=seed + 200)}, lambda p, h, b: (p["w"] - target).square().sum() / 2),
        dynamics=ht.dynamics.SGD(lr=0.2),
        num_steps=30,
    )
    hparams = problem.init_hparams()
    exact = ht.hypergradient(problem, hparams, backend=Reverse()).grads["c"]
    short = ht.hypergradient(problem, hparams, backend=Truncated(window=1)).grads["c"]
    # exact = sum_k (1 - lr H)^k short, each term of which leans towards `short`, the first being it.
    assert float(exact @ short) > float(short @ short) > 0


@pytest.mark.parametrize("window", [1, 4, 6])
def test_an_initialisation_under_a_short_window_is_refused(window: int) -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {})
    message = rf"`hparams\['init.first'\]` reaches the outer loss.*init.second.*`Truncated\(window={window}\)` follows"
    with pytest.raises(IncompatibleBackendError, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=Truncated(window=window))


def without_initialisation(problem: ht.BilevelProblem) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        problem.inner, problem.outer, dynamics=problem.dynamics, num_steps=problem.num_steps,
        allow_unused=("init.first", "init.second"),
    )  # fmt: skip


def test_a_schedule_before_the_window_gets_exact_zeros() -> None:
    schedule = {"lr": torch.linspace(0.1, 0.4, 7, dtype=F64)}
    problem = without_initialisation(net_problem(ht.dynamics.SGD(lr=ht.Hyper("lr", per="step")), schedule))
    hparams = problem.init_hparams()
    exact = ht.hypergradient(problem, hparams, backend=Reverse()).grads["lr"]
    for window in range(1, 8):
        lr = ht.hypergradient(problem, hparams, backend=Truncated(window=window)).grads["lr"]
        assert torch.equal(lr[: 7 - window], torch.zeros(7 - window, dtype=F64))
        # An entry acts at its own step alone, so those in the window are exact.
        torch.testing.assert_close(lr[7 - window :], exact[7 - window :], rtol=1e-12, atol=0)


def by_hand(problem: ht.BilevelProblem, hparams: TensorDict, num_steps: int, window: int) -> TensorDict:
    """A plain loop that cuts the graph once, for full batches and gradient descent of size 0.3."""
    leaves = {name: value.clone().requires_grad_() for name, value in hparams.items()}
    params = problem.inner.init_params(leaves)
    total = torch.zeros((), dtype=F64)
    for step in range(num_steps):
        if step == num_steps - window:
            params = {name: value.detach() for name, value in params.items()}
        inside = step >= num_steps - window
        cut = {name: value.detach().requires_grad_() for name, value in params.items()}
        own = params if inside and step > num_steps - window else cut
        loss = problem.inner.loss(own, leaves, problem.inner.batch(step))
        gradients = torch.autograd.grad(loss, list(own.values()), create_graph=inside)
        params = {name: own[name] - 0.3 * g for (name, g) in zip(own, gradients, strict=True)}
        judged = params if inside else {name: value.detach() for name, value in params.items()}
        total = total + problem.outer.step_loss(judged, leaves, None, step)
        params = judged
    total = total + problem.outer.loss(params, leaves, None)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if g is None else g
        for (name, value), g in zip(hparams.items(), gradients, strict=True)
    } | {"total": total.detach()}


@pytest.mark.parametrize("window", [1, 3, 5])
def test_terms_at_inner_steps_are_direct_before_the_window_and_full_inside(window: int) -> None:
    problem = without_initialisation(net_problem(ht.dynamics.SGD(lr=0.3), {}, step_terms=True))
    hparams = problem.init_hparams()
    result = ht.hypergradient(problem, hparams, backend=Truncated(window=window))
    expected = by_hand(problem, hparams, 7, window)
    torch.testing.assert_close(result.outer_loss, expected.pop("total"), rtol=1e-12, atol=0)
    assert_equal(result.grads, expected, 1e-10)


@pytest.mark.parametrize("step_terms", [False, True])
def test_costs_are_as_documented(step_terms: bool) -> None:
    for num_steps in (9, 40):
        problem = without_initialisation(
            net_problem(ht.dynamics.SGD(lr=0.3), {}, num_steps=num_steps, step_terms=step_terms)
        )
        stats = ht.hypergradient(problem, problem.init_hparams(), backend=Truncated(window=4)).stats
        assert (stats.steps, stats.vjps, stats.graph_steps, stats.stored_states) == (num_steps, 4, 4, 0)


def most_saved_bytes(num_steps: int, window: int) -> int:
    """Most bytes that autograd holds for backward at once, each storage once."""
    held: dict[int, int] = {}
    peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            # Detached: an output that a node saves would otherwise keep the node, and the node it.
            self.tensor, self.key = tensor.detach(), tensor.untyped_storage().data_ptr()
            count, _ = held.get(self.key, (0, 0))
            held[self.key] = (count + 1, tensor.untyped_storage().nbytes())
            nonlocal peak
            peak = max(peak, sum(size for _, size in held.values()))

        def __del__(self) -> None:
            count, size = held.pop(self.key)
            if count > 1:
                held[self.key] = (count - 1, size)

    problem = without_initialisation(net_problem(ht.dynamics.SGD(lr=0.3), {}, num_steps=num_steps))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        ht.hypergradient(problem, problem.init_hparams(), backend=Truncated(window=window))
    return peak


def test_memory_grows_with_the_window_not_with_the_horizon() -> None:
    assert most_saved_bytes(64, 4) < 1.1 * most_saved_bytes(8, 4)
    assert most_saved_bytes(64, 32) > 6 * most_saved_bytes(64, 4)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_vectorised_tasks_with_running_statistics_equal_a_loop(window: int) -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    names = tuple(name for name, _ in module.named_parameters())
    problem = task_problem(module, item=(4,), allow_unused=names)
    hparams = problem.init_hparams()
    vmap, loop = (
        ht.hypergradient(problem, hparams, backend=Truncated(window=window), execution=ht.Execution(tasks=route))
        for route in ("vmap", "loop")
    )
    assert_equal(vmap.grads, loop.grads)
    assert_equal(vmap.params, loop.params)
    assert float(vmap.grads["lr"].abs()) > 1e-4


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_context_is_chained(window: int) -> None:
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.ones((), dtype=F64)}, lambda p, h, b: h["scale"] * (p["w"] - 3.0).square() / 2
        ),
        LambdaOuter({"raw": torch.tensor(0.7, dtype=F64)}, lambda p, h, b: p["w"] + h["scale"]),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=5,
        context=lambda hparams, batch: {"scale": hparams["raw"].square()},
    )
    result = ht.hypergradient(problem, problem.init_hparams(), backend=Truncated(window=window))
    rate = 1 - 0.1 * 0.49
    # w_t - 3 = -2 r^t; a step's own derivative in the scale is -0.1 (w - 3), then times r for every step after it.
    in_scale = 1.0 + window * 0.1 * 2 * rate**4
    torch.testing.assert_close(result.grads["raw"], torch.tensor(2 * 0.7 * in_scale, dtype=F64), rtol=1e-12, atol=0)


def test_a_warm_started_run_has_no_path_before_it_anyway() -> None:
    ridge = Ridge()
    fresh = ridge.problem(3)
    problem = ht.BilevelProblem(fresh.inner, fresh.outer, dynamics=fresh.dynamics, num_steps=3, warm_start=True)
    hparams = problem.init_hparams()
    carry = ht.hypergradient(problem, hparams, backend=Reverse()).carry
    for window in (3, 4):
        expected = ht.hypergradient(problem, hparams, backend=Reverse(), carry=carry)
        again = ht.hypergradient(problem, hparams, backend=Truncated(window=window), carry=carry)
        assert_equal(again.grads, expected.grads)
    assert int(again.carry["index"]) == 6


def test_a_closed_form_without_a_step_is_differentiated_through() -> None:
    ridge = Ridge()
    problem = ridge.closed_form_problem()
    hparams = problem.init_hparams()
    result = ht.hypergradient(problem, hparams, backend=Truncated(window=1))
    torch.testing.assert_close(result.grads["lam"], ridge.exact_hypergradient(hparams["lam"]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("window", [0, -1, 1.5, True, None, math.inf])
def test_the_window_is_validated(window: object) -> None:
    with pytest.raises(ValueError, match=r"`window` is .*nothing that happens in the inner loop.* Pass a whole number"):
        Truncated(window=window)  # type: ignore[arg-type]


def test_an_initialisation_that_is_a_hyperparameter_leaves_no_graph_behind() -> None:
    """`init_params` returns the leaf itself, which must not be what the window starts from."""
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["w"]}, lambda p, h, b: h["c"] * p["w"].square()),
        LambdaOuter(
            {"w": torch.tensor(2.0, dtype=F64), "c": torch.tensor(0.5, dtype=F64)}, lambda p, h, b: p["w"] * h["w"]
        ),
        dynamics=ht.dynamics.SGD(lr=0.0),
        num_steps=2,
    )
    result = ht.hypergradient(problem, problem.init_hparams(), backend=Truncated(window=1))
    assert float(result.grads["w"]) == 2.0  # the direct term alone, with w_T = w


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_weight_that_asks_for_its_own_gradient_is_a_constant(num_steps: int) -> None:
    """`init_params` hands out a module's own parameter, which asks for its gradient where no graph is recorded, too."""
    weight = torch.nn.Parameter(torch.tensor(2.0, dtype=F64))
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": weight}, lambda p, h, b: h["c"] * p["w"].square()),
        LambdaOuter({"c": torch.tensor(0.5, dtype=F64)}, lambda p, h, b: p["w"].square() + h["c"]),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=num_steps,
    )
    backends = [ht.hypergradients.EvoGrad(num_copies=2), Truncated(window=1)]
    for backend in [*backends, *([ht.hypergradients.OneStep()] if num_steps else [])]:
        result = ht.hypergradient(problem, problem.init_hparams(), backend=backend)
        assert not result.params["w"].requires_grad and not result.grads["c"].requires_grad
    assert weight.grad is None
