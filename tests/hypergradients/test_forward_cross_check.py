"""The comparison of forward mode with reverse over reverse: what it notices, and that nothing else is changed by it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.forward_mode import tangent_choice
from hypertorch.hypergradients.guards import cross_check
from hypertorch.inner.kinds import kind_of
from hypertorch.types import Batch, TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, scalars

Forward, ForwardGradient, Reverse = (
    ht.hypergradients.Forward,
    ht.hypergradients.ForwardGradient,
    ht.hypergradients.Reverse,
)
F64 = torch.float64


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    set_aside(monkeypatch, cross_check.FAULTS)


class Bent(torch.autograd.Function):
    """The sine, with a forward derivative that is wrong by a factor."""

    generate_vmap_rule = True
    factor = 1.0 + 1e-4

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return Bent.factor * tangent * ctx.saved_tensors[0].cos()


bent: Callable[[Tensor], Tensor] = Bent.apply  # type: ignore[assignment]


def problem(
    where: str, operation: Callable[[Tensor], Tensor] = bent, dtype: torch.dtype = F64, **options: Any
) -> ht.BilevelProblem:
    """Least squares with the operation in one place: of the loss, the initial state, or the optimiser."""

    def at(place: str, value: Tensor) -> Tensor:
        return operation(value) if place == where else value.sin()

    def init(h: TensorDict) -> TensorDict:
        return {"w": at("initial state", h["start"]) * torch.linspace(0.5, 1.0, 3, dtype=dtype)}

    def loss(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return (at("loss", p["w"] * h["scale"]) - 0.3).square().sum()

    settings: dict[str, Any] = {
        "dynamics": ht.dynamics.SGD(
            lr=ht.Hyper("rate", lambda value: 0.1 + 0.1 * at("optimiser", value)), momentum=0.5
        ),
        "num_steps": 3,
        **options,
    }
    values = {name: value.to(dtype) for name, value in scalars(start=0.4, scale=0.7, rate=0.2).items()}
    judge = LambdaOuter(values, lambda p, h, b: p["w"].square().sum() + h["scale"])
    return ht.BilevelProblem(LambdaInner(init, loss), judge, **settings)


def compute(own: ht.BilevelProblem, backend: ht.Hypergradient, **options: Any) -> ht.HypergradientResult:
    return ht.hypergradient(own, own.init_hparams(), backend=backend, **options)


PATHS = {
    "vectorised": Forward(),
    "in chunks": Forward(chunk_size=2),
    "one by one": Forward(chunk_size=1),
    "forward gradient": ForwardGradient(num_samples=2),
    "forward gradient, one": ForwardGradient(),
}
PLACES = {
    "initial state": "the initial state in `start`|the initial state in",
    "loss": "a step in",
    "optimiser": "a step in",
}


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_forward_derivative_is_noticed_on_every_path(path: str, where: str, num_steps: int) -> None:
    backend = PATHS[path]
    own = problem(where, num_steps=num_steps)
    message = f"`{type(backend).__name__}` cannot serve this problem.*{PLACES[where]}.*differs by.*`Reverse\\(\\)`"
    with pytest.raises(IncompatibleBackendError, match=message):
        compute(own, backend)
    right = problem(where, torch.sin, num_steps=num_steps)
    expected = compute(right, Reverse()).grads
    torch.testing.assert_close(compute(own, Reverse()).grads, expected, rtol=1e-12, atol=1e-14)
    if isinstance(backend, Forward):
        torch.testing.assert_close(compute(right, backend).grads, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_wrong_forward_derivative_is_noticed_in_real_time(where: str, chunk_size: int | None) -> None:
    real_time = ht.RealTime(problem(where), optimizer=partial(torch.optim.SGD, lr=0.0), every=1, chunk_size=chunk_size)
    with pytest.raises(IncompatibleBackendError, match="differs by"):
        real_time.run(4)


def test_a_wrong_forward_derivative_is_noticed_in_mixed_mode() -> None:
    with pytest.raises(IncompatibleBackendError, match=r"mixed mode is not possible here.*`scale` differs by"):
        compute(problem("loss"), Reverse(derivative="mixed"))
    # These are differentiated by reverse mode there.
    for where in ("initial state", "optimiser"):
        expected = compute(problem(where, torch.sin), Reverse()).grads
        torch.testing.assert_close(compute(problem(where), Reverse(derivative="mixed")).grads, expected)


class Offsets(LambdaOuter):
    num_tasks: list[int]  # one, in a list: a number by itself would make another kind of problem

    def batch(self, outer_step: int) -> Batch:
        return OFFSETS[: self.num_tasks[0]]


OFFSETS = torch.tensor([0.0, 0.1, -0.2], dtype=F64)


def with_tasks(own: ht.BilevelProblem, num_tasks: int = 2) -> ht.BilevelProblem:
    judge = Offsets(own.init_hparams(), lambda p, h, b: (p["w"] - b).square().sum() + h["scale"])
    judge.num_tasks = [num_tasks]
    return replace(own, outer=judge, num_tasks=num_tasks, context=lambda h, b: {"task": b})


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_wrong_forward_derivative_is_noticed_with_tasks(
    route: Literal["vmap", "loop"], chunk_size: int | None
) -> None:
    execution = ht.Execution(tasks=route)
    own = with_tasks(problem("loss"))
    with pytest.raises(IncompatibleBackendError, match="differs by"):
        compute(own, Forward(chunk_size=chunk_size), execution=execution)
    right = with_tasks(problem("loss", torch.sin))
    found = compute(right, Forward(chunk_size=chunk_size), execution=execution).grads
    torch.testing.assert_close(found, compute(right, Reverse(), execution=execution).grads, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_curvature_far_smaller_than_the_params_is_seen(dtype: torch.dtype) -> None:
    """A step is the identity but for its step size times a Hessian: an error of the Hessian is measured by itself."""

    def loss(operation: Callable[[Tensor], Tensor], p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return operation(p["w"]).sum() + (h["shift"] * p["w"]).sum()

    def own(operation: Callable[[Tensor], Tensor]) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LambdaInner(lambda h: {"w": h["start"]}, partial(loss, operation)),
            LambdaOuter(
                {"start": torch.linspace(0.5, 1.0, 3, dtype=dtype), "shift": torch.zeros(3, dtype=dtype)},
                lambda p, h, b: p["w"].square().sum(),
            ),
            dynamics=ht.dynamics.SGD(lr=1e-3),
            num_steps=2,
        )

    class Worse(Bent):
        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return 1.05 * tangent * ctx.saved_tensors[0].cos()

    for backend in (Forward(), Forward(chunk_size=1), Reverse(derivative="mixed")):
        with pytest.raises(IncompatibleBackendError, match="derivative of a step in `w` differs by"):
            compute(own(lambda value: Worse.apply(value) * value), backend)  # type: ignore[operator]
        compute(own(lambda value: value.sin() * value), backend)


def test_what_is_rounding_beside_the_other_derivatives_is_no_fault() -> None:
    """A shift that a mean takes out again: its derivative is what rounding leaves of large terms."""
    inputs = normal(40, 3, seed=3)

    def loss(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        moved = inputs @ p["w"] * h["scale"] + p["shift"]
        return 1e7 * ((moved - moved.mean()).square().mean() + (p["w"] * h["scale"]).square().sum())

    own = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["start"], "shift": h["offset"]}, loss),
        LambdaOuter(
            {"start": 1e-7 * normal(3, seed=4), **scalars(offset=0.0, scale=0.7)}, lambda p, h, b: p["w"].square().sum()
        ),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=1,
    )
    for backend in (Forward(), Forward(chunk_size=1)):
        torch.testing.assert_close(compute(own, backend).grads, compute(own, Reverse()).grads, rtol=1e-10, atol=1e-9)


# Once for every kind of problem, and without a trace


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> list[list[weakref.ref]]:
    """Refers to every comparison that is made."""
    made: list[list[weakref.ref]] = []
    original = cross_check._reference

    def watched(*arguments: Any) -> cross_check.Reference:
        reference = original(*arguments)
        made.append([weakref.ref(each) for each in (reference, *reference.departure.tensors())])
        return reference

    monkeypatch.setattr(cross_check, "_reference", watched)
    return made


def comparisons(references: list[list[weakref.ref]], run: Callable[[], object]) -> int:
    before = len(references)
    run()
    return len(references) - before


@pytest.mark.parametrize("backend", [Forward(), Forward(chunk_size=1), ForwardGradient(num_samples=3, chunk_size=2)])
def test_it_changes_nothing_and_holds_nothing(
    backend: ht.Hypergradient, references: list[list[weakref.ref]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = net_problem(ht.dynamics.SGD(lr=0.3, momentum=0.5), {}, num_steps=3, dropout=0.4, step_terms=True)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = compute(own, backend)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(references) == 1
    assert not any(each() for each in references[0])
    monkeypatch.setattr(tangent_choice, "fault_of", lambda *arguments: None)
    plain = compute(own, backend)
    assert first.stats == plain.stats
    assert torch.equal(first.outer_loss, plain.outer_loss)
    assert all(torch.equal(first.grads[name], plain.grads[name]) for name in plain.grads)


def test_it_is_made_once_for_every_kind_of_problem(references: list[list[weakref.ref]]) -> None:
    own = problem("nowhere")
    kinds = {
        "two steps and more": [own, replace(own, num_steps=2), replace(own, num_steps=5), problem("nowhere")],
        "one step": [replace(own, num_steps=1)],
        "tasks together": [with_tasks(own), with_tasks(own, num_tasks=3)],
        "tasks one by one": [with_tasks(own), with_tasks(own, num_tasks=3)],
        "single precision": [problem("nowhere", dtype=torch.float32)],
        "products of fewer bits": [problem("nowhere", dtype=torch.float32)],
        "another rule": [replace(own, dynamics=ht.dynamics.Adam(lr=ht.Hyper("rate")))],
        "another loss": [problem("nowhere", torch.tanh)],
    }
    executions = {
        "tasks together": ht.Execution(tasks="vmap"),
        "tasks one by one": ht.Execution(tasks="loop"),
        "products of fewer bits": ht.Execution(inner_dtype=torch.bfloat16),
    }
    for backend in (Forward(), Forward(chunk_size=1)):
        for kind, problems in kinds.items():
            execution = executions.get(kind, ht.Execution())
            made = [comparisons(references, partial(compute, each, backend, execution=execution)) for each in problems]
            assert made == [1] + [0] * (len(problems) - 1), kind
    assert comparisons(references, lambda: compute(own, ForwardGradient(num_samples=4))) == 0


def test_real_time_makes_it_twice(references: list[list[weakref.ref]]) -> None:
    """For the fresh start, and for a run that goes on."""
    for _ in range(2):
        ht.RealTime(problem("nowhere"), optimizer=partial(torch.optim.SGD, lr=0.01), every=2).run(20)
        assert len(references) == 2


class Later(LambdaInner):
    """Has the operation in every step but the first."""

    def batch(self, step: int) -> Batch:
        return step > 0


def later() -> ht.BilevelProblem:
    own = problem("nowhere")

    def loss(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return ((bent if b else torch.sin)(p["w"] * h["scale"]) - 0.3).square().sum()

    return replace(own, inner=Later(own.inner.init_params, loss))


def test_what_is_right_at_the_first_step_is_looked_at_again_at_the_second() -> None:
    own = later()
    compute(replace(own, num_steps=1), Forward())
    with pytest.raises(IncompatibleBackendError, match="differs by"):
        compute(replace(own, num_steps=2), Forward())
    with pytest.raises(IncompatibleBackendError, match="differs by"):
        ht.RealTime(own, optimizer=partial(torch.optim.SGD, lr=0.0), every=1).run(2)


def test_another_route_is_taken_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def by_numpy(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return (p["w"] * h["scale"] - 0.3).square().sum() * float(1.0 + 0.0 * p["w"].detach().numpy().sum())

    own = problem("nowhere")
    own = replace(own, inner=LambdaInner(own.inner.init_params, by_numpy))
    with caplog.at_level(logging.INFO, logger="hypertorch"):
        results = [compute(own, Forward()) for _ in range(3)]
    assert [record.message.split(":")[0] for record in caplog.records] == ["forward mode by torch.func is not taken"]
    assert "vmap" in caplog.records[0].message
    torch.testing.assert_close(results[0].grads, compute(own, Reverse()).grads, rtol=1e-11, atol=1e-13)
    # One by one, every tangent has its own step.
    assert results[0].stats == compute(own, Forward(chunk_size=3)).stats
    assert results[0].stats.steps == 3 * 3


@pytest.mark.parametrize("backend", [Forward(), Reverse(derivative="mixed")], ids=repr)
def test_a_refusal_is_looked_at_again(backend: ht.Hypergradient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cause may have gone, such as a switch of PyTorch."""
    with pytest.raises(IncompatibleBackendError, match="differs by"):
        compute(problem("loss"), backend)
    monkeypatch.setattr(Bent, "factor", 1.0)
    found = compute(problem("loss"), backend).grads
    torch.testing.assert_close(found, compute(problem("loss"), Reverse()).grads, rtol=1e-11, atol=1e-13)


