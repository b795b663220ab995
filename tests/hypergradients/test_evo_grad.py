"""EvoGrad: the estimator written out by hand, its small-noise limit, and the scalar problem of the paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hypertorch as ht
from hypertorch import tree
from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge, net_problem, normal, scalars, task_problem
from tests.helpers.sized_problems import conv_net, mlp, sized_problem

EvoGrad = ht.hypergradients.EvoGrad
SGD, Hyper = ht.dynamics.SGD, ht.Hyper
F64 = torch.float64


def compute(problem: ht.BilevelProblem, backend: ht.Hypergradient, **options: Any) -> ht.HypergradientResult:
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend, **options)


class RecordingInner(ht.InnerProblem):
    """`L = sum(lam (w - b)^4) / 4`, which notes the params that it is evaluated at."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": normal(3, seed=1), "unused": normal(2, seed=2)}

    def batch(self, step: int) -> Tensor:
        return normal(3, seed=10 + step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        self.seen.append(params["w"].detach())
        return (hparams["lam"] * (params["w"] - batch) ** 4).sum() / 4


class CubicOuter(ht.OuterProblem):
    """`E = sum(w^3) / 3 + sum(lam^2) / 2`."""

    def init_hparams(self) -> TensorDict:
        return {"lam": normal(3, seed=3).exp()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"].pow(3).sum() / 3 + hparams["lam"].square().sum() / 2


class CubicOuterWithSteps(CubicOuter):
    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return (hparams["lam"] * params["w"]).sum() * (index + 1)


def recording(num_steps: int, outer: ht.OuterProblem | None = None) -> tuple[ht.BilevelProblem, RecordingInner]:
    inner = RecordingInner()
    return ht.BilevelProblem(inner, outer or CubicOuter(), dynamics=SGD(lr=0.01), num_steps=num_steps), inner


@pytest.mark.parametrize("num_steps", [0, 4])
@pytest.mark.parametrize("noise", ["gaussian", "sign"])
@pytest.mark.parametrize("num_copies", [2, 5])
def test_the_estimate_for_given_noise_equals_the_formula(num_steps: int, noise: str, num_copies: int) -> None:
    """g = sum_k dw_k/dlam theta_k . E'(theta*) + direct, with dw_k = -(w_k / tau) (dl_k - sum_j w_j dl_j)."""
    problem, inner = recording(num_steps)
    lam, sigma, tau = problem.init_hparams()["lam"], 0.3, 0.7
    backend = EvoGrad(num_copies=num_copies, sigma=sigma, temperature=tau, noise=noise)
    result = compute(problem, backend, outer_step=2)
    theta, copies = result.params["w"], torch.stack(inner.seen[-num_copies:])
    data = inner.batch(max(num_steps - 1, 0))

    noises = (copies - theta) / sigma
    if noise == "sign":
        torch.testing.assert_close(noises.abs(), torch.ones_like(noises), rtol=1e-12, atol=0)
    assert len({tuple(row.tolist()) for row in noises.round(decimals=9)}) == num_copies
    losses = (lam * (copies - data) ** 4).sum(1) / 4
    weights = torch.softmax(-losses / tau, 0)
    in_losses = (copies - data) ** 4 / 4
    in_weights = -weights[:, None] / tau * (in_losses - weights @ in_losses)
    outward = (weights @ copies) ** 2
    torch.testing.assert_close(result.grads["lam"], (copies @ outward) @ in_weights + lam, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.figures["effective_copies"], 1 / weights.square().sum(), rtol=1e-12, atol=0)
    # What is returned is the model, not the mixture of its copies.
    assert torch.equal(theta, ht.unroll(problem, {"lam": lam}, outer_step=2).params["w"])
    torch.testing.assert_close(result.outer_loss, theta.pow(3).sum() / 3 + lam.square().sum() / 2, rtol=1e-13, atol=0)


class Evaluation(NamedTuple):
    """What a loss was evaluated at, and the state of torch's generator before."""

    params: TensorDict
    batch: Batch
    noise: Tensor


class WatchedInner(ht.InnerProblem):
    """A net with running statistics and dropout: `w(lam, losses) . losses` and a penalty, nonlinear in `hparams`."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)]
        self.net = ht.FunctionalModule(nn.Sequential(*layers).double())
        self.buffers = self.net.buffers
        self.seen: list[Evaluation] = []

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self.net.init_params()

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> tuple[Tensor, TensorDict]:
        self.seen.append(Evaluation(tree.detach(params), batch, torch.get_rng_state()))
        scores, buffers = self.net.with_buffers(params, batch)
        losses = F.cross_entropy(scores, torch.arange(len(batch)) % 3, reduction="none")
        penalty = (hparams["penalty"].exp() * params["4.weight"].square().sum(0)).sum()
        return (hparams["weights"].sigmoid() * losses.pow(hparams["power"])).mean() + penalty, buffers

    def batch(self, step: int) -> Tensor:
        return normal(6, 4, seed=30 + step)


class WatchedTasksInner(WatchedInner):
    def batch(self, step: int) -> Tensor:
        return normal(3, 6, 4, seed=30 + step)


class WatchedOuter(ht.OuterProblem):
    """The same net on other data, and a part of `hparams`, one of which has no part in the inner loss."""

    def __init__(self, inner: WatchedInner, *shape: int) -> None:
        self.inner, self.shape = inner, shape
        self.seen: list[Evaluation] = []

    def init_hparams(self) -> TensorDict:
        return {"weights": normal(6, seed=3), "penalty": normal(6, seed=4) - 3, **scalars(power=1.5, direct=0.7)}

    def batch(self, outer_step: int) -> Tensor:
        return normal(*self.shape, 8, 4, seed=20)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        self.seen.append(Evaluation(tree.detach(params), batch, torch.get_rng_state()))
        loss = F.cross_entropy(self.inner.net(params, batch), torch.arange(len(batch)) % 3)
        return hparams["direct"].exp() * loss + (hparams["penalty"].exp() * params["4.weight"].cosh().sum(0)).sum()


def by_autograd(
    inner: WatchedInner,
    outer: WatchedOuter,
    copies: list[Evaluation],
    end: Evaluation,
    hparams: TensorDict,
    tau: float,
) -> tuple[TensorDict, Tensor]:
    """The paper's algorithm 1 in plain autograd: one graph over all copies, `theta* = sum_k w_k theta_k`."""
    leaves = tree.leaves_requiring_grad(hparams)
    losses = []
    for copy in copies:
        torch.set_rng_state(copy.noise)
        losses.append(inner.loss(copy.params, leaves, copy.batch)[0])
    weights = torch.softmax(-torch.stack(losses) / tau, 0)
    mixed = {
        name: value
        if name in inner.buffers
        else sum(weight * copy.params[name] for weight, copy in zip(weights, copies, strict=True))
        for name, value in end.params.items()
    }
    torch.set_rng_state(end.noise)
    loss = outer.loss(mixed, leaves, end.batch)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), weights.detach()


@pytest.mark.parametrize("num_tasks", [None, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("num_copies", [2, 5])
def test_the_estimate_equals_one_graph_over_all_copies(num_copies: int, num_steps: int, num_tasks: int | None) -> None:
    """With running statistics, dropout, a direct term, hyperparameters that enter both losses nonlinearly, tasks."""
    tau = 0.7
    inner = WatchedInner() if num_tasks is None else WatchedTasksInner()
    outer = WatchedOuter(inner, *(() if num_tasks is None else (num_tasks,)))
    problem = ht.BilevelProblem(inner, outer, dynamics=SGD(lr=0.1), num_steps=num_steps, num_tasks=num_tasks)
    hparams = outer.init_hparams()
    execution = ht.Execution(tasks="auto" if num_tasks is None else "loop")
    backend = EvoGrad(num_copies=num_copies, sigma=0.2, temperature=tau)
    compute(problem, backend, execution=execution)  # the first of its kind is looked at for side effects
    inner.seen.clear()
    outer.seen.clear()
    result = compute(problem, backend, execution=execution)

    per_task = num_steps + num_copies
    runs = [inner.seen[start + num_steps : start + per_task] for start in range(0, len(inner.seen), per_task)]
    # The loss of the mixture, and that of the model, which is reported.
    ends = outer.seen[1::2]
    assert len(runs) == len(ends) == (num_tasks or 1)
    estimates = [by_autograd(inner, outer, copies, end, hparams, tau) for copies, end in zip(runs, ends, strict=True)]
    for name, value in result.grads.items():
        expected = torch.stack([grads[name] for grads, _ in estimates]).mean(0)
        assert float(expected.abs().max()) > 1e-6
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)
    effective = torch.stack([1 / weights.square().sum() for _, weights in estimates])
    torch.testing.assert_close(result.figures["effective_copies"].reshape(-1), effective, rtol=1e-12, atol=0)


def test_noise_differs_between_outer_steps_and_is_repeatable() -> None:
    problem, _ = recording(2)
    backend = EvoGrad(sigma=0.3, temperature=1.0)
    first, again, other = (compute(problem, backend, outer_step=step).grads["lam"] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def covariance(copies: Tensor, sigma: float) -> Tensor:
    noise = copies / sigma
    centred = noise - noise.mean(0)
    return centred.T @ centred / len(copies)


@pytest.mark.parametrize("noise", ["gaussian", "sign"])
def test_small_noise_tends_to_one_gradient_step_seen_through_the_noise(noise: str) -> None:
    """g - direct -> -(sigma^2 / tau) E' C d2L/(dw dlam), with an error of the order of sigma or smaller."""
    tau, errors = 0.7, []
    for sigma in (0.02, 0.01, 0.005):
        problem, inner = recording(3)
        lam = problem.init_hparams()["lam"]
        result = compute(problem, EvoGrad(num_copies=4, sigma=sigma, temperature=tau, noise=noise))
        theta, copies = result.params["w"], torch.stack(inner.seen[-4:])
        mixed = torch.diag((theta - inner.batch(2)) ** 3)
        limit = -(theta**2) @ covariance(copies, sigma) @ mixed / tau
        errors.append(float(((result.grads["lam"] - lam) / sigma**2 - limit).norm() / limit.norm()))
    # Of second order where the third moments of the drawn noise happen to vanish.
    assert errors[0] / errors[1] > 1.9
    assert errors[1] / errors[2] > 1.9
    assert errors[2] < 0.05


@pytest.mark.parametrize(("noise", "num_copies"), [("gaussian", 2), ("gaussian", 5), ("sign", 2)])
def test_the_expectation_at_small_noise_is_a_step_of_gradient_descent(noise: str, num_copies: int) -> None:
    """Its mean is `OneStep` at the step size (sigma^2 / tau) (1 - 1/K), at a confidence of 99.99 %.

    With n = K - 1, K C is a Wishart matrix of n degrees of freedom, so that u' C v has the variance
    (n / K^2) ((u . v)^2 + |u|^2 |v|^2); signs, whose fourth moments are smaller, have less. The estimates of the tasks
    are independent.
    """
    num_tasks, sigma, tau = 10_000, 1e-3, 0.5
    root = normal(3, 3, seed=5)
    hessian = root @ root.T / 3 + torch.eye(3, dtype=F64)
    slope, start = torch.tensor([1.0, -2.0, 3.0], dtype=F64), normal(3, seed=7)
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": start},
            lambda p, h, b: (p["w"] - h["lam"]) @ hessian @ (p["w"] - h["lam"]) / 2,
        ),
        LambdaOuter({"lam": normal(3, seed=8)}, lambda p, h, b: slope @ p["w"]),
        dynamics=SGD(lr=1.0),
        num_steps=0,
        num_tasks=num_tasks,
    )
    backend = EvoGrad(num_copies=num_copies, sigma=sigma, temperature=tau, noise=noise)
    estimate = compute(problem, backend, execution=ht.Execution(tasks="vmap")).grads["lam"] / (sigma**2 / tau)
    expected = (1 - 1 / num_copies) * hessian @ slope
    one_step = compute(
        replace(problem, num_steps=1), ht.hypergradients.OneStep(), execution=ht.Execution(tasks="vmap")
    ).grads["lam"]
    torch.testing.assert_close(expected, (1 - 1 / num_copies) * one_step, rtol=1e-12, atol=0)
    variance = (num_copies - 1) / num_copies**2 * ((hessian @ slope) ** 2 + slope @ slope * hessian.square().sum(0))
    # 4.15 standard errors for each of three entries: 1e-4 together.
    error = (variance / num_tasks).sqrt()
    assert float(((estimate - expected).abs() / error).max()) < 4.15
    assert float((error / expected.abs()).max()) < 0.05  # so that the test can tell


class ScalarOuter(ht.OuterProblem):
    """A start drawn from the normal distribution and a strength of its own for each of the tasks."""

    def __init__(self, strengths: Tensor) -> None:
        self.strengths = strengths

    def init_hparams(self) -> TensorDict:
        return {"strengths": self.strengths}

    def batch(self, outer_step: int) -> Tensor:
        return normal(len(self.strengths), seed=9)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        return (params["x"] - 0.5).square()


def scalar_estimates(num_copies: int, grid: Tensor, trials: int) -> Tensor:
    """Estimates of shape (grid, trials) on the problem of papers: train (x-1)^2 + l x^2, judge (x-0.5)^2."""
    strengths = grid.repeat_interleave(trials)
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"x": h["start"]}, lambda p, h, b: (p["x"] - 1).square() + h["l"] * p["x"].square()),
        ScalarOuter(strengths),
        dynamics=SGD(lr=0.1),
        num_steps=0,
        num_tasks=len(strengths),
        context=lambda hparams, batch: {"l": hparams["strengths"] * 1.0, "start": batch},
    )
    result = compute(
        problem, EvoGrad(num_copies=num_copies, sigma=1.0, temperature=0.5), execution=ht.Execution(tasks="vmap")
    )
    return len(strengths) * result.grads["strengths"].reshape(len(grid), trials)


