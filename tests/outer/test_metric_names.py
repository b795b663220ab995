"""Metrics of a problem beside the figures of the outer loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

import hypertorch as ht
from hypertorch import outer
from hypertorch.types import Batch, TensorDict
from tests.outer.problems import Outer, Quadratics
from tests.outer.runs import make_loop

OWN_NAMES = ["outer_loss", "learning_rate", "learning_rate/1", "hypergradient_norm", "steps_per_second", "step",
             "hparams/curvature", "validation/distance"]  # fmt: skip


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_metric_must_not_hide_a_figure_of_the_loop(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`OuterProblem\.metrics` returned \['{name}'\], names that the outer loop"):
        make_loop(Quadratics(metric=name)).run(1)


class Loud(ht.hypergradients.Reverse):
    """Fails where an outer step is taken."""

    def compute(self, *_: object) -> ht.BackendResult:
        raise AssertionError("an outer step was taken")


def test_a_metric_is_refused_before_the_first_step() -> None:
    """A record comes after `log_every` steps only, which may be hours."""
    with pytest.raises(ValueError, match=r"`OuterProblem\.metrics` returned \['outer_loss'\], names that the outer"):
        make_loop(Quadratics(metric="outer_loss", num_tasks=None), backend=Loud(), log_every=1000).run(2000)
    with pytest.raises(ValueError, match="`each` of shape"):
        make_loop(Measured(num_tasks=None, figures=lambda w: {"each": w}), backend=Loud()).run(2)


def test_a_metric_of_a_later_problem_must_not_hide_a_figure_either() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(Quadratics):
        def at(self, outer_step: int) -> ht.BilevelProblem:
            return replace(self, metric="outer_loss" if outer_step == 2 else "distance").problem(outer_step)

        def problem(self, outer_step: int) -> ht.BilevelProblem:
            return super().at(outer_step)

    memory = outer.MemoryLogger()
    with pytest.raises(ValueError, match=r"`OuterProblem\.metrics` returned \['outer_loss'\]"):
        make_loop(Later(), loggers=[memory]).run(4)
    assert len(memory.records) == 2


def test_every_name_that_the_loop_logs_is_refused_for_a_metric() -> None:
    memory = outer.MemoryLogger()
    validation = outer.Validation(source=Quadratics(), every=1, num_episodes=2, metric="distance")
    make_loop(loggers=[memory], validation=validation).run(1)
    logged = {name for record in memory.records for name in record} - {"distance"}
    assert len(logged) == 10
    for name in logged:
        with pytest.raises(ValueError, match=rf"`OuterProblem\.metrics` returned \['{name}'\]"):
            make_loop(Quadratics(metric=name)).run(1)


def test_metrics_that_look_like_those_of_the_loop_are_kept() -> None:
    memory = outer.MemoryLogger()
    for name in ("outer_loss_train", "hparams_norm", "steps", "seconds", "train/outer_loss"):
        make_loop(Quadratics(metric=name), loggers=[memory]).run(1)
        assert name in memory.records[-1]


@dataclass(frozen=True, kw_only=True)
class Measuring(Outer):
    """Returns the metrics that it is given, of the fitted params."""

    figures: Any

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        return self.figures(params["w"])


@dataclass(frozen=True, kw_only=True)
class Measured(Quadratics):
    figures: Any

    def at(self, outer_step: int) -> ht.BilevelProblem:
        problem = super().at(outer_step)
        return replace(problem, outer=Measuring(**vars(problem.outer), figures=self.figures))


@pytest.mark.parametrize("num_tasks", [None, 4])
def test_a_metric_of_several_entries_is_not_averaged_over_them(num_tasks: int | None) -> None:
    source = Measured(num_tasks=num_tasks, figures=lambda w: {"each": w})
    with pytest.raises(ValueError, match=r"`OuterProblem\.metrics` returned `each` of shape .*3,?\).*one figure"):
        make_loop(source).run(1)
    with pytest.raises(ValueError, match=r"`OuterProblem\.metrics` returned `number` as a float"):
        make_loop(Measured(num_tasks=None, figures=lambda w: {"number": 0.5})).run(1)


def test_a_metric_must_not_hide_an_interval() -> None:
    source = Measured(figures=lambda w: {"error": w.sum(), "error_half_width": w.sum()})
    validation = outer.Validation(source=source, every=100, num_episodes=2, metric="error")
    with pytest.raises(ValueError, match=r"returned `error_half_width` beside `error`.*Rename the metric"):
        make_loop(validation=validation).run(100)
