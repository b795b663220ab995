"""Checks of a hypergradient against numbers that do not come from automatic differentiation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from hypertorch import tree
from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import check_count, check_hparams, check_seed
from hypertorch.hypergradients import Hypergradient, hypergradient, measured_execution
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll


@dataclass(frozen=True, kw_only=True)
class DirectionalCheck:
    """One directional derivative, computed twice.

    Attributes:
        name: the hyperparameter that was moved.
        expected: by central differences of the outer loss.
        actual: by the backend.
        error: their difference, relative to the larger of the two and of a thousandth of the outer loss.
        spread: how far central differences of two step sizes are apart, relative to the same; 0 if the first ones
            agreed with the backend. Above the tolerance they do not tell who is right.
    """

    name: str
    expected: float
    actual: float
    error: float
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class HypergradientCheck:
    """The verdict on a backend for one problem; printing it shows a line per hyperparameter.

    Attributes:
        checks: every directional derivative that was compared.
        tolerance: largest relative error that passes.
    """

    checks: tuple[DirectionalCheck, ...]
    tolerance: float

    @property
    def max_error(self) -> float:
        """The largest relative error."""
        return max(check.error for check in self.checks)

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance."""
        return self.max_error <= self.tolerance

    def __bool__(self) -> bool:
        """Whether it passed, for `assert ht.check_hypergradient(...)`."""
        return self.passed

    def __str__(self) -> str:
        lines = [
            f"{'ok ' if check.error <= self.tolerance else 'BAD'} {check.name}: backend {check.actual:.10g}, "
            f"central differences {check.expected:.10g}, relative error {check.error:.2g}"
            + (f" (differences agree to {check.spread:.2g})" if check.error > self.tolerance else "")
            for check in self.checks
        ]
        verdict = "passed" if self.passed else "FAILED"
        lines.append(f"{verdict}: largest relative error {self.max_error:.2g}, tolerance {self.tolerance:.2g}")
        return "\n".join(lines)


@typed("step_size", "tolerance")
def check_hypergradient(
    problem: BilevelProblem,
    hparams: TensorDict,
    backend: Hypergradient,
    *,
    num_directions: int = 2,
    step_size: float = 1e-3,
    tolerance: float = 1e-6,
    outer_step: int = 0,
    seed: int = 0,
    execution: Execution = DEFAULT,
) -> HypergradientCheck:
    """Returns a comparison of a backend's hypergradient with central differences along random directions.

    Every hyperparameter is moved on its own, along random directions `d` of unit norm, by the fourth-order rule

        f'(0) = (8 (f(e) - f(-e)) - (f(2e) - f(-2e))) / 12e + O(e^4),   f(x) = f(hparams + x d).

    Its error is `e^4` times the fifth derivative, plus rounding of `f` over `e`, so the check is sharp in float64 only.
    Where the backend disagrees, that derivative may be large (the first steps of Adam): then a tenth, a hundredth and a
    thousandth of `e` are tried too, and the two that agree best say what is right. A backend that is approximate by
    design fails by its bias.

    Cost: one hypergradient, and `4 num_directions` unrolls per hyperparameter; four times as many where they disagree.

    Args:
        problem: the problem.
        hparams: the outer variables, in float64.
        backend: the backend to check.
        num_directions: directions per hyperparameter, at least 1.
        step_size: `e`, the largest, above 0.
        tolerance: largest relative error that passes, at least 0.
        outer_step: chooses the outer data and the noise, the same for every evaluation.
        seed: of the directions.
        execution: how the problem is run, the same for every evaluation.

    Raises:
        TypeError: if a hyperparameter is not float64.
        ValueError: if a number is out of range.
    """
    check_hparams(hparams)
    check_seed(seed)
    _check_dtype(hparams)
    _check_numbers(num_directions, step_size, tolerance)
    # The noise that a model draws differs between tasks by `vmap` and by the loop.
    execution = measured_execution(problem, hparams, backend=backend, outer_step=outer_step, execution=execution)
    result = hypergradient(problem, hparams, backend=backend, outer_step=outer_step, execution=execution)

    def outer_loss(moved: TensorDict) -> float:
        # The mean over tasks, which is what a hypergradient is the derivative of.
        return float(unroll(problem, moved, outer_step=outer_step, execution=execution).outer_loss.mean())

    # On the host and of its own: the directions are the same on every device, and torch's generator is not moved.
    generator = torch.Generator().manual_seed(seed)
    scale = float(result.outer_loss.abs())
    checks: list[DirectionalCheck] = []
    for name, value in hparams.items():
        for _ in range(num_directions):
            direction = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
            # Of unit norm, so that the step is `e` however many entries the variable has.
            direction = direction / direction.norm()
            actual = float((result.grads[name] * direction).sum())
            difference = partial(_central_difference, outer_loss, hparams, name, direction)
            checks.append(_compared(name, actual, difference, step_size, smallest=1e-3 * scale, tolerance=tolerance))
    return HypergradientCheck(checks=tuple(checks), tolerance=tolerance)


