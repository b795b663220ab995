"""The steps of an inner loop and their vjps as compiled functions, shared by all steps of all outer iterations."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.noise import generator_states
from hypertorch.hypergradients.guards.replay import check_values
from hypertorch.hypergradients.reverse_mode.compiled.comparison import compare
from hypertorch.hypergradients.reverse_mode.compiled.compilation import compiled, programs_made
from hypertorch.hypergradients.reverse_mode.graph import graph_vjp, with_terms
from hypertorch.hypergradients.reverse_mode.mixed import through_gradients
from hypertorch.hypergradients.reverse_mode.steps import Steps
from hypertorch.hypergradients.reverse_mode.sweep import (
    Cotangents,
    Differentiable,
    Grads,
    PulledBack,
    Segment,
    pull_back,
)
from hypertorch.inner import memo
from hypertorch.inner.loop import InnerLoop, inner_loop
from hypertorch.inner.state import InnerState
from hypertorch.inner.tasks import TaskSlice
from hypertorch.problem import BilevelProblem
from hypertorch.types import Batch, TensorDict

TRIED = "dynamics that took a step, by the sizes of variables and horizon"


class Program(NamedTuple):
    """What a loop is made of beside the data of its steps and its noise: enough to build it inside a traced function.

    Attributes:
        problem: the problem. A step does not know the horizon, and is the same program for all of them.
        num_tasks: length of the tasks axis; None without one.
        context: names of the variables that are the context's.
        outer_batch: the outer data of these tasks.
        device: of the tensors.
        inner_dtype: of the inner loss's products; None for that of the params.
    """

    problem: BilevelProblem
    num_tasks: int | None
    context: frozenset[str]
    outer_batch: Batch
    device: torch.device
    inner_dtype: torch.dtype | None

    @classmethod
    def of(cls, loop: InnerLoop) -> Program:
        """Returns the program of a loop."""
        return cls(loop.problem, loop.num_tasks, loop.context, loop.outer_batch, loop.device, loop.inner_dtype)

    @classmethod
    def of_steps(cls, loop: InnerLoop) -> Program:
        """Returns the program of a loop's steps, whatever their number.

        What a step does not read is made equal, so that problems that differ in it share a program.
        """
        program = cls.of(loop)
        return program._replace(problem=replace(program.problem, num_steps=1, seed=0, allow_unused=()))

    @property
    def has_terms(self) -> bool:
        """Whether the outer loss has terms at inner steps."""
        return self.problem.outer.has_step_loss

    @property
    def key(self) -> Hashable:
        """What loops have in common that may be served by the same compiled functions."""
        problem = self.problem
        return type(problem.inner), type(problem.outer), type(problem.dynamics), self.num_tasks is None

    def loop(self, draw: Callable[[int], Batch]) -> InnerLoop:
        """Returns the loop with the data of each step given, and no noise seeded: the caller does that.

        Args:
            draw: the data by the index of the step, of these tasks.
        """
        return inner_loop(
            self.problem,
            outer_batch=self.outer_batch,
            tasks=None if self.num_tasks is None else TaskSlice(start=0, stop=self.num_tasks, whole=True),
            context=self.context,
            noise_key=None,
            device=self.device,
            carry={},
            inner_dtype=self.inner_dtype,
            draw=draw,
        )


class CompiledSteps(Steps):
    """The steps of one loop as two compiled functions: a step, and a step with its vjp.

    They are pure functions of the state, the variables, the data and the index. `torch.compile` keeps the programs, so
    that they serve all loops of problems of the same classes, shapes and settings.

    Steps run again are known by the inner loss before them, which data and noise enter and which costs nothing: the end
    of a step is then only computed as far as its derivative needs it. The losses are compared in the end, by
    `check_replays`, so that an accelerator need not be waited for.

    The last step is differentiated without compilation: there the buffers of an optimiser have no cotangent yet, which
    would be a program of its own.

    Args:
        loop: the loop.
        variables: hyperparameters and context, as leaves.
        mixed: whether the derivative of the inner gradient is taken by forward over reverse. A step that draws noise,
            and one of a problem with buffers, goes by reverse over reverse all the same.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict, *, mixed: bool) -> None:
        self._loop = loop
        self._variables = variables
        self._is_last = True
        self._advanced = False
        self._mixed = mixed and not loop.has_buffers
        self._program = Program.of_steps(loop)
        # Without a graph: a program makes leaves of its own.
        self._moving = {name: value.detach() for name, value in variables.items() if value.requires_grad}
        self._fixed = {name: value.detach() for name, value in variables.items() if not value.requires_grad}
        self._names = list(variables)
        self._advance = compiled(_advance, self._program.key, loop.device)
        self._made = programs_made()
        self._first_values: dict[int, Tensor] = {}
        self._further_values: dict[int, Tensor] = {}

    def initial(self) -> InnerState:
        """Returns the state before the first step, in tensors of its own: the same program for every step."""
        constants = {**self._moving, **self._fixed}
        try_dynamics(self._loop, constants)
        with torch.no_grad():
            state = self._loop.initial(constants)
        return state.replace_tensors(_plain(state.tensors()))

    def advance(self, state: InnerState, step: int) -> InnerState:
        """Returns the state after a step."""
        batch = self._prepare(step)
        before = () if self._advanced or not self._mixed else generator_states(self._loop.device)
        # Grad mode is a part of what a program is compiled for, and is the same for all calls.
        with torch.no_grad():
            end, value, tracked = self._advance(
                self._program, state, self._moving, self._fixed, batch, self._counter(step)
            )
        # A gradient that is evaluated twice inside one program would draw twice.
        self._mixed = self._mixed and not draws(before, self._loop.device)
        self._advanced = True
        if self._is_new():
            with torch.no_grad():
                right, _ = self._loop.transition(state, {**self._moving, **self._fixed}, step)
            compare("the state", end.tensors(), right.tensors())
        self._loop.record.add_step(step, value, frozenset(tracked))
        if value is not None:
            # The first run counts, as the one whose states are kept.
            self._first_values.setdefault(step, value)
        return end

    def vjp(self, segment: Segment) -> Differentiable:
        """Returns a single step whose vjp is compiled, with what it runs; the last one by its graph."""
        if self._is_last or segment.connected or segment.arrival is None:
            # The first segment that arrives is the last of the run.
            self._is_last = False
            return graph_vjp(self._loop, self._variables, segment)
        return Differentiable(segment.arrival, partial(self._pull_back, segment))

    def _pull_back(self, segment: Segment, cotangents: Cotangents) -> PulledBack:
        loop, step = self._loop, segment.start
        run = compiled(_pull_back_mixed if self._mixed else _pull_back, self._program.key, loop.device)
        batch = self._prepare(step)
        with torch.no_grad():
            grads, before, term, value = run(
                self._program,
                # Sorted: a set has no order, and another order would be another program.
                tuple(sorted(loop.record.tracked_buffers)),
                segment.departure,
                self._moving,
                self._fixed,
                batch,
                self._counter(step),
                _plain(cotangents),
            )
        if self._is_new():
            own = loop.uncounted()
            own.record.track(loop.record.tracked_buffers)
            right = graph_vjp(own, self._variables, segment).pull_back(cotangents)
            compare("the hypergradient", [grads.get(name) for name in self._names], [*right.grads.values()])
            compare("the cotangents of the state", before, right.cotangents)
            compare("the terms of the outer loss", [term], [right.outer_loss])
        if value is not None:
            self._further_values[step] = value
        loop.record.add_step(step, value)
        loop.record.add_vjps(1, graph_steps=1)
        # A program differentiates in what moves: the other variables have no path.
        return PulledBack({name: grads.get(name) for name in self._names}, before, term)

    def gradient(self, params: TensorDict, step: int) -> TensorDict:
        """Returns the gradient of the inner loss of a step; at the same params it has the same bits."""
        run = compiled(_gradient, self._program.key, self._loop.device)
        batch = self._prepare(step)
        # Tensors of the same kind in every call: the same program serves
        # the run and its way back, with the same bits.
        own = dict(zip(params, _plain(list(params.values())), strict=True))
        with torch.no_grad():
            grads, value = run(self._program, own, self._moving, self._fixed, batch, self._counter(step))
        if self._is_new():
            with torch.enable_grad():
                loss = self._loop.uncounted().loss_at(InnerState(params, {}), step)
                right = loss.gradient(tree.leaves_requiring_grad(params), {**self._moving, **self._fixed})
            compare("the inner gradient", [*grads.values()], [right[name] for name in grads])
        self._loop.record.add_step(step, value)
        return grads

    def check_replays(self) -> None:
        """Raises `ReplayError` if a step run again had another inner loss, so that its derivative is of another run."""
        check_values(self._first_values, self._further_values, inner_eps=self._loop.inner_eps)

    def _is_new(self) -> bool:
        """Returns whether a program was compiled since the last call."""
        before, self._made = self._made, programs_made()
        return self._made != before

    def _prepare(self, step: int) -> Batch:
        """Returns the data of a step, and seeds its noise: a program does neither."""
        index = self._loop.first_index + step
        batch = self._loop.draw(index)
        self._loop.seed(index)
        return batch

    def _counter(self, step: int) -> int:
        # Counted from 2, as `compilation.COUNTER` explains.
        return self._loop.first_index + step + 2


