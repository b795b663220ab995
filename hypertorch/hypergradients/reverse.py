"""Reverse-mode differentiation through the whole unrolled inner loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.compiled_run import check_compile, compiled_whole, run_compiled
from hypertorch.hypergradients.compiled_steps import CompiledSteps
from hypertorch.hypergradients.derivative_choice import Derivative, check_derivative, is_mixed
from hypertorch.hypergradients.kinds import kind_of
from hypertorch.hypergradients.memory_plan import plan_loop, plan_memory
from hypertorch.hypergradients.pull_back import (
    accumulate,
    last_term,
    pull_back_initial,
    pull_back_segment,
    pull_back_steps,
    run_segment,
)
from hypertorch.hypergradients.revolve import Advance, Differentiate, Keep, Return, binomial_schedule
from hypertorch.hypergradients.step_by_step import EagerSteps, Piece, Steps, go_back_step_by_step
from hypertorch.hypergradients.window import differentiate_window, whole_window
from hypertorch.inner_loop import InnerLoop
from hypertorch.inner_state import InnerState
from hypertorch.live_memory import parse_bytes
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict

_logger = logging.getLogger(__name__)

# The variables to which a path was found, of problems with a derivative that was exactly zero in mixed mode.
_followed: dict[Hashable, frozenset[str]] = {}


@dataclass(frozen=True, kw_only=True)
class Reverse(Hypergradient):
    """The exact hypergradient by reverse mode through all inner steps.

    With `a_T = dE/ds_T`, going back: `a_{t-1} = a_t dPhi_t/ds_{t-1}` and `df/dhparams` gathers
    `a_t dPhi_t/dhparams`, the initialisation's part `a_0 dPhi_0/dhparams` and the direct term `dE/dhparams`.

    Without settings the graph of all steps is kept. Each of the first three settings keeps states instead, from which
    steps are run again when the reverse pass reaches them: the same number, less memory. At most one of them can be
    given.

    With `checkpoint_every`, one state in every so many is kept, counted from the end, and each segment between two is
    run again with its graph. 1 keeps every state and one step's graph. With "sqrt" memory grows as the square root of
    the horizon: `n / k` states and a segment of `k` steps are least in sum at `k = sqrt(n / r)`, where a segment holds
    `r` states' worth per step. Graphs of steps hold at least the state after the step and its gradient, often much
    more, so `r = 2`; compiled and mixed segments hold states alone, so `r = 1`.

    With `snapshots`, at most so many states and one step's graph are kept, and states in between are run again and
    again, by the schedule that runs the fewest steps (Revolve).

    With `memory_budget`, one step is measured at each outer step, in bytes of live tensors, and the cheapest of these
    is taken that fits: the whole graph, else states kept every `k` steps with the largest `k` that fits, else Revolve
    with as many states as fit. The budget is for what the backend holds beside the problem's own data,
    the hyperparameters and a context; bytes asked for are counted, not what an allocator makes of them, so leave it a
    tenth. The choice depends on shapes only, those of the second step, which the others must share; `explain` and
    `plan_memory` tell it in advance. It is a plan for reverse over reverse: not with another `derivative`.

    With `compile`, the step, and the step with its vjp, are compiled by `torch.compile`, once for all steps, outer
    iterations and problems of the same classes and shapes; changed tensors change the results and compile nothing. A
    horizon of up to 8 steps is one program, from the initial state to the hypergradient; a longer one keeps every
    state, unless a setting says less. Compilation takes seconds to minutes. What cannot be compiled (a schedule given
    as a list of numbers and a beta that is learnt are examples) runs without, after one warning.

    `derivative` says how the inner gradient is differentiated. By "reverse", reverse over reverse. By "mixed", forward
    over reverse: the Hessian product and the cross derivative of a step are the gradient in params and hyperparameters,
    moved along one direction, which keeps no graph of a backward pass. Without compilation that is worth a quarter of
    a step's memory or nothing, as the model's operations have it. Every state is kept unless a setting says less. By
    "auto", whichever a measurement on the first step of a problem of these sizes favours. Before mixed mode serves a
    kind of problem, a step is differentiated both ways and compared: where an operation has no forward derivative, or
    PyTorch has a wrong one (of determinants and linear solves, for example), "auto" goes on by reverse over reverse and
    "mixed" raises. They agree up to rounding.
    Steps of problems with buffers, and compiled ones that draw noise, always go by reverse over reverse.

    Cost, with `T = num_steps`, in steps beside `T` vjps, and in memory:

        Reverse()                       T steps                       graphs of T steps
        Reverse(checkpoint_every=k)     2 T - k steps                 T / k states, graphs of k steps
        Reverse(snapshots=c)            T + recomputed_steps(T, c)    c states, the graph of one step
        Reverse(memory_budget=bytes)    as chosen, and one step more  as allowed
        derivative="mixed"              2 T steps, 2 to 3 gradients   T states, the tangents of one step
                                        instead of a vjp
        compile=True, T > 8             2 T steps                     T states, the graph of one step
        ... with checkpoint_every=k     3 T steps at most             T / k + k states, the graph of one step

    Args:
        checkpoint_every: steps between kept states (unit: steps, at least 1); "sqrt" for
            `round(sqrt(num_steps / 2))`, compiled or in mixed mode `round(sqrt(num_steps))`.
        snapshots: most states kept at once, the first one included (unit: states, at least 1).
        memory_budget: bytes, or a string such as "512MiB" or "1.5 GB".
        compile: run the steps as compiled functions.
        derivative: "reverse", "mixed" or "auto".

    Raises:
        ValueError: if a setting is out of its range or an unknown word, more than one of the first three is given, or
            `memory_budget` together with a `derivative`.
        TypeError: if `compile` is neither True nor False.
        IncompatibleBackendError: (from `compute`) if `checkpoint_every` is above `num_steps`, nothing fits
            `memory_budget` (the message then says what would), or mixed mode is not possible or would be wrong.
        ReplayError: (from `compute`) if steps run again do not arrive at the same state.

    References:
        Maclaurin, Duvenaud and Adams (2015), algorithm 2, without reversal; Franceschi et al. (2017), algorithm 1;
        Griewank and Walther (2000), Algorithm 799: Revolve (snapshots); Kemaev et al. (2025), Scalable
        meta-learning via mixed-mode differentiation (mixed mode).
    """

    checkpoint_every: int | Literal["sqrt"] | None = None
    snapshots: int | None = None
    memory_budget: int | str | None = None
    compile: bool = False
    derivative: Derivative = "reverse"

    def __post_init__(self) -> None:
        check_derivative(self.derivative)
        check_compile(self.compile)
        kept = {
            "checkpoint_every": self.checkpoint_every,
            "snapshots": self.snapshots,
            "memory_budget": self.memory_budget,
        }
        given = [name for name, value in kept.items() if value is not None]
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
            if self.derivative != "reverse":
                raise ValueError(
                    f"`memory_budget` is given with `derivative={self.derivative!r}`: what is planned is reverse over "
                    "reverse, and mixed mode would not keep the budget. Leave `derivative` out, or say what is kept by "
                    "`checkpoint_every` or `snapshots`."
                )

    def explain(self, problem: BilevelProblem, hparams: TensorDict, *, outer_step: int = 0) -> str:
        """Returns what `memory_budget` makes of a problem, and why, to be printed; as `plan_memory` tells it.

        Raises:
            ValueError: if there is no `memory_budget`, and so nothing that was chosen.
            IncompatibleBackendError: if nothing fits.
        """
        if self.memory_budget is None:
            raise ValueError(
                f"`{self!r}` has no `memory_budget`: it runs as its settings say, and chooses nothing that could be "
                "explained. Pass one, such as `Reverse(memory_budget='512MiB')`."
            )
        plan = plan_memory(problem, hparams, self.memory_budget, outer_step=outer_step).explain()
        return f"{plan}\ncompiled steps keep states in place of graphs, and hold less" if self.compile else plan

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the exact derivative of the outer loss in `variables`."""
        every, snapshots = self.checkpoint_every, self.snapshots
        if loop.num_steps and self.memory_budget is not None:
            plan = plan_loop(loop, variables, parse_bytes(self.memory_budget, "memory_budget"))
            _logger.debug("%s", plan)
            every, snapshots = plan.checkpoint_every, plan.snapshots
        if loop.num_steps == 0:
            return differentiate_window(loop, variables, whole_window(loop, variables))
        if self.compile:
            return run_compiled(
                loop,
                self.derivative,
                run=lambda: self._compiled(loop, variables, every, snapshots),
                otherwise=lambda: self._eager(loop, variables, every, snapshots),
            )
        return self._eager(loop, variables, every, snapshots)

    def _eager(
        self, loop: InnerLoop, variables: TensorDict, every: int | Literal["sqrt"] | None, snapshots: int | None
    ) -> BackendResult:
        def steps_of(loop: InnerLoop, variables: TensorDict, mixed: bool) -> Steps:
            return EagerSteps(loop, variables, mixed=mixed)

        mixed = is_mixed(self.derivative, loop, variables, steps_of, compiled=False)
        if every is snapshots is None and not mixed:
            return differentiate_window(loop, variables, whole_window(loop, variables))
        steps = EagerSteps(loop, variables, mixed=mixed)
        pieces = _pieces(loop, steps, every, snapshots, with_graphs=not mixed)
        if not mixed:
            return _go_back(loop, variables, pieces)
        result = go_back_step_by_step(loop, variables, pieces, steps)
        return _without_missing_paths(loop, variables, result, every, snapshots)

    def _compiled(
        self, loop: InnerLoop, variables: TensorDict, every: int | Literal["sqrt"] | None, snapshots: int | None
    ) -> BackendResult:
        if every is snapshots is None and self.derivative == "reverse":
            result = compiled_whole(loop, variables)
            if result is not None:
                return result

        def steps_of(loop: InnerLoop, variables: TensorDict, mixed: bool) -> Steps:
            return CompiledSteps(loop, variables, mixed=mixed)

        mixed = is_mixed(self.derivative, loop, variables, steps_of, compiled=True)
        own = CompiledSteps(loop, variables, mixed=mixed)
        result = go_back_step_by_step(loop, variables, _pieces(loop, own, every, snapshots, with_graphs=False), own)
        return _without_missing_paths(loop, variables, result, every, snapshots) if mixed else result