def _compared(
    name: str,
    actual: float,
    difference: Callable[[float], float],
    step_size: float,
    *,
    smallest: float,
    tolerance: float,
) -> DirectionalCheck:
    """Returns the comparison of a derivative with central differences.

    Args:
        name: of the hyperparameter.
        actual: by the backend.
        difference: by the step size.
        step_size: the largest.
        smallest: derivative that an error is relative to. To one of zero any error is infinite, and differences of a
            loss are no finer than its own rounding.
        tolerance: largest relative error that passes.
    """

    def judged(expected: float, spread: float) -> DirectionalCheck:
        size = max(abs(expected), abs(actual), smallest, 1e-12)
        error = abs(actual - expected) / size
        return DirectionalCheck(name=name, expected=expected, actual=actual, error=error, spread=spread / size)

    first = difference(step_size)
    check = judged(first, 0.0)
    if check.error <= tolerance:
        return check
    differences = [first, *(difference(step_size / shorter) for shorter in (10, 100, 1000))]
    # A longer step is off by the curvature of the loss, a shorter one by its rounding. The backend has no say in it.
    apart = [abs(later - former) for former, later in itertools.pairwise(differences)]
    best = min(range(len(apart)), key=apart.__getitem__)
    return judged(differences[best + 1], apart[best])


def _central_difference(
    outer_loss: Callable[[TensorDict], float],
    hparams: TensorDict,
    name: str,
    direction: torch.Tensor,
    step_size: float,
) -> float:
    def at(distance: float) -> float:
        return outer_loss({**tree.detach(hparams), name: hparams[name].detach() + distance * direction})

    # Fourth order: with the default step a plain central difference has an error of 1e-6, as large as the tolerance.
    near = at(step_size) - at(-step_size)
    far = at(2 * step_size) - at(-2 * step_size)
    # Rounding of the loss is divided by the step: a much smaller one makes the check worse, not better.
    return (8 * near - far) / (12 * step_size)


def _check_numbers(num_directions: int, step_size: float, tolerance: float) -> None:
    why = "without a direction nothing is compared, and everything would pass"
    check_count("`num_directions`", num_directions, why)
    if not 0.0 < step_size < math.inf:
        raise ValueError(
            f"`step_size` is {step_size!r}: a difference needs two places. Pass a number above 0; 1e-3 is usual."
        )
    if not 0.0 <= tolerance < math.inf:
        raise ValueError(
            f"`tolerance` is {tolerance!r}: it is compared with a relative error, which is never below 0. Pass a "
            "number of at least 0; 1e-6 is usual."
        )


def _check_dtype(hparams: TensorDict) -> None:
    for name, value in hparams.items():
        if value.dtype != torch.float64:
            raise TypeError(
                f"`hparams[{name!r}]` has dtype {value.dtype}, in which central differences are too coarse to judge a "
                "hypergradient. Convert problem and hparams to `torch.float64`."
            )