def try_dynamics(loop: InnerLoop, constants: TensorDict) -> None:
    """Runs a step without compilation for dynamics that are new, and for variables or a horizon of another size.

    What an object computes at first need and keeps cannot be computed while a function is compiled, and what is wrong
    with a problem is better said without a compiler: a program checks no setting of the rule. That step is not counted.
    A check of a rule that reads values, and not sizes alone, is made before every run.
    """

    def take_one() -> bool:
        # `transition` and not `step`, which would count.
        state = loop.initial(constants)
        loop.transition(state, constants, 0)
        return _checks_sizes_alone(loop, loop.trained(state.params), constants)

    sizes = tuple((name, value.shape, value.dtype) for name, value in constants.items())
    with torch.no_grad():
        if not memo.recall(TRIED, (memo.Same(loop.dynamics), loop.num_steps, sizes), take_one):
            loop.initial(constants)


def _checks_sizes_alone(loop: InnerLoop, trained: TensorDict, constants: TensorDict) -> bool:
    """Returns whether the dynamics' check, which has passed, passes with tensors that have no values too."""
    one_task = trained if loop.num_tasks is None else {name: value[0] for name, value in trained.items()}
    params, hparams = ({name: value.to("meta") for name, value in own.items()} for own in (one_task, constants))
    try:
        loop.dynamics.check(params, hparams, loop.num_steps)
    except Exception:  # noqa: BLE001 - of whatever kind: a value was asked for
        return False
    return True


