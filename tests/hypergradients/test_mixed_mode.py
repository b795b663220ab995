"""Mixed mode against reverse over reverse: the same number, fewer graphs, and refusals that say what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError, ReplayError
from hypertorch.hypergradients.reverse_mode import derivative_choice
from hypertorch.hypergradients.reverse_mode.steps import EagerSteps
from hypertorch.hypergradients.reverse_mode.sweep import Cotangents, Differentiable, PulledBack, Segment
from hypertorch.inner.state import InnerState
from hypertorch.types import Batch, TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

Reverse = ht.hypergradients.Reverse
F64 = torch.float64
LR = {"lr": torch.tensor(0.3, dtype=F64)}
SHARED = {"lr": torch.tensor(0.3, dtype=F64), "decay": torch.tensor(0.02, dtype=F64)}
SCHEDULE = {"lr": torch.linspace(-2.0, -3.0, 7, dtype=F64), "decay": torch.tensor(0.02, dtype=F64)}


@dataclass(frozen=True, kw_only=True, eq=False)
class ExtraGradient(ht.Dynamics):
    """Looks ahead and steps along the gradient found there: two gradients, the second at a point that moves."""

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def step(
        self, loss: InnerLoss, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        first = loss.gradient(params, hparams)
        ahead = {name: value - hparams["lr"] * first[name] for name, value in params.items()}
        second = loss.gradient(ahead, hparams)
        return {name: value - hparams["lr"] * second[name] for name, value in params.items()}, {}


FAMILIES = {
    "sgd": (ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.7, weight_decay=ht.Hyper("decay")), SHARED),
    "nesterov": (ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.5, nesterov=True), LR),
    "adam": (ht.dynamics.Adam(lr=ht.Hyper("lr", torch.exp, per="step"), weight_decay=ht.Hyper("decay")), SCHEDULE),
    "adamw": (ht.dynamics.AdamW(lr=ht.Hyper("lr", torch.exp, per="step"), weight_decay=ht.Hyper("decay")), SCHEDULE),
    "rmsprop": (ht.dynamics.RMSprop(lr=ht.Hyper("lr"), momentum=0.3), {"lr": torch.tensor(0.01, dtype=F64)}),
    "adagrad": (ht.dynamics.Adagrad(lr=ht.Hyper("lr")), {"lr": torch.tensor(0.1, dtype=F64)}),
    "reversible": (ht.dynamics.ReversibleMomentum(lr=ht.Hyper("lr"), momentum=0.75), LR),
    "torch_optim": (ht.dynamics.TorchOptim(torch.optim.Adamax, options={"lr": ht.Hyper("lr")}), LR),
    "groups": (
        ht.dynamics.Groups({"first": ht.dynamics.SGD(lr=ht.Hyper("lr")), "*": ht.dynamics.Adam(lr=0.01)}),
        LR,
    ),
    "learned": (ht.dynamics.LearnedUpdate(ht.dynamics.CoordinatewiseMLP(hidden=3).double(), scale=0.01), {}),
    "extra_gradient": (ExtraGradient(), LR),
}


def assert_same(problem: ht.BilevelProblem, backend: Reverse, **options: Any) -> ht.HypergradientResult:
    """Asserts that a backend gives the whole graph's number, and returns its result."""
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse(), **options)
    mixed = ht.hypergradient(problem, hparams, backend=backend, **options)
    torch.testing.assert_close(mixed.outer_loss, whole.outer_loss, rtol=1e-12, atol=1e-14)
    for name in hparams:
        torch.testing.assert_close(mixed.grads[name], whole.grads[name], rtol=1e-10, atol=1e-13)
    return mixed


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_reverse_over_reverse_for_every_family(family: str) -> None:
    dynamics, extra = FAMILIES[family]
    result = assert_same(net_problem(dynamics, extra), Reverse(derivative="mixed"), outer_step=3)
    assert result.stats.steps == 14 and result.stats.vjps == 7 and result.stats.graph_steps == 1