def test_the_scalar_problem_of_the_paper() -> None:
    """Sign and correlation with (l-1)/(l+1)^3 as the copies grow; the size is biased and is not compared."""
    grid = torch.linspace(0.1, 2.0, 20, dtype=F64)
    truth = (grid - 1) / (grid + 1) ** 3
    correlations, spreads, smallest = {}, {}, {}
    for num_copies, trials in ((2, 2000), (10, 400), (100, 200)):
        estimates = scalar_estimates(num_copies, grid, trials)
        means = estimates.mean(1)
        correlations[num_copies] = float(torch.corrcoef(torch.stack([means, truth]))[0, 1])
        spreads[num_copies] = float(estimates.std(1).mean())
        smallest[num_copies] = float(means[0])
        if num_copies > 2:
            clear = truth.abs() > 0.02
            assert torch.equal(means.sign()[clear], truth.sign()[clear])
    assert correlations[2] > 0.95
    assert correlations[10] > 0.98
    assert correlations[100] > 0.98
    # An independent implementation of the same set-up found 0.45, 0.14 and 0.08, and -0.16, -0.33 and -0.32.
    assert list(spreads.values()) == pytest.approx([0.45, 0.14, 0.08], rel=0.15)
    assert list(smallest.values()) == pytest.approx([-0.16, -0.33, -0.32], abs=0.07)


