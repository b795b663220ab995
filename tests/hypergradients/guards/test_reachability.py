"""A hyperparameter that does nothing, or that a backend drops, is named; never a silent zero, never noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import hypertorch as ht
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, BlackBox, PathBlind, RandomDirections
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter

F64 = torch.float64
Reverse = ht.hypergradients.Reverse


def answer(loop: InnerLoop, variables: TensorDict, **grads: float | None) -> BackendResult:
    """What a backend returns that answers these numbers, and the exact derivative elsewhere."""
    exact = Reverse().compute(loop, variables)
    chosen = {name: None if value is None else torch.full_like(variables[name], value) for name, value in grads.items()}
    return BackendResult(grads={**exact.grads, **chosen}, outer_loss=exact.outer_loss, state=exact.state)


@dataclass(frozen=True, kw_only=True)
class DropsInitialisation(ht.Hypergradient):
    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        return answer(loop, variables, w0=None)


@dataclass(frozen=True, kw_only=True)
class Zeros(PathBlind):
    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        return answer(loop, variables, **dict.fromkeys(variables, 0.0))


@dataclass(frozen=True, kw_only=True)
class Noise(RandomDirections):
    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        return answer(loop, variables, **dict.fromkeys(variables, 0.7))


@dataclass(frozen=True, kw_only=True)
class Values(BlackBox):
    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        return answer(loop, variables, **dict.fromkeys(variables, 0.7))


@dataclass(frozen=True)
class Ones(BlackBox):
    """Takes no derivative, so that the losses may have none."""

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        ones = {name: torch.ones_like(value) for name, value in variables.items()}
        return BackendResult(grads=dict(ones), outer_loss=torch.zeros(()), state=loop.initial(variables).detached())


def problem(*, target: str = "idle", **options: object) -> ht.BilevelProblem:
    """Descends (w - c)^2 from w0 and judges w^2; `idle` does nothing unless it is the `target`."""
    hparams = {name: torch.tensor(0.5, dtype=F64) for name in ("w0", "c", "idle")}
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["w0"]}, lambda p, h, b: (p["w"] - h["c"]).square()),
        LambdaOuter(hparams, lambda p, h, b: p["w"].square() + (h["idle"] if target == "outer" else 0.0)),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=3,
        **options,  # type: ignore[arg-type]
    )


def compute(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> ht.HypergradientResult:
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend)


@pytest.mark.parametrize("backend", [Reverse(), DropsInitialisation(), Zeros(), Noise(), Values()], ids=repr)
def test_what_does_nothing_is_named_under_every_kind_of_backend(backend: ht.Hypergradient) -> None:
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach the outer loss"):
        compute(problem(), backend)
    grads = compute(problem(allow_unused=("idle", "w0")), backend).grads
    assert set(grads) == {"w0", "c", "idle"}


@pytest.mark.parametrize("backend", [Reverse(), Zeros(), Noise(), Values()], ids=repr)
def test_what_has_a_path_is_no_false_alarm(backend: ht.Hypergradient) -> None:
    assert set(compute(problem(target="outer"), backend).grads) == {"w0", "c", "idle"}


def test_what_a_backend_drops_is_named_with_the_backend() -> None:
    message = r"`hparams\['w0'\]` reaches the outer loss, but by no path that `DropsInitialisation\(\)` follows"
    with pytest.raises(IncompatibleBackendError, match=message):
        compute(problem(target="outer"), DropsInitialisation())
    grads = compute(problem(target="outer", allow_unused=("w0",)), DropsInitialisation()).grads
    assert grads["w0"] == 0.0 and grads["c"] != 0.0


def test_a_true_zero_is_returned() -> None:
    """At w0 = c = 0 the derivative vanishes although there is a path."""
    hparams = {name: torch.tensor(0.0, dtype=F64) for name in ("w0", "c", "idle")}
    for backend in (Reverse(), Zeros()):
        grads = ht.hypergradient(problem(target="outer"), hparams, backend=backend).grads
        assert grads["w0"] == 0.0 and grads["c"] == 0.0


def test_values_alone_decide_for_a_black_box() -> None:
    """A loss without a derivative, such as an accuracy, is served by value."""
    hard = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["w0"]}, lambda p, h, b: (p["w"] - h["c"].detach()).square()),
        LambdaOuter(
            {name: torch.tensor(0.5, dtype=F64) for name in ("w0", "c")}, lambda p, h, b: (p["w"] > 0.2).double()
        ),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
    )
    hparams = hard.init_hparams()
    with pytest.raises(DetachedHyperparameterError):
        ht.hypergradient(hard, hparams, backend=Reverse())

    assert ht.hypergradient(hard, hparams, backend=Ones()).grads["c"] == 1.0


def test_the_probe_is_asked_once_for_each_problem() -> None:
    calls: list[int] = []  # a number would make another kind of every call

    def outer(p: TensorDict, h: TensorDict, b: object) -> torch.Tensor:
        calls.append(1)
        return p["w"].square() + h["idle"]

    hparams = {name: torch.tensor(0.5, dtype=F64) for name in ("w0", "c", "idle")}
    inner = LambdaInner(lambda h: {"w": h["w0"]}, lambda p, h, b: (p["w"] - h["c"]).square())
    alike, counted = (
        ht.BilevelProblem(inner, LambdaOuter(hparams, outer), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=3)
        for _ in range(2)
    )
    compute(alike, Noise())  # the first of its kind is looked at for side effects
    calls.clear()
    compute(counted, Noise())
    first = len(calls)
    compute(counted, Noise())
    assert len(calls) - first == first - 1  # the second time without the probe's evaluation
    changed = {**hparams, "idle": torch.tensor(0.1, dtype=F64)}
    ht.hypergradient(counted, changed, backend=Noise())
    assert len(calls) - first == 2 * (first - 1)


def test_a_loss_that_is_constant_in_pieces_is_moved_far_enough() -> None:
    """The error rate of a threshold does not change with a small move."""
    scores, labels = torch.linspace(-2.0, 2.0, 40, dtype=F64), torch.arange(40) % 3 == 0
    hard = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones((), dtype=F64)}, lambda p, h, b: (p["w"] - 1.0).square()),
        LambdaOuter(
            {"threshold": torch.tensor(0.9, dtype=F64)},
            lambda p, h, b: ((scores * p["w"] > h["threshold"]) != labels).double().mean(),
        ),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
    )
    evolution = ht.hypergradients.EvolutionStrategies(num_pairs=20, sigma=0.3)
    assert ht.hypergradient(hard, hard.init_hparams(), backend=evolution).grads["threshold"] != 0.0


def test_a_path_of_a_longer_horizon_is_none_of_a_shorter() -> None:
    """Dampening works from the second step on: what was found out about two steps says nothing of one."""
    hparams = {name: torch.tensor(0.5, dtype=F64) for name in ("dampening", "c")}
    two = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones((), dtype=F64)}, lambda p, h, b: (p["w"] - h["c"]).square()),
        LambdaOuter(hparams, lambda p, h, b: p["w"].square()),
        dynamics=ht.dynamics.SGD(lr=0.1, momentum=0.5, dampening=ht.Hyper("dampening")),
        num_steps=2,
    )
    for backend in (Zeros(), Values()):
        compute(two, backend)
        with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['dampening'\]` does not reach"):
            compute(replace(two, num_steps=1), backend)
        compute(two, backend)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
def test_every_move_of_a_black_box_is_made(sign: float, size: float) -> None:
    """A value that differs near one point only, which one size of move in one direction meets."""
    start = 0.6
    met = start + sign * size * (start + 1.0)

    def outer(p: TensorDict, h: TensorDict, b: object) -> torch.Tensor:
        return ((h["threshold"] - met).abs() < 0.5 * size).double()

    def with_outer(loss: Callable[..., torch.Tensor]) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LambdaInner(lambda h: {"w": torch.ones((), dtype=F64)}, lambda p, h, b: (p["w"] - 1.0).square()),
            LambdaOuter({"threshold": torch.tensor(start, dtype=F64)}, loss),
            dynamics=ht.dynamics.SGD(lr=0.1),
            num_steps=2,
        )

    assert compute(with_outer(outer), Ones()).grads["threshold"] == 1.0
    with pytest.raises(DetachedHyperparameterError):
        compute(with_outer(lambda p, h, b: p["w"]), Ones())
