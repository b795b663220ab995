"""A run goes on past outer steps that meet NaN, as it was told to; tasks that do not fit into memory are divided."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import CheckpointError, NonFiniteError, NonFiniteWarning
from hypertorch.outer.guards.memory_limit import is_out_of_memory, within_memory
from hypertorch.outer.steps import step as outer_step_module
from hypertorch.types import Batch, TensorDict
from tests.outer.problems import Inner, Quadratics
from tests.outer.runs import full_loop, make_loop, records


@dataclass(frozen=True, kw_only=True)
class Breaking(Inner):
    """The inner loss is NaN at an inner step and after it."""

    at: int

    def batch(self, step: int) -> Batch:
        return torch.full((4,), math.nan if step >= self.at else 0.0, dtype=torch.float64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return super().loss(params, hparams, batch) + batch


@dataclass(frozen=True, kw_only=True)
class Faulty(Quadratics):
    """At some outer steps the inner loss is NaN from an inner step on."""

    bad: tuple[int, ...] = (2, 5)
    inner_step: int = 2

    def at(self, outer_step: int) -> ht.BilevelProblem:
        problem = super().at(outer_step)
        return replace(problem, inner=Breaking(at=self.inner_step if outer_step in self.bad else 99))


def descent(horizons: list[int], rate: float = 0.1) -> TensorDict:
    """Gradient descent by the formula, over a horizon for each outer step; 0 for a step that is skipped."""
    hparams = Quadratics().init_hparams()
    for step, horizon in enumerate(horizons):
        if horizon:
            _, grads = Quadratics(num_steps=horizon).formula(hparams, step)
            hparams = {name: value - rate * grads[name] for name, value in hparams.items()}
    return hparams


@contextmanager
def warned() -> Iterator[list[str]]:
    """Gives the texts of the warnings that were raised, which point at this file."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield messages
        finally:
            messages += [str(one.message) for one in caught]
    assert {Path(one.filename).name for one in caught} <= {Path(__file__).name}


def assert_close(found: TensorDict, wanted: TensorDict) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_by_default_the_run_ends_with_the_step_and_the_inner_step() -> None:
    with pytest.raises(
        NonFiniteError, match="outer step 2: the inner loss holds NaN or infinity at inner step 2"
    ) as no:
        make_loop(Faulty()).run(7)
    assert no.value.inner_step == 2


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path: Path) -> None:
    logger = ht.JsonLinesLogger(tmp_path / "metrics.jsonl")
    with warned() as messages:
        found = make_loop(Faulty(), on_non_finite="skip", loggers=[logger]).run(7)
    assert [text.split(":")[0] for text in messages] == ["outer step 2", "outer step 5"]
    assert "the inner loss holds NaN or infinity at inner step 2" in messages[0]
    assert messages[1].endswith("The step is skipped. It is number 2 of at most 10 such outer steps.")
    assert_close(found.hparams, descent([3, 3, 0, 3, 3, 0, 3]))
    logged = records(tmp_path / "metrics.jsonl")
    assert [record["non_finite_steps"] for record in logged] == [0, 0, 1, 1, 1, 2, 2]
    assert logged[2] == {"step": 3, "non_finite_steps": 1}


@pytest.mark.parametrize(("inner_step", "horizon"), [(2, 2), (1, 1)])
def test_a_shortened_step_ends_before_the_first_nan(inner_step: int, horizon: int) -> None:
    with warned() as messages:
        found = make_loop(Faulty(inner_step=inner_step), on_non_finite="shorten").run(7)
    assert len(messages) == 2
    assert all(f"The step is taken over {horizon} of 3 inner steps" in text for text in messages)
    assert_close(found.hparams, descent([3, 3, horizon, 3, 3, horizon, 3]))


def test_a_step_that_is_not_finite_at_the_end_is_halved() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Judge(type(Quadratics().at(0).outer)):  # type: ignore[misc]
        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            # After three steps it is beyond where the root is real; after one it is not.
            return super().loss(params, hparams, batch) + 0.0 * (params["w"][..., 0] - 2.2).sqrt().sum()

    class Root(Quadratics):
        def at(self, outer_step: int) -> ht.BilevelProblem:
            problem = super().at(outer_step)
            return replace(problem, outer=Judge(step=outer_step, num_tasks=4, metric="distance"))

    # w_1 - 1 = 0.8 (3 - 1), so w_1 = 2.6; w_3 = 2.02.
    with pytest.warns(NonFiniteWarning, match="the outer loss .* The step is taken over 1 of 3 inner steps"):
        found = make_loop(Root(), on_non_finite="shorten").run(1)
    assert_close(found.hparams, descent([1]))


def test_a_backend_that_refuses_fewer_steps_does_not_hide_the_nan() -> None:
    loop = make_loop(
        Faulty(), backend=ht.hypergradients.Reverse(checkpoint_every=3), on_non_finite="shorten", log_every=1
    )
    with pytest.raises(NonFiniteError, match="outer step 2: .* inner step 2: .* 2 of 3 .*checkpoint_every=3") as caught:
        loop.run(7)
    assert caught.value.inner_step == 2
    assert "use `on_non_finite='skip'`" in str(caught.value)


