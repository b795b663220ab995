"""Reverse-mode differentiation through the whole unrolled inner loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.memory_plan import plan_loop
from hypertorch.hypergradients.pull_back import (
    accumulate,
    last_term,
    pull_back_initial,
    pull_back_segment,
    pull_back_steps,
    run_segment,
)
from hypertorch.hypergradients.revolve import Advance, Differentiate, Keep, Return, binomial_schedule
from hypertorch.hypergradients.window import differentiate_window, whole_window
from hypertorch.inner_loop import InnerLoop, InnerState
from hypertorch.live_memory import parse_bytes
from hypertorch.types import TensorDict

_logger = logging.getLogger(__name__)

Piece: TypeAlias = tuple[int, int, InnerState]
"""Consecutive steps: the first, one past the last, and the state before them."""


@dataclass(frozen=True, kw_only=True)
class Reverse(Hypergradient):
    """The exact hypergradient by reverse mode through all inner steps.

    With `a_T = dE/ds_T`, going back: `a_{t-1} = a_t dPhi_t/ds_{t-1}` and `df/dhparams` gathers
    `a_t dPhi_t/dhparams`, the initialisation's part `a_0 dPhi_0/dhparams` and the direct term `dE/dhparams`.

    Without settings the graph of all steps is kept. Each setting keeps states instead, from which steps are run again
    when the reverse pass reaches them: the same number, less memory. At most one of them can be given.

    With `checkpoint_every`, one state in every so many is kept, counted from the end, and each segment between two is
    run again with its graph. 1 keeps every state and one step's graph; with "sqrt" both the states and the steps of a
    graph are about `sqrt(num_steps)`.

    With `snapshots`, at most so many states and one step's graph are kept, and states in between are run again and
    again, by the schedule that runs the fewest steps (Revolve).

    With `memory_budget`, one step is measured at each outer step, in bytes of live tensors, and the cheapest of these
    is taken that fits: the whole graph, else states kept every `k` steps with the largest `k` that fits, else Revolve
    with as many states as fit. The budget is for what the backend holds beside the problem's own data,
    the hyperparameters and a context; bytes asked for are counted, not what an allocator makes of them, so leave it a
    tenth. The choice depends on shapes only. `plan_memory` tells it in advance.

    Cost, with `T = num_steps`, in steps beside `T` vjps, and in memory:

        Reverse()                       T steps                       graphs of T steps
        Reverse(checkpoint_every=k)     2 T - k steps                 T / k states, graphs of k steps
        Reverse(snapshots=c)            T + recomputed_steps(T, c)    c states, the graph of one step
        Reverse(memory_budget=bytes)    as chosen, and one step more  as allowed

    Args:
        checkpoint_every: steps between kept states (unit: steps, at least 1); "sqrt" for
            `round(sqrt(num_steps))`.
        snapshots: most states kept at once, the first one included (unit: states, at least 1).
        memory_budget: bytes, or a string such as "512MiB" or "1.5 GB".

    Raises:
        ValueError: if a setting is out of its range or an unknown word, or more than one is given.
        IncompatibleBackendError: (from `compute`) if `checkpoint_every` is above `num_steps`, or nothing fits
            `memory_budget`; the message then says what would.
        ReplayError: (from `compute`) if steps run again do not arrive at the same state.

    References:
        Maclaurin, Duvenaud and Adams (2015), algorithm 2, without reversal; Franceschi et al. (2017), algorithm 1;
        Griewank and Walther (2000), Algorithm 799: Revolve (snapshots).
    """

    checkpoint_every: int | Literal["sqrt"] | None = None
    snapshots: int | None = None
    memory_budget: int | str | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"`{given[0]}` and `{given[1]}` are both given: each says what is kept, and they would contradict each "
                "other. Pass one of `checkpoint_every`, `snapshots` and `memory_budget`, or none for the whole graph."
            )
        if self.checkpoint_every not in (None, "sqrt"):
            _check_count("checkpoint_every", self.checkpoint_every, "states are kept every so many steps", ", 'sqrt',")
        if self.snapshots is not None:
            _check_count("snapshots", self.snapshots, "so many states are kept, the first one included", "")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, "memory_budget")

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the exact derivative of the outer loss in `variables`."""
        every, snapshots = self.checkpoint_every, self.snapshots
        if loop.num_steps and self.memory_budget is not None:
            plan = plan_loop(loop, variables, parse_bytes(self.memory_budget, "memory_budget"))
            _logger.debug("%s", plan)
            every, snapshots = plan.checkpoint_every, plan.snapshots
        if loop.num_steps == 0 or every is snapshots is None:
            return differentiate_window(loop, variables, whole_window(loop, variables))
        constants = tree.detach(variables)
        if snapshots is not None:
            return _go_back(loop, variables, _revolving(loop, constants, snapshots))
        return _go_back(loop, variables, _kept_every(loop, constants, _stretch(every, loop.num_steps)))


