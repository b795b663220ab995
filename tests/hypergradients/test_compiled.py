"""Compiled runs against eager ones: the same number, compiled once, and eager with one warning where they cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import hypertorch as ht
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError, ReplayError
from hypertorch.hypergradients.reverse_mode.compiled import (
    compilation,
    looped_steps,
    not_compilable,
    single_steps,
    whole_run,
)
from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError
from hypertorch.inner import memo
from hypertorch.types import Batch, TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import LambdaInner, LambdaOuter, NetInner, net_problem, normal, task_problem

Reverse, Reversible = ht.hypergradients.Reverse, ht.hypergradients.Reversible
F64 = torch.float64
LEARNT = {"lr": torch.tensor(0.3, dtype=F64), "momentum": torch.tensor(0.6, dtype=F64)}
MOMENTUM = ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=ht.Hyper("momentum"))
ADAM = ht.dynamics.Adam(lr=ht.Hyper("lr", torch.exp, per="step"))
SCHEDULE = {"lr": torch.linspace(-2.0, -3.0, 12, dtype=F64)}


@pytest.fixture(autouse=True)
def _traced_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces functions and their derivatives, but makes no machine code of them; what is slow does that too."""
    refused = not_compilable.REFUSED, not_compilable.ATTEMPTS, not_compilable.WARNED
    set_aside(monkeypatch, compilation.PROGRAMS, looped_steps.ONE_BY_ONE, *refused)
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


def programs() -> int:
    """Returns how many programs were compiled in this process."""
    return counters["stats"]["unique_graphs"]


def assert_same(problem: ht.BilevelProblem, backend: Reverse, **options: Any) -> ht.HypergradientResult:
    """Asserts that a backend gives the eager number, and returns its result."""
    hparams = problem.init_hparams()
    eager = ht.hypergradient(problem, hparams, backend=Reverse(), **options)
    result = ht.hypergradient(problem, hparams, backend=backend, **options)
    torch.testing.assert_close(result.outer_loss, eager.outer_loss, rtol=1e-10, atol=1e-13)
    for name in hparams:
        torch.testing.assert_close(result.grads[name], eager.grads[name], rtol=1e-10, atol=1e-13)
    for name, value in eager.params.items():
        torch.testing.assert_close(result.params[name], value, rtol=1e-10, atol=1e-13)
    return result


@pytest.mark.parametrize(("kept", "states"), [({}, 13), ({"checkpoint_every": 4}, 3 + 4), ({"snapshots": 2}, 3)])
def test_states_are_counted_and_one_loss_is_kept_for_each_step(kept: dict[str, int], states: int) -> None:
    loops = []

    class Watching(Reverse):
        def compute(self, loop, variables):
            loops.append(loop)
            return super().compute(loop, variables)

    problem = net_problem(MOMENTUM, LEARNT, num_steps=12)
    result = assert_same(problem, Watching(compile=True, **kept))
    assert result.stats.stored_states == states
    losses = loops[0].record.losses
    assert losses.keys() == set(range(12))
    by_step = ht.unroll(problem, problem.init_hparams()).inner_losses
    torch.testing.assert_close(torch.stack([losses[step] for step in range(12)]), by_step, rtol=1e-10, atol=1e-13)


def test_one_step_and_one_vjp_are_compiled_for_all_steps_outer_steps_and_problems() -> None:
    before = programs()
    result = assert_same(net_problem(MOMENTUM, LEARNT, num_steps=12), Reverse(compile=True))
    assert programs() - before == 2
    assert (result.stats.steps, result.stats.vjps, result.stats.graph_steps) == (24, 12, 1)
    for outer_step in (1, 2):
        rebuilt = net_problem(MOMENTUM, LEARNT, num_steps=12)
        assert isinstance(rebuilt.inner, NetInner)
        rebuilt.inner.inputs = normal(12, 4, seed=50 + outer_step)  # which the loss reads past its arguments
        assert_same(rebuilt, Reverse(compile=True), outer_step=outer_step)
    for kept in ({"checkpoint_every": 1}, {"checkpoint_every": "sqrt"}, {"snapshots": 3}, {"memory_budget": "40KiB"}):
        assert_same(net_problem(MOMENTUM, LEARNT, num_steps=14), Reverse(compile=True, **kept))
    # Two with the loop inside, and two of a single step, for the snapshots.
    assert programs() - before == 4


