"""What implicit differentiation measures of itself, what it warns of, and what it costs."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.errors import LinearSolveWarning, NonFiniteError
from hypertorch.linear_solvers import (
    ConjugateGradient,
    Dense,
    FixedPoint,
    LinearSolution,
    LinearSolver,
    Neumann,
    Nystrom,
)
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal
from tests.hypergradients.implicit.setups import (
    EXACT,
    F64,
    SGD,
    SILENT,
    Implicit,
    Proximal,
    Reverse,
    assert_close,
    grads,
    maps,
    scalar,
    softmax,
)


@maps
def test_a_run_that_has_not_arrived_is_reported(kind: str) -> None:
    """The measure is what is left of the way: here `rate^T` of one eigenvalue, whatever the units of the loss."""

    def problem(num_steps: int, unit: float) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LambdaInner(lambda h: {"w": torch.zeros(3, dtype=F64)},
                        lambda p, h, b: unit * (p["w"] - h["c"]).square().sum() / 2),
            LambdaOuter({"c": normal(3, seed=1)}, lambda p, h, b: p["w"].square().sum()),
            dynamics=SGD(lr=0.5 / unit),
            num_steps=num_steps,
        )  # fmt: skip

    for unit in (1.0, 1e6):
        for num_steps, left in ((1, 0.5), (3, 0.125), (30, 0.5**30)):
            few = problem(num_steps, unit)
            result = ht.hypergradient(few, few.init_hparams(), backend=SILENT[kind])
            torch.testing.assert_close(result.figures["stationarity"], scalar(left), rtol=1e-4, atol=0)
    few = problem(3, 1.0)
    with pytest.warns(LinearSolveWarning, match=(
        r"`stationarity` is 1e-01, above `stationarity_tolerance` = 0.01: .*has no solution yet.*Take more inner steps"
    )) as caught:  # fmt: skip
        ht.hypergradient(few, few.init_hparams(), backend=EXACT[kind])
    assert caught[0].message.residual == pytest.approx(0.125)  # type: ignore[union-attr]
    ht.hypergradient(few, few.init_hparams(), backend=replace(EXACT[kind], stationarity_tolerance=0.126))


@maps
@pytest.mark.parametrize("num_steps", [1, 2, 6, 20])
def test_the_way_is_measured_from_where_the_run_began_though_it_gets_steeper_at_first(
    kind: str, num_steps: int
) -> None:
    """Down from near the top of `(w^2 - c)^2 / 4`, by hand: the slope is `w (w^2 - c)`."""
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.full((), 0.1, dtype=F64)}, lambda p, h, b: (p["w"] ** 2 - h["c"]) ** 2 / 4),
        LambdaOuter({"c": scalar(1.0)}, lambda p, h, b: p["w"] ** 3),
        dynamics=SGD(lr=0.3),
        num_steps=num_steps,
    )
    slopes, w = [], 0.1
    for _ in range(num_steps + 1):
        slopes.append(w * (w * w - 1.0))
        w -= 0.3 * slopes[-1]
    result = ht.hypergradient(problem, problem.init_hparams(), backend=SILENT[kind])
    torch.testing.assert_close(result.figures["stationarity"], scalar(slopes[-1] / slopes[0]), rtol=1e-9, atol=0)
    if num_steps == 6:
        assert float(result.figures["stationarity"]) > 1.0


def test_a_poor_solution_of_the_linear_system_is_reported() -> None:
    problem = softmax(SGD(lr=0.8), 100)
    hparams = problem.init_hparams()
    poor = Implicit(solver=ConjugateGradient(max_iterations=2), residual_tolerance=1e-4)
    with pytest.warns(LinearSolveWarning, match=(
        r"`linear_residual` is \de-0\d, above `residual_tolerance` = 0.0001: `ConjugateGradient\(max_iterations=2.*"
        r"off by it or more. Give it more iterations.*`residual_tolerance=None` accepts it"
    )) as caught:  # fmt: skip
        result = ht.hypergradient(problem, hparams, backend=poor)
    assert caught[0].message.residual == float(result.figures["linear_residual"]) > 1e-3  # type: ignore[union-attr]
    ht.hypergradient(problem, hparams, backend=replace(poor, residual_tolerance=None))
    diverging = Implicit(solver=FixedPoint(max_iterations=30, step_size=50.0))
    with pytest.warns(LinearSolveWarning, match=(
        r"`linear_residual` is \de\+\d+, .*after 30 iterations `FixedPoint\(max_iterations=30.* than zero is, and the "
        r"hypergradient means nothing.*Lower the step size.*`residual_tolerance=None` accepts it"
    )):  # fmt: skip
        ht.hypergradient(problem, hparams, backend=diverging)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (1.0, r"`linear_residual` is 1e\+00.*left that part of the linear system"),
        (1.5, r"`linear_residual` is 2e\+00.*is farther from the solution than zero is"),
    ],
)
def test_only_a_solution_that_is_worse_than_zero_has_diverged(residual: float, message: str) -> None:
    """A residual of one is that of zero: more iterations may help."""

    class Idle(LinearSolver):
        def solve(self, matvec, rhs, *, tasks_axis=False):
            zero = {name: torch.zeros_like(value) for name, value in rhs.items()}
            return LinearSolution(solution=zero, residual=torch.tensor(residual, dtype=F64), iterations=0)

    problem = softmax(SGD(lr=0.8), 100)
    with pytest.warns(LinearSolveWarning, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=Implicit(solver=Idle()))


@pytest.mark.parametrize(
    "solver",
    [Neumann(num_terms=400, step_size=50.0), FixedPoint(max_iterations=400, step_size=50.0)],
    ids=["neumann", "fixed point"],
)
@maps
def test_a_solver_that_overflows_is_named(kind: str, solver: LinearSolver) -> None:
    """Not the reverse pass, which is as healthy as the run; whether or not the residual is asked about."""
    problem = softmax(SGD(lr=0.8), 100)
    backend = Implicit(solver=solver, map=kind, residual_tolerance=None)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match=(
        rf"the linear system of the hypergradient: `{type(solver).__name__}\(.*step_size=50.0\)` diverged, with a "
        r"`linear_residual` of (inf|nan) after 400 iterations.*Lower the step size.*`ConjugateGradient\(damping=...\)`"
    )):  # fmt: skip
        ht.hypergradient(problem, problem.init_hparams(), backend=backend)


def indefinite() -> ht.BilevelProblem:
    """A saddle of curvatures 1 and -1, on which conjugate gradients divide by next to nothing."""
    curvatures = torch.tensor([1.0, -1.0], dtype=torch.float32)
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["c"] * torch.ones(2)},
                    lambda p, h, b: (curvatures * (p["w"] - h["c"]).square()).sum() / 2),
        LambdaOuter({"c": torch.tensor(0.5)}, lambda p, h, b: p["w"] @ torch.tensor([1.0, 1.0 + 3e-7])),
        dynamics=SGD(lr=0.1),
        num_steps=1,
    )  # fmt: skip


def test_conjugate_gradients_on_a_saddle_are_reported_and_damping_mends_it() -> None:
    problem = indefinite()
    hparams = problem.init_hparams()
    few = Implicit(solver=ConjugateGradient(max_iterations=1), stationarity_tolerance=None)
    with pytest.warns(LinearSolveWarning, match=r"after 1 iterations `ConjugateGradient.*not positive definite"):
        ht.hypergradient(problem, hparams, backend=few)
    exact = ht.hypergradient(problem, hparams, backend=Implicit(solver=Dense(), stationarity_tolerance=None))
    torch.testing.assert_close(exact.grads["c"], torch.tensor(2.0))


def test_a_run_that_is_not_finite_is_not_the_solvers_fault() -> None:
    problem = softmax(SGD(lr=1e200), 5)
    with pytest.raises(NonFiniteError, match="inner step|inner loss"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Implicit(solver=Neumann()))


def test_a_curvature_that_is_not_finite_is_not_the_solvers_fault() -> None:
    """The square root at 0 has an infinite second derivative, and a first one of 0 by the power."""
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.zeros((), dtype=F64)},
                    lambda p, h, b: p["w"].abs().pow(1.5) + 0.0 * p["w"] * h["c"]),
        LambdaOuter({"c": scalar(1.0)}, lambda p, h, b: p["w"] + 1.0),
        dynamics=SGD(lr=0.1),
        num_steps=1,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="met an infinite derivative.*the backend reports `linear_residual` = nan"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Implicit(solver=Neumann()))


def test_one_task_that_is_badly_solved_is_enough_for_a_warning() -> None:
    family = Proximal(num_tasks=3)
    problem = family.problem()
    backend = Implicit(solver=ConjugateGradient(max_iterations=4, tolerance=1e-12), residual_tolerance=None)
    residuals = ht.hypergradient(
        problem, family.hparams, backend=backend, execution=ht.Execution(tasks="vmap")
    ).figures["linear_residual"]
    between = float(residuals.sort().values[1:].mean())
    with pytest.warns(LinearSolveWarning) as caught:
        ht.hypergradient(
            problem,
            family.hparams,
            backend=replace(backend, residual_tolerance=between),
            execution=ht.Execution(tasks="vmap"),
        )
    assert caught[0].message.residual == float(residuals.max())  # type: ignore[union-attr]


def test_the_same_warning_is_shown_once_though_its_numbers_differ_a_little() -> None:
    problem = softmax(SGD(lr=0.5), 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for shift in (0.0, 0.001, 0.002):
            grads(problem, Implicit(), log_l2=scalar(-2.0 + shift))
    assert len(caught) == 1


@maps
def test_a_warm_started_run_is_measured_by_its_longest_way(kind: str) -> None:
    """Three steps from where the last run ended are no failure to arrive, though little is gained in them."""
    problem = softmax(SGD(lr=0.8), 80, warm_start=True)
    hparams = problem.init_hparams()
    first = ht.hypergradient(problem, hparams, backend=EXACT[kind])
    short = replace(problem, num_steps=3)
    moved = {**hparams, "log_l2": hparams["log_l2"] + 1e-3}
    second = ht.hypergradient(short, moved, backend=EXACT[kind], carry=first.carry)
    assert float(second.figures["stationarity"]) < 1e-3
    for name in ("params.matrix", "stationarity.first", "index"):
        assert name in second.carry
    assert torch.equal(second.carry["stationarity.first"], first.carry["stationarity.first"])
    expected = grads(softmax(SGD(lr=0.8), 100), Reverse(), log_l2=moved["log_l2"])
    assert_close(second.grads, expected, 1e-2)
    other = ht.hypergradient(problem, hparams, backend=Reverse()).carry
    alone = ht.hypergradient(short, moved, backend=SILENT[kind], carry=other)
    assert float(alone.figures["stationarity"]) > 0.02


def test_a_cold_run_carries_nothing() -> None:
    problem = softmax(SGD(lr=0.8), 80)
    assert not ht.hypergradient(problem, problem.init_hparams(), backend=Implicit()).carry


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_warm_started_tasks_keep_their_own_measure(route: str) -> None:
    family = Proximal(num_tasks=3)
    problem = family.problem(warm_start=True, num_steps=60)
    first = ht.hypergradient(problem, family.hparams, backend=SILENT["gradient"], execution=ht.Execution(tasks=route))
    second = ht.hypergradient(
        problem, family.hparams, backend=SILENT["gradient"], carry=first.carry, execution=ht.Execution(tasks=route)
    )
    assert first.carry["stationarity.first"].shape == (3,)
    assert torch.equal(second.carry["stationarity.first"], first.carry["stationarity.first"])
    assert bool((second.figures["stationarity"] < first.figures["stationarity"]).all())


@pytest.mark.parametrize("num_steps", [0, 1, 50])
def test_steps_and_products_are_counted(num_steps: int) -> None:
    problem = softmax(SGD(lr=0.5, momentum=0.3), num_steps)
    hparams = problem.init_hparams()
    measured = 1 if num_steps else 0
    quiet = {"residual_tolerance": None, "stationarity_tolerance": None}
    for solver, products in (
        (ConjugateGradient(max_iterations=4, tolerance=0.0), 5),
        (Neumann(num_terms=4), 4),
        (FixedPoint(max_iterations=4, tolerance=0.0), 4),
        (Nystrom(rank=4), 5),
        (Dense(), 16),
    ):
        stats = ht.hypergradient(problem, hparams, backend=Implicit(solver=solver, **quiet)).stats
        assert (stats.steps, stats.vjps) == (num_steps + 1 + measured, products + 1)
        assert (stats.stored_states, stats.graph_steps) == (1, 1)
    stats = ht.hypergradient(problem, hparams, backend=Implicit(solver=Neumann(num_terms=4), map="step", **quiet)).stats
    # Buffers are no part of the outer loss: one product finds out that they matter.
    assert (stats.steps, stats.vjps) == (num_steps + 2, 4 + 1 + 1)


@maps
def test_memory_does_not_grow_with_the_horizon(kind: str) -> None:
    def peak(num_steps: int) -> int:
        problem = softmax(SGD(lr=0.5, momentum=0.3), num_steps)
        hparams = problem.init_hparams()
        with PeakMemory() as memory:
            ht.hypergradient(problem, hparams, backend=SILENT[kind])
        return memory.peak

    # The losses of the inner steps are kept for the final check of finiteness: a number for each.
    assert peak(64) - peak(4) <= 60 * 2 * 8


class Watched(ht.GradientDynamics):
    """Gradient descent that counts how many of the params it has made are still held."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        new = {name: value - 0.5 * grads[name] for name, value in params.items()}
        self.made.append(weakref.ref(new["matrix"]))
        self.most = max(self.most, sum(item() is not None for item in self.made))
        return new, {}


