"""What compilation costs and saves is measured, told, and weighed by `compile="auto"`, on a clock of the test."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import hypertorch as ht
from hypertorch.hypergradients.reverse_mode.compiled import compilation, costs, not_compilable, whole_run
from hypertorch.hypergradients.reverse_mode.compiled.looped_steps import UNLOOPED
from hypertorch.inner import memo
from tests.helpers.memo import set_aside
from tests.helpers.problems import net_problem
from tests.outer.problems import Quadratics
from tests.outer.runs import make_loop

COSTS = [value for name, value in vars(costs).items() if name.isupper() and isinstance(value, str)]
Reverse, Reversible = ht.hypergradients.Reverse, ht.hypergradients.Reversible


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces functions without making code of them, and forgets what compilation cost before."""
    known = (compilation.PROGRAMS, UNLOOPED, not_compilable.REFUSED, not_compilable.ATTEMPTS, not_compilable.WARNED)
    set_aside(monkeypatch, *known, *COSTS)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


def take(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every run that is timed take as long."""
    monkeypatch.setattr(whole_run, "timed", lambda device, run: (run(), seconds))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns what the log tells of costs: other tests may have let others say more than they do by themselves."""
    return [record.getMessage() for record in caplog.records if record.name == costs.__name__]


def problem() -> ht.BilevelProblem:
    return net_problem(ht.dynamics.ReversibleMomentum(lr=0.1, momentum=0.5), {}, num_steps=12)


@pytest.mark.parametrize("backend", [Reverse(compile="auto"), Reversible(compile="auto")])
def test_auto_compiles_once_runs_without_have_taken_as_long(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem()
    hparams = asked.init_hparams()
    eager = ht.hypergradient(asked, hparams, backend=type(backend)())
    take(costs.USUAL_PRICE / 3, monkeypatch)
    made = []
    for run in range(5):
        if run == 4:
            take(0.0, monkeypatch)
        before = compilation.programs_made()
        result = ht.hypergradient(asked, hparams, backend=backend)
        made.append(compilation.programs_made() > before)
        for name, value in eager.grads.items():
            # Before the change nothing differs, not even the last bit.
            torch.testing.assert_close(result.grads[name], value, rtol=1e-10 if any(made) else 0.0, atol=0.0)
    assert made == [False, False, False, True, False]


def test_auto_goes_back_where_compilation_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, watched = problem(), []
    monkeypatch.setattr(whole_run, "compilation", lambda tell: watched.append(True) or compilation.compilation(tell))
    take(costs.USUAL_PRICE, monkeypatch)  # compiled, each run takes longer than the steps that were compared
    for _ in range(5):
        ht.hypergradient(asked, asked.init_hparams(), backend=Reverse(compile="auto"))
    assert len(watched) == 2  # the one that compiles, and the one that is measured


def test_auto_uses_what_took_longer_to_compile_than_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, watched = problem(), []
    monkeypatch.setattr(whole_run, "compilation", lambda tell: watched.append(True) or compilation.compilation(tell))
    for seconds in (costs.USUAL_PRICE, 10 * costs.USUAL_PRICE, 0.0, 0.0):
        take(seconds, monkeypatch)
        ht.hypergradient(asked, asked.init_hparams(), backend=Reverse(compile="auto"))
    assert len(watched) == 3
    # Nor does it go back where the compilation of another problem took long.
    memo.note(costs.PRICE, None, 1000.0)
    ht.hypergradient(asked, asked.init_hparams(), backend=Reverse(compile="auto"))
    assert len(watched) == 4


def test_auto_takes_the_price_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem()
    memo.note(costs.PRICE, None, 1000.0)
    take(999.0, monkeypatch)
    before = compilation.programs_made()
    ht.hypergradient(asked, asked.init_hparams(), backend=Reverse(compile="auto"))
    ht.hypergradient(asked, asked.init_hparams(), backend=Reverse(compile="auto"))
    assert compilation.programs_made() == before
    ht.hypergradient(asked, asked.init_hparams(), backend=Reverse(compile="auto"))
    assert compilation.programs_made() > before


def test_the_log_tells_the_price_and_from_where_on_it_pays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hypertorch")
    asked = problem()
    hparams, compiled = asked.init_hparams(), Reverse(compile=True)
    take(30.0, monkeypatch)
    ht.hypergradient(asked, hparams, backend=compiled)
    assert told(caplog) == [
        "`NetInner` by `ReversibleMomentum` is compiled now: small steps take about 20 s, large ones minutes",
        "`NetInner` by `ReversibleMomentum` was compiled, or its programs were loaded, in 30.0 s",
    ]
    (family,) = (key for _, key in memo.entries(costs.EAGER))
    assert 0.0 < memo.get(costs.EAGER, family, 0.0) < 30.0  # of the steps that were compared
    memo.note(costs.EAGER, family, 0.4)
    take(0.1, monkeypatch)
    ht.hypergradient(asked, hparams, backend=compiled)
    assert told(caplog)[2:] == [
        "`NetInner` by `ReversibleMomentum` takes 0.1 s compiled and about 0.4 s without: compilation (30.0 s) pays "
        "from 100 hypergradients on"
    ]
    take(0.3, monkeypatch)
    ht.hypergradient(asked, hparams, backend=compiled)
    assert len(told(caplog)) == 3  # told once


@pytest.mark.parametrize(("steps", "is_told"), [(99, True), (101, False)])
def test_a_run_that_is_too_short_is_told_once(steps: int, is_told: bool, caplog: pytest.LogCaptureFixture) -> None:
    memo.note(costs.PRICE, None, 30.0)
    memo.note(costs.EAGER, "family", 0.4)
    # Two parts of the tasks in each outer step: 100 outer steps are 200 runs.
    for _ in range(20):
        costs.count("family")
    memo.note(costs.PAYS_FROM, "family", 200.0)
    for _ in range(2):
        costs.warn_if_too_short(10, steps - 10)
    assert len(told(caplog)) == (1 if is_told else 0)
    for message in told(caplog):
        assert "this run of 99 outer steps slower: compilation takes 30.0 s, and pays from 100 of them on" in message


def test_the_outer_loop_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    take(30.0, monkeypatch)  # compiled, each run takes as long as the compilation
    make_loop(Quadratics(), backend=Reverse(compile=True), execution=ht.Execution()).run(4)
    (message,) = [message for message in told(caplog) if "outer steps" in message]
    assert "this run of 4 outer steps slower: compilation takes 30.0 s, and never pays" in message


def test_compile_is_one_of_three() -> None:
    for backend in (Reverse, Reversible):
        with pytest.raises(TypeError, match="`compile` is 'yes', which is neither True nor False nor 'auto'"):
            backend(compile="yes")  # pyright: ignore[reportArgumentType]
