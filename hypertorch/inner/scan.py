"""The forward run over inner steps: the one loop that all runs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

S = TypeVar("S")


def scan(advance: Callable[[S, int], S], state: S, steps: range, visit: Callable[[S, int], object] | None = None) -> S:
    """Returns the state after some steps, `s_t = advance(s_{t-1}, t)`.

    The caller chooses the kind of state: an inner state, one with tangents, one in integers, or one with a sum.

    Cost: what `advance` and `visit` cost for each step; nothing is kept.

    Args:
        advance: from the state before a step, and the step, to the state after it.
        state: the state before the first step.
        steps: the steps, in order.
        visit: called with the state before each step, and the step.
    """
    for step in steps:
        if visit is not None:
            visit(state, step)
        state = advance(state, step)
    return state