def test_what_cannot_be_shortened_is_raised() -> None:
    with pytest.raises(NonFiniteError, match="outer step 2: the inner loss holds NaN or infinity at inner step 0"):
        make_loop(Faulty(inner_step=0), on_non_finite="shorten").run(7)

    class Scheduled(Faulty):
        def at(self, outer_step: int) -> ht.BilevelProblem:
            return replace(super().at(outer_step), dynamics=ht.dynamics.SGD(lr=[0.1, 0.1, 0.1]))

    with pytest.raises(ValueError, match=r"`on_non_finite` is 'shorten', but `lr` of the dynamics is a schedule"):
        make_loop(Scheduled(bad=()), on_non_finite="shorten").run(2)


@pytest.mark.parametrize("policy", ["skip", "shorten"])
def test_there_is_a_limit(policy: Any) -> None:
    loop = make_loop(Faulty(bad=(1, 2, 3)), on_non_finite=policy, most_non_finite=2)
    limit = "outer step 3: .* 2 outer steps of this kind were skipped or shortened before"
    with warned() as messages, pytest.raises(NonFiniteError, match=limit):
        loop.run(7)
    assert len(messages) == 2


def test_lost_outer_variables_are_not_skipped_over() -> None:
    class Leap(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].data.fill_(math.nan)

    with pytest.raises(NonFiniteError, match="outer step 1: `start` holds NaN or infinity before the first inner step"):
        make_loop(optimizer=partial(Leap, lr=0.1), on_non_finite="skip").run(5)


def test_the_schedule_goes_on_over_a_skipped_step() -> None:
    memory = ht.MemoryLogger()
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    with warned():
        make_loop(Faulty(bad=(0, 2)), on_non_finite="skip", scheduler=scheduler, loggers=[memory]).run(4)
    assert [record.get("learning_rate") for record in memory.records] == [None, 0.05, None, 0.0125]


@pytest.mark.parametrize("policy", ["skip", "shorten"])
def test_a_killed_run_goes_on_with_its_count(policy: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"on_non_finite": policy, "most_non_finite": 2}
    with warned():
        whole = full_loop(tmp_path / "whole", Faulty(), **options).run(9)
    with pytest.warns(NonFiniteWarning):
        full_loop(tmp_path / "parts", Faulty(), **options).run(4)
    with pytest.warns(NonFiniteWarning, match="number 2 of at most 2"):
        parts = full_loop(tmp_path / "parts", Faulty(), **options).run(9, resume=True)
    assert all(torch.equal(parts.hparams[name], whole.hparams[name]) for name in whole.hparams)
    with pytest.raises(NonFiniteError, match="2 outer steps of this kind were skipped or shortened before"):
        full_loop(tmp_path / "parts", Faulty(bad=(10,)), **options).run(12, resume=True)
    with pytest.raises(CheckpointError, match="`on_non_finite` is 'raise', and was"):
        full_loop(tmp_path / "parts", Faulty()).run(12, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_non_finite": "ignore"}, "`on_non_finite` is 'ignore', which names no way to go on"),
        ({"most_non_finite": 0}, "`most_non_finite` is 0: it counts outer steps that may be skipped"),
        ({"most_non_finite": True}, "`most_non_finite` is True"),
    ],
)
def test_unknown_policies_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loop(**settings)


# Memory


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int | None]:
    """Makes hypergradients of more tasks at once than some fail as they do where memory is too small."""
    chunks: list[int | None] = []
    original = outer_step_module.hypergradient

    def within(*arguments: Any, execution: ht.Execution, **options: Any) -> ht.HypergradientResult:
        chunks.append(execution.chunk)
        if execution.chunk is None or execution.chunk > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(*arguments, execution=execution, **options)

    monkeypatch.setattr(outer_step_module, "hypergradient", within)
    return chunks


def test_tasks_that_do_not_fit_are_divided_and_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_loop(Quadratics(num_tasks=5)).run(6)
    chunks = limited(monkeypatch, 2)
    with warned() as messages:
        full_loop(tmp_path, Quadratics(num_tasks=5), validation=None).run(3)
    assert [text.split(" from")[0] for text in messages] == [
        "5 tasks at once do not fit into memory: `chunk` of the execution is 3",
        "3 tasks at once do not fit into memory: `chunk` of the execution is 2",
    ]
    assert chunks == [None, 3, 2, 2, 2]
    chunks.clear()
    full_loop(tmp_path, Quadratics(num_tasks=5), validation=None).run(4, resume=True)
    assert chunks == [2]
    chunks.clear()
    with warned():
        assert_close(make_loop(Quadratics(num_tasks=5)).run(6).hparams, plain.hparams)


def test_a_single_task_that_does_not_fit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for source, tasks in ((Quadratics(num_tasks=None), "vmap"), (Quadratics(), "loop")):
        chunks = limited(monkeypatch, 0)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            make_loop(source, execution=ht.Execution(tasks=tasks)).run(1)
        assert chunks == [None]
        monkeypatch.undo()
    limited(monkeypatch, 0)
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)
    with pytest.raises(torch.OutOfMemoryError):
        make_loop().run(1)


def test_a_validation_that_does_not_fit_is_divided() -> None:
    tried: list[int | None] = []

    def evaluation(execution: ht.Execution) -> str:
        tried.append(execution.chunk)
        if execution.chunk is None:
            torch.empty(10**15)  # what the host says
        return "figures"

    with pytest.warns(UserWarning, match="8 tasks at once do not fit"):
        found, execution = within_memory(evaluation, ht.Execution(tasks="vmap"), lambda: 8)
    assert (found, execution.chunk, tried) == ("figures", 4, [None, 4])


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def failing(_: ht.Execution) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        within_memory(failing, ht.Execution(tasks="vmap"), lambda: 8)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