def _without_missing_paths(
    loop: InnerLoop,
    variables: TensorDict,
    result: BackendResult,
    every: int | Literal["sqrt"] | None,
    snapshots: int | None,
) -> BackendResult:
    """Returns the result with None for zero where there is no path, of which forward mode knows nothing.

    Cost: nothing, unless a derivative is exactly zero: then a run by reverse over reverse, in as little memory and not
    counted, the first time that the question comes up for this kind of problem.
    """
    if all(value is None or bool(value.any()) for value in result.grads.values()):
        return result
    key = (kind_of(loop.program().problem), loop.num_steps, *variables)
    if key not in _followed:
        own = loop.uncounted()
        steps = EagerSteps(own, variables, mixed=False)
        every = 1 if every is None else every
        known = _go_back(own, variables, _pieces(own, steps, every, snapshots, with_graphs=True))
        _followed[key] = frozenset(name for name, value in known.grads.items() if value is not None)
    grads = {
        name: value if name in _followed[key] or (value is not None and bool(value.any())) else None
        for name, value in result.grads.items()
    }
    return replace(result, grads=grads)


def _pieces(
    loop: InnerLoop, steps: Steps, every: int | Literal["sqrt"] | None, snapshots: int | None, *, with_graphs: bool
) -> Iterator[Piece]:
    """Returns the pieces of a run from the last to the first; single steps of which every state is kept by default.

    Args:
        loop: the loop.
        steps: its steps.
        every: steps between kept states.
        snapshots: most states kept at once.
        with_graphs: whether a piece is run with the graph of all its steps; without, with their states.
    """
    if snapshots is not None:
        return _revolving(loop, steps, snapshots)
    return _kept_every(loop, steps, 1 if every is None else _stretch(every, loop.num_steps, with_graphs))


