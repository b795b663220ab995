"""The segments that a run is differentiated in, from the last to the first, and the states kept for them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import torch

from hypertorch.hypergradients.reverse_mode import revolve
from hypertorch.hypergradients.reverse_mode.spilled_states import KeptStates, kept_states
from hypertorch.hypergradients.reverse_mode.steps import Steps
from hypertorch.hypergradients.reverse_mode.sweep import Segment
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict

# Losses of a run too long for memory are gathered by so many steps.
_GATHERED = 256


def initialisation(loop: InnerLoop, variables: TensorDict, first: InnerState | None) -> Segment:
    """Returns the initial state as a segment without steps, connected to the variables.

    Cost: one evaluation of the initial state.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, as leaves.
        first: the initial state that the run started from, to compare with.
    """
    with torch.enable_grad():
        return Segment(0, 0, loop.initial(variables), first, connected=True)


def kept_every(
    loop: InnerLoop, variables: TensorDict, steps: Steps, every: int, spill_to: Path | None = None
) -> Generator[Segment]:
    """Yields segments of `every` steps, with the states between them kept from one forward run.

    The first segment of the run may be shorter: the steps of the last one are not run before it is differentiated.

    Cost: `num_steps - every` steps; memory of `num_steps / every` states, or of two and a file of the others.
    """
    spans = _from_last(loop.num_steps, every)
    with kept_states(spill_to, len(spans)) as kept:
        _keep(kept, loop, steps, [start for start, _ in spans])
        arrival, ungathered = None, loop.num_steps
        for start, stop in spans:
            # Popped: a state is held no longer than its segment.
            departure = kept.pop()
            yield Segment(start, stop, departure, arrival)
            if spill_to is not None and ungathered - start >= _GATHERED:
                loop.record.gather(range(start, ungathered))
                ungathered = start
            # Where the segment before must end, if it is the same run.
            arrival = departure
    yield initialisation(loop, variables, arrival)


def single_steps(
    loop: InnerLoop, variables: TensorDict, steps: Steps, every: int = 1, spill_to: Path | None = None
) -> Generator[Segment]:
    """Yields single steps. One state in `every` is kept; those in between are run again when they are reached.

    Cost: `num_steps` steps, and `num_steps - every` once more if `every` is above 1; memory of
    `num_steps / every + every` states, of `every + 2` and a file of the others.
    """
    spans = _from_last(loop.num_steps, every)
    with kept_states(spill_to, len(spans)) as kept:
        _keep(kept, loop, steps, [start for start, _ in spans])
        arrival, ungathered = None, loop.num_steps
        for start, stop in spans:
            states: list[InnerState] = []
            last = stop if arrival is None else stop - 1
            reached = scan(steps.advance, kept.pop(), range(start, last), _collect(states))
            if arrival is None:
                loop.record.hold(len(spans) + stop - start)
                arrival = reached
            else:
                states.append(reached)
            # Held by `states` or as the arrival, and not a moment longer.
            del reached
            for step in reversed(range(start, stop)):
                departure = states.pop()
                yield Segment(step, step + 1, departure, arrival)
                arrival = departure
            if spill_to is not None and ungathered - start >= _GATHERED:
                loop.record.gather(range(start, ungathered))
                ungathered = start
    yield initialisation(loop, variables, arrival)


def revolving(
    loop: InnerLoop, variables: TensorDict, steps: Steps, snapshots: int, spill_to: Path | None = None
) -> Generator[Segment]:
    """Yields single steps, with states that the binomial schedule keeps or runs again.

    Cost: `recomputed_steps(num_steps, snapshots)` steps; memory of `snapshots` states, or of two and a file of the
    others.
    """
    arrival = None
    state = steps.initial()
    with kept_states(spill_to, min(snapshots, loop.num_steps)) as kept:
        for action in revolve.binomial_schedule(loop.num_steps, snapshots):
            match action:
                case revolve.Keep():
                    kept.append(state)
                    loop.record.hold(len(kept) + 1)
                # Of the kept states, the schedule asks for the last one only.
                case revolve.Return():
                    state = kept[-1]
                case revolve.Advance(start, stop):
                    state = scan(steps.advance, state, range(start, stop))
                case revolve.Differentiate(step, release):
                    # Before it is handed over, so that the sweep has the last hold on it.
                    if release:
                        kept.pop()
                    yield Segment(step, step + 1, state, arrival)
                    arrival = state
    yield initialisation(loop, variables, arrival)


def _from_last(num_steps: int, every: int) -> list[tuple[int, int]]:
    """Returns start and stop of segments of `every` steps, from the last; the first of the run may be shorter."""
    return [(max(stop - every, 0), stop) for stop in range(num_steps, 0, -every)]


def _keep(kept: KeptStates, loop: InnerLoop, steps: Steps, starts: list[int]) -> None:
    """Keeps the states before some steps, given from the last to the first, in the order of the run."""
    # Up to the start of the last segment, whose steps are run by whoever differentiates it.
    wanted = frozenset(starts)

    def keep(state: InnerState, step: int) -> None:
        if step in wanted:
            kept.append(state)
        if step % _GATHERED == 0 and not isinstance(kept, list):
            loop.record.gather(range(step - _GATHERED, step))

    kept.append(scan(steps.advance, steps.initial(), range(starts[0]), keep))
    loop.record.hold(len(kept) + 1)


def _collect(states: list[InnerState]) -> Callable[[InnerState, int], None]:
    return lambda state, _: states.append(state)