def test_all_copies_see_the_same_noise_of_the_model() -> None:
    def estimate(spread: float) -> Tensor:
        problem = ht.BilevelProblem(
            LambdaInner(
                lambda h: {"w": normal(2, seed=1)},
                lambda p, h, b: (h["lam"] * p["w"].square()).sum() + spread * torch.randn((), dtype=F64),
            ),
            LambdaOuter({"lam": normal(2, seed=2)}, lambda p, h, b: p["w"].sum()),
            dynamics=SGD(lr=0.1),
            num_steps=3,
        )
        return compute(problem, EvoGrad(num_copies=3, sigma=0.1)).grads["lam"]

    torch.testing.assert_close(estimate(2.0), estimate(0.0), rtol=1e-9, atol=0)


def test_the_loss_is_that_of_the_full_batch_where_there_is_one() -> None:
    class Full(RecordingInner):
        def full_batch(self) -> Tensor:
            return normal(3, seed=99)

    class Last(RecordingInner):
        def batch(self, step: int) -> Tensor:
            return normal(3, seed=99)

    outer, backend = CubicOuter(), EvoGrad(sigma=0.2, temperature=1.0)
    full, last, plain = (
        compute(ht.BilevelProblem(inner, outer, dynamics=SGD(lr=0.0), num_steps=2), backend).grads["lam"]
        for inner in (Full(), Last(), RecordingInner())
    )
    assert torch.equal(full, last)
    assert not torch.equal(full, plain)


