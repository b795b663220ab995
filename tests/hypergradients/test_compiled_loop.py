"""The loop over inner steps inside a program: the eager number, one program for every horizon, refused where it cannot.

The default suite traces the loops and runs them without a compiler; the slow tests make machine code of them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hypertorch as ht
from hypertorch.errors import DetachedHyperparameterError
from hypertorch.hypergradients.reverse_mode.compiled import (
    compilation,
    looped_programs,
    looped_steps,
    not_compilable,
    whole_run,
)
from hypertorch.hypergradients.reverse_mode.compiled.looped_steps import ONE_BY_ONE, UNLOOPED
from hypertorch.inner import memo
from hypertorch.types import Batch, TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

Reverse, D, Hyper = ht.hypergradients.Reverse, ht.dynamics, ht.Hyper
F64 = torch.float64
LR = {"lr": torch.tensor(-2.0, dtype=F64)}
SHAPES = {"first": (4, 6), "second": (6, 3)}
RULES: dict[str, tuple[ht.Dynamics, TensorDict]] = {
    "gradient descent": (D.SGD(lr=0.1), {}),
    "momentum": (D.SGD(lr=Hyper("lr", torch.exp), momentum=0.9, nesterov=True), LR),
    "dampening": (D.SGD(lr=Hyper("lr", torch.exp), momentum=0.9, dampening=0.3), LR),
    "a schedule": (D.SGD(lr=Hyper("lr", torch.exp, per="step")), {"lr": torch.linspace(-2.0, -3.0, 12, dtype=F64)}),
    "Adam": (D.Adam(lr=Hyper("lr", torch.exp), eps=1e-3), LR),
    "AMSGrad": (D.AdamW(lr=Hyper("lr", torch.exp), eps=1e-3, amsgrad=True), LR),
    "RAdam": (D.RAdam(lr=Hyper("lr", torch.exp), eps=1e-3), LR),
    "RAdam, all given": (D.RAdam(lr=0.1, eps=1e-3), {}),
    "NAdam": (D.NAdam(lr=Hyper("lr", torch.exp), eps=1e-3), LR),
    "Adagrad": (D.Adagrad(lr=Hyper("lr", torch.exp), lr_decay=0.1, eps=1e-3), LR),
    "RMSprop": (D.RMSprop(lr=Hyper("lr", torch.exp), eps=1e-3, momentum=0.5), LR),
    "clipped": (D.Clipped(D.SGD(lr=Hyper("lr", torch.exp)), max_norm=0.3), LR),
}


@pytest.fixture(autouse=True)
def _traced_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_aside(
        monkeypatch,
        compilation.PROGRAMS,
        UNLOOPED,
        ONE_BY_ONE,
        not_compilable.REFUSED,
        not_compilable.ATTEMPTS,
        not_compilable.WARNED,
    )
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


def programs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_looped(problem: ht.BilevelProblem, *, looped: bool = True, **options: Any) -> ht.HypergradientResult:
    """Asserts that the loop in the program, or what takes its place, gives the eager number."""
    hparams = problem.init_hparams()
    backend = Reverse(compile=True, **options.pop("kept", {}))
    eager = ht.hypergradient(problem, hparams, backend=Reverse(), **options)
    result = ht.hypergradient(problem, hparams, backend=backend, **options)
    assert bool(memo.entries(UNLOOPED)) is not looped
    torch.testing.assert_close(result.outer_loss, eager.outer_loss, rtol=1e-10, atol=1e-13)
    for name, value in {**eager.grads, **eager.params}.items():
        torch.testing.assert_close({**result.grads, **result.params}[name], value, rtol=1e-9, atol=1e-12)
    return result


@pytest.mark.parametrize("rule", ["dampening", "Adam"])
def test_rules_in_a_loop_give_the_eager_number(rule: str) -> None:
    dynamics, extra = RULES[rule]
    assert_looped(net_problem(dynamics, extra, num_steps=12), outer_step=2)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_rules_in_machine_code_give_the_eager_number(rule: str) -> None:
    dynamics, extra = RULES[rule]
    assert_looped(net_problem(dynamics, extra, num_steps=12, step_terms=True), outer_step=2)


def test_weights_tied_before_a_run_or_after_are_one_in_a_program() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    problem = task_problem(module, item=(3,), num_tasks=2)
    own = module[3].weight
    for weight, names in ((own, 3), (module[1].weight, 2), (own, 3)):
        module[3].weight = weight
        assert len(assert_looped(problem).grads) == names


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_kind_of_a_learnt_number_is_no_obstacle_outside_of_a_loop(num_steps: int) -> None:
    def loss(params: TensorDict, hparams: TensorDict, _: Batch) -> Tensor:
        assert not isinstance(hparams["decay"], (int, float))
        return (params["w"] - 1.0).square().sum() + hparams["decay"] * params["w"].square().sum()

    inner = LambdaInner(lambda _: {"w": torch.zeros(3, dtype=F64)}, loss)
    outer = LambdaOuter({"decay": torch.tensor(0.1, dtype=F64)}, lambda p, h, _: p["w"].square().sum())
    problem = ht.BilevelProblem(inner, outer, dynamics=D.SGD(lr=0.05), num_steps=num_steps)
    hparams = problem.init_hparams()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, found = (ht.hypergradient(problem, hparams, backend=Reverse(compile=own)) for own in (False, True))
    torch.testing.assert_close(found.grads, eager.grads)


@dataclass
class _Pair:
    inputs: Tensor
    factor: float = 1.0


_ONE = _Pair(normal(3, seed=1))


def _changed(step: int) -> _Pair:
    _ONE.factor = 1.0 + (step == 9)
    return _ONE


@pytest.mark.parametrize(
    "data",
    [
        lambda step: (normal(3, seed=1), np.ones(3)),
        lambda step: _Pair(normal(3, seed=step)),
        _changed,
    ],
    ids=["an array", "new objects", "an object that changes late"],
)
def test_data_that_may_change_unseen_is_not_looped_over(data: Any) -> None:
    class Inner(LambdaInner):
        def batch(self, step: int) -> Batch:
            return data(step)

    def loss(params: TensorDict, hparams: TensorDict, batch: Any) -> Tensor:
        value = batch.inputs * batch.factor if isinstance(batch, _Pair) else batch[0] * float(batch[1].sum())
        return (params["w"] - hparams["c"] * value).square().sum()

    inner = Inner(lambda _: {"w": torch.zeros(3, dtype=F64)}, loss)
    outer = LambdaOuter({"c": torch.ones(3, dtype=F64)}, lambda p, h, _: p["w"].square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some are not compiled at all
        assert_looped(ht.BilevelProblem(inner, outer, dynamics=D.SGD(lr=0.05), num_steps=12), looped=False)


def test_one_pair_of_programs_serves_every_horizon_and_keeps_what_is_asked_for() -> None:
    before = programs()
    dynamics, extra = RULES["momentum"]
    for num_steps in (12, 9, 30):
        result = assert_looped(net_problem(dynamics, extra, num_steps=num_steps))
        cost = result.stats
        assert (cost.steps, cost.vjps, cost.stored_states) == (2 * num_steps, num_steps, num_steps + 1)
    for every, states in ((4, 3 + 4), (5, 3 + 5), ("sqrt", 4 + 3)):
        result = assert_looped(net_problem(dynamics, extra, num_steps=12), kept={"checkpoint_every": every})
        assert result.stats.stored_states == states
        assert result.stats.steps <= 3 * 12
    assert programs() - before == 2


def test_terms_of_the_outer_loss_are_summed_inside() -> None:
    dynamics, extra = RULES["momentum"]
    assert_looped(net_problem(dynamics, extra, num_steps=12, step_terms=True), kept={"checkpoint_every": 5})


@pytest.mark.parametrize("route", ["vmap", pytest.param("loop", marks=pytest.mark.slow)])
def test_tasks_are_looped_over_together_or_one_by_one(route: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    problem = task_problem(module, item=(4,), num_steps=10)
    assert_looped(problem, execution=ht.Execution(tasks=route))


class Series(ht.InnerProblem):
    """Fits a number to data that may be shared by all steps, differ, or be ragged."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.shared = normal(4, seed=1)
        self.place = torch.zeros(4, dtype=F64)
        self.array = self.place.clone().numpy()
        self.drawn: list[int] = []

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["c"].expand(4).clone()}

    def batch(self, step: int) -> Batch:
        self.drawn.append(step)
        length = 3 if self.kind == "ragged" and step == 7 else 4
        own = normal(length, seed=10 + step)
        if self.kind == "refilled":  # one place for the data of all steps
            return {"y": self.place.copy_(own)}
        if self.kind == "refilled past PyTorch":
            self.array[:] = own.numpy()
            return {"y": torch.from_numpy(self.array)}
        if self.kind == "late":  # which differs from a step on that is not looked at first
            return {"y": self.shared if step < 5 else own}
        return {"shared": {"x": self.shared}, "mixed": {"x": self.shared, "y": own}}.get(self.kind, {"y": own})

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Any) -> Tensor:
        return sum(
            ((params["w"][: len(x)] - hparams["c"] * x).square().sum() for x in batch.values()), torch.tensor(0.0)
        )