def test_schedules_bias_correction_terms_at_steps_and_noise() -> None:
    before = programs()
    problem = net_problem(ADAM, SCHEDULE, num_steps=12, dropout=0.5, step_terms=True)
    assert_same(problem, Reverse(compile=True))
    assert_same(problem, Reverse(compile=True, snapshots=2), outer_step=1)
    assert_same(problem, Reverse(compile=True, derivative="mixed"), outer_step=1)  # noise: by reverse over reverse
    assert programs() - before == 2


@pytest.mark.slow
def test_mixed_mode_is_compiled() -> None:
    for dynamics, extra in ((MOMENTUM, LEARNT), (ADAM, SCHEDULE), (ht.dynamics.SGD(lr=0.1), {})):
        result = assert_same(net_problem(dynamics, extra, num_steps=12), Reverse(compile=True, derivative="mixed"))
        assert result.stats.vjps == 12


@pytest.mark.slow
@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_a_short_horizon_is_one_program(route: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    before = programs()
    for _ in range(2):
        made = task_problem(module, item=(4,), num_steps=2)
        assert_same(made, Reverse(compile=True), execution=ht.Execution(tasks=route))
    assert programs() - before == 1


def sum_problem(loss: Any, *, num_steps: int = 10, **extra: Tensor) -> ht.BilevelProblem:
    inner = LambdaInner(lambda hparams: {"w": torch.ones(3, dtype=F64)}, loss)
    outer = LambdaOuter({"c": torch.tensor(0.5, dtype=F64), **extra}, lambda p, h, b: p["w"].square().sum())
    return ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=num_steps)


def test_what_cannot_be_compiled_runs_without_after_one_warning() -> None:
    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        sign = 1.0 if float(params["w"].detach().sum()) > 0.0 else -1.0  # a branch that depends on values
        return sign * (params["w"] * hparams["c"]).square().sum()

    problem = sum_problem(loss)
    with pytest.warns(UserWarning, match=r"`compile=True`: a step of `LambdaInner` by `SGD` cannot") as caught:
        first = assert_same(problem, Reverse(compile=True))
    assert len(caught) == 1 and first.stats.steps == 10
    assert_same(sum_problem(loss), Reverse(compile=True), outer_step=1)


def test_without_a_compiler_it_runs_without_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*arguments: Any) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compilation, "BACKEND", no_compiler)
    problem = sum_problem(lambda p, h, b: (p["w"] * h["c"]).square().sum())
    with pytest.warns(UserWarning, match=r"No working C\+\+ compiler found") as caught:
        assert_same(problem, Reverse(compile=True))
    assert len(caught) == 1


def test_an_error_of_the_problem_is_no_word_on_compilation() -> None:
    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        raise KeyError("a mistake")

    problem = sum_problem(loss)
    with warnings.catch_warnings(), pytest.raises(KeyError, match="a mistake"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=True))
    assert not memo.entries(not_compilable.REFUSED)


def test_a_hyperparameter_that_does_nothing_is_refused() -> None:
    problem = sum_problem(lambda p, h, b: (p["w"] * h["c"]).square().sum(), idle=torch.zeros(2, dtype=F64))
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=True))


def test_steps_that_are_run_again_must_arrive_at_the_same_state() -> None:
    class Counting(ht.InnerProblem):
        def __init__(self) -> None:
            self.calls = 0

        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": torch.ones(2, dtype=F64)}

        def batch(self, step: int) -> Batch:
            self.calls += step == 4  # another one when step 4 is run again
            return torch.tensor(float(self.calls), dtype=F64)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return (params["w"] * hparams["c"] - batch).square().sum()

    outer = LambdaOuter({"c": torch.tensor(1.0, dtype=F64)}, lambda params, hparams, batch: params["w"].sum())
    problem = ht.BilevelProblem(Counting(), outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=10)
    with pytest.raises(ReplayError, match="the inner loss before step 0 differs by"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=True))


