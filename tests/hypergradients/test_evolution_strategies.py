"""Evolution strategies: bias and variance at a stated confidence, black-box losses, and persistent runs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import outer
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, scalars, task_problem

EvolutionStrategies = ht.hypergradients.EvolutionStrategies
SGD, Hyper = ht.dynamics.SGD, ht.Hyper
F64 = torch.float64
Z = 4.42  # standard errors that a normal number exceeds, in either direction, once in 100 000 times


def compute(problem: ht.BilevelProblem, backend: ht.Hypergradient, **options: object) -> ht.HypergradientResult:
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend, **options)  # type: ignore[arg-type]


SLOPE = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)


def linear(num_tasks: int | None = None) -> ht.BilevelProblem:
    """f(lam) = slope . lam, by way of the initialisation and a step that adds a constant."""
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["lam"] * 1.0}, lambda p, h, b: p["w"].sum()),
        LambdaOuter({"lam": normal(4, seed=1)}, lambda p, h, b: SLOPE @ p["w"]),
        dynamics=SGD(lr=0.1),
        num_steps=1,
        num_tasks=num_tasks,
    )


def test_a_linear_objective_is_unbiased_with_the_variance_of_the_formula() -> None:
    """E g = a and Var g_j = (|a|^2 + a_j^2) / N, at a confidence of 99.99 % for the four means.

    The variance over M estimates is judged by its own. g_j is the mean of N products e_j (e . a), whose fourth moment
    is at most 105 |a|^4, so that the empirical variance has a relative variance below 105 / (N M) + 2 / (M - 1).
    """
    num_pairs, repeats = 20, 300
    backend = EvolutionStrategies(num_pairs=num_pairs, sigma=0.3)
    problem = linear()
    estimates = torch.stack([compute(problem, backend, outer_step=step).grads["lam"] for step in range(repeats)])
    variance = (SLOPE @ SLOPE + SLOPE**2) / num_pairs
    deviation = (estimates.mean(0) - SLOPE).abs() / (variance / repeats).sqrt()
    assert float(deviation.max()) < Z
    spread = Z * math.sqrt(105 / (num_pairs * repeats) + 2 / (repeats - 1))
    assert float((estimates.var(0) / variance - 1).abs().max()) < spread < 0.7


@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_a_quadratic_objective_has_no_bias_at_any_sigma(sigma: float) -> None:
    """Antithetic differences of a quadratic are exact, so that the mean and its error are those of its gradient."""
    root, num_pairs = normal(4, 4, seed=2), 4000
    hessian = root @ root.T
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["lam"] * 1.0}, lambda p, h, b: p["w"].sum()),
        LambdaOuter({"lam": normal(4, seed=3)}, lambda p, h, b: p["w"] @ hessian @ p["w"] / 2 + 5.0),
        dynamics=SGD(lr=0.1),
        num_steps=0,
    )
    estimate = compute(problem, EvolutionStrategies(num_pairs=num_pairs, sigma=sigma)).grads["lam"]
    gradient = hessian @ problem.init_hparams()["lam"]
    error = ((gradient @ gradient + gradient**2) / num_pairs).sqrt()
    assert float(((estimate - gradient).abs() / error).max()) < Z
    assert float((error / gradient.abs()).min()) < 0.05


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_an_error_rate_has_the_gradient_of_its_smoothed_form(threshold: float) -> None:
    """f = 1[w > threshold] at w = lam: d/dlam P(lam + sigma e > threshold) is a normal density.

    A pair gives e (f+ - f-) / (2 sigma), of a variance below E e^2 / (4 sigma^2).
    """
    sigma, num_pairs, lam = 0.5, 4000, 0.3
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["lam"] * 1.0}, lambda p, h, b: p["w"].sum()),
        LambdaOuter(scalars(lam=lam), lambda p, h, b: (p["w"] > threshold).double()),
        dynamics=SGD(lr=0.1),
        num_steps=0,
    )
    estimate = float(compute(problem, EvolutionStrategies(num_pairs=num_pairs, sigma=sigma)).grads["lam"])
    distance = (lam - threshold) / sigma
    expected = math.exp(-(distance**2) / 2) / math.sqrt(2 * math.pi) / sigma
    bound = Z / (2 * sigma * math.sqrt(num_pairs))
    assert abs(estimate - expected) < bound < 0.15 * expected


def hand_written(
    problem: ht.BilevelProblem, hparams: TensorDict, noise: list[TensorDict], sigma: float, **options: object
) -> TensorDict:
    """The formula on unrolls of the perturbed problems."""
    total = {name: torch.zeros_like(value) for name, value in hparams.items()}
    for direction in noise:
        ahead, behind = (
            ht.unroll(
                problem,
                {name: value + sign * sigma * direction[name] for name, value in hparams.items()},
                **options,  # type: ignore[arg-type]
            ).outer_loss.mean()
            for sign in (1, -1)
        )
        for name in total:
            total[name] += direction[name] * (ahead - behind) / (2 * len(noise) * sigma)
    return total


class Watch(ht.InnerProblem):
    """Notes the hyperparameters that runs start with, from which the noise can be read."""

    def __init__(self, inner: ht.InnerProblem) -> None:
        self.inner, self.seen = inner, []

    def init_params(self, hparams: TensorDict) -> TensorDict:
        self.seen.append({name: value.detach().clone() for name, value in hparams.items()})
        return self.inner.init_params(hparams)

    def batch(self, step: int) -> Batch:
        return self.inner.batch(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self.inner.loss(params, hparams, batch)

    def noise(self, hparams: TensorDict, num_pairs: int, sigma: float) -> list[TensorDict]:
        """The noise of the first hypergradient: an unperturbed run, then pairs."""
        ahead, behind = self.seen[1 : 2 * num_pairs : 2], self.seen[2 : 2 * num_pairs + 1 : 2]
        for first, second in zip(ahead, behind, strict=True):
            for name, value in hparams.items():
                torch.testing.assert_close(first[name] + second[name], 2 * value, rtol=1e-12, atol=1e-14)
        return [{name: (one[name] - value) / sigma for name, value in hparams.items()} for one in ahead]


@pytest.mark.parametrize("step_terms", [False, True])
def test_the_estimate_for_given_noise_equals_the_formula(step_terms: bool) -> None:
    """All runs see the same minibatches and dropout masks; terms at inner steps and the direct term are included."""
    plain = net_problem(SGD(lr=Hyper("lr"), momentum=0.5), scalars(lr=0.3), dropout=0.4, step_terms=step_terms)
    watch = Watch(plain.inner)
    problem, hparams = replace(plain, inner=watch), plain.init_hparams()
    compute(problem, EvolutionStrategies(num_pairs=5, sigma=0.2))  # the first of its kind is looked at for side effects
    watch.seen.clear()
    result = compute(problem, EvolutionStrategies(num_pairs=5, sigma=0.2), outer_step=3)
    noise = watch.noise(hparams, 5, 0.2)
    assert abs(float(torch.cat([direction["weights"] for direction in noise]).std()) - 1) < 0.3
    expected = hand_written(plain, hparams, noise, 0.2, outer_step=3)
    for name, value in expected.items():
        torch.testing.assert_close(result.grads[name], value, rtol=1e-9, atol=1e-11)
    # Values are those of the hyperparameters as they are.
    unperturbed = ht.unroll(plain, hparams, outer_step=3)
    torch.testing.assert_close(result.outer_loss, unperturbed.outer_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.params, unperturbed.params, rtol=1e-12, atol=0)


def test_no_derivative_of_the_outer_loss_is_asked_for() -> None:
    """A metric that autograd cannot differentiate, and whose hyperparameters all count."""
    plain = net_problem(SGD(lr=0.3), {})

    class Accuracy(type(plain.outer)):  # type: ignore[misc]
        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            logits = torch.tanh(self.inputs @ params["first"]) @ params["second"]
            return (logits.argmax(-1) != self.labels).double().mean()

    problem = replace(plain, outer=Accuracy())
    grads = compute(problem, EvolutionStrategies(num_pairs=40, sigma=0.5)).grads
    assert all(float(value.abs().max()) > 0 for value in grads.values())
    with pytest.raises(DetachedHyperparameterError):
        compute(problem, ht.hypergradients.Reverse())


def test_a_hyperparameter_that_changes_nothing_is_named() -> None:
    problem = linear()

    class Outer(LambdaOuter):
        def init_hparams(self) -> TensorDict:
            return {**super().init_hparams(), **scalars(idle=1.0)}

    idle = replace(problem, outer=Outer(problem.init_hparams(), lambda p, h, b: SLOPE @ p["w"]))
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach the outer loss"):
        compute(idle, EvolutionStrategies(num_pairs=2, sigma=0.1))


def test_vectorised_tasks_with_running_statistics_equal_a_loop() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    problem = task_problem(module, item=(4,))
    hparams = problem.init_hparams()
    backend = EvolutionStrategies(num_pairs=3, sigma=0.02)
    executions = [ht.Execution(tasks="vmap"), ht.Execution(tasks="vmap", chunk=2), ht.Execution(tasks="loop")]
    whole, chunks, loop = (
        ht.hypergradient(problem, hparams, backend=backend, execution=execution) for execution in executions
    )
    for other in (chunks, loop):
        torch.testing.assert_close(other.grads, whole.grads, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(other.params, whole.params, rtol=1e-10, atol=1e-13)


def test_the_context_is_perturbed_and_chained() -> None:
    """f = slope . lam with lam = raw^2 from the context: the gradient is 2 raw slope; labels stay what they are."""
    num_pairs, raw = 3000, torch.tensor([0.5, 1.0, -1.5, 2.0], dtype=F64)
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["lam"][h["order"]]}, lambda p, h, b: p["w"].sum()),
        LambdaOuter({"raw": raw}, lambda p, h, b: SLOPE @ p["w"]),
        dynamics=SGD(lr=0.1),
        num_steps=0,
        context=lambda hparams, batch: {"lam": hparams["raw"].square(), "order": torch.tensor([3, 2, 1, 0])},
    )
    estimate = compute(problem, EvolutionStrategies(num_pairs=num_pairs, sigma=0.1)).grads["raw"]
    slope = SLOPE.flip(0)
    error = 2 * raw.abs() * ((slope @ slope + slope**2) / num_pairs).sqrt()
    # The context's own entry is estimated; `raw` itself is perturbed too, which adds noise alone.
    error = (error**2 + slope @ slope / num_pairs).sqrt()
    assert float(((estimate - 2 * raw * slope).abs() / error).max()) < Z


@pytest.mark.parametrize("num_steps", [0, 4])
def test_costs_are_as_documented(num_steps: int) -> None:
    problem = replace(linear(), num_steps=num_steps)
    stats = compute(problem, EvolutionStrategies(num_pairs=6, sigma=0.1)).stats
    assert (stats.steps, stats.vjps, stats.graph_steps, stats.stored_states) == (13 * num_steps, 0, 0, 0)


# Persistent runs


class Decay(ht.InnerProblem):
    """Gradient descent on `c (w - lam)^2 / 2` from `start`: `w_t = lam + r^t (start - lam)`, `r = 1 - lr c`."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["start"] * 1.0}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["lam"]).square().sum() / 2