def _stretch(every: int | Literal["sqrt"] | None, num_steps: int) -> int:
    """Returns the steps between kept states."""
    if every is None or every == "sqrt":
        return max(1, round(math.sqrt(num_steps)))
    if every > num_steps:
        raise IncompatibleBackendError(
            f"`Reverse(checkpoint_every={every})` got a problem with `num_steps` = {num_steps}: no state would be kept "
            "between segments. Use at most that many steps, or `Reverse()` for the whole graph."
        )
    return every


def _check_count(name: str, value: object, meaning: str, word: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"`{name}` is {value!r}: {meaning}, at least 1. Pass a whole number{word} or None to keep the whole graph."
        )


def _go_back(loop: InnerLoop, variables: TensorDict, pieces: Iterator[Piece]) -> BackendResult:
    """Goes back through the pieces of a run, from the last to the first, and through its initial state."""
    start, stop, departure = next(pieces)
    # The outer loss is taken at the end of the last piece's own graph, so that its steps are run only once.
    segment = run_segment(loop, variables, departure, start, stop)
    last = segment.end.detached()
    grads, cotangents, outer_loss = last_term(loop, variables, last)
    part, cotangents, step_losses = pull_back_segment(loop, variables, segment, cotangents)
    del segment  # not to live beside the next one
    grads, outer_loss = accumulate(grads, part), outer_loss + step_losses
    for start, stop, earlier in pieces:
        del part
        part, cotangents, step_losses = pull_back_steps(
            loop, variables, earlier, cotangents, start, stop, arrival=departure
        )
        grads, outer_loss = accumulate(grads, part), outer_loss + step_losses
        departure = earlier
    grads = accumulate(grads, pull_back_initial(loop, variables, cotangents))
    return BackendResult(grads=grads, outer_loss=outer_loss, state=last)


def _kept_every(loop: InnerLoop, variables: TensorDict, every: int) -> Iterator[Piece]:
    """Yields stretches of `every` steps from the last to the first, keeping the states before them from one run.

    A stretch that is shorter is the first one, since the steps of the last one are run only once.
    """
    stops = range(loop.num_steps, 0, -every)
    starts = [max(stop - every, 0) for stop in stops]
    to_keep = frozenset(starts)
    kept: list[InnerState] = []
    with torch.no_grad():
        state = loop.initial(variables)
        for step in range(starts[0]):
            if step in to_keep:
                kept.append(state)
            state = loop.step(state, variables, step)
    kept.append(state)
    loop.cost.stored_states = len(kept) + 1
    for start, stop in zip(starts, stops, strict=True):
        yield start, stop, kept.pop()


def _revolving(loop: InnerLoop, variables: TensorDict, snapshots: int) -> Iterator[Piece]:
    """Yields single steps from the last to the first, with states that the binomial schedule keeps or runs again."""
    kept: dict[int, InnerState] = {}
    first_run = 0  # the first step that was not run yet
    with torch.no_grad():
        state = loop.initial(variables)
    for action in binomial_schedule(loop.num_steps, snapshots):
        match action:
            case Keep(step):
                kept[step] = state
                loop.cost.stored_states = max(loop.cost.stored_states, len(kept) + 1)
            case Return(step):
                state = kept[step]
            case Advance(start, stop):
                with torch.no_grad():
                    for step in range(start, stop):
                        if step >= first_run:
                            state = loop.step(state, variables, step)
                        else:  # its loss is known
                            state = loop.apply(loop.bound_loss(state, step), state, variables, step)
                            loop.count_value(None)
                first_run = max(first_run, stop)
            case Differentiate(step, release):
                if release:
                    del kept[step]
                yield step, step + 1, state