def series(kind: str, num_steps: int) -> ht.BilevelProblem:
    outer = LambdaOuter({"c": torch.tensor(0.5, dtype=F64)}, lambda p, h, b: p["w"].square().sum())
    return ht.BilevelProblem(Series(kind), outer, dynamics=D.SGD(lr=0.1), num_steps=num_steps)


@pytest.mark.parametrize(
    ("kind", "looped"),
    [
        ("mixed", True),
        ("late", True),
        ("ragged", False),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("shared", "own")),
    ],
)
def test_data_that_differs_is_stacked_and_ragged_data_goes_by_single_steps(kind: str, looped: bool) -> None:
    assert_looped(series(kind, 10), looped=looped)


@pytest.mark.parametrize(
    ("kind", "num_steps", "kept"),
    [
        ("refilled", 10, {"checkpoint_every": 4}),
        ("refilled past PyTorch", 10, {}),
        ("refilled", 5, {}),
        pytest.param("refilled past PyTorch", 10, {"checkpoint_every": 4}, marks=pytest.mark.slow),
        pytest.param("refilled", 10, {}, marks=pytest.mark.slow),
        pytest.param("refilled past PyTorch", 5, {}, marks=pytest.mark.slow),
    ],
)
def test_data_that_is_written_over_is_copied_as_it_is_drawn(kind: str, num_steps: int, kept: dict[str, Any]) -> None:
    # Without compilation PyTorch refuses data that is written over under a graph, where it sees it.
    expected = ht.hypergradient(series("own", num_steps), {"c": torch.tensor(0.5, dtype=F64)}, backend=Reverse())
    problem = series(kind, num_steps)
    result = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=True, **kept))
    torch.testing.assert_close(result.grads["c"], expected.grads["c"], rtol=1e-9, atol=1e-12)