def draws(before: tuple[Tensor, ...], device: torch.device) -> bool:
    """Returns whether torch's generators have moved since they were in these states; False for none."""
    return any(not torch.equal(then, now) for then, now in zip(before, generator_states(device), strict=False))


def _plain(tensors: list) -> list:
    """Returns the tensors, contiguous and each an object of its own: what else they are would make a new program."""
    return [None if value is None else value.detach().contiguous() for value in tensors]


def _advance(
    program: Program, state: InnerState, moving: TensorDict, fixed: TensorDict, batch: Batch, counter: int
) -> tuple[InnerState, Tensor | None, tuple[str, ...]]:
    """Returns the state after a step, the inner loss before it, and the buffers that have a derivative."""
    index = counter - 2
    loop = program.loop(lambda _: batch)
    end, loss = loop.transition(state, {**moving, **fixed}, index)
    return end.replace_tensors(_plain(end.tensors())), loss.value, tuple(sorted(loss.tracked_buffers))


def _gradient(
    program: Program, params: TensorDict, moving: TensorDict, fixed: TensorDict, batch: Batch, counter: int
) -> tuple[TensorDict, Tensor | None]:
    """Returns the gradient of the inner loss, and its value."""
    loss = program.loop(lambda _: batch).loss_at(InnerState(params, {}), counter - 2)
    return loss.gradient(params, {**moving, **fixed}), loss.value


def _pull_back(
    program: Program,
    tracked: tuple[str, ...],
    departure: InnerState,
    moving: TensorDict,
    fixed: TensorDict,
    batch: Batch,
    counter: int,
    cotangents: Cotangents,
) -> tuple[Grads, Cotangents, Tensor | None, Tensor | None]:
    """Returns what a step and its vjp give.

    Namely its part of the derivative in the variables, the cotangents of its start, its term of the outer loss, and the
    inner loss before it.
    """
    index = counter - 2
    loop = program.loop(lambda _: batch)
    # `leaves` asks the record, and this loop's is new.
    loop.record.track(tracked)
    with torch.enable_grad():
        leaves, own = loop.leaves(departure), tree.leaves_requiring_grad(moving)
        variables = {**own, **fixed}
        end, loss = loop.transition(leaves, variables, index)
        term = loop.term(end, variables, index)
    outputs, seeds = with_terms(end, cotangents, term)
    grads, before = pull_back(outputs, seeds, leaves, own)
    return _detached(grads), _plain(before), None if term is None else term.detach(), loss.value


def _pull_back_mixed(
    program: Program,
    _: tuple[str, ...],
    departure: InnerState,
    moving: TensorDict,
    fixed: TensorDict,
    batch: Batch,
    counter: int,
    cotangents: Cotangents,
) -> tuple[Grads, Cotangents, Tensor | None, Tensor | None]:
    """Returns what `_pull_back` returns, with the derivative of the inner gradient by forward over reverse.

    Zeros, where there is no path through the gradient.
    """
    index = counter - 2
    loop = program.loop(lambda _: batch)
    with torch.enable_grad():
        leaves, own = loop.leaves(departure), tree.leaves_requiring_grad(moving)
        variables = {**own, **fixed}
        end, loss = loop.transition(leaves, variables, index, route="leaf")
        term = loop.term(end, variables, index)
    outputs, seeds = with_terms(end, cotangents, term)
    outputs, seeds, value = through_gradients(loss, outputs, seeds)
    grads, before = pull_back(outputs, seeds, leaves, own)
    return _detached(grads), _plain(before), None if term is None else term.detach(), value


def _detached(grads: Grads) -> Grads:
    return {name: None if value is None else value.detach() for name, value in grads.items()}