def test_terms_at_inner_steps_give_their_direct_derivative() -> None:
    with_terms, _ = recording(3, CubicOuterWithSteps())
    without, _ = recording(3)
    backend = EvoGrad(sigma=0.2, temperature=1.0)
    result, plain = compute(with_terms, backend), compute(without, backend)
    expected, total, lam = plain.grads["lam"], plain.outer_loss, with_terms.init_hparams()["lam"]
    for step in (1, 2, 3):
        w = ht.unroll(replace(without, num_steps=step), {"lam": lam}).params["w"]
        expected, total = expected + step * w, total + step * lam @ w
    torch.testing.assert_close(result.grads["lam"], expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.outer_loss, total, rtol=1e-12, atol=0)


class PenalisedTasks(ht.InnerProblem):
    """Another inner problem with a learnt penalty."""

    def __init__(self, inner: ht.InnerProblem) -> None:
        self.inner = inner
        self.buffers = inner.buffers

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self.inner.init_params(hparams)

    def batch(self, step: int) -> Batch:
        return self.inner.batch(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
        loss, buffers = self.inner.loss(params, hparams, batch)
        return loss + hparams["penalty"] * params["0.weight"].cosh().sum(), buffers


@pytest.mark.parametrize("noise", ["gaussian", "sign"])
def test_vectorised_tasks_with_running_statistics_equal_a_loop(noise: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    plain = task_problem(module, item=(4,))
    hparams = {**plain.init_hparams(), **scalars(penalty=0.1)}
    names = tuple(name for name in hparams if name != "penalty")
    problem = replace(plain, inner=PenalisedTasks(plain.inner), allow_unused=names)
    backend = EvoGrad(num_copies=3, sigma=0.05, noise=noise)
    executions = [ht.Execution(tasks="vmap"), ht.Execution(tasks="vmap", chunk=2), ht.Execution(tasks="loop")]
    whole, chunks, loop = (
        ht.hypergradient(problem, hparams, backend=backend, execution=execution) for execution in executions
    )
    assert whole.figures["effective_copies"].shape == (3,)
    for other in (chunks, loop):
        torch.testing.assert_close(other.grads["penalty"], whole.grads["penalty"], rtol=1e-9, atol=0)
        torch.testing.assert_close(other.figures, whole.figures, rtol=1e-9, atol=0)
        torch.testing.assert_close(other.outer_loss, whole.outer_loss, rtol=1e-12, atol=0)
    # Each task has noise of its own.
    assert len(set(whole.figures["effective_copies"].tolist())) == 3


def test_the_context_is_chained() -> None:
    """A context that scales the hyperparameter by 3 scales its estimate by 3."""
    problem, _ = recording(2)
    backend = EvoGrad(sigma=0.2, temperature=1.0)
    plain = compute(problem, backend).grads["lam"] - problem.init_hparams()["lam"]

    class Outer(CubicOuter):
        def init_hparams(self) -> TensorDict:
            return {"third": CubicOuter().init_hparams()["lam"] / 3}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return params["w"].pow(3).sum() / 3

    chained = replace(problem, outer=Outer(), context=lambda hparams, batch: {"lam": 3 * hparams["third"]})
    torch.testing.assert_close(compute(chained, backend).grads["third"], 3 * plain, rtol=1e-10, atol=0)


def test_hyperparameters_without_a_part_in_the_loss_are_refused() -> None:
    with pytest.raises(IncompatibleBackendError, match=r"`hparams\['init.first'\]` reaches .*`EvoGrad\(num_copies=2"):
        compute(net_problem(SGD(lr=0.3), {}), EvoGrad())
    ridge = replace(Ridge().problem(3), dynamics=SGD(lr=Hyper("eta")))
    with pytest.raises(IncompatibleBackendError, match=r"`hparams\['eta'\]` reaches .*`EvoGrad"):
        compute(ridge, EvoGrad())
    problem, _ = recording(2)

    class Outer(CubicOuter):
        def init_hparams(self) -> TensorDict:
            return {**super().init_hparams(), **scalars(idle=1.0)}

    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach"):
        compute(replace(problem, outer=Outer()), EvoGrad())


def test_problems_without_a_trained_parameter_are_refused() -> None:
    class Fixed(RecordingInner):
        buffers = ("w", "unused")

    with pytest.raises(IncompatibleBackendError, match=r"returns no trained parameter.*nothing to perturb"):
        compute(replace(recording(0)[0], inner=Fixed()), EvoGrad())


def test_a_low_temperature_shows_in_the_effective_copies() -> None:
    problem, _ = recording(2)
    cold = compute(problem, EvoGrad(num_copies=4, sigma=1.0, temperature=1e-6))
    assert float(cold.figures["effective_copies"]) == pytest.approx(1.0)
    assert torch.equal(cold.grads["lam"], problem.init_hparams()["lam"])  # the direct term alone
    warm = compute(problem, EvoGrad(num_copies=4, sigma=1.0, temperature=1e6))
    assert float(warm.figures["effective_copies"]) == pytest.approx(4.0)


def test_only_first_derivatives_are_taken() -> None:
    target = normal(3, seed=1)
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.zeros(3, dtype=F64)},
            lambda p, h, b: h["c"] * torch.cdist(p["w"][None], target[None]).square().sum(),
        ),
        LambdaOuter(scalars(c=1.0), lambda p, h, b: p["w"].sum()),
        dynamics=SGD(lr=0.1),
        num_steps=3,
    )
    assert float(compute(problem, EvoGrad(sigma=0.1)).grads["c"].abs()) > 0
    with pytest.raises(IncompatibleBackendError, match="cannot differentiate twice"):
        compute(problem, ht.hypergradients.Reverse())