def test_stacked_data_is_bounded() -> None:
    result = assert_looped(series("own", 150))
    assert result.stats.stored_states == 151


@pytest.mark.parametrize(
    "why",
    ["noise", "buffers", "a branch on the index", "whole numbers in the state"],
)
def test_what_cannot_be_looped_over_goes_by_single_steps(why: str) -> None:
    if why == "noise":
        problem = net_problem(D.SGD(lr=0.1), {}, num_steps=10, dropout=0.5)
    elif why == "buffers":
        module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)).double()
        problem = task_problem(module, item=(4,), num_steps=10)
    elif why == "a branch on the index":
        problem = net_problem(D.SGD(lr=0.1, momentum=0.9, dampening=0.5), {}, num_steps=10)
    else:
        problem = net_problem(Counting(), {}, num_steps=10)
    hparams = problem.init_hparams()
    execution = ht.Execution(tasks="loop") if why == "buffers" else ht.Execution()
    eager = ht.hypergradient(problem, hparams, backend=Reverse(), execution=execution)
    result = ht.hypergradient(problem, hparams, backend=Reverse(compile=True), execution=execution)
    for name, value in eager.grads.items():
        torch.testing.assert_close(result.grads[name], value, rtol=1e-9, atol=1e-12)


class Counting(D.Dynamics):
    """Gradient descent that counts its steps in the state, in whole numbers."""

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {"count": torch.zeros((), dtype=torch.int64)}

    def step(
        self, loss: Any, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        grads = loss.gradient(params, hparams)
        rate = 0.1 / (1.0 + state["count"])
        return {name: w - rate * grads[name] for name, w in params.items()}, {"count": state["count"] + 1}


def test_powers_of_the_index_are_as_exact_as_those_of_a_number() -> None:
    class Decaying(D.GradientDynamics):
        def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
            return {}

        def update(
            self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
        ) -> tuple[TensorDict, TensorDict]:
            rate = 0.03 * 0.97**index
            return {name: w - rate * grads[name] for name, w in params.items()}, {}

    assert_looped(net_problem(Decaying(), {}, num_steps=20))


@dataclass(frozen=True, eq=False)
class Bounded(D.SGD):
    """Gradient descent that refuses hyperparameters by their values, and params by their sizes."""

    def check(self, params: TensorDict, hparams: TensorDict, num_steps: int) -> None:
        super().check(params, hparams, num_steps)
        if bool(hparams["c"].detach().abs().max() > 10.0):
            raise ValueError("`c` is above 10")


@pytest.mark.parametrize("num_steps", [5, 12])
def test_a_check_of_values_is_made_before_every_run(num_steps: int) -> None:
    inner = LambdaInner(lambda h: {"w": h["c"] * 1.0}, lambda p, h, b: (p["w"] - h["c"].sin()).square().sum())
    outer = LambdaOuter({"c": normal(3, seed=1)}, lambda p, h, b: p["w"].square().sum())
    problem = ht.BilevelProblem(inner, outer, dynamics=Bounded(lr=0.1), num_steps=num_steps)
    assert_looped(problem)
    for compiled in (False, True):
        with pytest.raises(ValueError, match="`c` is above 10"):
            ht.hypergradient(problem, {"c": 20.0 * normal(3, seed=1)}, backend=Reverse(compile=compiled))


@pytest.mark.parametrize(("kind", "checks"), [(D.SGD, 0), (Bounded, 3)])
def test_a_check_of_sizes_is_made_once(kind: Any, checks: int) -> None:
    made: list[int] = []

    class Counted(kind):
        def check(self, params: TensorDict, hparams: TensorDict, num_steps: int) -> None:
            made.append(num_steps)
            super().check(params, hparams, num_steps)

    inner = LambdaInner(lambda h: {"w": h["c"] * 1.0}, lambda p, h, b: (p["w"] - h["c"].sin()).square().sum())
    outer = LambdaOuter({"c": normal(3, seed=1)}, lambda p, h, b: p["w"].square().sum())
    problem = ht.BilevelProblem(inner, outer, dynamics=Counted(lr=0.1), num_steps=12)
    assert_looped(problem)
    known = len(made)
    for _ in range(3):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=True))
    assert len(made) - known == checks