def test_steps_that_are_run_again_must_be_the_same_for_every_task() -> None:
    class Counting(ht.InnerProblem):
        calls = 0

        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": torch.ones(2, dtype=F64)}

        def batch(self, step: int) -> Batch:
            self.calls += step == 4
            return torch.tensor([0.0, float(self.calls)], dtype=F64)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return (params["w"] * hparams["c"] - batch).square().sum()

    outer = LambdaOuter({"c": torch.tensor(1.0, dtype=F64)}, lambda params, hparams, batch: params["w"].sum())
    problem = ht.BilevelProblem(Counting(), outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=10, num_tasks=2)
    execution = ht.Execution(tasks="vmap")
    with pytest.raises(ReplayError, match="the inner loss before step 0 differs by"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=True), execution=execution)


@pytest.mark.parametrize("backend", [Reverse, Reversible])
def test_compile_is_true_or_false(backend: Callable[..., ht.Hypergradient]) -> None:
    with pytest.raises(TypeError, match="`compile` is 'yes'"):
        backend(compile="yes")


REVERSIBLE = ht.dynamics.ReversibleMomentum(lr=ht.Hyper("lr"), momentum=ht.Hyper("momentum"))


def test_a_run_backwards_is_compiled_too() -> None:
    before = programs()
    for _ in range(2):
        result = assert_same(net_problem(REVERSIBLE, LEARNT, num_steps=12), Reversible(compile=True), outer_step=3)
        assert result.stats.vjps == 12 and result.stats.stored_states == 2
        assert result.figures["information_bits"] > 0.0
    assert programs() - before == 2  # the gradient, and the step with its vjp
    assert_same(net_problem(REVERSIBLE, LEARNT, num_steps=12, dropout=0.5, step_terms=True), Reversible(compile=True))


def test_a_run_backwards_ends_by_the_noise_of_its_integers_elsewhere_than_floats() -> None:
    """With several momenta in one tensor that noise is larger, with small weights it is large beside them."""
    several = ht.dynamics.ReversibleMomentum(lr=0.3, momentum=ht.Hyper("momentum", per="parameter"))
    momenta = {
        f"momentum.{name}": 0.5 + 0.4 * normal(*shape, seed=1).sigmoid()
        for name, shape in (("first", (4, 6)), ("second", (6, 3)))
    }
    assert_same(net_problem(several, momenta, num_steps=15), Reversible(compile=True))
    small = LambdaInner(lambda _: {"w": torch.full((3,), 1e-4, dtype=F64)}, lambda p, h, _: _square(p["w"] - h["c"]))
    outer = LambdaOuter({"c": torch.full((3,), 2e-4, dtype=F64)}, lambda p, h, _: 1e8 * _square(p["w"]))
    rule = ht.dynamics.ReversibleMomentum(lr=0.1, momentum=0.9)
    problem = ht.BilevelProblem(small, outer, dynamics=rule, num_steps=15)
    found, expected = (
        ht.hypergradient(problem, problem.init_hparams(), backend=backend).grads["c"]
        for backend in (Reversible(compile=True), Reverse())
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)


def _square(value: Tensor) -> Tensor:
    return value.square().sum()


@pytest.mark.slow
def test_a_run_backwards_is_made_machine_code() -> None:
    assert_same(net_problem(REVERSIBLE, LEARNT, num_steps=12), Reversible(compile=True))
    assert_same(net_problem(ht.dynamics.ReversibleMomentum(lr=0.3), {}, num_steps=12), Reversible(compile=True))


def test_a_step_that_cannot_be_compiled_is_run_backwards_without() -> None:
    class Reads(NetInner):
        def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
            scale = 2.0 if float(params["first"].detach().sum()) > 1e9 else 1.0  # a branch that depends on values
            return scale * super().loss(params, hparams, batch)

    plain = net_problem(REVERSIBLE, LEARNT, num_steps=4)
    problem = replace(plain, inner=Reads())
    with pytest.warns(UserWarning, match="`compile=True`: a step of `Reads`"):
        result = ht.hypergradient(problem, problem.init_hparams(), backend=Reversible(compile=True))
    expected = ht.hypergradient(plain, plain.init_hparams(), backend=Reversible())
    torch.testing.assert_close(result.grads["lr"], expected.grads["lr"], rtol=1e-10, atol=1e-13)


def _expanded() -> Tensor:
    return torch.zeros((), dtype=F64).expand(6)


def put(where: Tensor, value: Tensor) -> Tensor:
    return _expanded().index_put((where,), value)


def put_sum(where: Tensor, value: Tensor) -> Tensor:
    return _expanded().index_put((where,), value, accumulate=True)


