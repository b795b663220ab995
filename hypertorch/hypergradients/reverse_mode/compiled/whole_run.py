"""Runs of reverse mode with compiled functions: as one program where that can be, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from hypertorch import tree
from hypertorch.autodiff.noise import generator_states
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.reverse_mode.compiled.comparison import compare, compared
from hypertorch.hypergradients.reverse_mode.compiled.compilation import attempt, compilation, compiled, programs_made
from hypertorch.hypergradients.reverse_mode.compiled.costs import (
    count,
    is_measured,
    is_worth_compiling,
    note_compilation,
    note_compiled,
    note_eager,
    tell_start,
    timed,
)
from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError, TooManyProgramsError
from hypertorch.hypergradients.reverse_mode.compiled.looped_programs import whole
from hypertorch.hypergradients.reverse_mode.compiled.looped_steps import ONE_BY_ONE, may_loop, refuse_loop
from hypertorch.hypergradients.reverse_mode.compiled.not_compilable import may_compile, refuse
from hypertorch.hypergradients.reverse_mode.compiled.single_steps import Program, draws, try_dynamics
from hypertorch.hypergradients.reverse_mode.compiled.step_data import counters_of, data_of
from hypertorch.hypergradients.reverse_mode.graph import whole_graph
from hypertorch.hypergradients.reverse_mode.sweep import Grads, sweep
from hypertorch.inner import memo
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import Batch, TensorDict

# Steps in one program without a loop, where each is compiled anew, which takes seconds. Horizons up to it have programs
# of their own.
LONGEST_PROGRAM = 8

NOISY = "steps that draw noise"


def run_compiled(
    loop: InnerLoop,
    derivative: str,
    run: Callable[[InnerLoop], BackendResult],
    otherwise: Callable[[], BackendResult],
    *,
    where_it_pays: bool = False,
) -> BackendResult:
    """Returns the result of a run with compiled functions, or of one without, with a warning once, if need be.

    Args:
        loop: the loop.
        derivative: how the inner gradient is differentiated; one way may be compiled where another cannot.
        run: the run with compiled functions, of a loop that is counted only if the run succeeds.
        otherwise: the run without.
        where_it_pays: compile once the runs without have taken as long as a compilation takes.
    """
    if is_in_torch_dispatch_mode(include_infra_modes=False):
        # Nothing is remembered against the problem: outside of the mode it can be compiled.
        warnings.warn(
            "`compile=True`: a mode that watches every operation is active, such as `PeakMemory`, and PyTorch compiles "
            "nothing inside one. The run goes without compilation, with the same numbers. Pass `compile=False` here.",
            UserWarning,
            stacklevel=2,
        )
        return otherwise()
    problem = loop.problem
    family = (Program.of(loop).key, derivative)
    if not may_compile(family, lambda: kind_of(problem)):
        return otherwise()
    if where_it_pays and not is_worth_compiling(family):
        result, seconds = timed(loop.device, otherwise)
        note_eager(family, seconds)
        return result
    # What fails halfway leaves no counts behind.
    trial = loop.uncounted()
    what = f"`{type(problem.inner).__name__}` by `{type(problem.dynamics).__name__}`"
    try:
        with compilation(partial(tell_start, what)):
            result = _measured(family, what, trial, run)
    except NotCompilableError as error:
        reason = error
    else:
        loop.record.add(trial.record)
        return result
    # What is wrong with the problem itself is an error here, and no word on compilation.
    result = otherwise()
    refuse(family, kind_of(problem), f"a step of {what}", reason)
    return result


def _measured(family: Hashable, what: str, loop: InnerLoop, run: Callable[[InnerLoop], BackendResult]) -> BackendResult:
    """Returns a run with compiled functions, of which the time is taken until it is known what compilation saves."""
    count(family)
    if is_measured(family):
        return run(loop)
    made = programs_made()
    result, seconds = timed(loop.device, lambda: run(loop))
    (note_compiled if programs_made() == made else note_compilation)(family, what, seconds)
    return result


def compiled_whole(loop: InnerLoop, variables: TensorDict) -> BackendResult | None:
    """Returns the hypergradient by one compiled function: unroll, outer loss and the derivative of all of it.

    None where that cannot be: the run goes on from another one; noise is drawn, which is seeded at every step, and a
    program cannot do that; steps cannot be looped over, or get each its own data, and are more than a few.

    Cost: with a loop in the program, `2 num_steps` steps and memory of as many states, and of the large matrix
    products of as many steps; without, memory of the graphs of all steps, as far as the compiler keeps them.
    """
    key = Program.of(loop).key
    if loop.carry or memo.get(NOISY, key, False):
        return None
    try_dynamics(loop, tree.detach(variables))
    if may_loop(loop, variables):
        try:
            with attempt():
                return _whole_by_loop(loop, variables)
        except TooManyProgramsError:
            raise
        except NotCompilableError as error:
            refuse_loop(loop, error)
    if loop.num_steps > LONGEST_PROGRAM or memo.get(ONE_BY_ONE, key, False):
        return None
    try:
        with attempt():
            return _whole_unrolled(loop, variables)
    except TooManyProgramsError:
        raise
    except NotCompilableError:  # a step alone may be compilable all the same
        memo.note(ONE_BY_ONE, key, True)
        return None


def _whole_by_loop(loop: InnerLoop, variables: TensorDict) -> BackendResult | None:
    steps, made, program = range(loop.num_steps), programs_made(), Program.of(loop)
    if loop.num_steps > LONGEST_PROGRAM:
        # Data of many steps is stacked a part at a time, for a loop of as many steps.
        if data_of(loop, steps[:2]).stacked:
            return None
        # One program for all lengths.
        program = Program.of_steps(loop)
    found = _looped(loop, program, variables, steps)
    if found is None:
        return None
    if programs_made() != made:
        for few in compared(steps):
            _compare(_looped(loop, program, variables, few), loop, variables, few)
    grads, outer_loss, state, losses = found
    for _ in range(2):  # forward, and on the way back with a derivative
        for step, value in zip(steps, losses.unbind(), strict=True):
            loop.record.add_step(step, value)
    loop.record.hold(loop.num_steps + 1)
    loop.record.add_vjps(loop.num_steps, graph_steps=1)
    return BackendResult(grads={name: grads.get(name) for name in variables}, outer_loss=outer_loss, state=state)


def _looped(loop: InnerLoop, program: Program, variables: TensorDict, steps: range) -> Any:
    """Returns what a program with a loop over some steps gives, as if they were all."""
    return _called(loop, program, variables, whole, data_of(loop, steps), counters_of(loop, steps))


def _compare(found: Any, loop: InnerLoop, variables: TensorDict, steps: range) -> None:
    """Compares what a program gives for some steps, as if they were all, with the same without compilation."""
    grads, outer_loss, state, _ = found

    def run() -> BackendResult:
        own = loop.uncounted()
        (all_steps,), vjp = whole_graph(own, variables)
        return sweep(own, variables, [all_steps._replace(start=steps.start, stop=steps.stop)], vjp)

    try:
        expected, seconds = timed(loop.device, run)
    except RuntimeError as error:  # data that is written over under a graph, which PyTorch refuses
        raise NotCompilableError("the same steps cannot be run without it, to compare them") from error
    note_eager((Program.of(loop).key, "reverse"), seconds * loop.num_steps / len(steps))
    compare("the outer loss", [outer_loss], [expected.outer_loss])
    compare("the last state", state.tensors(), expected.state.tensors())
    compare("the hypergradient", [grads.get(name) for name in variables], [*expected.grads.values()])


def _whole_unrolled(loop: InnerLoop, variables: TensorDict) -> BackendResult | None:
    made = programs_made()
    found = _called(loop, Program.of(loop), variables, _whole, _batches(loop))
    if found is None:
        return None
    if programs_made() != made:
        _compare(found, loop, variables, range(loop.num_steps))
    grads, outer_loss, state, losses = found
    for step, value in losses.items():
        loop.record.add_step(step, value)
    loop.record.add_vjps(loop.num_steps, graph_steps=loop.num_steps)
    return BackendResult(grads={name: grads.get(name) for name in variables}, outer_loss=outer_loss, state=state)


def _batches(loop: InnerLoop) -> tuple[Batch, ...]:
    """Returns the data of all steps."""
    try:
        data = data_of(loop, range(loop.num_steps))
    except NotCompilableError:  # of several shapes, each a tensor of its own
        return tuple(loop.draw(step) for step in range(loop.num_steps))
    return tuple(data.at(value[step] for value in data.stacked.values()) for step in range(loop.num_steps))


def _called(loop: InnerLoop, program: Program, variables: TensorDict, function: Callable[..., Any], *data: Any) -> Any:
    """Returns what a program for a whole run gives; None if it drew noise, which is looked for at every call.

    Its steps then drew from one seed, not each from its own: the numbers are of another run, and are dropped.
    """
    moving = {name: value.detach() for name, value in variables.items() if value.requires_grad}
    fixed = {name: value.detach() for name, value in variables.items() if not value.requires_grad}
    run = compiled(function, (program.key, "whole"), loop.device, loops=function is whole)
    before = generator_states(loop.device)
    with torch.no_grad():
        found = run(program, moving, fixed, *data)
    if draws(before, loop.device):
        memo.note(NOISY, program.key, True)
        return None
    return found


def _whole(
    program: Program, moving: TensorDict, fixed: TensorDict, batches: tuple[Batch, ...]
) -> tuple[Grads, Tensor, InnerState, dict[int, Tensor]]:
    """Returns the derivative of the outer loss in `moving`, the outer loss, the last state and the inner losses."""
    loop = program.loop(lambda index: batches[index])
    # Leaves of the program: its inputs have no derivative outside.
    own = tree.leaves_requiring_grad(moving)
    variables = {**own, **fixed}
    result = sweep(loop, variables, *whole_graph(loop, variables))
    grads = {name: None if value is None else value.detach() for name, value in result.grads.items()}
    return grads, result.outer_loss, result.state.detached(), loop.record.losses