@pytest.mark.parametrize("family", ["sgd", "adam"])
def test_the_form_that_is_compiled_is_the_same_function(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as it is traced: compiled it can only be slower to test."""
    problem = net_problem(*FAMILIES[family])
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=Reverse(derivative="mixed")).grads
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = ht.hypergradient(problem, hparams, backend=Reverse(derivative="mixed")).grads
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kept", [{}, {"checkpoint_every": 3}, {"checkpoint_every": "sqrt"}, {"snapshots": 2}])
@pytest.mark.parametrize("family", ["sgd", "extra_gradient"])
def test_equals_reverse_over_reverse_with_noise_and_terms_at_steps(kept: dict, family: str) -> None:
    dynamics, extra = FAMILIES[family]
    problem = net_problem(dynamics, extra, dropout=0.5, step_terms=True)
    assert_same(problem, Reverse(derivative="mixed", **kept), outer_step=2)


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_equals_reverse_over_reverse_with_tasks(route: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    made = task_problem(module.double(), item=(4,))
    assert_same(made, Reverse(derivative="mixed"), execution=ht.Execution(tasks=route))


def test_statistics_keep_their_path() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    assert_same(task_problem(module.double(), item=(4,)), Reverse(derivative="mixed"))


def test_equals_central_differences() -> None:
    problem = net_problem(*FAMILIES["sgd"], dropout=0.3)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(derivative="mixed", snapshots=2))
    assert check.passed, str(check)


def deep_problem(calls: list[int], *, depth: int = 8, num_steps: int = 3) -> ht.BilevelProblem:
    """A deep net on many rows, whose activations are most of what is held; counts evaluations of its loss."""
    inputs, targets = normal(256, 8, seed=1), normal(256, 8, seed=2)
    weights = {f"w{layer}": 0.4 * normal(8, 8, seed=10 + layer) for layer in range(depth)}

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        calls.append(1)
        hidden = inputs
        for layer in range(depth):
            hidden = torch.tanh(hidden @ params[f"w{layer}"])
        return (hparams["weight"].sigmoid() * (hidden - targets).square().sum(1)).mean()

    inner = LambdaInner(lambda hparams: {name: value.clone() for name, value in weights.items()}, loss)
    outer = LambdaOuter({"weight": normal(256, seed=3)}, lambda params, hparams, batch: params["w0"].square().sum())
    return ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=num_steps)


def test_takes_one_gradient_in_a_step_and_two_in_its_vjp() -> None:
    calls: list[int] = []
    problem = deep_problem(calls, num_steps=5)
    for _ in range(2):  # the first is compared with reverse over reverse
        calls.clear()
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(derivative="mixed"))
    assert len(calls) == 1 + 5 + 2 * 5  # one tells which operations there are


def test_holds_less_than_reverse_over_reverse() -> None:
    problem = deep_problem([], depth=24, num_steps=2)
    peaks = {}
    for name, derivative in (("reverse", "reverse"), ("mixed", "mixed")):
        backend = Reverse(checkpoint_every=1, derivative=derivative)
        hparams = problem.init_hparams()
        ht.hypergradient(problem, hparams, backend=backend)
        with PeakMemory() as memory:
            ht.hypergradient(problem, hparams, backend=backend)
        peaks[name] = memory.peak
    assert peaks["mixed"] < 0.9 * peaks["reverse"], peaks


def test_memory_is_that_of_states_in_the_number_of_steps() -> None:
    peaks = []
    for num_steps in (4, 8, 12):
        problem = deep_problem([], num_steps=num_steps)
        with PeakMemory() as memory:
            ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(derivative="mixed"))
        peaks.append(memory.peak)
    state = 8 * 64 * 8
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.2)
    assert peaks[1] - peaks[0] < 4 * state + 8 * 256


def test_a_hyperparameter_that_does_nothing_is_refused() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.1), {"idle": torch.zeros(2, dtype=F64)})
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(derivative="mixed"))


def test_a_hyperparameter_that_shifts_the_loss_alone_is_refused() -> None:
    inner = LambdaInner(lambda hparams: {"w": torch.ones(2, dtype=F64)}, lambda p, h, b: (p["w"] ** 2).sum() + h["c"])
    outer = LambdaOuter({"c": torch.tensor(1.0, dtype=F64)}, lambda p, h, b: p["w"].sum())
    problem = ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=3)
    with pytest.raises(DetachedHyperparameterError, match="`hparams\\['c'\\]` does not reach"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(derivative="mixed"))


def test_a_path_of_a_longer_horizon_is_none_of_a_shorter() -> None:
    """Dampening works from the second step on, and `c` has a zero derivative at which the paths are asked for."""
    inner = LambdaInner(lambda h: {"w": torch.ones(2, dtype=F64)}, lambda p, h, b: (p["w"] - 0.3).pow(4).sum())
    hparams = {"dampening": torch.tensor(0.2, dtype=F64), "c": torch.tensor(0.0, dtype=F64)}
    outer = LambdaOuter(hparams, lambda p, h, b: p["w"].square().sum() + h["c"].square())
    rule = ht.dynamics.SGD(lr=0.1, momentum=0.5, dampening=ht.Hyper("dampening"))
    two = ht.BilevelProblem(inner, outer, dynamics=rule, num_steps=2)
    backend = Reverse(derivative="mixed")
    result = assert_same(two, backend)
    assert result.grads["dampening"] != 0.0
    assert result.grads["c"] == 0.0
    assert result.stats == ht.hypergradient(two, hparams, backend=backend).stats
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['dampening'\]` does not reach"):
        ht.hypergradient(replace(two, num_steps=1), hparams, backend=backend)


def test_a_number_is_kept_where_another_problem_of_the_kind_has_no_path() -> None:
    """Whether the inner loss reads `c` is told by a tensor, which no kind of problem looks into."""

    def problem(reads: bool) -> ht.BilevelProblem:
        switch = torch.tensor(reads)

        def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            fit = (params["w"] - hparams["a"]).square()
            return fit + hparams["c"][0] * params["w"].square() if switch else fit

        # Only where some derivative is zero, as that in `z`, is it asked which have a path.
        hparams = {
            "a": torch.tensor(0.5, dtype=F64), "c": torch.tensor([0.3, 0.7], dtype=F64), "z": torch.zeros((), dtype=F64)
        }  # fmt: skip
        return ht.BilevelProblem(
            LambdaInner(lambda h: {"w": torch.ones((), dtype=F64)}, loss),
            LambdaOuter(hparams, lambda p, h, b: p["w"].square() + h["z"].square()),
            dynamics=ht.dynamics.SGD(lr=0.1),
            num_steps=3,
            allow_unused=("c",),
        )

    backend = Reverse(derivative="mixed")
    assert not assert_same(problem(False), backend).grads["c"].any()
    assert assert_same(problem(True), backend).grads["c"][0] != 0.0


def no_forward_problem() -> ht.BilevelProblem:
    targets = normal(3, seed=4)
    inner = LambdaInner(
        lambda hparams: {"w": torch.zeros(3, dtype=F64)},
        lambda params, hparams, batch: torch.nn.functional.huber_loss(params["w"] * hparams["scale"], targets),
    )
    outer = LambdaOuter(
        {"scale": torch.tensor(1.5, dtype=F64)}, lambda params, hparams, batch: params["w"].square().sum()
    )
    return ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=4)


def test_an_operation_without_forward_derivative_is_named_and_avoided_by_auto() -> None:
    problem = no_forward_problem()
    with pytest.raises(IncompatibleBackendError, match=r"forward AD with huber_loss_backward.*'reverse'"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(derivative="mixed"))
    result = assert_same(problem, Reverse(derivative="auto"))
    assert result.stats.graph_steps == 4


@pytest.mark.parametrize("faster", ["reverse", "mixed"])
def test_auto_takes_the_faster_and_measures_once(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_aside(monkeypatch, derivative_choice.DERIVATIVE)
    asked: list[EagerSteps] = []

    def seconds(loop: object, steps: EagerSteps) -> float:
        asked.append(steps)
        return 1.0 if steps._mixed == (faster == "mixed") else 2.0

    monkeypatch.setattr(derivative_choice, "_seconds", seconds)
    problem = net_problem(*FAMILIES["sgd"])
    for outer_step in range(3):
        result = assert_same(problem, Reverse(derivative="auto"), outer_step=outer_step)
    assert len(asked) == 2
    assert result.stats.graph_steps == (1 if faster == "mixed" else 7)
    assert result.stats.steps == (14 if faster == "mixed" else 7)


def test_what_is_measured_is_the_vjp_of_the_whole_state_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steps:
        """Remembers what it is asked for; each vjp is faster than the one before."""

        def __init__(self) -> None:
            self.asked: list[tuple[object, ...]] = []
            self.now = 0.0

        def initial(self) -> str:
            return "start"

        def advance(self, state: str, step: int) -> InnerState:
            return InnerState({"w": torch.full((2,), 3.0), "count": torch.tensor(4)}, {})

        def vjp(self, segment: Segment) -> Differentiable:
            def pull_back(cotangents: Cotangents) -> PulledBack:
                assert segment.arrival is not None and isinstance(cotangents[0], Tensor)
                end = segment.arrival.params["w"].tolist()
                self.asked.append((segment.departure, cotangents[0].tolist(), cotangents[1], *segment[:2], end))
                self.now += 10.0 - len(self.asked)
                return PulledBack({}, [], None)

            return Differentiable(segment.departure, pull_back)

    steps = Steps()
    monkeypatch.setattr(derivative_choice.time, "perf_counter", lambda: steps.now)
    loop = SimpleNamespace(device=torch.device("cpu"))
    seconds = derivative_choice._seconds(loop, steps)  # type: ignore[arg-type]
    runs = derivative_choice._REPEATS + 2
    assert steps.asked == [("start", [1.0, 1.0], None, 0, 1, [3.0, 3.0])] * runs
    assert seconds == 10.0 - runs


def test_the_measurement_itself_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    set_aside(monkeypatch, derivative_choice.DERIVATIVE)
    problem = net_problem(*FAMILIES["sgd"], dropout=0.4)
    result = assert_same(problem, Reverse(derivative="auto", checkpoint_every=1))
    assert result.stats.vjps == 7 and result.stats.steps in (13, 14)


def test_steps_that_are_run_again_must_arrive_at_the_same_state() -> None:
    class Counting(ht.InnerProblem):
        def __init__(self) -> None:
            self.calls = 0

        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": torch.ones(2, dtype=F64)}

        def batch(self, step: int) -> Batch:
            self.calls += step > 0  # the first step, which is looked at beforehand, is the same every time
            return torch.tensor(float(self.calls), dtype=F64)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return (params["w"] * hparams["c"] - batch).square().sum()

    outer = LambdaOuter({"c": torch.tensor(1.0, dtype=F64)}, lambda params, hparams, batch: params["w"].sum())
    problem = ht.BilevelProblem(Counting(), outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=3)
    with pytest.raises(ReplayError, match="`w` after inner step [12] differs"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(derivative="mixed"))


def test_an_unknown_derivative_is_refused() -> None:
    with pytest.raises(ValueError, match="`derivative` is 'forward'.*'reverse', 'mixed' or 'auto'"):
        Reverse(derivative="forward")  # type: ignore[arg-type]