@maps
def test_no_state_on_the_way_is_kept(kind: str) -> None:
    watched = Watched()
    problem = softmax(watched, 40)
    for _ in range(2):  # the first of its kind is looked at for side effects
        watched.made.clear()
        watched.most = 0
        ht.hypergradient(problem, problem.init_hparams(), backend=SILENT[kind])
    assert len(watched.made) == (41 if kind == "step" else 40)
    assert watched.most <= 3


@maps
def test_no_graph_is_left_and_no_grad_is_written(kind: str) -> None:
    problem = softmax(SGD(lr=0.8), 80)
    hparams = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
    with torch.no_grad():
        result = ht.hypergradient(problem, hparams, backend=EXACT[kind])
    assert all(value.grad is None for value in hparams.values())
    values = [result.outer_loss, *result.grads.values(), *result.params.values(), *result.figures.values()]
    assert not any(value.requires_grad for value in values)
    torch.testing.assert_close(result.outer_loss, ht.unroll(problem, hparams).outer_loss)


def test_single_precision_is_enough_for_the_default_settings() -> None:
    a, y = normal(20, 5, seed=0).float(), normal(20, seed=1).float()
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.zeros(5)},
                    lambda p, h, b: (a @ p["w"] - y).square().mean() / 2 + h["lam"] * p["w"].square().sum() / 2),
        LambdaOuter({"lam": torch.tensor(0.3)}, lambda p, h, b: (p["w"] - 1.0).square().sum()),
        dynamics=SGD(lr=0.3),
        num_steps=150,
    )  # fmt: skip
    for backend in (Implicit(), Implicit(solver=FixedPoint(), map="step")):
        result = ht.hypergradient(problem, problem.init_hparams(), backend=backend)
        assert result.grads["lam"].dtype == result.figures["linear_residual"].dtype == torch.float32
        torch.testing.assert_close(result.grads, grads(problem, Reverse()), rtol=1e-4, atol=0)