def test_single_precision_keeps_the_digits_of_small_perturbations() -> None:
    """With sigma at 1e-4 of the params' size, a mixture of whole copies would lose four of seven digits."""

    def estimate(dtype: torch.dtype) -> Tensor:
        start, slope, lam = (
            value.to(dtype) for value in (100 + normal(50, seed=1), normal(50, seed=2), torch.ones(50))
        )
        problem = ht.BilevelProblem(
            LambdaInner(lambda h: {"w": start}, lambda p, h, b: (h["lam"] * (p["w"] - start)).sum()),
            LambdaOuter({"lam": lam}, lambda p, h, b: slope @ p["w"]),
            dynamics=SGD(lr=0.1),
            num_steps=0,
        )
        result = compute(problem, EvoGrad(num_copies=2, sigma=2**-7, temperature=1.0, noise="sign"))
        return result.grads["lam"].double()

    exact = estimate(F64)
    assert float((estimate(torch.float32) - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("num_copies", [2, 6])
def test_costs_are_as_documented(num_copies: int) -> None:
    problem, inner = recording(5)
    compute(problem, EvoGrad(num_copies=num_copies))  # the first of its kind is looked at for side effects
    inner.seen.clear()
    stats = compute(problem, EvoGrad(num_copies=num_copies)).stats
    assert (stats.steps, stats.vjps, stats.graph_steps, stats.stored_states) == (5 + num_copies, 0, 0, 0)
    assert len(inner.seen) == 5 + num_copies


def measured(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> tuple[int, int]:
    """Returns the FLOPs of products and convolutions, and the peak of live bytes."""
    compute(problem, backend)  # the first of its kind is looked at for side effects
    with FlopCounterMode(display=False) as flops:
        compute(problem, backend)
    with PeakMemory() as memory:
        compute(problem, backend)
    return flops.get_total_flops(), memory.peak


def weighted(module: nn.Module, *shape: int) -> ht.BilevelProblem:
    return sized_problem(module, *shape, num_steps=1)


@pytest.mark.parametrize("num_copies", [2, 5])
def test_flops_are_those_of_the_evaluations_by_hand(num_copies: int) -> None:
    """A step, one forward pass per copy, the outer loss with its gradient, the outer loss that is reported."""
    problem = weighted(mlp(20, 16, 16, 5), 80, 20)
    params, hparams = problem.inner.init_params({}), problem.init_hparams()
    leaves = tree.leaves_requiring_grad(params)
    with FlopCounterMode(display=False) as gradient:
        torch.autograd.grad(problem.outer.loss(leaves, hparams, None), list(leaves.values()))
    with FlopCounterMode(display=False) as value:
        problem.outer.loss(params, hparams, None)
    expected = 2 * gradient.get_total_flops() + (num_copies + 1) * value.get_total_flops()
    assert measured(problem, EvoGrad(num_copies=num_copies))[0] == expected


def test_it_is_cheaper_than_a_second_derivative_of_a_convolutional_net() -> None:
    """A net of equal linear layers takes 7 + K passes here and 8 there, where K = 2 saves memory alone."""
    conv, linear = weighted(conv_net(), 20, 1, 12, 12), weighted(mlp(20, 16, 5), 80, 20)
    for second in (ht.hypergradients.Reverse(), ht.hypergradients.OneStep()):
        flops, peak = measured(conv, EvoGrad())
        flops_of_second, peak_of_second = measured(conv, second)
        assert flops < flops_of_second
        assert peak < 0.4 * peak_of_second
        assert measured(linear, EvoGrad())[1] < 0.8 * measured(linear, second)[1]


def test_the_graph_of_one_copy_lives_at_a_time() -> None:
    """A shift of the inputs keeps the activations of the whole net; a further copy adds its noise and two numbers."""
    net = ht.FunctionalModule(mlp(20, 16, 5).double())
    inputs, labels = normal(400, 20, seed=1), torch.arange(400) % 5

    def loss(params: TensorDict, shift: Tensor | float) -> Tensor:
        return F.cross_entropy(net(params, inputs + shift), labels)

    problem = ht.BilevelProblem(
        LambdaInner(lambda h: net.init_params(), lambda p, h, b: loss(p, h["shift"])),
        LambdaOuter(scalars(shift=0.1), lambda p, h, b: loss(p, 0.0)),
        dynamics=SGD(lr=0.1),
        num_steps=1,
    )
    params = net.init_params()
    noise = 8 * sum(value.numel() for value in params.values())
    few, many = (measured(problem, EvoGrad(num_copies=copies))[1] for copies in (2, 12))
    assert 10 * noise <= many - few <= 10 * (noise + 16 * 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_copies": 1}, r"`num_copies` is 1: a single copy has all the weight.* at least 2"),
        ({"num_copies": 2.0}, r"`num_copies` is 2.0"),
        ({"num_copies": True}, r"`num_copies` is True"),
        ({"sigma": 0.0}, r"`sigma` of `EvoGrad` is 0.0: copies must differ.* above 0"),
        ({"temperature": -1.0}, r"`temperature` of `EvoGrad` is -1.0"),
        ({"noise": "uniform"}, r"`noise` is 'uniform', which names no distribution. Use 'gaussian' or 'sign'"),
    ],
)
def test_settings_are_validated(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvoGrad(**settings)
