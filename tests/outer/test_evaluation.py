"""Evaluation: the mean and interval over exactly the episodes asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from rich.console import Console
from torch import Tensor

import hypertorch as ht
from hypertorch.outer import Estimate, Report, evaluate
from hypertorch.types import Batch, TensorDict
from tests.outer.problems import Outer, Quadratics, centres


def distances(source: Quadratics, count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """The metric and the outer loss of successive episodes, by the formula."""
    hparams = source.init_hparams()
    params = 1 + (1 - source.lr * hparams["curvature"]) ** source.num_steps * (hparams["start"] - 1)
    tasks = source.num_tasks or 1
    centre = torch.cat([centres(first + step, tasks, 3) for step in range(-(-count // tasks))])[:count]
    return (params - centre).abs().amax(1), (params - centre).square().sum(1) / 2


@pytest.mark.parametrize("num_tasks", [None, 1, 4])
@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_mean_and_interval(num_tasks: int | None, count: int) -> None:
    source = Quadratics(num_tasks=num_tasks)
    report = evaluate(source, source.init_hparams(), num_episodes=count)
    assert list(report.metrics) == ["distance", "outer_loss"]
    for name, values in zip(report.metrics, distances(source, count), strict=True):
        estimate = report.metrics[name]
        assert estimate.count == count
        assert estimate.mean == pytest.approx(float(values.mean()), rel=1e-12)
        if count == 1:
            assert math.isnan(estimate.half_width)
        else:
            assert estimate.half_width == pytest.approx(1.96 * float(values.std()) / math.sqrt(count), rel=1e-9)


def test_first_step_chooses_other_episodes() -> None:
    source = Quadratics()
    report = evaluate(source, source.init_hparams(), num_episodes=6, first_step=7)
    assert report.metrics["distance"].mean == pytest.approx(float(distances(source, 6, 7)[0].mean()), rel=1e-12)


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_the_task_route_can_be_named(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypertorch.outer.evaluation import evaluate as evaluation

    seen: list[str] = []
    original = evaluation.unroll
    monkeypatch.setattr(
        evaluation,
        "unroll",
        lambda *args, execution, **named: seen.append(execution.tasks) or original(*args, **named),
    )
    source = Quadratics()
    evaluate(source, source.init_hparams(), num_episodes=4, execution=ht.Execution(tasks=route))  # type: ignore[arg-type]
    assert seen == [route]


def test_hparams_that_require_grad_keep_no_graph() -> None:
    source = Quadratics()
    hparams = {name: value.requires_grad_() for name, value in source.init_hparams().items()}
    evaluate(source, hparams, num_episodes=2)
    assert all(value.grad is None for value in hparams.values())


@dataclass(frozen=True, kw_only=True)
class Changing(Outer):
    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        figures = super().metrics(params, hparams, batch)
        if self.metric == "vector":
            return {"vector": params["w"]}
        return figures if self.step == 0 else {}


@dataclass(frozen=True, kw_only=True)
class Odd(Quadratics):
    def at(self, outer_step: int) -> ht.BilevelProblem:
        problem = super().at(outer_step)
        return replace(problem, outer=Changing(**vars(problem.outer)))


def test_refused_metrics() -> None:
    hparams = Quadratics().init_hparams()
    with pytest.raises(ValueError, match=r"`OuterProblem\.metrics` returned `outer_loss`, the name"):
        evaluate(Quadratics(metric="outer_loss"), hparams, num_episodes=2)
    with pytest.raises(ValueError, match=r"returned `vector` of shape \(3,\), where shape \(\) was expected"):
        evaluate(Odd(metric="vector"), hparams, num_episodes=2)
    with pytest.raises(ValueError, match=r"returned `distance` for 4 of 8 episodes only"):
        evaluate(Odd(), hparams, num_episodes=8)


def test_refused_arguments() -> None:
    hparams = Quadratics().init_hparams()
    with pytest.raises(ValueError, match=r"`num_episodes` is 0: there is no mean"):
        evaluate(Quadratics(), hparams, num_episodes=0)
    with pytest.raises(ValueError, match=r"`first_step` is -1"):
        evaluate(Quadratics(), hparams, num_episodes=1, first_step=-1)


def test_the_report_prints() -> None:
    report = Report(
        metrics={
            "accuracy": Estimate(mean=0.98765432, half_width=0.0012345, count=600),
            "outer_loss": Estimate(mean=0.5, half_width=math.nan, count=1),
        },
        seconds=1.0,
    )
    assert str(report).splitlines() == [
        "accuracy    0.98765 ± 0.001234  (600 episodes)",
        "outer_loss  0.5  (1 episodes)",
    ]
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(report.table("meta_test"))
    text = capture.get()
    for part in ("meta_test", "accuracy", "0.98765", "± 0.001234", "600", "unknown"):
        assert part in text
    with pytest.raises(TypeError, match=r"does not support item assignment"):
        report.metrics["accuracy"] = report.metrics["outer_loss"]  # pyright: ignore
