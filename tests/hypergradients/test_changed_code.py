"""Programs are not run again where what they were made of has changed: methods, hooks, names of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import FunctionType
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import hypertorch as ht
from hypertorch.hypergradients.reverse_mode.compiled import compilation, looped_steps, not_compilable
from hypertorch.types import Batch, TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import normal

Reverse = ht.hypergradients.Reverse
INPUTS, TARGETS = normal(6, 3, seed=1), normal(6, 2, seed=2)
Change: TypeAlias = Callable[[ExitStack, "Fit"], object]


@pytest.fixture(autouse=True)
def _traced_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = not_compilable.REFUSED, not_compilable.ATTEMPTS, not_compilable.WARNED
    set_aside(monkeypatch, compilation.PROGRAMS, looped_steps.ONE_BY_ONE, looped_steps.UNLOOPED, *refused)
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


class Penalty:
    """Made anew in the loss."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    @property
    def scale(self) -> float:
        return 1.0

    def of(self, x: Tensor) -> Tensor:
        return self.strength * self.scale * x.square().mean()


class Errors(ht.InnerProblem):
    def errors(self, x: Tensor) -> Tensor:
        return x.square()

    @classmethod
    def mean(cls, x: Tensor) -> Tensor:
        return x.mean()


class Fit(Errors):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), Squash(), nn.Linear(4, 2)).double()
        self.inputs = INPUTS

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {name: value.detach().clone() for name, value in self.net.named_parameters()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        outputs = functional_call(self.net, params, (self.inputs,))
        fit = self.mean(hparams["weights"].sigmoid()[:, None] * self.errors(outputs - TARGETS))
        return fit + Penalty(0.1).of(outputs)


class Judge(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {"weights": torch.zeros(6, dtype=torch.float64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        # By a global name, of a tensor that the inner problem holds as an attribute.
        return (functional_call(NET, params, (INPUTS,)) - TARGETS).square().mean()


NET = Fit().net


def attribute(owner: type, name: str, value: object) -> Change:
    """Returns a change of a class; it is undone."""

    def change(stack: ExitStack, inner: Fit) -> None:
        if name in vars(owner):
            stack.callback(setattr, owner, name, vars(owner)[name])
        else:
            stack.callback(delattr, owner, name)
        setattr(owner, name, value)

    return change


def code(function: Any, other: Any) -> Change:
    """Returns a change of a function in place, as a notebook does that loads edited modules again."""
    assert isinstance(function, FunctionType)

    def change(stack: ExitStack, inner: Fit) -> None:
        stack.callback(setattr, function, "__code__", function.__code__)
        function.__code__ = other.__code__

    return change


def another_tensor(stack: ExitStack, inner: Fit) -> None:
    inner.inputs = normal(6, 3, seed=3)


def of_all_modules(register: Callable[[Any], Any], hook: Any) -> Change:
    return lambda stack, inner: stack.callback(register(hook).remove)


def another_loss(inner: Fit, params: TensorDict, hparams: TensorDict) -> Tensor:
    outputs = functional_call(inner.net, params, (inner.inputs,))
    return (hparams["weights"].sigmoid()[:, None] * outputs).square().mean()


def halved(net: nn.Module) -> TensorDict:
    return {name: 0.5 * value.detach() for name, value in net.named_parameters()}


def doubled_before_squashed(module: nn.Module, own: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (2.0 * own[0],) if isinstance(module, Squash) else None


def another_init(self: Penalty, strength: float) -> None:
    self.strength = 3.0 * strength


CHANGES: dict[str, Change] = {
    "a tensor with two names": another_tensor,
    "a method": attribute(Fit, "loss", lambda self, p, h, b: another_loss(self, p, h)),
    "an inherited method": attribute(Errors, "errors", lambda self, x: x.abs()),
    "a method over an inherited one": attribute(Fit, "errors", lambda self, x: x.abs()),
    "a method of a class": attribute(Errors, "mean", classmethod(lambda cls, x: x.sum())),
    "the code of a method": code(Errors.errors, lambda self, x: x.abs()),
    "a method of a module": attribute(Squash, "forward", lambda self, x: x.sin()),
    "a method of a module of PyTorch": attribute(nn.Linear, "forward", lambda self, x: 2.0 * (x @ self.weight.mT)),
    "a method of an object made in the loss": attribute(Penalty, "of", lambda self, x: x.abs().mean()),
    "a property of an object made in the loss": attribute(Penalty, "scale", property(lambda self: 5.0)),
    "how an object is made in the loss": attribute(Penalty, "__init__", another_init),
    "a hook": lambda stack, inner: inner.net[1].register_forward_hook(lambda module, inputs, output: 2.0 * output),
    "a hook before": lambda stack, inner: inner.net[1].register_forward_pre_hook(lambda module, own: (2.0 * own[0],)),
    "a hook of all modules": of_all_modules(register_module_forward_hook, lambda module, own, output: 0.5 * output),
    "a hook before all modules": of_all_modules(register_module_forward_pre_hook, doubled_before_squashed),
    "the initial params": attribute(Fit, "init_params", lambda self, hparams: halved(self.net)),
}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as undone:
        yield undone


def assert_seen(change: Change, stack: ExitStack, num_steps: int, **options: Any) -> None:
    """Asserts that a program gives the eager number before and after a change, which matters."""
    inner = Fit()
    problem = ht.BilevelProblem(inner, Judge(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=num_steps)
    hparams = problem.init_hparams()
    losses = []
    for own in (None, change):
        if own is not None:
            own(stack, inner)
        eager = ht.hypergradient(problem, hparams, backend=Reverse(**options))
        found = ht.hypergradient(problem, hparams, backend=Reverse(compile=True, **options))
        torch.testing.assert_close(found.outer_loss, eager.outer_loss, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(found.grads, eager.grads, rtol=1e-8, atol=1e-12)
        losses.append(eager.outer_loss)
    assert not torch.equal(*losses)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("change", CHANGES)
def test_a_program_with_a_loop_sees_a_change(change: str, stack: ExitStack) -> None:
    assert_seen(CHANGES[change], stack, 10)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"checkpoint_every": 1}, {"derivative": "mixed"}, {"snapshots": 2}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_programs_of_single_steps_see_a_change(change: str, options: dict[str, Any], stack: ExitStack) -> None:
    assert_seen(CHANGES[change], stack, 3, **options)


class Passed(Fit):
    """Returns a tensor that the loss reads by its global name, at some steps only."""

    def batch(self, step: int) -> Batch:
        return normal(6, 3, seed=step) if 9 <= step < 18 else INPUTS

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        errors = (functional_call(self.net, params, (batch,)) - TARGETS).square()
        others = functional_call(self.net, params, (INPUTS,)).sin().mean()
        return (hparams["weights"].sigmoid()[:, None] * errors).mean() + 0.1 * others


def test_data_that_has_a_global_name_at_some_steps_is_told_apart() -> None:
    problem = ht.BilevelProblem(Passed(), Judge(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=27)
    hparams = problem.init_hparams()
    eager = ht.hypergradient(problem, hparams, backend=Reverse())
    found = ht.hypergradient(problem, hparams, backend=Reverse(compile=True, checkpoint_every=5))
    torch.testing.assert_close(found.grads, eager.grads, rtol=1e-8, atol=1e-12)