def idle_problem(num_steps: int) -> ht.BilevelProblem:
    """Returns a problem of which no step reads two of the hyperparameters, of one shape."""
    inner = LambdaInner(
        lambda h: {"w": h["init"].clone(), "frozen": h["other"].clone()},
        lambda p, h, b: (p["w"] * h["c"]).square().sum() + 0.0 * p["frozen"].sum(),
    )
    hparams = {"init": normal(3, seed=1), "other": normal(3, seed=2), "c": normal(3, seed=3).exp()}
    outer = LambdaOuter(hparams, lambda p, h, b: (p["w"] * p["frozen"]).sum() + h["c"].sum())
    return ht.BilevelProblem(inner, outer, dynamics=D.SGD(lr=0.1), num_steps=num_steps)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [5, 12])
def test_what_a_step_hands_on_as_it_got_it_is_not_written_over(num_steps: int) -> None:
    # The compiler gives the memory of such tensors to others: the gradients of `init` and `other` were wrong.
    assert_looped(idle_problem(num_steps))
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).double()
    assert_looped(task_problem(module, item=(4,), num_steps=num_steps), execution=ht.Execution(tasks="vmap"))


@pytest.mark.parametrize("num_steps", [5, 12])
def test_a_program_that_gives_other_numbers_is_not_used(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = looped_programs._carried
    monkeypatch.setattr(looped_programs, "_carried", lambda tensors, index: [1.001 * x for x in right(tensors, index)])
    assert_looped(idle_problem(num_steps), looped=False)
    assert "gives other numbers" in next(iter(memo.entries(UNLOOPED).values()))


@pytest.mark.parametrize("seen", ["before they are traced", "in the program"])
@pytest.mark.parametrize("num_steps", [5, 12])
def test_large_steps_are_called_one_by_one(num_steps: int, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Machine code of a loop over them, or of several in a row, would take minutes.
    monkeypatch.setattr(compilation, "MOST_CALLS_LOOPED", 20)
    if seen == "in the program":
        monkeypatch.setattr(looped_steps, "_CALLS_TO_A_STEP", 0)
    else:
        monkeypatch.setattr(whole_run, "_whole_by_loop", lambda *_: pytest.fail("a loop was traced"))
    monkeypatch.setattr(whole_run, "_whole_unrolled", lambda *_: pytest.fail("several steps in one program"))
    result = assert_looped(net_problem(*RULES["gradient descent"], num_steps=num_steps), looped=False)
    assert result.stats.stored_states == num_steps + 1
    assert "Above 20 it takes much longer to compile" in next(iter(memo.entries(UNLOOPED).values()))


def test_a_hyperparameter_without_a_path_is_refused_and_one_with_a_zero_is_not() -> None:
    def made(loss: Any) -> ht.BilevelProblem:
        inner = LambdaInner(lambda hparams: {"w": torch.ones(3, dtype=F64)}, loss)
        hparams = {"c": torch.tensor(0.5, dtype=F64), "d": torch.zeros(2, dtype=F64)}
        outer = LambdaOuter(hparams, lambda p, h, b: p["w"].square().sum())
        return ht.BilevelProblem(inner, outer, dynamics=D.SGD(lr=0.1), num_steps=10)

    idle = made(lambda p, h, b: (p["w"] * h["c"]).square().sum())
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['d'\]` does not reach"):
        ht.hypergradient(idle, idle.init_hparams(), backend=Reverse(compile=True))
    zero = made(lambda p, h, b: (p["w"] * h["c"]).square().sum() + (h["d"] * 0.0 * p["w"][:2]).sum())
    assert not assert_looped(zero).grads["d"].any()


@pytest.mark.parametrize("num_steps", [5, 12])
def test_a_learnt_buffer_that_the_first_step_leaves_out_is_refused_as_without_compilation(num_steps: int) -> None:
    start = {f"buffers.momentum.{name}": normal(*shape, seed=1) for name, shape in SHAPES.items()}
    rule = D.LearnedBuffers(D.SGD(lr=0.1, momentum=0.7, dampening=0.3))
    problem = net_problem(rule, start, num_steps=num_steps)
    with pytest.raises(DetachedHyperparameterError, match=r"buffers.momentum.first"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=True))
    assert not memo.entries(UNLOOPED)


def test_a_warm_start_goes_on_counting() -> None:
    dynamics, extra = RULES["Adam"]
    first = net_problem(dynamics, extra, num_steps=10)
    problem = replace(first, warm_start=True, allow_unused=("init.first", "init.second"))
    hparams = problem.init_hparams()
    carry = ht.hypergradient(problem, hparams, backend=Reverse()).carry
    assert_looped(problem, carry=carry, outer_step=1)


class ClippedBackwards(torch.autograd.Function):
    """The identity, with a gradient that is clipped."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1.0, 1.0)


@pytest.mark.parametrize("num_steps", [5, 12])
def test_a_custom_function_of_a_bare_param_is_not_traced(num_steps: int) -> None:
    # The clipping does nothing at first, when programs are compared.
    inner = LambdaInner(
        lambda h: {"w": h["start"] * 1.0}, lambda p, h, b: (ClippedBackwards.apply(p["w"]) - h["c"]).square().sum()
    )
    outer = LambdaOuter(
        {"start": torch.full((2,), 0.1, dtype=F64), "c": torch.tensor(0.2, dtype=F64)},
        lambda p, h, b: p["w"].square().sum(),
    )
    problem = ht.BilevelProblem(inner, outer, dynamics=D.SGD(lr=0.05), num_steps=num_steps)
    hparams = problem.init_hparams()
    with pytest.warns(UserWarning, match=r"cannot be compiled.*: a custom `torch.autograd.Function` is on the way"):
        ht.hypergradient(problem, hparams, backend=Reverse(compile=True))
    hparams["start"] = torch.full((2,), 5.0, dtype=F64)
    found = ht.hypergradient(problem, hparams, backend=Reverse(compile=True))
    expected = ht.hypergradient(problem, hparams, backend=Reverse())
    torch.testing.assert_close(found.outer_loss, expected.outer_loss)
    torch.testing.assert_close(found.grads, expected.grads)
    assert expected.grads["c"] == 0.0


@pytest.mark.parametrize("num_steps", [5, 12])
def test_where_the_compiler_fails_a_check_of_its_own_the_run_goes_without(num_steps: int) -> None:
    factor = np.float64(3.0)
    inner = LambdaInner(lambda h: {"w": h["c"] * 1.0}, lambda p, h, b: factor * (p["w"] - h["c"].sin()).square().sum())
    outer = LambdaOuter({"c": normal(3, seed=1)}, lambda p, h, b: p["w"].square().sum())
    problem = ht.BilevelProblem(inner, outer, dynamics=D.SGD(lr=0.05), num_steps=num_steps)
    hparams = problem.init_hparams()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = ht.hypergradient(problem, hparams, backend=Reverse(compile=True))
    assert len(said) <= 1
    torch.testing.assert_close(found.grads, ht.hypergradient(problem, hparams, backend=Reverse()).grads)