def add(where: Tensor, value: Tensor) -> Tensor:
    return _expanded().index_add(0, where, value)


def copy(where: Tensor, value: Tensor) -> Tensor:
    return _expanded().index_copy(0, where, value)


def fill(where: Tensor, value: Tensor) -> Tensor:
    return _expanded().index_fill(0, where[:2], 3.0) + value


def descend(where: Tensor, value: Tensor) -> Tensor:
    return value.add(value.outer(value) @ value.diag(), alpha=-0.1)


@pytest.mark.slow
@pytest.mark.parametrize("function", [put, put_sum, add, copy, fill, descend])
def test_what_the_compiler_gets_wrong_is_mended(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    where, value = torch.tensor([1, 3, 0, 2, 5, 4]), normal(6, seed=0)
    expected = function(where, value)
    with compilation.compilation(lambda: None):
        actual = compilation.compiled(function, "mends", torch.device("cpu"))(where, value)
    torch.testing.assert_close(actual, expected)
    alone = torch.compile(function, dynamic=False)(where, value)
    assert not torch.allclose(alone, expected), "PyTorch has mended this: the mend can go"


def test_a_number_that_changes_with_every_step_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_MOST_PROGRAMS", 4)

    class Sliced(NetInner):
        def batch(self, step: int) -> Batch:
            return super().batch(step), step + 3

        def loss(self, params: TensorDict, hparams: TensorDict, batch: tuple[Tensor, int]) -> Tensor:
            return super().loss(params, hparams, batch[0]) * (1.0 + 1.0 / batch[1])

    problem = replace(net_problem(MOMENTUM, LEARNT, num_steps=30), inner=Sliced())
    with pytest.warns(UserWarning, match="another program 4 times.*belong in tensors of the batch"):
        result = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=True))
    expected = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    torch.testing.assert_close(result.grads["lr"], expected.grads["lr"], rtol=1e-10, atol=1e-13)


def test_problems_of_a_class_that_was_refused_three_times_are_not_tried_any_more() -> None:
    family = "a class"
    for number in range(3):
        kind = f"problem {number}"
        assert not_compilable.may_compile(family, lambda kind=kind: kind)
        with pytest.warns(UserWarning, match=f"{kind} cannot be compiled") as caught:
            not_compilable.refuse(family, kind, kind, NotCompilableError("it is too odd."))
        assert not not_compilable.may_compile(family, lambda kind=kind: kind)
        assert ("Others of its class are not tried any more" in str(caught[0].message)) == (number == 2)
    assert not not_compilable.may_compile(family, lambda: "problem 3")
    assert not_compilable.may_compile("another class", lambda: "problem 0")


