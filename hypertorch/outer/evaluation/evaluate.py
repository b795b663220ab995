"""Evaluation of outer variables on fresh episodes."""

from __future__ import annotations

import time
from typing import TypeAlias

import torch
from torch import Tensor

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import check_metrics, is_count
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.ranks import arguments, check_same_arguments
from hypertorch.outer.evaluation.report import Estimate, Report
from hypertorch.outer.reporting.progress import progress_display
from hypertorch.outer.reporting.scalars import to_floats
from hypertorch.problem import BilevelProblem, ProblemSource
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll

Figures: TypeAlias = dict[str, list[Tensor]]
"""By name, those of some problems: of each problem a tensor of shape `(tasks,)`."""

OUTER_LOSS = "outer_loss"
"""Name under which the outer loss is logged and reported."""


@typed("source", "progress", "execution")
def evaluate(
    source: ProblemSource,
    hparams: TensorDict,
    *,
    num_episodes: int = 600,
    first_step: int = 0,
    progress: bool = False,
    execution: Execution = DEFAULT,
) -> Report:
    """Returns the means of the problem's metrics and of its outer loss over episodes, with 95 % intervals.

    An episode is one task of a problem with tasks, or one run of a problem without. Episodes come from the successive
    problems `source.at(first_step)`, `source.at(first_step + 1)`, ...; surplus tasks of the last one are left out. The
    interval assumes independent episodes: see `Estimate`.

    Cost: as many plain inner runs as there are episodes; no hypergradient, no graph, one copy from the accelerator.
    With `ranks` in the execution the processes share the problems, and each gets the same report as one alone would:
    all of them must have as many tasks as the first.

    Args:
        source: where the episodes come from, usually of classes not seen in training.
        hparams: the outer variables.
        num_episodes: how many, at least 1.
        first_step: the first step asked of `source`.
        progress: show a progress bar.
        execution: how the problems are run.

    Raises:
        ValueError: if `num_episodes` is below 1 or `first_step` below 0, a metric is not one figure per episode or is
            called `outer_loss`, or processes share problems of different numbers of tasks.
    """
    if not is_count(num_episodes):
        raise ValueError(
            f"`num_episodes` is {num_episodes!r}: there is no mean over no episodes. Pass a whole number of at least "
            "1, and 600 or more for a narrow interval."
        )
    if not is_count(first_step, least=0):
        raise ValueError(
            f"`first_step` is {first_step!r}: steps of a source count from 0. Pass a whole number of at least 0."
        )
    start = time.perf_counter()
    ranks = execution.ranks
    # The number of tasks is asked for only where processes must know which problems are whose.
    num_tasks = None if ranks is None else source.at(first_step).num_tasks or 1

    def figures_of(problems: range, num_episodes: int) -> Figures:
        figures: Figures = {}
        count = 0
        with progress_display(enabled=progress, title="episodes", total=num_episodes, metric=None) as display:
            for step in problems:
                if count == num_episodes:
                    break
                problem = source.at(first_step + step)
                if num_tasks is not None and num_tasks != (problem.num_tasks or 1):
                    raise ValueError(
                        f"`source.at({first_step + step})` has {problem.num_tasks or 1} tasks, and "
                        f"`source.at({first_step})` has {num_tasks}: several processes do not know which episodes are "
                        "whose. Return problems of the same number of tasks, or evaluate on one process."
                    )
                # All tasks of the last problem run; only as many count as are still missing.
                taken = min(problem.num_tasks or 1, num_episodes - count)
                for name, values in _figures_of(problem, hparams, first_step + step, execution).items():
                    # Left on the device: a copy of each figure to the host would wait for it at every problem.
                    figures.setdefault(name, []).append(values[:taken])
                count += taken
                display.advance(count)
        return figures

    if ranks is None or num_tasks is None:
        figures = figures_of(range(num_episodes), num_episodes)
    else:
        own = ranks.share(-(-num_episodes // num_tasks))
        own_episodes = min(own.stop * num_tasks, num_episodes) - min(own.start * num_tasks, num_episodes)
        found = ranks.objects(lambda: (arguments(hparams, num_episodes), figures_of(own, own_episodes)))
        check_same_arguments([asked for asked, _ in found], list(hparams))
        figures = _joined([part for _, part in found])
    return Report(metrics=_estimates(figures, num_episodes), seconds=time.perf_counter() - start)


def _joined(parts: list[Figures]) -> Figures:
    """Returns the figures of all processes, in the order of the episodes."""
    return {name: [value for part in parts for value in part.get(name, [])] for part in parts for name in part}


def _figures_of(problem: BilevelProblem, hparams: TensorDict, step: int, execution: Execution) -> dict[str, Tensor]:
    """Returns every figure of one inner run, each of shape `(tasks,)`."""
    result = unroll(problem, hparams, outer_step=step, execution=execution)
    if OUTER_LOSS in result.metrics:
        raise ValueError(
            f"`OuterProblem.metrics` returned `{OUTER_LOSS}`, the name that the outer loss itself is reported under: "
            "one of them would be lost. Rename the metric."
        )
    shape = () if problem.num_tasks is None else (problem.num_tasks,)
    check_metrics(result.metrics, shape)
    return {
        name: value.detach().reshape(-1) for name, value in (*result.metrics.items(), (OUTER_LOSS, result.outer_loss))
    }


def _estimates(figures: dict[str, list[Tensor]], count: int) -> dict[str, Estimate]:
    moments: dict[str, Tensor] = {}
    for name, parts in figures.items():
        values = torch.cat(parts)
        if len(values) != count:
            raise ValueError(
                f"`OuterProblem.metrics` returned `{name}` for {len(values)} of {count} episodes only: its mean would "
                "be over others than the rest. Return the same metrics from every problem."
            )
        # Sums over thousands of episodes lose digits in single precision; Apple's GPUs have no other.
        values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
        moments[f"mean {name}"] = values.mean()
        moments[f"variance {name}"] = values.var(correction=1) if count > 1 else values.new_tensor(0.0)
    numbers = to_floats(moments)
    return {
        name: Estimate.from_sums(mean=numbers[f"mean {name}"], variance=numbers[f"variance {name}"], count=count)
        for name in figures
    }
