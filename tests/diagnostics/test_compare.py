"""The comparison itself: its numbers are those of each backend alone, and what refuses says why."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field

import pytest
import torch

import hypertorch as ht
from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.errors import IncompatibleBackendError, NonFiniteError
from hypertorch.hypergradients import BackendResult
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict
from tests.diagnostics.task_routes import noisy_module, routes_by_turns
from tests.helpers.problems import Ridge, net_problem, task_problem

Reverse, Truncated = ht.hypergradients.Reverse, ht.hypergradients.Truncated


@dataclass(frozen=True, kw_only=True)
class Scaled(ht.Hypergradient):
    """Reverse mode times a factor, which warns, says a figure and writes down when it ran."""

    name: str = ""
    factor: float = 1.0
    warning: str = ""
    log: list[str] = field(default_factory=list)

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        self.log.append(self.name)
        if self.warning:
            warnings.warn(self.warning, stacklevel=2)
        result = Reverse().compute(loop, variables)
        grads = {name: None if grad is None else self.factor * grad for name, grad in result.grads.items()}
        figures = {"factor": torch.tensor([self.factor, self.factor + 2])}
        return BackendResult(grads=grads, outer_loss=result.outer_loss, state=result.state, figures=figures)


def compare(problem: ht.BilevelProblem, backends: dict[str, ht.Hypergradient], **options: object):
    return ht.compare_backends(problem, problem.init_hparams(), backends, **options)  # type: ignore[arg-type]


def test_the_figures_are_those_of_each_backend_alone() -> None:
    problem = Ridge().problem(30)
    hparams = problem.init_hparams()
    backends = {"whole": Reverse(), "sqrt": Reverse(checkpoint_every="sqrt"), "last 5": Truncated(window=5)}
    comparison = compare(problem, backends, repeats=2)
    exact = ht.hypergradient(problem, hparams, backend=Reverse()).grads
    assert list(comparison.figures) == ["whole", "sqrt", "last 5"]
    for name, backend in backends.items():
        figures = comparison.figures[name]
        alone = ht.hypergradient(problem, hparams, backend=backend)
        assert asdict(figures.cost) == asdict(alone.stats)
        assert figures.accuracy == ht.Accuracy.of(alone.grads, exact)
        with PeakMemory() as memory:
            ht.hypergradient(problem, hparams, backend=backend)
        assert figures.peak_bytes == memory.peak
        assert len(figures.seconds) == 2
        assert 0 < figures.min_seconds <= figures.median_seconds <= max(figures.seconds)
    assert comparison.figures["whole"].accuracy.error == 0.0
    assert comparison.figures["sqrt"].accuracy.error < 1e-14
    assert comparison.figures["last 5"].accuracy.errors["lam"] > 0.1
    assert comparison.figures["sqrt"].peak_bytes < comparison.figures["whole"].peak_bytes / 2


def test_errors_are_against_the_exact_backend_that_is_given() -> None:
    comparison = compare(Ridge().problem(5), {"reverse": Reverse()}, exact=Scaled(factor=-2.0), repeats=1)
    accuracy = comparison.figures["reverse"].accuracy
    assert accuracy.error == pytest.approx(1.5)
    assert accuracy.cosine == pytest.approx(-1.0)
    assert "errors against Scaled(" in str(comparison)


def test_backends_take_turns_after_a_warm_up() -> None:
    log: list[str] = []
    backends = {name: Scaled(name=name, log=log) for name in "ab"}
    compare(Ridge().problem(2), backends, repeats=3)
    assert "".join(log) == "ab" + "ab" + "ababab"


def test_a_refusal_is_a_reason_in_place_of_numbers() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.1), {}, num_steps=4)
    comparison = compare(problem, {"short": Truncated(window=2), "whole": Reverse()}, repeats=1)
    assert list(comparison.figures) == ["whole"]
    assert "`hparams['init.first']` reaches the outer loss" in comparison.refusals["short"]
    rows = comparison.rows()
    assert rows[1] == {"backend": "short", "refusal": comparison.refusals["short"]}
    assert "Use an exact backend" in comparison.refusals["short"]
    assert f"short refused: {comparison.refusals['short'].split('. ')[0]}\n" in f"{comparison}\n"


def test_nothing_may_be_left_to_compare() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.1), {}, num_steps=4)
    comparison = compare(problem, {"short": Truncated(window=2)}, repeats=1)
    assert not comparison.figures
    assert "time of the fastest of 0, and the median\nshort refused" in str(comparison)


def test_the_exact_backend_must_serve() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.1), {}, num_steps=4)
    with pytest.raises(IncompatibleBackendError):
        compare(problem, {"whole": Reverse()}, exact=Truncated(window=2))
    ridge = Ridge().problem(5)
    with pytest.raises(NonFiniteError):
        ht.compare_backends(ridge, {**ridge.init_hparams(), "eta": torch.tensor(1e300).double()}, {"whole": Reverse()})


def test_a_bug_is_no_refusal() -> None:
    with pytest.raises(TypeError, match="`backend` is 'reverse', not a `Hypergradient`"):
        compare(Ridge().problem(2), {"reverse": "reverse"})  # type: ignore[dict-item]


def test_warnings_are_kept_and_heard_once() -> None:
    comparison = compare(Ridge().problem(2), {"loud": Scaled(warning="residual 0.5"), "quiet": Scaled()})
    assert comparison.figures["loud"].warnings == ("residual 0.5",)
    assert comparison.figures["quiet"].warnings == ()
    assert str(comparison).count("loud warned: residual 0.5") == 1


def test_rows_are_flat_and_go_into_json() -> None:
    row = json.loads(json.dumps(compare(Ridge().problem(3), {"doubled": Scaled(factor=2.0)}).rows()))[0]
    assert row["backend"] == "doubled"
    assert row["refusal"] is None
    assert row["error"] == row["error.lam"] == row["error.eta"] == 1.0
    assert row["own.factor"] == 3.0
    assert row["steps"] == row["vjps"] == row["graph_steps"] == 3
    assert {"cosine", "min_seconds", "median_seconds", "peak_bytes", "jvps", "stored_states"} < set(row)


def test_the_table_is_aligned_and_the_most_exact_comes_first() -> None:
    text = str(compare(Ridge().problem(3), {"a long name": Scaled(factor=2.0), "exact": Scaled()}))
    heading, first, second, *_ = text.splitlines()
    assert first.startswith("exact")
    assert second.startswith("a long name")
    for column in ("error", "cosine", "time", "memory", "steps", "graph steps"):
        end = heading.index(column) + len(column)
        assert all(line[end - 1 : end].strip() and not line[end : end + 1].strip() for line in (first, second))
    assert "0.00e+00" in first
    assert "1.00e+00" in second


def test_tasks_are_run_by_one_route(monkeypatch: pytest.MonkeyPatch) -> None:
    routes_by_turns(monkeypatch)
    problem = task_problem(noisy_module(), item=(4,), num_steps=4)
    comparison = compare(problem, {"step-wise": Reverse(checkpoint_every=1), "sqrt": Reverse(checkpoint_every="sqrt")})
    assert all(figures.accuracy.error < 1e-12 for figures in comparison.figures.values())


def test_leaves_hparams_and_generators_alone() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.1), {}, num_steps=3, dropout=0.5)
    hparams = problem.init_hparams()
    before = {name: value.clone() for name, value in hparams.items()}
    state = torch.random.get_rng_state()
    ht.compare_backends(problem, hparams, {"whole": Reverse()})
    assert all(torch.equal(hparams[name], before[name]) for name in before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="`backends` is empty"):
        compare(Ridge().problem(2), {})
    for repeats in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"`repeats` is {repeats!r}: "):
            compare(Ridge().problem(2), {"whole": Reverse()}, repeats=repeats)


def test_backends_without_names_are_refused() -> None:
    ridge = Ridge()
    problem = ridge.problem(2)
    with pytest.raises(TypeError, match="`backends` is a list: the rows of the table need names"):
        ht.compare_backends(problem, problem.init_hparams(), [ht.hypergradients.Reverse()])  # type: ignore[arg-type]


def test_a_comparison_cannot_be_changed() -> None:
    refusals = {"Forward()": "too many"}
    found = ht.BackendComparison(figures={}, refusals=refusals, exact=Reverse())
    refusals["Forward()"] = "another"
    assert found.refusals["Forward()"] == "too many"
    for mapping in (found.figures, found.refusals):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["Reverse()"] = None  # type: ignore[index]
