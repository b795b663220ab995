"""Mixed mode and compilation where PyTorch's own formulas are silently wrong: never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.guards import cross_check
from hypertorch.hypergradients.reverse_mode import derivative_choice
from hypertorch.hypergradients.reverse_mode.compiled import compilation, not_compilable
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.tasks import TaskSlice
from hypertorch.types import TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import LambdaInner, LambdaOuter, normal, scalar_problem

Reverse = ht.hypergradients.Reverse
F64 = torch.float64
INPUTS, TARGETS, MATRIX = normal(12, 4, seed=1), normal(12, seed=2), normal(4, 4, seed=3)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return 3 * value.square() * grad


def pseudo_labels(weight: Tensor) -> Tensor:
    with torch.no_grad():
        labels = torch.tanh(INPUTS @ weight)
    return (INPUTS @ weight - labels).square().mean()


EXTRAS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda weight: weight.sum(),
    "slogdet": lambda weight: 0.1 * torch.slogdet(MATRIX * weight)[1],
    "solve": lambda weight: 0.1 * torch.linalg.solve(MATRIX * weight + 4.0 * torch.eye(4, dtype=F64), weight).sum(),
    "no_grad": pseudo_labels,
    "custom function": lambda weight: (INPUTS @ Cube.apply(weight) - TARGETS).square().mean(),  # type: ignore[operator]
    "branch": lambda weight: weight.sum() if weight.sum() > 0 else -weight.sum(),
}


class Extra(ht.InnerProblem):
    """Weighted least squares with one more term, by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.linspace(0.5, 1.0, 4, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: object) -> Tensor:
        base = (hparams["weight"].sigmoid() * (INPUTS @ params["w"] - TARGETS).square()).mean()
        return base + EXTRAS[self.name](params["w"])


def problem(name: str, *, lr: float = 0.02, num_steps: int = 10) -> ht.BilevelProblem:
    outer = LambdaOuter(
        {"weight": torch.linspace(-1, 1, 12, dtype=F64)},
        lambda params, hparams, batch: (INPUTS @ params["w"] + TARGETS).square().mean(),
    )
    return ht.BilevelProblem(Extra(name), outer, dynamics=ht.dynamics.SGD(lr=lr), num_steps=num_steps)


def error(own: ht.BilevelProblem, backend: ht.Hypergradient, **options: Any) -> float:
    """Returns the relative error beside `Reverse()`."""
    hparams = own.init_hparams()
    found, exact = (
        ht.hypergradient(own, hparams, backend=each, **options).grads["weight"] for each in (backend, Reverse())
    )
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces functions, but makes no machine code of them."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    set_aside(
        monkeypatch,
        compilation.PROGRAMS,
        not_compilable.REFUSED,
        not_compilable.ATTEMPTS,
        not_compilable.WARNED,
        derivative_choice.DERIVATIVE,
        cross_check.FAULTS,
    )


@pytest.mark.parametrize("name", ["slogdet", "solve"])
def test_backward_passes_without_forward_derivative_are_noticed(name: str) -> None:
    with pytest.raises(IncompatibleBackendError, match=r"in `w` differs by .*='reverse'` or 'auto'"):
        error(problem(name), Reverse(derivative="mixed"))
    assert error(problem(name), Reverse(derivative="auto")) < 1e-12


def test_problems_of_one_class_are_judged_by_what_they_compute() -> None:
    assert error(problem("nothing"), Reverse(derivative="mixed")) < 1e-12
    with pytest.raises(IncompatibleBackendError, match="mixed mode is not possible here"):
        error(problem("slogdet"), Reverse(derivative="mixed"))
    assert error(problem("nothing"), Reverse(derivative="mixed")) < 1e-12


@pytest.mark.parametrize("kept", [{}, {"checkpoint_every": 4}, {"snapshots": 3}])
def test_a_compiled_step_through_a_custom_function_is_refused(kept: dict[str, int]) -> None:
    for num_steps in (5, 12):
        asked = problem("custom function", num_steps=num_steps, lr=0.01 * num_steps / 5)
        with pytest.warns(UserWarning, match=r"cannot be compiled.*custom `torch.autograd.Function`"):
            assert error(asked, Reverse(compile=True, **kept)) < 1e-12


COMPILED = Reverse(compile=True)


def test_compiled_mixed_mode_does_not_go_through_what_stops_gradients() -> None:
    backend = Reverse(compile=True, derivative="mixed")
    with pytest.warns(UserWarning, match=r"cannot be compiled.*gives other numbers"):
        assert error(problem("no_grad"), backend) < 1e-12


def test_one_that_cannot_be_compiled_keeps_no_other_from_it() -> None:
    assert error(problem("nothing"), COMPILED) < 1e-12
    with pytest.warns(UserWarning, match="cannot be compiled"):
        assert error(problem("branch"), COMPILED) < 1e-12
    assert ht.hypergradient(problem("nothing"), HPARAMS, backend=COMPILED).stats.graph_steps == 1
    assert ht.hypergradient(problem("branch"), HPARAMS, backend=COMPILED).stats.graph_steps == 10


