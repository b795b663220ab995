"""What is said of an outer variable whose hypergradient stays exactly zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import outer
from hypertorch.errors import ZeroHypergradientWarning
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, scalars
from tests.outer.runs import make_loop

F64 = torch.float64
SGD = ht.dynamics.SGD


def quadratic(shaped: Callable[[TensorDict], Tensor], num_steps: int = 2, **hparams: float) -> ht.BilevelProblem:
    """The inner solution is drawn to `shaped(hparams)`, and judged by its distance from 3."""
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.zeros(2, dtype=F64)},
                    lambda p, h, b: (p["w"] - shaped(h)).square().sum()),
        LambdaOuter(scalars(**hparams), lambda p, h, b: (p["w"] - 3.0).square().sum()),
        dynamics=SGD(lr=0.1),
        num_steps=num_steps,
    )  # fmt: skip


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "a saturated clamp": lambda x: x.clamp(max=0.5),
    "a saturated sigmoid": lambda x: torch.sigmoid(1e4 * x),
    "a sign": torch.sign,
    "a rounding": torch.round,
    "a rectified unit": lambda x: torch.relu(-x),
}


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("backend", [ht.hypergradients.Reverse(), ht.hypergradients.Forward()])
def test_what_stays_zero_is_named_once(kind: str, backend: ht.Hypergradient) -> None:
    problem = quadratic(lambda h: FLAT[kind](h["x"]) + h["free"], x=1.0, free=0.2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_loop(problem, backend=backend).run(12)
    assert len(caught) == 1
    warning = caught[0].message
    assert isinstance(warning, ZeroHypergradientWarning) and warning.names == ("x",)
    assert str(warning).startswith(
        "the hypergradient of `hparams['x']` is exactly zero at each of the outer steps 0 to 4, although a path leads"
    )
    assert "`allow_unused`" in str(warning)
    assert caught[0].filename == __file__


def test_a_hypergradient_alone_says_nothing() -> None:
    problem = quadratic(lambda h: h["x"].clamp(max=0.5) + h["free"], x=1.0, free=0.2)
    result = ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse())
    assert not result.grads["x"].any()


def test_several_are_named_in_one_warning() -> None:
    problem = quadratic(lambda h: h["x"].sign() + h["free"] + h["y"].round(), x=1.0, free=0.2, y=0.1)
    with pytest.warns(ZeroHypergradientWarning, match=r"`hparams\['x'\]` .*\(so are those of \['y'\]\)") as caught:
        make_loop(problem).run(5)
    assert caught[0].message.names == ("x", "y")  # type: ignore[union-attr]


def test_a_momentum_that_never_acts() -> None:
    momentum = replace(
        quadratic(lambda h: h["free"], free=0.2, momentum=0.5, num_steps=1),
        dynamics=SGD(lr=0.1, momentum=ht.Hyper("momentum")),
    )
    with pytest.warns(ZeroHypergradientWarning, match=r"\['momentum'\].*a momentum with `num_steps=1`"):
        make_loop(momentum).run(5)
    make_loop(replace(momentum, num_steps=2)).run(5)


def test_what_is_allowed_is_not_named() -> None:
    problem = quadratic(lambda h: h["x"].sign() + h["free"], x=1.0, free=0.2)
    for allowed in (("x",), ("x", "free")):
        with warnings.catch_warnings(record=True) as said:
            make_loop(replace(problem, allow_unused=allowed)).run(6)
        assert not said


def test_layers_that_start_from_zero_are_given_the_time_to_move() -> None:
    """Each factor has a zero hypergradient until all the others have moved: a is moved at step 0, then b, then c."""
    problem = quadratic(lambda h: h["a"] + h["b"] * h["a"] + h["c"] * h["b"] * h["a"], a=0.0, b=0.0, c=0.0)
    memory = outer.MemoryLogger()
    make_loop(problem, loggers=[memory]).run(6)
    seen = memory.records
    assert seen[1]["hparams/b"] == 0.0 != seen[2]["hparams/b"]  # the premise
    assert seen[2]["hparams/c"] == 0.0 != seen[3]["hparams/c"]


class Opening(ht.ProblemSource):
    """A hyperparameter that acts from an outer step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def init_hparams(self) -> TensorDict:
        return scalars(x=1.0, free=0.2)

    def at(self, outer_step: int) -> ht.BilevelProblem:
        return quadratic(lambda h: h["x"] * float(outer_step >= self.step) + h["free"], x=1.0, free=0.2)


def test_every_one_of_the_first_five_steps_counts() -> None:
    make_loop(Opening(4)).run(10)
    with pytest.warns(ZeroHypergradientWarning, match="outer steps 0 to 4"):
        make_loop(Opening(5)).run(10)


def test_a_short_run_is_judged_by_what_it_has_and_a_single_step_by_nothing() -> None:
    with pytest.warns(ZeroHypergradientWarning, match="outer steps 0 to 2"):
        make_loop(Opening(100)).run(3)
    make_loop(Opening(100)).run(1)


def test_a_resumed_run_is_judged_anew(tmp_path: Path) -> None:
    def loop(source: ht.ProblemSource) -> outer.OuterLoop:
        return make_loop(source, checkpoints=outer.Checkpoints(tmp_path, every=3))

    loop(Opening(2)).run(3)
    with pytest.warns(ZeroHypergradientWarning, match="outer steps 3 to 7"):
        loop(Opening(100)).run(12, resume=True)


def test_one_wait_where_nothing_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    original = Tensor.count_nonzero
    monkeypatch.setattr(
        Tensor, "count_nonzero", lambda self, *args, **named: looks.append(1) or original(self, *args, **named)
    )
    make_loop(quadratic(lambda h: h["x"] + h["free"], x=1.0, free=0.2)).run(8)
    assert len(looks) == 2
    looks.clear()
    with pytest.warns(ZeroHypergradientWarning):
        make_loop(Opening(100)).run(8)
    assert len(looks) == 2 + 4
