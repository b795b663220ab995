"""Comparison of backends on one problem: error, time and memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

import torch

from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import check_count
from hypertorch.diagnostics.accuracy import Accuracy
from hypertorch.diagnostics.text_table import aligned, in_bytes, in_seconds
from hypertorch.errors import HypertorchError
from hypertorch.hypergradients import (
    Hypergradient,
    HypergradientResult,
    Reverse,
    hypergradient,
    measured_execution,
)
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.record import Cost
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class BackendFigures:
    """Accuracy, time, memory and cost of one backend on the problem.

    Attributes:
        accuracy: against the exact hypergradient.
        seconds: wall time of each repeat (unit: seconds).
        peak_bytes: most bytes that tensors made by the backend held at once.
        cost: steps, vjps, jvps and stored states, counted.
        own: what the backend reports of its own accuracy, the mean over tasks.
        warnings: texts of its warnings.
    """

    accuracy: Accuracy
    seconds: tuple[float, ...]
    peak_bytes: int
    cost: Cost
    own: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def min_seconds(self) -> float:
        """The fastest repeat, which other work on the machine delayed least."""
        return min(self.seconds)

    @property
    def median_seconds(self) -> float:
        """The middle repeat."""
        return median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Returns every figure by a name of its own, for a table with a row per backend."""
        return {
            "error": self.accuracy.error,
            "cosine": self.accuracy.cosine,
            "min_seconds": self.min_seconds,
            "median_seconds": self.median_seconds,
            "peak_bytes": self.peak_bytes,
            **asdict(self.cost),
            **{f"error.{name}": error for name, error in self.accuracy.errors.items()},
            **{f"own.{name}": value for name, value in self.own.items()},
        }


@dataclass(frozen=True, kw_only=True)
class BackendComparison:
    """Backends side by side; prints as a table with a line per backend, most exact first.

    Attributes:
        figures: of the backends that served the problem, by name.
        refusals: why the others did not, by name.
        exact: the backend that gave the exact hypergradient.
    """

    figures: Mapping[str, BackendFigures]
    refusals: Mapping[str, str]
    exact: Hypergradient

    def __post_init__(self) -> None:
        # Read-only: a frozen dataclass does not freeze its dictionaries.
        object.__setattr__(self, "figures", MappingProxyType(dict(self.figures)))
        object.__setattr__(self, "refusals", MappingProxyType(dict(self.refusals)))

    def rows(self) -> list[dict[str, Any]]:
        """Returns a dict per backend, for JSON or CSV: its name, why it refused (or None), and the figures it has."""
        return [
            *({"backend": name, "refusal": None, **figures.as_dict()} for name, figures in self.figures.items()),
            *({"backend": name, "refusal": reason} for name, reason in self.refusals.items()),
        ]

    def __str__(self) -> str:
        columns = ("backend", "error", "cosine", "time", "median", "memory")
        counts = ("steps", "vjps", "jvps", "stored states", "graph steps")
        by_error = sorted(self.figures.items(), key=lambda item: item[1].accuracy.error)
        table = aligned((*columns, *counts), [(name, *_texts(figures)) for name, figures in by_error])
        lines = [table, f"errors against {self.exact!r}; time of the fastest of {self._repeats()}, and the median"]
        lines += [f"{name} refused: {_first_sentence(reason)}" for name, reason in self.refusals.items()]
        lines += [f"{name} warned: {_first_sentence(text)}" for name, shown in by_error for text in shown.warnings]
        return "\n".join(lines)

    def _repeats(self) -> int:
        return max((len(figures.seconds) for figures in self.figures.values()), default=0)