HPARAMS = {"weight": torch.linspace(-1, 1, 12, dtype=F64)}


def test_too_many_programs_leave_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_MOST_PROGRAMS", 3)
    rates = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    with pytest.warns(UserWarning, match=r"another program 3 times.*`Hyper`") as caught:
        graphs = [
            ht.hypergradient(problem("nothing", lr=lr), HPARAMS, backend=COMPILED).stats.graph_steps for lr in rates
        ]
    assert len(caught) == 1
    assert graphs == [1, 1, 1, 10, 10, 10]
    assert ht.hypergradient(problem("nothing", lr=0.01), HPARAMS, backend=COMPILED).stats.graph_steps == 1


def test_kinds() -> None:
    assert kind_of(problem("nothing")) == kind_of(problem("nothing"))
    others = [problem("slogdet"), problem("nothing", lr=0.03)]
    others.append(
        ht.BilevelProblem(Extra("nothing"), others[0].outer, dynamics=ht.dynamics.Adam(lr=0.02), num_steps=10)
    )
    assert len({kind_of(each) for each in [problem("nothing"), *others]}) == 4


def test_kinds_look_into_dynamics_that_wrap_others() -> None:
    rules = [
        wrap(rule)
        for wrap in (
            lambda rule: ht.dynamics.Clipped(rule, max_norm=1.0),
            lambda rule: ht.dynamics.LearnedBuffers(rule),
            lambda rule: ht.dynamics.Groups({"*": rule}),
        )
        for rule in (
            ht.dynamics.SGD(lr=0.1, momentum=0.9),
            ht.dynamics.SGD(lr=0.2, momentum=0.9),
            ht.dynamics.SGD(lr=0.1, momentum=0.9, nesterov=True),
        )
    ]
    assert len({kind_of(replace(problem("nothing"), dynamics=rule)) for rule in rules}) == len(rules) == 9


def made(extra: Callable[[Tensor], Tensor]) -> ht.BilevelProblem:
    """A problem of a factory: its functions have the same code whatever the extra term is."""
    own = problem("nothing")
    inner = LambdaInner(
        own.inner.init_params, lambda params, hparams, batch: base(params, hparams) + extra(params["w"])
    )
    return ht.BilevelProblem(inner, own.outer, dynamics=own.dynamics, num_steps=own.num_steps)


def base(params: TensorDict, hparams: TensorDict) -> Tensor:
    return (hparams["weight"].sigmoid() * (INPUTS @ params["w"] - TARGETS).square()).mean()


def test_functions_of_one_factory_are_told_apart() -> None:
    harmless, wrong = made(EXTRAS["nothing"]), made(EXTRAS["slogdet"])
    assert kind_of(harmless) == kind_of(made(EXTRAS["nothing"])) != kind_of(wrong)
    assert error(harmless, Reverse(derivative="mixed")) < 1e-12
    with pytest.raises(IncompatibleBackendError, match="mixed mode is not possible here"):
        error(wrong, Reverse(derivative="mixed"))


FEWER_BITS = ht.Execution(inner_dtype=torch.bfloat16)


