"""Every figure that an outer run logs and reports, of problems whose data differ at every outer step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import outer
from hypertorch.outer import HPARAMS_FILE
from hypertorch.types import Batch, TensorDict
from tests.outer.problems import Outer, Quadratics, centres
from tests.outer.runs import make_loop


@dataclass(frozen=True, kw_only=True)
class Stepping(Outer):
    """One outer problem for all steps: its data are those of the step that is asked for."""

    def batch(self, outer_step: int) -> Batch:
        return Outer(step=outer_step, num_tasks=self.num_tasks, metric=self.metric).batch(outer_step)


def one_problem(num_tasks: int | None = 4, **changes: Any) -> ht.BilevelProblem:
    """The problem of `Quadratics` as a single one."""
    problem = Quadratics(num_tasks=num_tasks, **changes).at(0)
    return replace(problem, outer=Stepping(**vars(problem.outer)))


def fitted(source: Quadratics, hparams: Mapping[str, Tensor]) -> Tensor:
    return 1 + (1 - source.lr * hparams["curvature"]) ** source.num_steps * (hparams["start"] - 1)


def distance(source: Quadratics, hparams: Mapping[str, Tensor], step: int) -> float:
    """The metric of an outer step by the formula."""
    centre = centres(step, source.num_tasks or 1, 3)
    return float((fitted(source, hparams) - centre).abs().amax(1).mean())


@pytest.mark.parametrize("num_tasks", [None, 4])
@pytest.mark.parametrize("clip_norm", [None, 0.2])
def test_figures_are_those_of_the_step_and_the_norm_is_that_before_clipping(
    num_tasks: int | None, clip_norm: float | None
) -> None:
    source, memory = Quadratics(num_tasks=num_tasks), outer.MemoryLogger()
    make_loop(one_problem(num_tasks), loggers=[memory], clip_norm=clip_norm).run(4)
    hparams = source.init_hparams()
    clipped = []
    for step, record in enumerate(memory.records):
        loss, grads = source.formula(hparams, step)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        assert record["step"] == step + 1
        assert record["outer_loss"] == pytest.approx(float(loss), rel=1e-12)
        assert record["hypergradient_norm"] == pytest.approx(norm, rel=1e-12)
        assert record["distance"] == pytest.approx(distance(source, hparams, step), rel=1e-6)
        assert record["hparams/curvature"] == pytest.approx(float(hparams["curvature"]), rel=1e-12)
        assert record["learning_rate"] == 0.1
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
        clipped.append(factor < 1.0)
        hparams = {name: value - 0.1 * factor * grads[name] for name, value in hparams.items()}
    assert any(clipped) is (clip_norm is not None)  # the premise


def test_metrics_are_taken_with_the_outer_variables_of_the_step() -> None:
    """A metric that reads them directly, as a penalty would."""

    @dataclass(frozen=True, kw_only=True)
    class Reading(Stepping):
        def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
            return {
                "seen": hparams["curvature"] + 0.0 * params["w"].sum(),
                "data": batch.sum() + 0.0 * params["w"].sum(),
            }

    problem = one_problem()
    memory = outer.MemoryLogger()
    make_loop(replace(problem, outer=Reading(**vars(problem.outer))), loggers=[memory]).run(3)
    for step, record in enumerate(memory.records):
        assert record["seen"] == pytest.approx(record["hparams/curvature"], rel=1e-6)
        assert record["data"] == pytest.approx(float(centres(step, 4, 3).sum(1).mean()), rel=1e-6)


@pytest.mark.parametrize("num_tasks", [None, 3])
def test_an_evaluation_looks_at_another_episode_every_time(num_tasks: int | None) -> None:
    """Of one problem, whose data depend on the step that the evaluation asks for."""
    source, count, first = Quadratics(num_tasks=num_tasks), 7, 5
    report = outer.evaluate(one_problem(num_tasks), source.init_hparams(), num_episodes=count, first_step=first)
    tasks = num_tasks or 1
    centre = torch.cat([centres(first + step, tasks, 3) for step in range(-(-count // tasks))])[:count]
    away = fitted(source, source.init_hparams()) - centre
    for name, values in {"distance": away.abs().amax(1), "outer_loss": away.square().sum(1) / 2}.items():
        estimate = report.metrics[name]
        assert estimate.mean == pytest.approx(float(values.mean()), rel=1e-12)
        assert estimate.half_width == pytest.approx(1.96 * float(values.std()) / math.sqrt(count), rel=1e-9)


def test_every_validation_is_of_its_own_outer_variables_and_of_the_same_episodes() -> None:
    source, memory, kept = Quadratics(), outer.MemoryLogger(), []

    class Keeping(outer.MemoryLogger):
        def log(self, step: int, scalars: Mapping[str, float]) -> None:
            if "outer_loss" in scalars:
                kept.append(scalars["hparams/curvature"])

    validation = outer.Validation(source=one_problem(), every=2, num_episodes=6, metric="distance", mode="min")
    trained = make_loop(source, validation=validation, loggers=[memory, Keeping()]).run(5)
    path = [source.init_hparams()]
    for step in range(5):
        grads = source.formula(path[-1], step)[1]
        path.append({name: value - 0.1 * grads[name] for name, value in path[-1].items()})
    records = [record for record in memory.records if "validation/distance" in record]
    assert [record["step"] for record in records] == [2, 4, 5]
    centre = torch.cat([centres(step, 4, 3) for step in range(2)])[:6]
    means = []
    for record in records:
        values = (fitted(source, path[int(record["step"])]) - centre).abs().amax(1)
        means.append(float(values.mean()))
        assert record["validation/distance"] == pytest.approx(means[-1], rel=1e-12)
        width = 1.96 * float(values.std()) / math.sqrt(6)
        assert record["validation/distance_half_width"] == pytest.approx(width, rel=1e-9)
    assert trained.best_step == records[means.index(min(means))]["step"]
    for name, value in path[int(trained.best_step)].items():
        torch.testing.assert_close(trained.best_hparams[name], value, rtol=1e-12, atol=1e-14)


def test_speed_and_seconds_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step takes 2 seconds, looking at a validation problem 50: the first count as speed, both as run time."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    @dataclass(frozen=True, kw_only=True)
    class Slow(Quadratics):
        takes: float

        def at(self, outer_step: int) -> ht.BilevelProblem:
            now[0] += self.takes
            return super().at(outer_step)

    memory = outer.MemoryLogger()
    validation = outer.Validation(source=Slow(takes=50.0), every=2, num_episodes=4, metric="distance")
    checkpoints = outer.Checkpoints(tmp_path, every=1)
    loop = make_loop(Slow(takes=2.0), loggers=[memory], validation=validation, checkpoints=checkpoints, log_every=2)
    trained = loop.run(4)
    assert memory.series("steps_per_second")[1] == [0.5, 0.5]
    prepared, looks = 2.0, 3  # a problem to settle the run by, and a validation before the first step
    assert trained.seconds == 4 * 2.0 + looks * 50.0 + prepared


# The best and the newest


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_is_neither_the_first_nor_the_last_and_is_what_is_saved(mode: str, tmp_path: Path) -> None:
    """Validated on the outer variable itself, which swings: `curvature` goes 2, 3, 1, 2.5 or the reverse."""
    way = {"min": [3.0, 1.0, 2.5], "max": [1.0, 3.0, 2.5]}[mode]

    class Swinging(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                self.param_groups[0]["params"][1].fill_(way.pop(0))

    @dataclass(frozen=True, kw_only=True)
    class Reading(Outer):
        def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
            return {"curvature": hparams["curvature"] + 0.0 * params["w"].sum()}

    problem = Quadratics().at(0)
    judge = replace(problem, outer=Reading(**vars(problem.outer)))
    validation = outer.Validation(source=judge, every=1, num_episodes=2, metric="curvature", mode=mode)  # type: ignore[arg-type]
    checkpoints = outer.Checkpoints(tmp_path, every=1, keep=2)
    loop = make_loop(optimizer=partial(Swinging, lr=0.1), validation=validation, checkpoints=checkpoints)
    trained = loop.run(3)
    best = {"min": 1.0, "max": 3.0}[mode]
    assert (trained.best_step, trained.best_value) == (2, best)
    assert float(trained.best_hparams["curvature"]) == best
    assert float(trained.hparams["curvature"]) == 2.5
    assert float(ht.load_hparams(tmp_path / HPARAMS_FILE)["curvature"]) == best
    newest = checkpoints.newest()
    assert newest is not None and newest.name == "step_00000003.safetensors"
    assert float(checkpoints.load(newest).hparams["curvature"]) == 2.5
    assert float(checkpoints.load(newest).best_hparams["curvature"]) == best


def test_the_newest_checkpoint_is_that_of_the_largest_step(tmp_path: Path) -> None:
    """Not of the last name in the alphabet, nor of the file that was written last."""
    for step in (100_000_000, 99_999_999, 5):
        (tmp_path / f"step_{step:08d}.safetensors").touch()
    checkpoints = outer.Checkpoints(tmp_path)
    assert [path.name for path in checkpoints.paths()] == [
        "step_00000005.safetensors",
        "step_99999999.safetensors",
        "step_100000000.safetensors",
    ]
    newest = checkpoints.newest()
    assert newest is not None and newest.name == "step_100000000.safetensors"
