"""The loop over inner steps, and the way back through it, inside two compiled programs.

`compiled_steps` calls a program for every step from Python, which takes longer than the products of a small model. Here
the loop itself is in the program: `torch._higher_order_ops.scan` of one step forward, and of one step's vjp backward.
One step is compiled, whatever the horizon is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.utils import _pytree as pytree

from hypertorch import tree
from hypertorch.autodiff.noise import generator_states
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.guards.replay import check_values
from hypertorch.hypergradients.reverse_mode.compilation import (
    NotCompilableError,
    TooLargeError,
    TooManyProgramsError,
    attempt,
    compiled,
    programs_made,
)
from hypertorch.hypergradients.reverse_mode.compile_costs import note_eager
from hypertorch.hypergradients.reverse_mode.compiled_steps import Program, draws, try_dynamics
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
from hypertorch.types import Batch, TensorDict

UNLOOPED = "problems whose steps cannot be looped over in a program"
LARGE = "problems whose steps are too large for a program of several"
NOISY_STEP = "problems of which an inner step draws noise"

# Steps in one call of a program where the data of each differs: it is stacked, and held twice.
_STEPS_OF_DATA = 64

# Steps of a new program that are compared with the same steps without compilation.
_STEPS_COMPARED = 8


class Data(NamedTuple):
    """The data of some steps.

    Attributes:
        first: the data of the first step, whole.
        stacked: the tensors that differ between steps, with a leading axis of steps, by their position in the batch.
    """

    first: Batch
    stacked: dict[int, Tensor]

    def at(self, own: dict[int, Tensor]) -> Batch:
        """Returns the data of a step, of which `own` are the tensors that differ."""
        leaves, structure = pytree.tree_flatten(self.first)
        return pytree.tree_unflatten([own.get(position, leaf) for position, leaf in enumerate(leaves)], structure)


def data_of(loop: InnerLoop, steps: range) -> Data:
    """Returns the data of some steps.

    A tensor that every step hands over is held once. The others are copied as soon as they are drawn: whoever draws
    them may write the next ones to the same place.

    Raises:
        NotCompilableError: if its structure, its shapes or what is no tensor in it differ between steps.
    """
    first = loop.draw(loop.first_index + steps.start)
    leaves, structure = pytree.tree_flatten(first)
    marks = [_mark(leaf) for leaf in leaves]
    differing: set[int] = set()
    # The second step tells which tensors differ. Should a later one show more of them, all are drawn once more.
    looked_at = steps[1:2]
    while True:
        stacked = {position: _room(leaves[position], len(steps)) for position in sorted(differing)}
        found = set(differing)
        for step in looked_at:
            own, other = pytree.tree_flatten(loop.draw(loop.first_index + step))
            if other != structure:
                raise NotCompilableError("the data of the steps has not one structure")
            for position, (leaf, value) in enumerate(zip(leaves, own, strict=True)):
                if position in stacked:
                    _copy(value, stacked[position][step - steps.start])
                elif not isinstance(leaf, Tensor):
                    if value != leaf:
                        raise NotCompilableError("the data of the steps holds other values than tensors, which differ")
                elif value is not leaf or _mark(value) != marks[position]:
                    found.add(position)
        if found == differing and looked_at == steps:
            return Data(first, {position: _of_any_length(value) for position, value in stacked.items()})
        differing, looked_at = found, steps


def _mark(leaf: Any) -> int:
    """Returns what grows when a tensor is written to."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def _room(leaf: Tensor, num_steps: int) -> Tensor:
    return torch.empty((num_steps, *leaf.shape), dtype=leaf.dtype, device=leaf.device)