class Height(ht.OuterProblem):
    """The sum of the losses of a long run: `w` after each window."""

    def init_hparams(self) -> TensorDict:
        return scalars(lam=1.0, start=0.4)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"]


class HeightWithSteps(Height):
    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return 0.1 * (index + 1) * params["w"]


RATE, WINDOW, WINDOWS = 0.8, 2, 4


def decay(outer_problem: ht.OuterProblem | None = None, **options: object) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        Decay(), outer_problem or Height(), dynamics=SGD(lr=1 - RATE), num_steps=WINDOW, warm_start=True,
        allow_unused=("start",), **options,  # type: ignore[arg-type]
    )  # fmt: skip


def windows(
    problem: ht.BilevelProblem, backend: ht.Hypergradient, count: int = WINDOWS, **options: object
) -> list[ht.HypergradientResult]:
    results: list[ht.HypergradientResult] = []
    for step in range(count):
        carry = results[-1].carry if results else None
        results.append(compute(problem, backend, outer_step=step, carry=carry, **options))
    return results


@pytest.mark.slow
def test_persistent_runs_are_unbiased_where_truncated_ones_are_not() -> None:
    """Window k's loss is `w` after n = 2k steps: its derivative is 1 - r^n in lam and r^n in the start.

    A pair's difference is linear in the noise, sum_j A_j e_j of lam and B e_1 of the start, where window j <= k has
    A_j = r^(n-2j)(1 - r^2) and B = r^n, and it multiplies xi = sum_j e_j over k windows. The product of two normal
    numbers has the variance var var + cov^2. Confidence: 99.99 % for the eight numbers together.
    """
    num_pairs = 400
    persistent = windows(decay(), EvolutionStrategies(num_pairs=num_pairs, sigma=0.1, persistent=True))
    truncated = windows(decay(), EvolutionStrategies(num_pairs=num_pairs, sigma=0.1))
    for k in range(1, WINDOWS + 1):
        n = WINDOW * k
        parts = [RATE ** (n - WINDOW * j) * (1 - RATE**WINDOW) for j in range(1, k + 1)]
        power = sum(part**2 for part in parts) + RATE ** (2 * n)
        in_lam, in_start = float(persistent[k - 1].grads["lam"]), float(persistent[k - 1].grads["start"])
        lam_error = math.sqrt((k * power + (1 - RATE**n) ** 2) / num_pairs)
        # The start acts at the first window alone, but is perturbed at each: xi is a sum of k numbers, B of one.
        start_error = math.sqrt((k * power + RATE ** (2 * n)) / num_pairs)
        assert abs(in_lam - (1 - RATE**n)) < Z * lam_error
        assert abs(in_start - RATE**n) < Z * start_error
        if k == 1:
            assert persistent[0].grads["lam"] == truncated[0].grads["lam"]
            continue
        # From a state that did not feel the hyperparameter: one window's derivative, whatever came before.
        short = float(truncated[k - 1].grads["lam"])
        short_error = math.sqrt(2 * (1 - RATE**WINDOW) ** 2 / num_pairs)
        assert abs(short - (1 - RATE**WINDOW)) < Z * short_error
        assert (1 - RATE**n) - (1 - RATE**WINDOW) > Z * short_error  # so that the test can tell
        assert float(truncated[k - 1].grads["start"]) != 0.0
    total, truth = (
        sum(float(result.grads["lam"]) for result in persistent),
        sum(1 - RATE ** (WINDOW * k) for k in range(1, WINDOWS + 1)),
    )
    assert abs(total - truth) < 0.5 < truth - WINDOWS * (1 - RATE**WINDOW)


