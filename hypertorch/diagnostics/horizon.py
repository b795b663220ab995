"""The bias of truncated and of implicit hypergradients against the window and the number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import is_count
from hypertorch.diagnostics.accuracy import Accuracy
from hypertorch.diagnostics.geometric_fit import GeometricFit, fit_geometric
from hypertorch.diagnostics.text_table import aligned
from hypertorch.hypergradients import Hypergradient, Reverse, Truncated, hypergradient, measured_execution
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict

Series: TypeAlias = Literal["truncated", "implicit", "implicit to longest", "unrolled to longest"]
"""Which hypergradients are compared.

"truncated": that of a window with that of the whole run. "implicit": implicit differentiation after some steps with the
exact hypergradient of as many steps. "implicit to longest" and "unrolled to longest": implicit and exact hypergradients
after some steps with the exact one of the longest run, in place of that of the inner solution.
"""


@dataclass(frozen=True, kw_only=True)
class HorizonPoint:
    """One comparison.

    Attributes:
        length: the window, or the number of steps (unit: steps).
        accuracy: of what is compared.
    """

    length: int
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True)
class HorizonBias:
    """Errors against the window, or against the number of steps; prints as a table for each series.

    Attributes:
        series: the points of each comparison, by ascending length.
        fits: the geometric law that each follows; None where none can be fitted.
    """

    series: Mapping[Series, tuple[HorizonPoint, ...]]
    fits: Mapping[Series, GeometricFit | None]

    def __post_init__(self) -> None:
        object.__setattr__(self, "series", MappingProxyType(dict(self.series)))
        object.__setattr__(self, "fits", MappingProxyType(dict(self.fits)))

    def rows(self) -> list[dict[str, Any]]:
        """Returns a dict per point, for JSON or CSV."""
        return [
            {
                "series": name,
                "length": point.length,
                "error": point.accuracy.error,
                "cosine": point.accuracy.cosine,
                **{f"error.{hparam}": error for hparam, error in point.accuracy.errors.items()},
            }
            for name, points in self.series.items()
            for point in points
        ]

    def __str__(self) -> str:
        lines: list[str] = []
        for name, points in self.series.items():
            fit = self.fits[name]
            lines.append(f"{name}: {'no geometric rate was found' if fit is None else fit}")
            texts = [
                (str(point.length), f"{point.accuracy.error:.3e}", f"{point.accuracy.cosine:.6f}") for point in points
            ]
            lines.append(aligned(("steps", "error", "cosine"), texts))
        return "\n".join(lines)


@typed("implicit", "exact")
def horizon_bias(
    problem: BilevelProblem,
    hparams: TensorDict,
    *,
    windows: Sequence[int] = (),
    num_steps: Sequence[int] = (),
    implicit: Hypergradient | None = None,
    exact: Hypergradient = Reverse(checkpoint_every="sqrt"),  # noqa: B008 (frozen, without state)
    outer_step: int = 0,
    execution: Execution = DEFAULT,
) -> HorizonBias:
    """Returns the errors of truncated and of implicit hypergradients as windows and runs grow longer.

    On an inner map that contracts by `r` per step, a window of `K` of `T` steps leaves out terms of size `r^K ... r^T`,
    and after `T` steps implicit differentiation differs from the exact hypergradient, and either from that of the
    inner solution, by some `r^T` (times `T`). The rates are fitted by least squares to the logarithms of the errors;
    `fit_geometric` says which points are left out. Series that end at zero error, because they are compared with their
    own longest run, are fitted up to half of it.

    Cost: one exact hypergradient of the problem's own `num_steps` and one of a truncated run for each window; for each
    entry of `num_steps` one exact and one implicit hypergradient of that many steps.

    Args:
        problem: the problem; its own `num_steps` is the horizon that windows are taken of.
        hparams: the outer variables. A variable that a backend drops must be in the problem's `allow_unused`; its
            error is then the whole of its hypergradient.
        windows: windows of `Truncated` (unit: steps, at least 1).
        num_steps: lengths of runs (unit: steps, at least 1). The dynamics must not have a schedule over the horizon.
        implicit: `Implicit(...)` with the linear solver to use; None to look at unrolled runs only.
        exact: gives the exact hypergradient.
        outer_step: chooses the outer data and the noise.
        execution: how the problem is run, the same for all.

    Raises:
        ValueError: if there is nothing to do, or a length is below 1.
        IncompatibleBackendError: if a backend cannot serve the problem.

    References:
        Shaban, Cheng, Hatch and Boots (2019), Truncated back-propagation for bilevel optimization, proposition 3.1;
        Grazzi, Franceschi, Pontil and Salzo (2020), On the iteration complexity of hypergradient computation.
    """
    windows, num_steps = _ascending("windows", windows), _ascending("num_steps", num_steps)
    if not windows and not num_steps:
        raise ValueError(
            "`windows` and `num_steps` are both empty: there is nothing to compare. Pass windows to look back through, "
            "lengths of runs, or both."
        )
    # The noise that a model draws differs between tasks by `vmap` and by the loop.
    execution = measured_execution(problem, hparams, backend=exact, outer_step=outer_step, execution=execution)

    def grads(steps: int, backend: Hypergradient) -> TensorDict:
        # The same problem with another horizon: nothing else may differ between the points of a series.
        run = replace(problem, num_steps=steps)
        return hypergradient(run, hparams, backend=backend, outer_step=outer_step, execution=execution).grads

    series: dict[Series, tuple[HorizonPoint, ...]] = {}
    if windows:
        whole = grads(problem.num_steps, exact)
        truncated = [grads(problem.num_steps, Truncated(window=window)) for window in windows]
        series["truncated"] = _points(windows, truncated, [whole] * len(windows))
    if num_steps:
        unrolled = [grads(steps, exact) for steps in num_steps]
        longest = [unrolled[-1]] * len(num_steps)
        if implicit is not None:
            implied = [grads(steps, implicit) for steps in num_steps]
            series["implicit"] = _points(num_steps, implied, unrolled)
            series["implicit to longest"] = _points(num_steps, implied, longest)
        series["unrolled to longest"] = _points(num_steps, unrolled, longest)
    # Near the end of a run that they are compared with, errors fall faster than geometrically.
    ends = {"truncated": problem.num_steps / 2, "implicit": math.inf}
    return HorizonBias(
        series=series,
        fits={
            name: _fit(points, ends.get(name, num_steps[-1] / 2 if num_steps else 0)) for name, points in series.items()
        },
    )


def _points(
    lengths: Sequence[int], estimates: Sequence[TensorDict], references: Sequence[TensorDict]
) -> tuple[HorizonPoint, ...]:
    return tuple(
        HorizonPoint(length=length, accuracy=Accuracy.of(estimate, reference))
        for length, estimate, reference in zip(lengths, estimates, references, strict=True)
    )


def _fit(points: Sequence[HorizonPoint], end: float) -> GeometricFit | None:
    fitted = [point for point in points if point.length <= end]
    return fit_geometric([point.length for point in fitted], [point.accuracy.error for point in fitted])


def _ascending(argument: str, lengths: Sequence[int]) -> list[int]:
    if not isinstance(lengths, Sequence):
        raise TypeError(
            f"`{argument}` is {lengths!r}, a {type(lengths).__name__}: it lists numbers of steps. Pass a list of them."
        )
    for length in lengths:
        if not is_count(length):
            raise ValueError(
                f"`{argument}` holds {length!r}: with no step there is nothing to differentiate. Pass whole numbers of "
                "at least 1."
            )
    return sorted(set(lengths))