class Checkpointed(ht.InnerProblem):
    """Recomputes its loss at backward time."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.ones(3, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return checkpoint(lambda w: (w * hparams["c"]).tanh().square().sum(), params["w"], use_reentrant=False)


def test_what_cannot_be_compiled_leaves_autograd_as_it_was() -> None:
    """Where the compiler gives up, PyTorch leaves hooks on saved tensors off, and a level of forward mode open."""
    outer = LambdaOuter({"c": torch.tensor(0.7, dtype=F64)}, lambda params, hparams, batch: params["w"].square().sum())
    problem = ht.BilevelProblem(Checkpointed(), outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=3)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=Reverse())
    with pytest.raises(IncompatibleBackendError, match="mixed mode is not possible here.*saved tensor hooks"):
        ht.hypergradient(problem, hparams, backend=Reverse(compile=True, derivative="mixed"))
    for backend in (Reverse(), ht.hypergradients.Forward()):
        again = ht.hypergradient(problem, hparams, backend=backend)
        torch.testing.assert_close(again.grads["c"], expected.grads["c"], rtol=1e-12, atol=0)


# Without closures, which a program cannot have.
_advance, _gradient = single_steps._advance, single_steps._gradient
_pull_back, _pull_back_mixed, _whole = single_steps._pull_back, single_steps._pull_back_mixed, whole_run._whole


def _off(result: Any) -> Any:
    return tree_map_only(Tensor, lambda value: 1.001 * value, result)


def _advance_off(*arguments: Any) -> Any:
    return _off(_advance(*arguments))


def _gradient_off(*arguments: Any) -> Any:
    return _off(_gradient(*arguments))


def _pull_back_off(*arguments: Any) -> Any:
    return _off(_pull_back(*arguments))


def _pull_back_mixed_off(*arguments: Any) -> Any:
    return _off(_pull_back_mixed(*arguments))


def _whole_off(*arguments: Any) -> Any:
    return _off(_whole(*arguments))


@pytest.mark.parametrize(
    ("wrong", "backend", "num_steps"),
    [
        (_advance_off, Reverse(compile=True, snapshots=2), 12),
        (_pull_back_off, Reverse(compile=True, snapshots=2), 12),
        (_pull_back_mixed_off, Reverse(compile=True, derivative="mixed"), 12),
        (_gradient_off, Reversible(compile=True), 12),
        (_whole_off, Reverse(compile=True), 3),
    ],
)
def test_a_program_that_gives_other_numbers_is_not_used(
    wrong: Callable[..., Any], backend: Reverse, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_run, "may_loop", lambda *_: False)
    monkeypatch.setattr(whole_run if wrong is _whole_off else single_steps, wrong.__name__.removesuffix("_off"), wrong)
    problem = net_problem(MOMENTUM, LEARNT, num_steps=num_steps)
    if wrong is _gradient_off:
        rule = ht.dynamics.ReversibleMomentum(lr=ht.Hyper("lr"), momentum=0.5)
        problem = net_problem(rule, {"lr": LEARNT["lr"]}, num_steps=num_steps)
    if wrong is _whole_off:  # single steps are tried after it
        assert_same(problem, backend)
        assert memo.entries(looped_steps.ONE_BY_ONE)
        return
    with pytest.warns(UserWarning, match="the program gives other numbers for the"):
        assert_same(problem, backend)


class Ranked(ht.InnerProblem):
    """A loss that PyTorch's compiler makes wrong code of; at least that of version 2.13."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        torch.manual_seed(0)
        return {"w": torch.randn(5, 6, dtype=F64) * hparams["s"]}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        w = params["w"] * hparams["c"]
        ranks = w.sort(1, descending=True)[0].sum() + w.topk(3, 1).values.pow(3).sum()
        running = w.cummax(1).values.square().sum() + w.cumprod(1).square().sum() + w.logcumsumexp(1).square().mean()
        middle = w.median(1).values.square().sum() + w.kthvalue(2, 1).values.square().sum()
        return ranks + running + middle + w.quantile(0.3).square()


@pytest.mark.slow
def test_wrong_code_of_the_compiler_is_not_used() -> None:
    hparams = {"s": torch.tensor(1.1, dtype=F64), "c": torch.tensor(0.5, dtype=F64)}
    outer = LambdaOuter(hparams, lambda params, hparams, batch: params["w"].square().sum())
    problem = ht.BilevelProblem(Ranked(), outer, dynamics=ht.dynamics.SGD(lr=1e-3), num_steps=4)
    with pytest.warns(UserWarning, match="gives other numbers"):  # a later version of PyTorch may be right
        assert_same(problem, Reverse(compile=True, snapshots=2))


@pytest.mark.parametrize(
    ("backend", "num_steps"),
    [
        (Reverse(compile=True), 3),
        pytest.param(Reverse(compile=True, checkpoint_every=3), 12, marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_compiled_backend_is_that_of_the_code_it_was_compiled_from(
    backend: Reverse, num_steps: int
) -> None:
    problem = net_problem(MOMENTUM, LEARNT, num_steps=num_steps)
    hparams = problem.init_hparams()
    eager = replace(backend, compile=False)
    expected = ht.hypergradient(problem, hparams, backend=eager)
    peaks = []
    for own in (eager, backend, backend):
        with warnings.catch_warnings(record=True) as caught, ht.live_memory.PeakMemory() as memory:
            warnings.simplefilter("always")
            result = ht.hypergradient(problem, hparams, backend=own)
        assert [str(entry.message)[:55] for entry in caught] == (
            ["`compile=True`: a mode that watches every operation is "] if own is backend else []
        )
        torch.testing.assert_close(result.grads, expected.grads)
        peaks.append(memory.peak)
    assert peaks[1] == peaks[2] == peaks[0]
    # Outside of the context it is compiled as ever.
    before = programs()
    assert_same(problem, backend)
    assert programs() > before
