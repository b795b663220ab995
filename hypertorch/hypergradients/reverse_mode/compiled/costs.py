"""What compilation costs and saves: measured as it happens, told in the log, and weighed for `compile="auto"`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from hypertorch.inner import memo

T = TypeVar("T")

_logger = logging.getLogger(__name__)

# Seconds that a compilation is taken to last before one was measured: two programs with a loop, on one core.
USUAL_PRICE = 20.0

PRICE = "seconds that the last compilation took"
SPENT = "seconds of runs without compilation, until they are as many as a compilation takes"
EAGER = "seconds of a run without compilation"
PAYS_FROM = "number of hypergradients from which on compilation is the faster"
RUNS = "number of runs with compiled functions"
LAST = "problems that ran last with compiled functions"
WARNED = "problems of which a run was too short for compilation"


def timed(device: torch.device, run: Callable[[], T]) -> tuple[T, float]:
    """Returns what a run returns, and its seconds. It waits for an accelerator."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_worth_compiling(family: Hashable) -> bool:
    """Returns whether runs without compilation have taken as long as a compilation takes, unless that saves nothing.

    Compiling from there on takes at most twice the time of the better choice, however long the run is. What has been
    compiled is used, whatever that or another compilation took.

    Args:
        family: what problems that share programs have in common.
    """
    is_due = memo.get(RUNS, family, 0) > 0 or memo.get(SPENT, family, 0.0) >= memo.get(PRICE, None, USUAL_PRICE)
    return is_due and math.isfinite(memo.get(PAYS_FROM, family, 0.0))


def note_eager(family: Hashable, seconds: float) -> None:
    """Notes the time of a run without compilation."""
    memo.note(EAGER, family, seconds)
    memo.note(SPENT, family, memo.get(SPENT, family, 0.0) + seconds)


def count(family: Hashable) -> None:
    """Counts a run with compiled functions."""
    memo.note(RUNS, family, memo.get(RUNS, family, 0) + 1)
    memo.note(LAST, None, family)


def is_measured(family: Hashable) -> bool:
    """Returns whether it is known from which number of hypergradients on compilation is the faster."""
    return memo.get(PAYS_FROM, family, None) is not None


def tell_start(what: str) -> None:
    """Tells that a compilation begins, and for how long one takes."""
    price = memo.get(PRICE, None, None)
    usual = f"small steps take about {USUAL_PRICE:.0f} s, large ones minutes"
    _logger.info("%s is compiled now: %s", what, usual if price is None else f"the last time it took {price:.0f} s")


def note_compilation(family: Hashable, what: str, seconds: float) -> None:
    """Notes the time of a run on which programs were compiled, and tells it."""
    memo.note(PRICE, None, seconds)
    memo.forget(PAYS_FROM, family)
    _logger.info("%s was compiled, or its programs were loaded, in %.1f s", what, seconds)


def note_compiled(family: Hashable, what: str, seconds: float) -> None:
    """Notes the time of a run by programs that were there, and tells from where on they are the faster."""
    eager, price = memo.get(EAGER, family, None), memo.get(PRICE, None, USUAL_PRICE)
    if eager is None:  # nothing was run without
        memo.note(PAYS_FROM, family, 0.0)
        return
    saved = eager - seconds
    pays_from = price / saved if saved > 0.0 else math.inf
    memo.note(PAYS_FROM, family, pays_from)
    _logger.info(
        "%s takes %.2g s compiled and about %.2g s without: compilation (%.1f s) %s",
        what,
        seconds,
        eager,
        price,
        f"pays from {pays_from:.0f} hypergradients on" if saved > 0.0 else "never pays",
    )


def warn_if_too_short(steps_done: int, steps_left: int) -> None:
    """Says in the log, once, if a run has too few outer steps for compilation to make it faster."""
    family = memo.get(LAST, None, None)
    pays_from = memo.get(PAYS_FROM, family, 0.0)
    # An outer step may be several runs: of parts of its tasks.
    runs_per_step = memo.get(RUNS, family, 0) / steps_done
    num_steps = steps_done + steps_left
    if num_steps * runs_per_step < pays_from and not memo.get(WARNED, family, False):
        memo.note(WARNED, family, True)
        _logger.warning(
            "`compile=True` makes this run of %d outer steps slower: compilation takes %.1f s, and %s. Leave `compile` "
            "out, or pass 'auto'.",
            num_steps,
            memo.get(PRICE, None, USUAL_PRICE),
            f"pays from {pays_from / runs_per_step:.0f} of them on" if math.isfinite(pays_from) else "never pays",
        )