def _copy(value: Any, place: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != place.shape or value.dtype != place.dtype:
        raise NotCompilableError("the data of the steps has not one shape")
    place.copy_(value.detach())


def counters_of(loop: InnerLoop, steps: range) -> Tensor:
    """Returns the indices of some steps, in double precision: a rule's powers of them are exact in every dtype."""
    first = loop.first_index
    indices = torch.arange(first + steps.start, first + steps.stop, dtype=torch.float64, device=loop.device)
    return _of_any_length(indices)


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
    # Found out without a compiler, which takes seconds.
    return not memo.recall(NOISY_STEP, key, lambda: _draws_noise(loop, tree.detach(variables)))


def refuse_loop(loop: InnerLoop, error: NotCompilableError) -> None:
    """Remembers that steps of problems of this class cannot be looped over in a program, and why."""
    key = Program.of(loop).key
    memo.note(UNLOOPED, key, str(error))
    if isinstance(error, TooLargeError):
        memo.note(LARGE, key, True)


class _LoopedSteps:
    """The steps of one loop, several to a call of a program.

    Args:
        loop: the loop.
        variables: hyperparameters and context, as leaves.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict) -> None:
        self._loop = loop
        self._variables = variables
        program = Program.of(loop)
        # What a step does not read is made equal, so that problems that differ in it share a program.
        self._program = program._replace(problem=replace(program.problem, num_steps=1, seed=0, allow_unused=()))
        self._moving = {name: value.detach() for name, value in variables.items() if value.requires_grad}
        self._fixed = {name: value.detach() for name, value in variables.items() if not value.requires_grad}
        self._made = programs_made()
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
        return state.replace_tensors(_own(tensors))

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
        run = compiled(_forward, self._program.key, self._loop.device, loops=True)
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
        if programs_made() != self._made:
            self._compare(run, steps, cotangents)
            self._made = programs_made()
        self._add(steps, values)
        self._loop.record.add_vjps(len(steps), graph_steps=1)
        return pulled

    def _compare(self, run: _Run, steps: range, cotangents: Cotangents) -> None:
        """Compares the first steps with those without compilation: programs that are new are not trusted."""
        few = steps[:_STEPS_COMPARED]
        states = [run.end.replace_tensors([value[step] for value in run.before]) for step in range(len(few))]
        states.append(run.end if few == steps else run.end.replace_tensors([value[len(few)] for value in run.before]))
        pulled, _ = self._pulled(run._replace(before=[value[: len(few)] for value in run.before]), few, cotangents)
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
        back = compiled(_back, self._program.key, self._loop.device, loops=True)
        seeds = [
            torch.zeros_like(value) if cotangent is None else cotangent.detach().contiguous()
            for value, cotangent in zip(run.end.tensors(), cotangents, strict=True)
        ]
        with torch.no_grad():
            grads, before, term, values = back(
                self._program,
                run.end,
                [_of_any_length(value) for value in run.before],
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


def compare(what: str, found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Raises unless what a new program gives is what the same steps give without compilation, up to rounding.

    PyTorch's compiler has made wrong code of right loops, without a word.

    Raises:
        NotCompilableError: naming what differs.
    """
    for got, right in zip(found, expected, strict=True):
        if got is None or not got.numel():
            continue
        size = torch.zeros_like(got) if right is None else right.detach()
        # Half of the digits: a few steps lose less to rounding, and wrong code has none of them right.
        allowed = torch.finfo(got.dtype).eps ** 0.5 * max(float(size.abs().max()), 1e-30)
        if not float((got - size).abs().max()) <= allowed and bool(torch.isfinite(size).all()):
            raise NotCompilableError(f"the program gives other numbers for {what} than the same steps without it")


def _draws_noise(loop: InnerLoop, constants: TensorDict) -> bool:
    """Returns whether the first step draws from torch's generators; it is not counted."""
    try_dynamics(loop, constants)
    with torch.no_grad():
        loop.transition(loop.initial(constants), constants, 0)
    after = generator_states(loop.device)
    loop.seed(loop.first_index)
    return draws(after, loop.device)


def _of_any_length(value: Tensor) -> Tensor:
    """Returns the tensor, marked: programs take any length of its first axis."""
    torch._dynamo.maybe_mark_dynamic(value, 0)
    return value


def _own(tensors: list[Tensor]) -> list[Tensor]:
    """Returns tensors with memory of their own: the loop of a program writes each of its states to a place."""
    return [value.detach().clone(memory_format=torch.contiguous_format) for value in tensors]


def _forward(
    program: Program, state: InnerState, moving: TensorDict, fixed: TensorDict, data: Data, counters: Tensor
) -> tuple[InnerState, list[Tensor], Tensor]:
    """Returns the state after the steps, the states before each, and the inner losses before each."""
    variables = {**moving, **fixed}

    # The index of a step is a tensor here: a rule can count with it, and cannot branch on it.
    def body(now: list[Tensor], at: tuple[Any, dict[int, Tensor]]) -> tuple[list[Tensor], tuple[list[Tensor], Tensor]]:
        index, own = at
        loop = program.loop(lambda _: data.at(own))
        end, loss = loop.transition(state.replace_tensors(now), variables, index, route="functional")
        assert loss.value is not None
        return _carried(end.tensors(), index), (_own(now), loss.value.clone())

    last, (before, values) = scan(body, state.tensors(), (counters, data.stacked))
    return state.replace_tensors(last), before, values


def _back(
    program: Program,
    end: InnerState,
    before: list[Tensor],
    moving: TensorDict,
    fixed: TensorDict,
    data: Data,
    counters: Tensor,
    seeds: list[Tensor],
) -> tuple[TensorDict, list[Tensor], Tensor | None, Tensor]:
    """Returns what the steps and their vjps give.

    Namely their part of the derivative in the variables, the cotangents of their start, the sum of their terms of the
    outer loss, and the inner losses before each.
    """

    def body(carry: tuple[list[Tensor], TensorDict, list[Tensor]], at: Any) -> Any:
        cotangents, grads, total = carry
        now, index, own = at
        loop = program.loop(lambda _: data.at(own))

        def step(tensors: list[Tensor], own_moving: TensorDict) -> tuple[list[Tensor], Tensor | None]:
            variables = {**own_moving, **fixed}
            after, loss = loop.transition(end.replace_tensors(tensors), variables, index, route="functional")
            term = loop.term(after, variables, index)
            return [*after.tensors(), *([] if term is None else [term])], loss.value

        pulled: Any = torch.func.vjp(step, now, moving, has_aux=True)
        outputs, pull, value = pulled
        terms = outputs[len(cotangents) :]
        earlier, part = pull([*cotangents, *(torch.ones_like(term) for term in terms)])
        sums = [sum_ + term for sum_, term in zip(total, terms, strict=True)]
        gathered = _carried([grads[name] + part[name] for name in grads], index)
        return (_carried(earlier, index), dict(zip(grads, gathered, strict=True)), sums), value.clone()

    zeros = {name: torch.zeros_like(value) for name, value in moving.items()}
    none = [torch.zeros((), dtype=seeds[0].dtype, device=seeds[0].device)] if program.has_terms else []
    start = (_own(seeds), zeros, none)
    (earlier, grads, total), values = scan(body, start, (before, counters, data.stacked), reverse=True)
    return grads, earlier, total[0] if total else None, values


def whole(
    program: Program, moving: TensorDict, fixed: TensorDict, data: Data, counters: Tensor
) -> tuple[TensorDict, Tensor, InnerState, Tensor]:
    """Returns the derivative of the outer loss in `moving`, the outer loss, the last state and the inner losses.

    From the initial state to the hypergradient in one program, with a loop forward and one back inside.
    """
    loop = program.loop(lambda _: data.first)
    first = loop.initial({**moving, **fixed})

    def start(own: TensorDict) -> list[Tensor]:
        return _own_with_path(loop.initial({**own, **fixed}).tensors())

    def outer(tensors: list[Tensor], own: TensorDict) -> Tensor:
        return loop.outer(first.replace_tensors(tensors).params, {**own, **fixed})

    begun: Any = torch.func.vjp(start, moving)
    tensors, pull_start = begun
    last, before, values = _forward(program, first.replace_tensors(_own(tensors)), moving, fixed, data, counters)
    judged: Any = torch.func.vjp(outer, last.tensors(), moving)
    outer_loss, pull_outer = judged
    seeds, direct = pull_outer(torch.ones_like(outer_loss))
    grads, earlier, term, _ = _back(program, last, before, moving, fixed, data, counters, seeds)
    (of_start,) = pull_start(earlier)
    total = {name: direct[name] + grads[name] + of_start[name] for name in moving}
    return total, outer_loss if term is None else outer_loss + term, last, values


def _carried(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    """Returns the tensors as new ones, for the next step of a loop in a program.

    PyTorch's compiler takes what a step hands on as it got it (a sum to which zero is added, a param without a
    gradient) for a tensor with memory of its own, and gives the memory that it shares to others. The factor is one,
    and the compiler does not know.
    """
    is_step = index >= 0
    return [(value * is_step).contiguous() for value in tensors]


def _own_with_path(tensors: list[Tensor]) -> list[Tensor]:
    return [value.clone(memory_format=torch.contiguous_format) for value in tensors]