@pytest.mark.parametrize("step_terms", [False, True])
def test_persistent_runs_equal_the_algorithm_written_out(step_terms: bool) -> None:
    """The paper's algorithm in plain numbers: particles keep their states, noise adds up, windows are judged apart."""
    num_pairs, sigma = 3, 0.2
    outer_problem = HeightWithSteps() if step_terms else Height()
    problem = decay(outer_problem)
    hparams = problem.init_hparams()
    results = windows(problem, EvolutionStrategies(num_pairs=num_pairs, sigma=sigma, persistent=True))
    # What each window added to the sums of perturbations is its noise.
    before = {name: torch.zeros(num_pairs, dtype=F64) for name in hparams}
    states: list[list[Tensor | None]] = [[None, None] for _ in range(num_pairs)]
    for k, result in enumerate(results):
        sums = {
            name: torch.stack([result.carry[f"shared.perturbations.{i}.{name}"] for i in range(num_pairs)])
            for name in hparams
        }
        noise = {name: sums[name] - before[name] for name in hparams}
        expected = dict.fromkeys(hparams, torch.zeros((), dtype=F64))
        for i in range(num_pairs):
            losses = []
            for side, sign in enumerate((1, -1)):
                lam = hparams["lam"] + sign * sigma * noise["lam"][i]
                w = states[i][side]
                w = hparams["start"] + sign * sigma * noise["start"][i] if w is None else w
                loss = torch.zeros((), dtype=F64)
                for step in range(WINDOW):
                    w = lam + RATE * (w - lam)
                    loss = loss + (0.1 * (k * WINDOW + step + 1) * w if step_terms else 0.0)
                states[i][side] = w
                losses.append(loss + w)
                torch.testing.assert_close(
                    result.carry[f"particles.{i}.{('ahead', 'behind')[side]}.params.w"], w, rtol=1e-12, atol=0
                )
            for name in hparams:
                share = sums[name][i] * sigma * (losses[0] - losses[1]) / (2 * num_pairs * sigma**2)
                expected[name] = expected[name] + share
        for name, value in expected.items():
            torch.testing.assert_close(result.grads[name], value, rtol=1e-11, atol=1e-13)
        before = sums
    # The run that is returned is nobody's particle.
    plain = ht.unroll(replace(problem, warm_start=False, num_steps=WINDOW * WINDOWS), hparams).params["w"]
    torch.testing.assert_close(results[-1].params["w"], plain, rtol=1e-12, atol=0)
    assert int(results[-1].carry["index"]) == WINDOW * WINDOWS


