"""The steps of an inner loop and their vjps as compiled functions, shared by all steps of all outer iterations."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.compilation import compiled
from hypertorch.dynamics import Dynamics
from hypertorch.hypergradients.mixed_mode import through_gradients
from hypertorch.hypergradients.pull_back import Cotangents, Grads, PulledBack, pull_back, pull_back_steps
from hypertorch.hypergradients.replay import check_values
from hypertorch.hypergradients.step_by_step import Steps
from hypertorch.inner_loop import InnerLoop, LoopProgram
from hypertorch.inner_state import InnerState
from hypertorch.noise import generator_states
from hypertorch.types import Batch, TensorDict

_tried: WeakValueDictionary[int, Dynamics] = WeakValueDictionary()


class CompiledSteps(Steps):
    """The steps of one loop as two compiled functions: a step, and a step with its vjp.

    They are pure functions of the state, the variables, the data and the index. `torch.compile` keeps the programs, so
    that they serve all loops of problems of the same classes, shapes and settings.

    Steps run again are known by the inner loss before them, which data and noise enter and which costs nothing: the end
    of a step is then only computed as far as its derivative needs it. The losses are compared in the end, by
    `check_replays`, so that an accelerator need not be waited for.

    The last step is pulled back without compilation: there the buffers of an optimiser have no cotangent yet, which
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
        self._pulled_back = False
        self._advanced = False
        self._mixed = mixed and not loop.has_buffers
        program = loop.program()
        # A step does not know of the horizon, and is the same program for all of them.
        self._program = program._replace(problem=replace(program.problem, num_steps=1, seed=0, allow_unused=()))
        self._moving = {name: value.detach() for name, value in variables.items() if value.requires_grad}
        self._fixed = {name: value.detach() for name, value in variables.items() if not value.requires_grad}
        self._names = list(variables)
        self._advance = compiled(_advance, program_key(self._program), loop.device)
        self._first_values: dict[int, Tensor] = {}
        self._further_values: dict[int, Tensor] = {}

    def initial(self) -> InnerState:
        """Returns the state before the first step, in tensors of its own: the same program for every step."""
        constants = {**self._moving, **self._fixed}
        try_dynamics(self._loop, constants)
        with torch.no_grad():
            state = self._loop.initial(constants)
        return state.replace_tensors(_plain(state.tensors()))

    def advance(self, state: InnerState, step: int, *, first_run: bool = True) -> InnerState:
        """Returns the state after a step."""
        batch = self._loop.prepare_step(step)
        before = () if self._advanced or not self._mixed else generator_states(self._loop.device)
        with torch.no_grad():
            end, value, tracked = self._advance(
                self._program, state, self._moving, self._fixed, batch, self._counter(step)
            )
        # A gradient that is evaluated twice inside one program would draw twice.
        self._mixed = self._mixed and not draws(before, self._loop.device)
        self._advanced = True
        self._loop.note_tracked(frozenset(tracked))
        self._loop.count_value(value if first_run else None)
        if first_run and value is not None:
            self._first_values[step] = value
        return end

    def pull_back(self, departure: InnerState, cotangents: Cotangents, step: int, arrival: InnerState) -> PulledBack:
        """Returns what a step adds to the hypergradient, given the cotangents of its end."""
        if not self._pulled_back:
            self._pulled_back = True
            return pull_back_steps(self._loop, self._variables, departure, cotangents, step, step + 1, arrival=arrival)
        run = compiled(_pull_back_mixed if self._mixed else _pull_back, program_key(self._program), self._loop.device)
        batch = self._loop.prepare_step(step)
        with torch.no_grad():
            grads, before, term, value = run(
                self._program,
                tuple(sorted(self._loop.tracked_buffers)),
                departure,
                self._moving,
                self._fixed,
                batch,
                self._counter(step),
                _plain(cotangents),
            )
        if value is not None:
            self._further_values[step] = value
        self._loop.count_value(value)
        self._loop.cost.vjps += 1
        self._loop.cost.graph_steps = max(self._loop.cost.graph_steps, 1)
        return PulledBack({name: grads.get(name) for name in self._names}, before, term)

    def gradient(self, params: TensorDict, step: int, *, first_run: bool) -> TensorDict:
        """Returns the gradient of the inner loss of a step; at the same params it has the same bits.

        Args:
            params: where.
            step: the step.
            first_run: whether the step was not run before, so that its loss is news.
        """
        run = compiled(_gradient, program_key(self._program), self._loop.device)
        batch = self._loop.prepare_step(step)
        own = dict(zip(params, _plain(list(params.values())), strict=True))
        with torch.no_grad():
            grads, value = run(self._program, own, self._moving, self._fixed, batch, self._counter(step))
        self._loop.count_value(value if first_run else None)
        return grads

    def check_replays(self) -> None:
        """Raises `ReplayError` if a step run again had another inner loss, so that its derivative is of another run."""
        check_values(self._first_values, self._further_values, inner_eps=self._loop.inner_eps)

    def _counter(self, step: int) -> int:
        return self._loop.first_index + step + 2


