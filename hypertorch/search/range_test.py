"""The learning-rate range test: one short run whose rate grows, and the rate at which the loss falls fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hypertorch.checks.values import check_count, is_count, is_number
from hypertorch.dynamics import Dynamics
from hypertorch.dynamics.declared import declared
from hypertorch.dynamics.settings import Setting
from hypertorch.errors import HypertorchError
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll

Scale: TypeAlias = Literal["log", "linear"]
"""What the slope is of: the logarithm of the loss, or the loss."""

# A fall is larger than that of noise alone: the lowest of many smoothed values, which are twice as uncertain at the
# ends of the curve as within.
_STANDARD_ERRORS = 8.0
_ROUNDING = 1e-6  # relative, of losses in single precision
_INFINITE = 1e100  # sums of such losses overflow


@dataclass(frozen=True, kw_only=True, eq=False)
class RangeFigures:
    """The curve of a range test.

    Attributes:
        rates: learning rate of each step, shape `(steps,)`, float64.
        losses: inner loss before each step, the mean over tasks, shape `(steps,)`; it may end in NaN or infinity.
        smoothed: the loss on the fitted lines, shape `(finite steps,)`: it ends where the losses are no longer finite.
        slopes: of the fitted lines, by the logarithm of the rate, shape `(finite steps,)`.
        scale: what the slopes are of.
        lowest: rate at which `smoothed` is least, before it has regained half of its fall. The first and last
            `half_window` values are left out: their lines have losses on one side alone.
        blow_up: rate at which, after that, `smoothed` is above its value at the start or the loss no longer finite;
            None if neither happens.
    """

    rates: Tensor
    losses: Tensor
    smoothed: Tensor
    slopes: Tensor
    scale: Scale
    lowest: float
    blow_up: float | None


class NoSuggestionError(HypertorchError):
    """A range test has no rate to suggest: its curve is flat, rises from the start, or is lowest at its end.

    Attributes:
        figures: the curve.
    """

    def __init__(self, message: str, figures: RangeFigures) -> None:
        super().__init__(message)
        self.figures = figures


def lr_range_test(
    problem: BilevelProblem,
    hparams: TensorDict | None = None,
    *,
    min_lr: float = 1e-5,
    max_lr: float = 1e2,
    num_steps: int = 100,
    half_window: int = 5,
    scale: Scale = "log",
    outer_step: int = 0,
    execution: Execution = DEFAULT,
) -> tuple[RangeFigures, float]:
    """Returns the curve of the inner loss over a growing learning rate, and the rate where it falls fastest.

    The inner problem is run once, with the rate `min_lr (max_lr / min_lr)^(t / (num_steps - 1))` at step `t` in place
    of the `lr` of the dynamics, whatever that is. At each step a line is fitted to the losses around it, over the
    logarithm of the rate, with weights that fall off linearly. The suggestion is the rate with the steepest line before
    the lowest loss. The lowest point itself is no suggestion: there the loss is about to grow. The curve ends where the
    loss has regained half of its fall: a rule such as Adam may come back from there, and what it then does counts for
    nothing, however large `max_lr` is.

    The slope is that of the logarithm of the loss. A fall from 0.4 to 0.2 then counts as much as one from 2 to 1, so
    the suggestion does not stay where the first, easy part of the loss goes. It needs losses above 0.

    It finds a rate for the problem's data, batch size, momentum and first weights. A run whose horizon is short, about
    as long as the test, may do better with a larger one.

    Cost: `num_steps` inner steps, forward alone.

    Args:
        problem: the problem. With tasks, the curve is the mean over them; a warm-started one starts from its first
            params.
        hparams: the outer variables; None for the problem's own first ones.
        min_lr: first rate, above 0; so small that nothing is learnt with it.
        max_lr: last rate; so large that the loss grows.
        num_steps: of the test, whatever the horizon of the problem (unit: steps).
        half_window: steps on each side of a step that its line is fitted to.
        scale: "log" for the slope of the logarithm of the loss, "linear" for that of the loss, which may then be
            negative.
        outer_step: chooses the data and the noise.
        execution: how the problem is run.

    Returns:
        The curve, and the rate.

    Raises:
        NoSuggestionError: if the curve is flat, rises from the start, is lowest at its end, or is steepest at its
            start; if the loss is not above 0 on the "log" scale; or if too few losses are finite.
        ValueError: if a number is out of range, or another setting of the dynamics is a schedule of another length.
        TypeError: if the dynamics has no one `lr`, or an argument is of another kind.

    References:
        Smith (2017), Cyclical learning rates for training neural networks, section 3.3.
    """
    _check_arguments(problem, min_lr, max_lr, num_steps, half_window, scale)
    rates = torch.logspace(math.log10(min_lr), math.log10(max_lr), num_steps, dtype=torch.float64)
    test = replace(problem, dynamics=with_lr(problem.dynamics, rates.tolist()), num_steps=num_steps, warm_start=False)
    hparams = problem.init_hparams() if hparams is None else hparams
    losses = unroll(test, hparams, outer_step=outer_step, execution=execution).inner_losses
    losses = losses.reshape(-1, num_steps).mean(dim=0).double().cpu()
    figures, lowest, noise = _fitted(rates, losses, half_window, scale)
    return figures, _suggestion(figures, lowest, noise, half_window)


def with_lr(dynamics: Dynamics, lr: Setting) -> Dynamics:
    """Returns the same dynamics with another learning rate: its own, or that of the rule that it wraps.

    Args:
        dynamics: such as `SGD(...)`, or `Clipped(SGD(...), ...)`.
        lr: a number, a schedule, or whatever else a setting may be.

    Raises:
        TypeError: if the dynamics has no `lr`, or a group of them for parts of the params.
        ValueError: if `lr` is out of range.
    """
    name = type(dynamics).__name__
    if "lr" in declared(type(dynamics)):
        if isinstance(dynamics.settings()["lr"], Mapping):
            raise TypeError(
                f"`lr` of `{name}` is a group with a rate for each part of the params: one rate for all would not be "
                "the same dynamics. Give it one rate, or set each part's."
            )
        return dataclasses.replace(dynamics, lr=lr)  # type: ignore[call-arg]
    rule = getattr(dynamics, "rule", None)
    if isinstance(rule, Dynamics):
        return dataclasses.replace(dynamics, rule=with_lr(rule, lr))  # type: ignore[call-arg]
    raise TypeError(
        f"`dynamics` is a `{name}`, which has no `lr` of its own. Use a rule with one, such as `SGD` or `Adam`."
    )


def _check_arguments(
    problem: object, min_lr: float, max_lr: float, num_steps: int, half_window: int, scale: str
) -> None:
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"`problem` is a `{type(problem).__name__}`, which has no inner loss to run a test on. Pass a "
            "`BilevelProblem`."
        )
    for name, rate in (("min_lr", min_lr), ("max_lr", max_lr)):
        if not is_number(rate):
            raise TypeError(
                f"`{name}` is {rate!r}, a `{type(rate).__name__}`: it is a learning rate, at an end of those tried. "
                "Pass a number above 0."
            )
    # Written so that NaN is refused.
    if not 0.0 < min_lr < max_lr < math.inf:
        raise ValueError(
            f"`min_lr` and `max_lr` are {min_lr} and {max_lr}: the rate grows geometrically from the one to the other. "
            "Pass two numbers above 0, the smaller first."
        )
    why = "a line is fitted to that many losses on each side"
    check_count("`half_window`", half_window, why, advice="; 5 is usual")
    if not is_count(num_steps) or num_steps < 8 * half_window:
        raise ValueError(
            f"`num_steps` is {num_steps!r}, but a curve is told from its noise by at least eight times `half_window` = "
            f"{half_window} steps. Pass {8 * half_window} or more."
        )
    if scale not in ("log", "linear"):
        raise ValueError(f"`scale` is {scale!r}, which names no slope. Use 'log' or 'linear'.")


def _fitted(rates: Tensor, losses: Tensor, half_window: int, scale: Scale) -> tuple[RangeFigures, int, float]:
    """Returns the curve, the step with the lowest point, and the standard error of smoothed values before it.

    The error is that away from the ends, in the slopes' scale.
    """
    finite = losses.abs() < _INFINITE
    if scale == "log":
        finite &= losses > 0
    count = len(losses) if bool(finite.all()) else int((~finite).nonzero()[0])
    empty = rates.new_empty(0)
    figures = RangeFigures(
        rates=rates,
        losses=losses,
        smoothed=empty,
        slopes=empty,
        scale=scale,
        lowest=math.nan,
        blow_up=None if count == len(losses) else float(rates[count]),
    )
    if count < len(losses) and -_INFINITE < losses[count] <= 0:
        raise NoSuggestionError(
            f"The inner loss is {float(losses[count]):g} at the rate {float(rates[count]):.3g}: it has no logarithm, "
            "whose slope is asked for. Pass scale='linear'.",
            figures,
        )
    if count <= 4 * half_window:
        raise NoSuggestionError(
            f"The inner loss is {float(losses[count])} at step {count}, at the rate {float(rates[count]):.3g}: too few "
            "losses come before it. Pass a smaller `min_lr`.",
            figures,
        )
    # Rates grow by a factor, so that steps are equal in their logarithm.
    places, values = rates[:count].log(), losses[:count]
    values = values.log() if scale == "log" else values
    heights, slopes = _lines(places, values, half_window)
    errors = _standard_errors(values - heights, half_window)
    lowest = _lowest(heights, errors, half_window)
    above = (heights[lowest:] > heights[half_window]).nonzero()
    turned = lowest + int(above[0]) if len(above) else count
    figures = replace(
        figures,
        smoothed=heights.exp() if scale == "log" else heights,
        slopes=slopes,
        lowest=float(rates[lowest]),
        blow_up=float(rates[turned]) if turned < len(losses) else None,
    )
    return figures, lowest, float(errors[lowest])


def _standard_errors(residuals: Tensor, half_window: int) -> Tensor:
    """Returns, for every place, the standard error of smoothed values, by the residuals up to it.

    Not by those after it: beyond the lowest point the losses scatter more and more.
    """
    weights = _weights(torch.arange(-half_window, half_window + 1), half_window)
    variances = residuals.square().cumsum(dim=0) / torch.arange(1, len(residuals) + 1)
    # The first ones are means over too few residuals.
    variances[: 2 * half_window] = variances[2 * half_window]
    return variances.sqrt() * weights.square().sum().sqrt() / weights.sum()


def _lowest(heights: Tensor, errors: Tensor, half_window: int) -> int:
    """Returns the place of the lowest height, before half of the fall to it is regained.

    The heights at both ends are extrapolated from one side: a scattered end would be taken for a low one.
    """
    inner = heights[half_window:-half_window]
    least, places = inner.cummin(dim=0)
    places = places + half_window
    fall = heights[half_window] - least
    resolution = (_STANDARD_ERRORS * errors[places]).clamp(min=_ROUNDING * float(heights[half_window].abs()))
    regained = ((fall > resolution) & (inner - least > fall / 2)).nonzero()
    return int(places[regained[0] if len(regained) else -1])


def _lines(places: Tensor, values: Tensor, half_window: int) -> tuple[Tensor, Tensor]:
    """Returns height and slope, at every place, of the line that is fitted to the values around it.

    Unlike a running mean, lines do not lag behind, nor bend at the ends.
    """
    steps = torch.arange(len(values))
    weights = _weights(steps - steps[:, None], half_window)
    weights = weights / weights.sum(dim=1, keepdim=True)
    # About the means, in which the fit loses no digits.
    across = places - (weights @ places)[:, None]
    up = values - (weights @ values)[:, None]
    slopes = (weights * across * up).sum(dim=1) / (weights * across.square()).sum(dim=1)
    return weights @ values + slopes * (places - weights @ places), slopes


def _weights(distances: Tensor, half_window: int) -> Tensor:
    return (1.0 - distances.abs().double() / (half_window + 1)).clamp(min=0.0)


def _suggestion(figures: RangeFigures, lowest: int, noise: float, half_window: int) -> float:
    """Returns the rate of the steepest line before the lowest point.

    Raises:
        NoSuggestionError: if the curve has none.
    """
    heights = figures.smoothed.log() if figures.scale == "log" else figures.smoothed
    first, least = float(figures.smoothed[half_window]), float(figures.smoothed[lowest])
    low, high = float(figures.rates[0]), float(figures.rates[-1])
    start = heights[half_window]
    resolution = max(_STANDARD_ERRORS * noise, _ROUNDING * float(start.abs()))
    if float(start - heights[lowest]) <= resolution:
        rises = float(heights.max() - start) > resolution or len(heights) < len(figures.rates)
        raise NoSuggestionError(
            f"The inner loss is {first:.4g} at the rate {low:.3g} and falls to no less than {least:.4g}, within its "
            f"noise: the curve {'rises from the start' if rises else 'is flat'}. "
            + (
                "Pass a smaller `min_lr`."
                if rises
                else "Pass a larger `max_lr`, or look whether the net learns at all."
            ),
            figures,
        )
    if figures.blow_up is None and lowest >= len(heights) - 1 - half_window:
        raise NoSuggestionError(
            f"The inner loss is lowest at the largest rates, up to {high:.3g}, where it is {least:.4g}: where it "
            "grows is not known. Pass a larger `max_lr`.",
            figures,
        )
    steepest = int(figures.slopes[: lowest + 1].argmin())
    if steepest <= half_window:
        raise NoSuggestionError(
            f"The inner loss falls fastest at the smallest rates, from {low:.3g}: where the fall begins is not known. "
            "Pass a smaller `min_lr`.",
            figures,
        )
    return float(figures.rates[steepest])