def test_runs_start_afresh_after_the_horizon() -> None:
    """Index, state, sums of noise and particles: the third window is a first one, with noise of its own."""
    problem = replace(decay(HeightWithSteps()), dynamics=SGD(lr=0.2, momentum=0.5, dampening=0.3))
    settings = {"num_pairs": 2, "sigma": 0.2, "persistent": True}
    results = windows(problem, EvolutionStrategies(**settings, horizon=2 * WINDOW), 5)  # type: ignore[arg-type]
    endless = windows(problem, EvolutionStrategies(**settings), 5)  # type: ignore[arg-type]
    for step in (0, 1):
        assert results[step].carry.keys() == endless[step].carry.keys()
        assert all(torch.equal(value, endless[step].carry[name]) for name, value in results[step].carry.items())
    assert [int(result.carry["index"]) for result in results] == [2, 4, 2, 4, 2]
    for step in (2, 4):
        afresh = compute(problem, EvolutionStrategies(**settings), outer_step=step)  # type: ignore[arg-type]
        torch.testing.assert_close(results[step].carry, afresh.carry, rtol=0, atol=0)
        torch.testing.assert_close(results[step].grads, afresh.grads, rtol=0, atol=0)
        torch.testing.assert_close(results[step].outer_loss, results[0].outer_loss, rtol=0, atol=0)
    assert not torch.equal(results[2].grads["lam"], results[0].grads["lam"])
    assert not torch.equal(results[2].grads["lam"], endless[2].grads["lam"])


