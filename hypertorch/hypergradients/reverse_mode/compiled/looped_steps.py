"""The loop over inner steps, and the way back through it, inside two compiled programs.

`single_steps` calls a program for every step from Python, which takes longer than the products of a small model. Here
the loop itself is in the program.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypertorch import tree
from hypertorch.autodiff.noise import generator_states
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.guards.replay import check_values
from hypertorch.hypergradients.reverse_mode.compiled.comparison import compare, compared
from hypertorch.hypergradients.reverse_mode.compiled.compilation import attempt, check_size, compiled, programs_made
from hypertorch.hypergradients.reverse_mode.compiled.costs import note_eager
from hypertorch.hypergradients.reverse_mode.compiled.errors import (
    NotCompilableError,
    TooLargeError,
    TooManyProgramsError,
)
from hypertorch.hypergradients.reverse_mode.compiled.looped_programs import back, forward, own_memory
from hypertorch.hypergradients.reverse_mode.compiled.single_steps import Program, draws, try_dynamics
from hypertorch.hypergradients.reverse_mode.compiled.step_data import counters_of, data_of, of_any_length
from hypertorch.hypergradients.reverse_mode.compiled.step_index import LATEST_STEP
from hypertorch.hypergradients.reverse_mode.graph import graph_vjp
from hypertorch.hypergradients.reverse_mode.segments import initialisation
from hypertorch.hypergradients.reverse_mode.sweep import (
    Cotangents,
    Differentiable,
    Grads,
    PulledBack,
    Segment,
    sweep,
)
from hypertorch.inner import memo
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict

UNLOOPED = "problems whose steps cannot be looped over in a program"
ONE_BY_ONE = "problems of which no several steps are one program"
FIT_STEP = "problems of which an inner step draws no noise and is not too large for a loop"

# Steps in one call of a program where the data of each differs: it is stacked, and held twice.
_STEPS_OF_DATA = 64

# For each operation of a step, a program with a loop forward and one back has at least this number of calls. Steps that
# are too large are found by it before they are traced, which takes as long as tracing them one by one.
_CALLS_TO_A_STEP = 4


class _Run(NamedTuple):
    """Some steps that were run: the states before each, stacked, and the state after the last."""

    before: list[Tensor]
    end: InnerState


def by_compiled_loop(loop: InnerLoop, variables: TensorDict, every: int | None) -> BackendResult | None:
    """Returns the hypergradient by two compiled programs, each with the loop over the steps inside.

    None where a program cannot loop: noise is drawn, which is seeded at every step from Python; the params have
    buffers; a rule or a term asks for the index of the step as a number of Python; the data of the steps differs in
    shape.

    Cost: `2 num_steps` steps and as many vjps, and with `every` at most `num_steps` steps more; memory of `num_steps`
    states, with `every` of `num_steps / every + every`, and the graph of one step.

    Args:
        loop: the inner loop, of at least two steps.
        variables: hyperparameters and context, as leaves.
        every: steps between kept states; None to keep all of them.

    Raises:
        ReplayError: if a step run again has another inner loss.
    """
    if not may_loop(loop, variables):
        return None
    # What fails halfway leaves no counts behind.
    trial = loop.uncounted()
    steps = _LoopedSteps(trial, variables)
    try:
        with attempt():
            result = sweep(trial, variables, steps.segments(every), steps.vjp)
    except TooManyProgramsError:  # single steps would be as many
        raise
    except NotCompilableError as error:
        refuse_loop(loop, error)
        return None
    steps.check_replays()
    loop.record.add(trial.record)
    return result


def may_loop(loop: InnerLoop, variables: TensorDict) -> bool:
    """Returns whether nothing is known against a loop in a program.

    Cost: an inner step without compilation, once for a class of problems.
    """
    key = Program.of(loop).key
    if loop.has_buffers or loop.num_steps < 2 or memo.get(UNLOOPED, key, ""):
        return False
    if loop.first_index + loop.num_steps > LATEST_STEP:
        return False
    # Found out without a compiler, which takes seconds.
    return memo.recall(FIT_STEP, key, lambda: _is_fit(loop, tree.detach(variables)))


def refuse_loop(loop: InnerLoop, error: NotCompilableError) -> None:
    """Remembers that steps of problems of this class cannot be looped over in a program, and why."""
    key = Program.of(loop).key
    memo.note(UNLOOPED, key, str(error))
    if isinstance(error, TooLargeError):
        memo.note(ONE_BY_ONE, key, True)


class _LoopedSteps:
    """The steps of one loop, several to a call of a program.

    Args:
        loop: the loop.
        variables: hyperparameters and context, as leaves.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict) -> None:
        self._loop = loop
        self._variables = variables
        self._program = Program.of_steps(loop)
        self._moving = {name: value.detach() for name, value in variables.items() if value.requires_grad}
        self._fixed = {name: value.detach() for name, value in variables.items() if not value.requires_grad}
        self._made_before = programs_made()
        self._kept: dict[int, _Run] = {}
        self._values: dict[int, Tensor] = {}
        self._further_values: dict[int, Tensor] = {}

    def segments(self, every: int | None) -> Iterator[Segment]:
        """Yields the segments from the last to the first, and the initialisation.

        Args:
            every: steps between kept states; None to keep the states before all steps.
        """
        loop = self._loop
        state = self._initial()
        departures: list[InnerState] = []
        runs = self._runs(every)
        for steps in runs:
            departures.append(state)
            # With `every`, the last steps are first run when they are differentiated.
            if every is None or steps is not runs[-1]:
                run = self._forward(state, steps)
                state = run.end
                if every is None:
                    self._kept[steps.start] = run
        loop.record.hold(loop.num_steps + 1 if every is None else len(runs) + len(runs[-1]))
        arrival = None
        for steps in reversed(runs):
            # Popped: a state is held no longer than its segment.
            departure = departures.pop()
            yield Segment(steps.start, steps.stop, departure, arrival)
            arrival = departure
        yield initialisation(loop, self._variables, arrival)

    def vjp(self, segment: Segment) -> Differentiable:
        """Returns some steps whose vjp is compiled."""
        if segment.connected:
            return graph_vjp(self._loop, self._variables, segment)
        steps = range(segment.start, segment.stop)
        kept = self._kept.pop(segment.start, None)
        run = self._forward(segment.departure, steps) if kept is None else kept
        return Differentiable(run.end, partial(self._pull_back, run, steps))

    def check_replays(self) -> None:
        """Raises `ReplayError` if a step run again had another inner loss, so that its derivative is of another run."""
        check_values(self._values, self._further_values, inner_eps=self._loop.inner_eps)

    def _initial(self) -> InnerState:
        constants = {**self._moving, **self._fixed}
        try_dynamics(self._loop, constants)
        with torch.no_grad():
            state = self._loop.initial(constants)
        tensors = state.tensors()
        # Zeros of whole numbers have no derivative, and a rule that holds some goes by single steps.
        if not all(tree.is_differentiable(value) for value in [*tensors, *self._moving.values()]):
            raise NotCompilableError("the inner state holds whole numbers")
        return state.replace_tensors(own_memory(tensors))

    def _runs(self, every: int | None) -> list[range]:
        """Returns the steps of each call, in the order of the run; the first is the shortest."""
        loop = self._loop
        longest = loop.num_steps if every is None else every
        if every is None and data_of(loop, range(2)).stacked:
            longest = min(longest, _STEPS_OF_DATA)
        stops = [*range(loop.num_steps, 0, -longest)]
        return [range(max(stop - longest, 0), stop) for stop in reversed(stops)]

    def _forward(self, state: InnerState, steps: range) -> _Run:
        """Returns some steps that are run, with the states before them."""
        data = data_of(self._loop, steps)
        run = compiled(forward, self._program.key, self._loop.device, loops=True)
        noise = generator_states(self._loop.device)
        with torch.no_grad():
            end, before, values = run(
                self._program, state, self._moving, self._fixed, data, counters_of(self._loop, steps)
            )
        if draws(noise, self._loop.device):
            raise NotCompilableError("a step draws noise, which is seeded at every step from Python")
        self._add(steps, values)
        return _Run(before, end)

    def _pull_back(self, run: _Run, steps: range, cotangents: Cotangents) -> PulledBack:
        pulled, values = self._pulled(run, steps, cotangents)
        is_at_an_end = steps.start == 0 or steps.stop == self._loop.num_steps
        if is_at_an_end and programs_made() != self._made_before:
            for few in compared(steps):
                self._compare(run, steps, few, cotangents)
        self._add(steps, values)
        self._loop.record.add_vjps(len(steps), graph_steps=1)
        return pulled

    def _compare(self, run: _Run, steps: range, few: range, cotangents: Cotangents) -> None:
        """Compares a few of some steps with those without compilation: programs that are new are not trusted."""
        start = few.start - steps.start
        before = [value[start : start + len(few)] for value in run.before]
        states = [run.end.replace_tensors(list(tensors)) for tensors in zip(*before, strict=True)]
        stop = start + len(few)
        end = run.end if stop == len(steps) else run.end.replace_tensors([value[stop] for value in run.before])
        states.append(end)
        pulled, _ = self._pulled(_Run(before, end), few, cotangents)
        # One by one: the data of a step may be written over by that of the next.
        own, backward, fastest = self._loop.uncounted(), list(cotangents), float("inf")
        right: Grads = dict.fromkeys(self._variables)
        for step in reversed(few):
            segment = Segment(step, step + 1, states[step - few.start], None)
            start = time.perf_counter()
            found = graph_vjp(own, self._variables, segment)
            part, backward, _ = found.pull_back(backward)
            right = tree.accumulate(right, part)
            fastest = min(fastest, time.perf_counter() - start)
            compare("the state", states[step - few.start + 1].tensors(), found.end.tensors())
        note_eager((self._program.key, "reverse"), fastest * self._loop.num_steps)
        compare("the hypergradient", [*pulled.grads.values()], [*right.values()])
        compare("the cotangents of the state", pulled.cotangents, backward)

    def _pulled(self, run: _Run, steps: range, cotangents: Cotangents) -> tuple[PulledBack, Tensor]:
        """Returns what some steps add, and the inner losses before each."""
        data = data_of(self._loop, steps)
        program = compiled(back, self._program.key, self._loop.device, loops=True)
        seeds = [
            torch.zeros_like(value) if cotangent is None else cotangent.detach().contiguous()
            for value, cotangent in zip(run.end.tensors(), cotangents, strict=True)
        ]
        with torch.no_grad():
            grads, before, term, values = program(
                self._program,
                run.end,
                [of_any_length(value) for value in run.before],
                self._moving,
                self._fixed,
                data,
                counters_of(self._loop, steps),
                seeds,
            )
        # A program differentiates in what moves: the other variables have no path.
        return PulledBack({name: grads.get(name) for name in self._variables}, before, term), values

    def _add(self, steps: range, values: Tensor) -> None:
        for step, value in zip(steps, values.unbind(), strict=True):
            self._loop.record.add_step(step, value)
            # The first run counts, as the one whose states are kept.
            if self._values.setdefault(step, value) is not value:
                self._further_values[step] = value


def _is_fit(loop: InnerLoop, constants: TensorDict) -> bool:
    """Returns whether the first step draws nothing from torch's generators, and is not too large; it is not counted."""
    try_dynamics(loop, constants)
    with torch.no_grad():
        state = loop.initial(constants)
        with _Operations() as made:
            loop.transition(state, constants, 0)
    after = generator_states(loop.device)
    loop.seed(loop.first_index)
    try:
        check_size(_CALLS_TO_A_STEP * made.count)
    except TooLargeError as error:
        refuse_loop(loop, error)
        return False
    return not draws(after, loop.device)


class _Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