def module_problem(*layers: nn.Module) -> ht.BilevelProblem:
    torch.manual_seed(0)
    module = ht.FunctionalModule(nn.Sequential(*layers))
    inputs, labels = torch.randn(32, 8), torch.randint(3, (32,))

    def losses(params: TensorDict) -> Tensor:
        return nn.functional.cross_entropy(module(params, inputs), labels, reduction="none")

    return ht.BilevelProblem(
        LambdaInner(
            lambda hparams: module.init_params(),
            lambda params, hparams, batch: (hparams["weight"].sigmoid() * losses(params)).mean(),
        ),
        LambdaOuter({"weight": torch.zeros(32)}, lambda params, hparams, batch: losses(params).mean()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=12,
    )


def test_what_pytorch_cannot_do_in_fewer_bits_is_said_by_name_and_avoided_by_auto() -> None:
    own = module_problem(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(IncompatibleBackendError, match=r"mixed mode is not possible here: PyTorch says: .*dtype"):
        ht.hypergradient(own, own.init_hparams(), backend=Reverse(derivative="mixed"), execution=FEWER_BITS)
    assert error(own, Reverse(derivative="auto"), execution=FEWER_BITS) == 0.0


@pytest.mark.slow
def test_fewer_bits_round_otherwise_in_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    own = module_problem(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    assert error(own, COMPILED, execution=FEWER_BITS) < 0.05


NAMES = list(EXTRAS)


class Chosen(Extra):
    """The extra term is chosen by a switch that is no word: the classes and the words of two problems are the same."""

    def __init__(self, switch: object, read: Callable[[Any], int] = lambda switch: switch) -> None:
        self.switch = switch
        self.read = read

    @property
    def name(self) -> str:  # type: ignore[override]
        return NAMES[self.read(self.switch)]


class Settings:
    def __init__(self, extra: int) -> None:
        self.inside = {"extra": extra}


GLOBAL = {"extra": 0}
SWITCHES: dict[str, Callable[[int], Chosen]] = {
    "number": Chosen,
    "dict": lambda which: Chosen({"extra": which}, lambda switch: switch["extra"]),
    "tuple": lambda which: Chosen((1.0, which), lambda switch: switch[1]),
    "list": lambda which: Chosen([which], lambda switch: switch[0]),
    "tensor": lambda which: Chosen(torch.tensor(which), int),
    "object": lambda which: Chosen(Settings(which), lambda switch: switch.inside["extra"]),
    "global": lambda which: GLOBAL.update(extra=which) or Chosen(None, lambda switch: GLOBAL["extra"]),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("kind", SWITCHES)
@pytest.mark.parametrize("extra", ["slogdet", "solve"])
def test_no_verdict_is_handed_on_to_a_problem_that_a_switch_makes_another(kind: str, extra: str) -> None:
    mixed = Reverse(derivative="mixed")
    assert error(chosen(kind, "nothing"), mixed) < 1e-12
    with pytest.raises(IncompatibleBackendError, match="mixed mode is not possible here"):
        error(chosen(kind, extra), mixed)
    assert error(chosen(kind, "nothing"), mixed) < 1e-12
    assert error(chosen(kind, extra), Reverse(derivative="auto")) < 1e-12


def chosen(kind: str, extra: str) -> ht.BilevelProblem:
    return replace(problem("nothing"), inner=SWITCHES[kind](NAMES.index(extra)))


@pytest.mark.parametrize("kind", ["number", "dict", "tuple", "object"])
def test_numbers_that_a_problem_holds_are_of_its_kind(kind: str) -> None:
    first, again, other = (kind_of(chosen(kind, extra)) for extra in ("nothing", "nothing", "solve"))
    assert first == again != other


def test_a_list_that_something_is_noted_down_in_makes_no_other_kind() -> None:
    inner = Chosen([0.5], lambda switch: 0)
    noted: list[float] = inner.switch  # type: ignore[assignment]
    first = kind_of(replace(problem("nothing"), inner=inner))
    noted.append(0.7)
    assert kind_of(replace(problem("nothing"), inner=inner)) == first


def test_sizes_of_a_case_are_those_of_one_task() -> None:
    def case(size: int, num_tasks: int | None) -> object:
        shape = (size,) if num_tasks is None else (num_tasks, size)
        made = scalar_problem(
            init=lambda h: {"w": torch.zeros(size, dtype=F64)},
            inner=lambda p, h, b: (p["w"] - h["c"]).square().sum(),
            num_tasks=num_tasks,
            context=lambda h, b: {"seen": torch.zeros(shape, dtype=F64) + h["c"]},
        )
        bound = BoundProblem(made, made.init_hparams(), 0, None, ht.Execution(tasks="vmap"))
        tasks = None if num_tasks is None else TaskSlice(start=0, stop=num_tasks, whole=True)
        context = bound.context(made.init_hparams(), tasks)
        return cross_check.case_of(bound.loop(tasks, context), {**made.init_hparams(), **context})[2:4]

    assert case(2, None) == case(2, None) != case(3, None)
    assert case(2, 4) == case(2, 5) != case(3, 4)
    assert case(2, None) != case(2, 4)


class RunningMean(nn.Module):
    """Scales by a running mean of its own outputs, which has a derivative in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, dtype=F64)
        self.register_buffer("mean", torch.tensor(1.0, dtype=F64))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        self.mean.mul_(0.9).add_(0.1 * outputs.mean())
        return outputs * self.mean.clone()


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_derivative_of_a_buffer_is_compared_too(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = ht.FunctionalModule(RunningMean())

    class Inner(ht.InnerProblem):
        buffers = net.buffers

        def init_params(self, hparams: TensorDict) -> TensorDict:
            return net.init_params()

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Any) -> Any:
            outputs, buffers = net.with_buffers(params, INPUTS)
            return (hparams["weights"] * (outputs[:, 0] - TARGETS).square()).mean(), buffers

    outer = LambdaOuter({"weights": torch.ones(12, dtype=F64)}, lambda p, h, b: p["layer.weight"].sum() * p["mean"])
    problem = ht.BilevelProblem(Inner(), outer, dynamics=ht.dynamics.SGD(lr=0.01), num_steps=num_steps)
    compared: list[frozenset[str]] = []
    original = cross_check._products_of_step

    def products(loop: Any, *rest: Any) -> Any:
        compared.append(loop.record.tracked_buffers)
        return original(loop, *rest)

    monkeypatch.setattr(cross_check, "_products_of_step", products)
    hparams = problem.init_hparams()
    forward = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Forward()).grads
    torch.testing.assert_close(forward, ht.hypergradient(problem, hparams, backend=Reverse()).grads)
    assert compared == [{"mean"}]