def test_what_the_precision_of_the_loss_rounds_is_no_fault() -> None:
    """A loss in single precision, of params in double precision, by another summation."""
    inputs = normal(40, 3, seed=3).float()

    def loss(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return (inputs @ (p["w"] * h["scale"]).float()).tanh().square().mean().double()

    own = problem("nowhere")
    own = replace(own, inner=LambdaInner(own.inner.init_params, loss))
    for backend in (Forward(), Forward(chunk_size=1)):
        torch.testing.assert_close(compute(own, backend).grads, compute(own, Reverse()).grads, rtol=1e-4, atol=1e-6)


def test_kinds_tell_functions_of_pytorch_and_modules_apart() -> None:
    def kind(operation: Any) -> object:
        return kind_of(problem("loss", operation))

    class Power:
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            self.function = function

        def __call__(self, value: Tensor) -> Tensor:
            return self.function(value)

        def method(self, value: Tensor) -> Tensor:
            return self.function(value)

    def bound(function: Callable[[Tensor], Tensor]) -> MethodType:
        """A method that a factory makes."""
        return MethodType(lambda self, value: function(value), Power(torch.sin))

    operations = [
        torch.sin,
        torch.cos,
        torch.linalg.det,
        torch.nn.functional.silu,
        torch.Tensor.sin,
        torch.nn.GELU(),
        torch.nn.GELU(approximate="tanh"),
        Power(torch.sin),
        Power(torch.cos),
        Power(torch.sin).method,
        partial(torch.clamp, min=0.0),
        partial(torch.mul, torch.sin),
        partial(torch.mul, torch.cos),
        [torch.sin],
        {"layer": torch.cos},
        [Power(torch.sin)],
        [Power(torch.cos)],
        [partial(Power(torch.sin))],
        [partial(Power(torch.cos))],
        bound(torch.sin),
        bound(torch.cos),
    ]
    kinds = [kind(operation) for operation in operations]
    assert len(set(kinds)) == len(operations)
    assert kinds == [kind(operation) for operation in operations]
    assert kind(Power(torch.sin)) == kinds[7]