def _stretch(every: int | Literal["sqrt"], num_steps: int, with_graphs: bool) -> int:
    """Returns the steps between kept states."""
    if every == "sqrt":
        states_per_step = 2 if with_graphs else 1
        return max(1, round(math.sqrt(num_steps / states_per_step)))
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


def _kept_every(loop: InnerLoop, steps: Steps, every: int) -> Iterator[Piece]:
    """Yields stretches of `every` steps from the last to the first, keeping the states before them from one run.

    A stretch that is shorter is the first one, since the steps of the last one are run only once.
    """
    stops = range(loop.num_steps, 0, -every)
    starts = [max(stop - every, 0) for stop in stops]
    to_keep = frozenset(starts)
    kept: list[InnerState] = []
    state = steps.initial()
    for step in range(starts[0]):
        if step in to_keep:
            kept.append(state)
        state = steps.advance(state, step)
    kept.append(state)
    loop.cost.stored_states = len(kept) + 1
    del state
    for start, stop in zip(starts, stops, strict=True):
        yield start, stop, kept.pop()


def _revolving(loop: InnerLoop, steps: Steps, snapshots: int) -> Iterator[Piece]:
    """Yields single steps from the last to the first, with states that the binomial schedule keeps or runs again."""
    kept: dict[int, InnerState] = {}
    first_run = 0  # the first step that was not run yet
    state = steps.initial()
    for action in binomial_schedule(loop.num_steps, snapshots):
        match action:
            case Keep(step):
                kept[step] = state
                loop.cost.stored_states = max(loop.cost.stored_states, len(kept) + 1)
            case Return(step):
                state = kept[step]
            case Advance(start, stop):
                for step in range(start, stop):
                    state = steps.advance(state, step, first_run=step >= first_run)
                first_run = max(first_run, stop)
            case Differentiate(step, release):
                if release:
                    del kept[step]
                yield step, step + 1, state
