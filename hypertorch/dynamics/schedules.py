"""Schedules that people use, as one value per inner step: cyclical, one-cycle and cosine.

Each returns a list that any setting of a dynamics takes, a learning rate as well as a momentum:

    SGD(lr=schedules.one_cycle(100, peak=0.5), momentum=schedules.one_cycle(100, start=0.95, peak=0.85, end=0.95))

The same list, as a tensor, is where a learnt schedule (`Hyper(name, per="step")`) may start.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from hypertorch.checks.values import check_switch, is_count, is_number

__all__ = ["cosine", "cyclical", "one_cycle"]

Policy: TypeAlias = Literal["triangular", "triangular2", "exp_range"]
"""What a cycle's height becomes: the same, half of the one before, or a factor per step."""

Anneal: TypeAlias = Literal["cosine", "linear"]
"""How a value goes from one end of a phase to the other."""

# What `torch.optim.lr_scheduler.OneCycleLR` divides the peak by for the first value, and that for the last.
_START_DIVISOR, _END_DIVISOR = 25.0, 1e4
_LARGEST = 1e300  # differences of larger values overflow


def cyclical(
    num_steps: int,
    *,
    start: float,
    peak: float,
    steps_up: int,
    steps_down: int | None = None,
    policy: Policy = "triangular",
    gamma: float = 1.0,
) -> list[float]:
    """Returns values that rise from `start` to `peak` and fall back, again and again.

    With `h` from 0 to 1 and back, linearly, within cycle `c = 1, 2, ...`:

        value_t = start + (peak - start) h_t k      k = 1,  1 / 2^(c - 1)  or  gamma^t,   by the policy

    It is `torch.optim.lr_scheduler.CyclicLR` with `base_lr=start`, `max_lr=peak`. Its momentum runs against the rate:
    that is `start=max_momentum, peak=base_momentum`.

    Args:
        num_steps: the horizon (unit: steps).
        start: value of the first step.
        peak: the value at the top of the first cycle; it may lie below `start`.
        steps_up: from `start` to `peak` (unit: steps).
        steps_down: back (unit: steps); None for as many.
        policy: "triangular" repeats the cycle, "triangular2" halves its height each time, "exp_range" shrinks the
            height by `gamma` each step.
        gamma: factor per step of "exp_range", above 0 and at most 1; the other policies have none.

    Returns:
        `num_steps` values.

    Raises:
        TypeError: if an argument that must be a number is not one.
        ValueError: if a number is out of range, or `gamma` is given to a policy without one.

    References:
        Smith (2017), Cyclical learning rates for training neural networks.
    """
    steps_down = steps_up if steps_down is None else steps_down
    for name, value in (("num_steps", num_steps), ("steps_up", steps_up), ("steps_down", steps_down)):
        _check_steps("cyclical", name, value)
    start, peak = _finite("cyclical", "start", start), _finite("cyclical", "peak", peak)
    _check_choice("cyclical", "policy", policy, get_args(Policy))
    _check_number("cyclical", "gamma", gamma)
    if not 0.0 < gamma <= 1.0:
        raise ValueError(
            f"`gamma` of `cyclical` is {gamma}: the height of the cycle is multiplied by it at every step, so it lies "
            "above 0 and at most at 1. Use a number such as 0.999."
        )
    if gamma != 1.0 and policy != "exp_range":
        raise ValueError(
            f"`gamma` of `cyclical` is {gamma}, but the policy {policy!r} has no factor per step: it would do nothing. "
            "Leave it out, or use policy='exp_range'."
        )
    period = steps_up + steps_down
    values = []
    for step in range(num_steps):
        cycle, place = divmod(step, period)
        height = place / steps_up if place <= steps_up else (period - place) / steps_down
        factor = {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": gamma**step}[policy]
        values.append(start + (peak - start) * height * factor)
    return values


def one_cycle(
    num_steps: int,
    *,
    peak: float,
    start: float | None = None,
    end: float | None = None,
    share_up: float = 0.3,
    anneal: Anneal = "cosine",
    three_phase: bool = False,
) -> list[float]:
    """Returns values that go from `start` to `peak` and on to `end`, once over the whole horizon.

    It is `torch.optim.lr_scheduler.OneCycleLR` with `max_lr=peak`, `div_factor=peak / start`,
    `final_div_factor=start / end`, `pct_start=share_up`. Its momentum runs against the rate: that is
    `start=max_momentum, peak=base_momentum, end=max_momentum`.

    Args:
        num_steps: the horizon (unit: steps).
        peak: the value in between; it may lie below `start`.
        start: value of the first step; None for `peak / 25`.
        end: value of the last step; None for `start / 10000`.
        share_up: share of the steps from `start` to `peak`, above 0 and below 1.
        anneal: "cosine" for half a cosine in each phase, "linear" for a straight line.
        three_phase: go back from `peak` to `start` in as many steps as up, and only then to `end`.

    Returns:
        `num_steps` values.

    Raises:
        TypeError: if an argument that must be a number is not one, or `three_phase` is neither True nor False.
        ValueError: if a number is out of range, or the horizon is too short for the phases.

    References:
        Smith and Topin (2018), Super-convergence: very fast training of neural networks using large learning rates.
    """
    _check_steps("one_cycle", "num_steps", num_steps)
    _check_choice("one_cycle", "anneal", anneal, get_args(Anneal))
    check_switch("three_phase", three_phase)
    _check_number("one_cycle", "share_up", share_up)
    peak = _finite("one_cycle", "peak", peak)
    start = peak / _START_DIVISOR if start is None else _finite("one_cycle", "start", start)
    end = start / _END_DIVISOR if end is None else _finite("one_cycle", "end", end)
    ends = [share_up * num_steps - 1.0, 2.0 * share_up * num_steps - 2.0, num_steps - 1.0]
    targets = [start, peak, start, end]
    if not three_phase:
        del ends[1], targets[2]
    # Written so that NaN is refused. A phase of no length has no value.
    if not all(first < last for first, last in zip([0.0, *ends], ends, strict=False)):
        raise ValueError(
            f"`share_up` of `one_cycle` is {share_up} of `num_steps` = {num_steps}: its phases would end at the steps "
            f"{[round(last, 6) for last in ends]}, counted from 0, which do not follow each other. Use a share "
            f"between {1.0 / num_steps:.3g} and {0.5 if three_phase else 1.0:g}, or more steps."
        )
    values = []
    for step in range(num_steps):
        phase = next(index for index, last in enumerate(ends) if step <= last)
        first = ends[phase - 1] if phase else 0.0
        share = (step - first) / (ends[phase] - first)
        moved = share if anneal == "linear" else (1.0 - math.cos(math.pi * share)) / 2.0
        values.append(targets[phase] + (targets[phase + 1] - targets[phase]) * moved)
    return values


def cosine(num_steps: int, *, start: float, end: float = 0.0, half_period: int | None = None) -> list[float]:
    """Returns values along half a cosine from `start` to `end`, and up again if the horizon is longer.

        value_t = end + (start - end) (1 + cos(pi t / half_period)) / 2

    It is `torch.optim.lr_scheduler.CosineAnnealingLR` with the rate `start`, `eta_min=end`, `T_max=half_period`. The
    first step has `start`; `end` belongs to step `half_period`, which is the one after the last if that is the horizon.

    Args:
        num_steps: the horizon (unit: steps).
        start: value of the first step.
        end: value after `half_period` steps.
        half_period: steps from one to the other; None for the horizon.

    Returns:
        `num_steps` values.

    Raises:
        TypeError: if an argument that must be a number is not one.
        ValueError: if a number is out of range.

    References:
        Loshchilov and Hutter (2017), SGDR: stochastic gradient descent with warm restarts, equation 5 (one period).
    """
    half_period = num_steps if half_period is None else half_period
    for name, value in (("num_steps", num_steps), ("half_period", half_period)):
        _check_steps("cosine", name, value)
    start, end = _finite("cosine", "start", start), _finite("cosine", "end", end)
    return [end + (start - end) * (1.0 + math.cos(math.pi * step / half_period)) / 2.0 for step in range(num_steps)]


def _check_steps(function: str, argument: str, value: object) -> None:
    if not is_count(value):
        raise ValueError(
            f"`{argument}` of `{function}` is {value!r}: a schedule counts whole steps, at least 1. Pass such a number."
        )


def _check_number(function: str, argument: str, value: object) -> None:
    if not is_number(value):
        raise TypeError(
            f"`{argument}` of `{function}` is {value!r}, a `{type(value).__name__}`: a schedule is computed from plain "
            "numbers. Pass such a number; `.item()` of a tensor is one."
        )


def _finite(function: str, argument: str, value: float) -> float:
    # Python's integers can be longer than any float, and are numbers all the same.
    too_long = isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LARGEST
    if not too_long:
        _check_number(function, argument, value)
    # Written so that NaN is refused.
    if too_long or not abs(float(value)) < _LARGEST:
        raise ValueError(
            f"`{argument}` of `{function}` is {value}: the values next to it would be no numbers. Pass a finite one, "
            f"below {_LARGEST:g}."
        )
    return float(value)


def _check_choice(function: str, argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"`{argument}` of `{function}` is {value!r}, which it does not know. Use one of: {', '.join(allowed)}."
        )
