"""Runs of reverse mode with compiled functions: as one program where the horizon is short, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from hypertorch import tree
from hypertorch.autodiff.noise import generator_states
from hypertorch.hypergradients.base import BackendResult
from hypertorch.hypergradients.reverse_mode.compilation import NotCompilableError, compilation, compiled
from hypertorch.hypergradients.reverse_mode.compile_refusals import may_compile, refuse
from hypertorch.hypergradients.reverse_mode.compiled_steps import Program, draws, try_dynamics
from hypertorch.hypergradients.reverse_mode.graph import by_whole_graph
from hypertorch.hypergradients.reverse_mode.sweep import Grads
from hypertorch.inner import memo
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.loop import INIT, InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import Batch, TensorDict

# Steps in one program: each is compiled anew, which takes seconds.
LONGEST_PROGRAM = 8

NOISY = "steps that draw noise"


def run_compiled(
    loop: InnerLoop, derivative: str, run: Callable[[InnerLoop], BackendResult], otherwise: Callable[[], BackendResult]
) -> BackendResult:
    """Returns the result of a run with compiled functions, or of one without, with a warning once, if need be.

    Args:
        loop: the loop.
        derivative: how the inner gradient is differentiated; one way may be compiled where another cannot.
        run: the run with compiled functions, of a loop that is counted only if the run succeeds.
        otherwise: the run without.
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
    # What fails halfway leaves no counts behind.
    trial = loop.uncounted()
    try:
        with compilation():
            result = run(trial)
    except NotCompilableError as error:
        reason = error
    else:
        loop.record.add(trial.record)
        return result
    # What is wrong with the problem itself is an error here, and no word on compilation.
    result = otherwise()
    what = f"a step of `{type(problem.inner).__name__}` by `{type(problem.dynamics).__name__}`"
    refuse(family, kind_of(problem), what, reason)
    return result


def compiled_whole(loop: InnerLoop, variables: TensorDict) -> BackendResult | None:
    """Returns the hypergradient by one compiled function: unroll, outer loss and the derivative of all of it.

    None if the horizon is long, the run goes on from another one, or noise is drawn: the generators are seeded at
    every step, which a program cannot do.

    Cost: memory of the graphs of all steps, as far as the compiler keeps them.
    """
    program = Program.of(loop)
    key = (program.key, "whole")
    if loop.num_steps > LONGEST_PROGRAM or loop.carry or memo.get(NOISY, key, False):
        return None
    try_dynamics(loop, tree.detach(variables))
    batches = tuple(loop.draw(step) for step in range(loop.num_steps))
    loop.seed(INIT)
    before = generator_states(loop.device)
    moving = {name: value.detach() for name, value in variables.items() if value.requires_grad}
    fixed = {name: value.detach() for name, value in variables.items() if not value.requires_grad}
    with torch.no_grad():
        grads, outer_loss, state, losses = compiled(_whole, key, loop.device)(program, moving, fixed, batches)
    # The steps drew from one seed, not each from its own: these numbers are of another run, and are dropped.
    if draws(before, loop.device):
        memo.note(NOISY, key, True)
        return None
    for step, value in losses.items():
        loop.record.add_step(step, value)
    loop.record.add_vjps(loop.num_steps, graph_steps=loop.num_steps)
    return BackendResult(grads={name: grads.get(name) for name in variables}, outer_loss=outer_loss, state=state)


def _whole(
    program: Program, moving: TensorDict, fixed: TensorDict, batches: tuple[Batch, ...]
) -> tuple[Grads, Tensor, InnerState, dict[int, Tensor]]:
    """Returns the derivative of the outer loss in `moving`, the outer loss, the last state and the inner losses."""
    loop = program.loop(lambda index: batches[index])
    # Leaves of the program: its inputs have no derivative outside.
    own = tree.leaves_requiring_grad(moving)
    variables = {**own, **fixed}
    result = by_whole_graph(loop, variables)
    grads = {name: None if value is None else value.detach() for name, value in result.grads.items()}
    return grads, result.outer_loss, result.state.detached(), loop.record.losses