@typed("exact")
def compare_backends(
    problem: BilevelProblem,
    hparams: TensorDict,
    backends: Mapping[str, Hypergradient],
    *,
    exact: Hypergradient = Reverse(),  # noqa: B008 (frozen, without state)
    outer_step: int = 0,
    repeats: int = 3,
    execution: Execution = DEFAULT,
) -> BackendComparison:
    """Returns error, time, memory and counted cost of several backends for one hypergradient.

    Each backend runs once for its hypergradient, which warms it up; once more while live tensor bytes are counted; and
    then `repeats` times while time is taken. The backends take turns, so that other work on the machine delays all of
    them. All run the tasks in the same way, because the noise that a model draws differs between `vmap` and the loop. A
    backend that draws noise of its own is compared at the draw of this outer step: its bias shows in the mean over
    several.

    Memory is counted from before the backend starts: it holds neither `hparams` nor data of the problem.
    `hypertorch.autodiff.live_memory` describes what else it leaves out.

    Cost: one hypergradient by `exact`, and `2 + repeats` by each backend.

    Args:
        problem: the problem.
        hparams: the outer variables.
        backends: by the names they are to have.
        exact: gives the hypergradient that the others are judged by.
        outer_step: chooses the outer data and the noise, the same for all.
        repeats: timed runs of each backend.
        execution: how the problem is run, the same for all.

    Raises:
        ValueError: if there is no backend, or `repeats` is below 1.
        HypertorchError: if the exact backend cannot serve the problem. What others raise is their row's refusal.
    """
    _check_arguments(backends, repeats)
    # Measured once, with the exact backend: each backend by itself could choose another route, with other noise.
    execution = measured_execution(problem, hparams, backend=exact, outer_step=outer_step, execution=execution)

    def run(backend: Hypergradient) -> HypergradientResult:
        return hypergradient(problem, hparams, backend=backend, outer_step=outer_step, execution=execution)

    reference = run(exact).grads
    results: dict[str, HypergradientResult] = {}
    said: dict[str, tuple[str, ...]] = {}
    refusals: dict[str, str] = {}
    for name, backend in backends.items():
        with warnings.catch_warnings(record=True) as caught:
            # By default Python shows a warning from one place once, and the second backend's would be missing.
            warnings.simplefilter("always")
            try:
                results[name] = run(backend)
            # A refusal is a result here; any other error is a fault, and ends the comparison.
            except HypertorchError as error:
                refusals[name] = str(error)
        said[name] = tuple(dict.fromkeys(str(warning.message) for warning in caught))
    served = {name: backends[name] for name in results}
    with warnings.catch_warnings():
        # The first run of each backend has recorded them.
        warnings.simplefilter("ignore")
        peaks = {name: _peak_bytes(run, backend) for name, backend in served.items()}
        seconds = _seconds(run, served, repeats)
    return BackendComparison(
        figures={
            name: BackendFigures(
                accuracy=Accuracy.of(result.grads, reference),
                seconds=seconds[name],
                peak_bytes=peaks[name],
                cost=result.stats,
                own={key: float(value.double().mean()) for key, value in result.figures.items()},
                warnings=said[name],
            )
            for name, result in results.items()
        },
        refusals=refusals,
        exact=exact,
    )


def _peak_bytes(run: Callable[[Hypergradient], HypergradientResult], backend: Hypergradient) -> int:
    """Returns the most bytes that tensors of a run hold at once. Counting is slow: this run is not timed."""
    with PeakMemory() as memory:
        run(backend)
    return memory.peak


def _seconds(
    run: Callable[[Hypergradient], HypergradientResult], backends: Mapping[str, Hypergradient], repeats: int
) -> dict[str, tuple[float, ...]]:
    """Returns the wall times of the repeats of each backend, all backends taking turns."""
    times: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(repeats):
        for name, backend in backends.items():
            _synchronize()
            start = time.perf_counter()
            run(backend)
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: tuple(values) for name, values in times.items()}


def _synchronize() -> None:
    """Waits for what a GPU has been given to do."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _texts(figures: BackendFigures) -> list[str]:
    cost = figures.cost
    return [
        f"{figures.accuracy.error:.2e}",
        f"{figures.accuracy.cosine:.4f}",
        in_seconds(figures.min_seconds),
        in_seconds(figures.median_seconds),
        in_bytes(figures.peak_bytes),
        *(str(count) for count in (cost.steps, cost.vjps, cost.jvps, cost.stored_states, cost.graph_steps)),
    ]


def _first_sentence(message: str) -> str:
    """Returns the fault that a message names, without the advice."""
    return message.partition(". ")[0]


def _check_arguments(backends: Mapping[str, Hypergradient], repeats: int) -> None:
    if not isinstance(backends, Mapping):
        raise TypeError(
            f"`backends` is a {type(backends).__name__}: the rows of the table need names. Pass a dictionary from "
            "names to backends, for example {'sqrt': ht.hypergradients.Reverse(checkpoint_every='sqrt')}."
        )
    if not backends:
        raise ValueError(
            "`backends` is empty: there is nothing to compare. Pass a dictionary from names to backends, for example "
            "{'sqrt': ht.hypergradients.Reverse(checkpoint_every='sqrt')}."
        )
    why = "the fastest of several timed runs is reported"
    check_count("`repeats`", repeats, why, advice="; 3 or more on a busy machine")
