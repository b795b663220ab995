"""The index of a step in a compiled program: computed with as without one, or asked for what a program cannot tell.

It is a tensor in a loop and a symbol in a single step. What is asked of it here matters between the steps that a new
program is compared at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.hypergradients.reverse_mode.compiled import compilation, looped_steps, not_compilable
from hypertorch.hypergradients.reverse_mode.compiled.looped_steps import UNLOOPED
from hypertorch.inner import memo
from hypertorch.types import Batch, TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import LambdaInner, LambdaOuter

Reverse = ht.hypergradients.Reverse
F64 = torch.float64
TWELVE = 12
ROUTES = {"a loop": {}, "loops of some steps": {"checkpoint_every": 6}, "single steps": {"checkpoint_every": 1}}


class Indexed(LambdaOuter):
    """Has terms at inner steps, with a factor that is computed from the index alone."""

    factor: Callable[[int], Any]

    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return self.factor(index) * params["w"].square().sum()


def problem(factor: Callable[[int], Any], num_steps: int = 30) -> ht.BilevelProblem:
    inner = LambdaInner(lambda _: {"w": torch.zeros(3, dtype=F64)}, lambda p, h, _: (p["w"] - h["c"]).square().sum())
    outer = Indexed({"c": torch.ones(3, dtype=F64)}, lambda p, h, _: p["w"].square().sum())
    outer.factor = factor
    return ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.05), num_steps=num_steps)


def assert_eager(asked: ht.BilevelProblem, **kept: Any) -> None:
    hparams = asked.init_hparams()
    eager = ht.hypergradient(asked, hparams, backend=Reverse())
    found = ht.hypergradient(asked, hparams, backend=Reverse(compile=True, **kept))
    torch.testing.assert_close(found.outer_loss, eager.outer_loss, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found.grads["c"], eager.grads["c"], rtol=1e-12, atol=0.0)


@pytest.fixture(autouse=True)
def _traced_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    known = (not_compilable.REFUSED, not_compilable.ATTEMPTS, not_compilable.WARNED)
    set_aside(monkeypatch, compilation.PROGRAMS, UNLOOPED, *known)
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


def between(index: int) -> Any:
    return (index >= 12) * (index < 20)


KINDS: dict[str, Callable[[int], Any]] = {
    "an int": lambda index: 1.0 + between(index) * (0.5 if isinstance(index, int) else 7.0),
    "a kind of int": lambda index: 1.0 + between(index) * (0.5 if isinstance(index, (str, Integral)) else 7.0),
    "a tensor": lambda index: 1.0 + between(index) * (7.0 if isinstance(index, Tensor) else 0.5),
    "a tensor, by torch": lambda index: 1.0 + between(index) * (7.0 if torch.is_tensor(index) else 0.5),
    "its type": lambda index: 1.0 + between(index) * (0.5 if type(index) is int else 7.0),
    "its class": lambda index: 1.0 + between(index) * (0.5 if index.__class__ is int else 7.0),
    "an attribute": lambda index: 1.0 + between(index) * getattr(index, "denominator", 5),
    "whether there is one": lambda index: 1.0 + between(index) * (0.5 if hasattr(index, "bit_length") else 7.0),
    "one of tensors": lambda index: 1.0 + between(index) * (7.0 if hasattr(index, "numel") else 0.5),
    "a method": lambda index: 1.0 + between(index) * (0.5 if callable(getattr(index, "bit_length", None)) else 7.0),
    "identity": lambda index: 7.0 if index is TWELVE else 0.5,
    "no identity": lambda index: 0.5 if index is not TWELVE else 7.0,
    "what it is counted to": lambda index: 1.0 + between(index) * (0.5 if type(2 * index + 1) is int else 7.0),
    "a function of NumPy": lambda index: float(np.sin(index)),
    "looked up": lambda index: {12: 1.0, 15: 2.0}.get(index, 0.5),
    "in a set": lambda index: 1.0 if index % 100 in {12, 15} else 0.5,
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:`compile=True`. a step of")
def test_what_a_program_cannot_tell_is_left_to_python(kind: str, route: str) -> None:
    assert_eager(problem(KINDS[kind]), **ROUTES[route])


@pytest.mark.parametrize(("kind", "word"), [("its type", "its type"), ("a function of NumPy", "NumPy")])
@pytest.mark.filterwarnings("ignore:`compile=True`. a step of")
def test_what_is_asked_is_said(kind: str, word: str) -> None:
    assert_eager(problem(KINDS[kind]))
    assert word in str(memo.entries(UNLOOPED))


LARGE: dict[str, Callable[[int], Any]] = {
    "a power": lambda index: (index * 7919 + 13) ** 3 % 101 / 101,
    "products": lambda index: (index * 7919 + 13) * (index * 7919 + 13) * (index * 7919 + 13) % 101 / 101,
    "a power of two": lambda index: 2 ** (2 * index) % 101 / 101,
    "a shift": lambda index: (1 << (2 * index)) % 101 / 101,
    "more than 64 bits": lambda index: float((index * 1_000_003) ** 3 // 10**14) / 1e3,
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.filterwarnings("ignore:`compile=True`. a step of")
def test_whole_numbers_of_any_length_are_left_to_python(kind: str, route: str) -> None:
    """A longer horizon has larger ones than those that the program was compared at."""
    for num_steps in (12, 60):
        assert_eager(problem(LARGE[kind], num_steps), **ROUTES[route])


EXACT: dict[str, Callable[[int], Any]] = {
    "a power": lambda index: index**2 % 101 / 101,
    "a product": lambda index: (index * 7919 + 13) % 101 / 101,
    "numbers with a point": lambda index: 0.9**index + 2.0**-index + 1e18 * index * 1e-18,
    "a quotient": lambda index: index // 3 + index / 3,
    "compared": lambda index: 1.0 + between(index) + min(index, 12) + abs(index - 15),
    "compared with nothing": lambda index: 1.0 if index is None else 2.0,
    "by its operators": lambda index: operator.mul(index, operator.add(index, 1)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", EXACT)
def test_what_is_exact_is_looped_over(kind: str) -> None:
    for num_steps in (12, 60):
        assert_eager(problem(EXACT[kind], num_steps))
    assert not memo.entries(UNLOOPED)


def test_above_the_latest_step_no_loop_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looped_steps, "LATEST_STEP", 20)
    looped: list[int] = []
    original = looped_steps.counters_of
    monkeypatch.setattr(
        looped_steps, "counters_of", lambda loop, steps: looped.append(len(steps)) or original(loop, steps)
    )
    for num_steps, is_looped in ((20, True), (21, False)):
        looped.clear()
        assert_eager(problem(lambda index: index**2 / 100, num_steps), checkpoint_every=5)
        assert bool(looped) is is_looped


@pytest.mark.parametrize("kept", [{}, {"checkpoint_every": 6}], ids=["all states", "some states"])
@pytest.mark.filterwarnings("ignore:`compile=True`. a step of")
def test_the_last_steps_of_a_loop_are_compared_too(kept: dict[str, int]) -> None:
    """The loss is another one in programs, from the last steps on."""
    assert_eager(problem(lambda index: 1.0 + (index >= 27) * torch.compiler.is_compiling()), **kept)
    assert "gives other numbers" in str(memo.entries(UNLOOPED))