def try_dynamics(loop: InnerLoop, constants: TensorDict) -> None:
    """Runs a step without compilation for dynamics that are new.

    What an object computes at first need and keeps cannot be computed while a function is compiled, and what is wrong
    with a problem is better said without a compiler. That step is not counted.
    """
    dynamics = loop.dynamics
    if _tried.get(id(dynamics)) is not dynamics:
        with torch.no_grad():
            state = loop.initial(constants)
            loop.apply(loop.bound_loss(state, 0), state, constants, 0)
        _tried[id(dynamics)] = dynamics


def draws(before: tuple[Tensor, ...], device: torch.device) -> bool:
    """Returns whether torch's generators have moved since they were in these states; False for none."""
    return any(not torch.equal(then, now) for then, now in zip(before, generator_states(device), strict=False))


def program_key(program: LoopProgram) -> Hashable:
    """Returns what loops have in common that may be served by the same compiled functions."""
    problem = program.problem
    return type(problem.inner), type(problem.outer), type(problem.dynamics), program.num_tasks is None


def _plain(tensors: list) -> list:
    """Returns the tensors, contiguous and each an object of its own: what else they are would make a new program."""
    return [None if value is None else value.detach().contiguous() for value in tensors]


def _advance(
    program: LoopProgram, state: InnerState, moving: TensorDict, fixed: TensorDict, batch: Batch, counter: int
) -> tuple[InnerState, Tensor | None, tuple[str, ...]]:
    """Returns the state after a step, the inner loss before it, and the buffers that have a derivative."""
    index = counter - 2
    loop = program.loop(lambda _: batch)
    loss = loop.bound_loss(state, index)
    end = loop.apply(loss, state, {**moving, **fixed}, index)
    return end.replace_tensors(_plain(end.tensors())), loss.value, tuple(sorted(loss.tracked_buffers))


def _gradient(
    program: LoopProgram, params: TensorDict, moving: TensorDict, fixed: TensorDict, batch: Batch, counter: int
) -> tuple[TensorDict, Tensor | None]:
    """Returns the gradient of the inner loss, and its value."""
    loss = program.loop(lambda _: batch).bound_loss(InnerState(params, {}), counter - 2)
    return loss.gradient(params, {**moving, **fixed}), loss.value


def _pull_back(
    program: LoopProgram,
    tracked: tuple[str, ...],
    departure: InnerState,
    moving: TensorDict,
    fixed: TensorDict,
    batch: Batch,
    counter: int,
    cotangents: Cotangents,
) -> tuple[Grads, Cotangents, Tensor, Tensor | None]:
    """Returns what a step and its vjp give.

    Namely its part of the derivative in the variables, the cotangents of its start, its term of the outer loss, and the
    inner loss before it.
    """
    index = counter - 2
    loop = program.loop(lambda _: batch)
    loop.note_tracked(frozenset(tracked))
    with torch.enable_grad():
        leaves, own = loop.leaves(departure), tree.leaves_requiring_grad(moving)
        variables = {**own, **fixed}
        loss = loop.bound_loss(leaves, index)
        end = loop.apply(loss, leaves, variables, index)
        outputs, seeds, term = _with_term(loop, end, variables, index, cotangents)
    grads, before = pull_back(outputs, seeds, leaves, own)
    return _detached(grads), _plain(before), term.detach(), loss.value


def _pull_back_mixed(
    program: LoopProgram,
    _: tuple[str, ...],
    departure: InnerState,
    moving: TensorDict,
    fixed: TensorDict,
    batch: Batch,
    counter: int,
    cotangents: Cotangents,
) -> tuple[Grads, Cotangents, Tensor, Tensor | None]:
    """Returns what `_pull_back` returns, with the derivative of the inner gradient by forward over reverse.

    Zeros, where there is no path through the gradient.
    """
    index = counter - 2
    loop = program.loop(lambda _: batch)
    with torch.enable_grad():
        leaves, own = loop.leaves(departure), tree.leaves_requiring_grad(moving)
        variables = {**own, **fixed}
        loss = loop.bound_loss(leaves, index, route="leaf")
        end = loop.apply(loss, leaves, variables, index)
        outputs, seeds, term = _with_term(loop, end, variables, index, cotangents)
    outputs, seeds, value = through_gradients(loss, outputs, seeds)
    grads, before = pull_back(outputs, seeds, leaves, own)
    return _detached(grads), _plain(before), term.detach(), value


def _with_term(
    loop: InnerLoop, end: InnerState, variables: TensorDict, index: int, cotangents: Cotangents
) -> tuple[list[Tensor], Cotangents, Tensor]:
    """Returns a step's outputs with their cotangents, the term of the outer loss at the step among them."""
    if not loop.has_step_loss:
        return end.tensors(), list(cotangents), torch.zeros((), device=loop.device)
    term = loop.step_loss(end.params, variables, index)
    return [*end.tensors(), term], [*cotangents, torch.ones_like(term)], term


def _detached(grads: Grads) -> Grads:
    return {name: None if value is None else value.detach() for name, value in grads.items()}