class TaskDecay(Decay):
    """The same for tasks that differ in where they are pulled to."""

    def batch(self, step: int) -> Tensor:
        return torch.arange(3.0, dtype=F64) + 0.1 * step

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        return (params["w"] - batch * hparams["lam"]).square().sum() / 2


@pytest.mark.parametrize("horizon", [None, 4])
def test_persistent_tasks_are_the_same_by_every_route(horizon: int | None) -> None:
    problem = replace(decay(HeightWithSteps(), num_tasks=3), inner=TaskDecay(), dynamics=SGD(lr=0.2, momentum=0.5))
    backend = EvolutionStrategies(num_pairs=2, sigma=0.3, persistent=True, horizon=horizon)
    executions = [ht.Execution(tasks="vmap"), ht.Execution(tasks="vmap", chunk=2), ht.Execution(tasks="loop")]
    whole, chunks, loop = (windows(problem, backend, 3, execution=execution) for execution in executions)
    assert whole[0].carry["particles.1.behind.dynamics.momentum.w"].shape == (3,)
    assert whole[0].carry["shared.perturbations.1.lam"].shape == ()
    for other in (chunks, loop):
        for ours, theirs in zip(whole, other, strict=True):
            torch.testing.assert_close(theirs.grads, ours.grads, rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(theirs.carry, ours.carry, rtol=1e-10, atol=1e-13)
    # A carry does not say by which route it was made.
    backwards = compute(problem, backend, outer_step=2, carry=whole[1].carry, execution=executions[2])
    torch.testing.assert_close(backwards.grads, whole[2].grads, rtol=1e-10, atol=1e-13)


def test_a_call_leaves_its_carry_alone() -> None:
    backend = EvolutionStrategies(num_pairs=2, sigma=0.3, persistent=True, horizon=WINDOW)
    carry = compute(decay(), backend).carry
    kept = {name: value.clone() for name, value in carry.items()}
    first, again = (compute(decay(), backend, outer_step=1, carry=carry) for _ in range(2))
    assert carry.keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in carry.items())
    assert torch.equal(first.grads["lam"], again.grads["lam"])


def test_particles_are_born_from_the_state_of_a_run_without_them() -> None:
    """A run that another backend began goes on; nothing is yet owed to hyperparameters of the past."""
    problem = decay()
    carry = compute(problem, ht.hypergradients.Reverse()).carry
    backend = EvolutionStrategies(num_pairs=2, sigma=0.3, persistent=True)
    result = compute(problem, backend, outer_step=1, carry=carry)
    plain = compute(problem, replace(backend, persistent=False), outer_step=1, carry=carry)
    assert torch.equal(result.grads["lam"], plain.grads["lam"])
    assert len(result.carry) == 2 + 2 * 2 + 2 * 2


def test_costs_of_persistent_runs_are_as_documented() -> None:
    backend = EvolutionStrategies(num_pairs=6, sigma=0.1, persistent=True)
    for result in windows(decay(), backend, 2):
        stats = result.stats
        assert (stats.steps, stats.vjps, stats.graph_steps, stats.stored_states) == (13 * WINDOW, 0, 0, 13)


class DecaySource(ht.ProblemSource):
    """Windows of a long run, with tasks, momentum and minibatches by index."""

    def init_hparams(self) -> TensorDict:
        return Height().init_hparams()

    def at(self, outer_step: int) -> ht.BilevelProblem:
        problem = decay(HeightWithSteps(), num_tasks=3)
        return replace(problem, inner=TaskDecay(), dynamics=SGD(lr=0.2, momentum=0.5))


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_with_particles_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """Stopped within a horizon of three windows, at its end, and after it."""

    def loop(folder: Path | None) -> outer.OuterLoop:
        return outer.OuterLoop(
            DecaySource(),
            optimizer=partial(torch.optim.Adam, lr=0.05),
            backend=EvolutionStrategies(num_pairs=2, sigma=0.1, persistent=True, horizon=3 * WINDOW),
            checkpoints=None if folder is None else outer.Checkpoints(folder, every=100),
            execution=ht.Execution(tasks="vmap"),
        )

    straight = loop(None).run(8)
    loop(tmp_path).run(stop)
    newest = outer.Checkpoints(tmp_path).newest()
    assert newest is not None
    carry = outer.Checkpoints(tmp_path).load(newest).carry
    assert {"particles.0.ahead.params.w", "shared.perturbations.1.start", "index"} <= carry.keys()
    resumed = loop(tmp_path).run(8, resume=True)
    for name, value in straight.hparams.items():
        assert torch.equal(resumed.hparams[name], value)


@pytest.mark.parametrize(
    ("problem", "settings", "message"),
    [
        (replace(decay(), warm_start=False), {}, r"`warm_start` = False: its runs end.* Set `warm_start=True`"),
        (decay(), {"horizon": 3}, r"horizon=3.* `num_steps` = 2: a run must be made of whole windows"),
        (replace(decay(), num_steps=0), {}, r"`num_steps` = 0: without an inner loop nothing can persist"),
        (replace(decay(), context=lambda hparams, batch: {}), {}, r"a problem with a `context`: a run remembers"),
    ],
)
def test_persistent_runs_refuse_what_cannot_persist(problem: ht.BilevelProblem, settings: dict, message: str) -> None:
    with pytest.raises(IncompatibleBackendError, match=message):
        compute(problem, EvolutionStrategies(num_pairs=2, sigma=0.1, persistent=True, **settings))


def test_another_number_of_particles_is_refused() -> None:
    carry = compute(decay(), EvolutionStrategies(num_pairs=3, sigma=0.1, persistent=True)).carry
    with pytest.raises(IncompatibleBackendError, match=r"`carry` holds 3 pairs of particles, but `num_pairs` is 2"):
        compute(decay(), EvolutionStrategies(num_pairs=2, sigma=0.1, persistent=True), carry=carry)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": 0}, r"`num_pairs` is 0: without a perturbed run.* at least 1"),
        ({"num_pairs": True}, r"`num_pairs` is True"),
        ({"sigma": 0.0}, r"`sigma` of `EvolutionStrategies` is 0.0: perturbed runs must differ"),
        ({"horizon": 4}, r"`horizon` is 4, but `persistent` is False.* leave `horizon` out"),
        ({"persistent": True, "horizon": 0}, r"`horizon` is 0: runs start afresh after so many inner steps"),
    ],
)
def test_settings_are_validated(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvolutionStrategies(**{"num_pairs": 2, "sigma": 0.1, **settings})
