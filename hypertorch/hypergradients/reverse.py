"""Reverse-mode differentiation through the whole unrolled inner loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.derivatives import vjp
from hypertorch.errors import IncompatibleBackendError, ReplayError
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.inner_loop import InnerLoop, InnerState
from hypertorch.types import TensorDict

_REPLAY_TOLERANCE = 100.0  # in units of the dtype's machine epsilon, relative to the tensor's largest entry


@dataclass(frozen=True, kw_only=True)
class Reverse(Hypergradient):
    """The exact hypergradient by reverse mode through all inner steps.

    With `a_T = dE/ds_T`, going back: `a_{t-1} = a_t dPhi_t/ds_{t-1}` and `df/dhparams` gathers
    `a_t dPhi_t/dhparams`, the initialisation's part `a_0 dPhi_0/dhparams` and the direct term `dE/dhparams`.

    Without `checkpoint_every` the graph of all steps is kept. With it, one state in every `checkpoint_every` is kept,
    and each segment is run again from its state, with a graph, when the reverse pass reaches it: the same number, less
    memory. 1 keeps every state and one step's graph; `round(sqrt(num_steps))` needs the least memory.

    Cost: `num_steps` steps and as many vjps, and as many steps again with `checkpoint_every`. Memory: graphs of
    `num_steps` steps; with `checkpoint_every = k`, `num_steps / k` states and graphs of `k` steps.

    Args:
        checkpoint_every: steps between kept states (unit: steps, at least 1); "sqrt" for
            `round(sqrt(num_steps))`; None for the whole graph.

    Raises:
        ValueError: if `checkpoint_every` is below 1 or an unknown word.
        IncompatibleBackendError: (from `compute`) if `checkpoint_every` is above `num_steps`.
        ReplayError: (from `compute`) if a segment run again does not arrive at the same state.

    References:
        Maclaurin, Duvenaud and Adams (2015), algorithm 2, without reversal; Franceschi et al. (2017), algorithm 1;
        Griewank and Walther (2000), Revolve (checkpoints).
    """

    checkpoint_every: int | Literal["sqrt"] | None = None

    def __post_init__(self) -> None:
        every = self.checkpoint_every
        if every is None or every == "sqrt":
            return
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"`checkpoint_every` is {every!r}: states are kept every so many steps, at least 1. Pass a whole "
                "number, 'sqrt', or None to keep the whole graph."
            )

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the exact derivative of the outer loss in `variables`."""
        every = self.checkpoint_every
        if every is None or loop.num_steps == 0:
            return _whole_graph(loop, variables)
        if every == "sqrt":
            every = max(1, round(math.sqrt(loop.num_steps)))
        if every > loop.num_steps:
            raise IncompatibleBackendError(
                f"`Reverse(checkpoint_every={every})` got a problem with `num_steps` = {loop.num_steps}: no state "
                "would be kept between segments. Use at most that many steps, or `Reverse()` for the whole graph."
            )
        return _checkpointed(loop, variables, every)


def _whole_graph(loop: InnerLoop, variables: TensorDict) -> BackendResult:
    """Runs every step with its graph, then one reverse pass."""
    with torch.enable_grad():
        state = loop.initial(variables)
        outer_loss = torch.zeros((), device=loop.device)
        for step in range(loop.num_steps):
            state = loop.step(state, variables, step)
            if loop.has_step_loss:
                outer_loss = outer_loss + loop.step_loss(state.params, variables, step)
        outer_loss = outer_loss + loop.outer_loss(state.params, variables)
    loop.cost.vjps += loop.num_steps
    loop.cost.graph_steps = loop.num_steps
    return BackendResult(
        grads=vjp([outer_loss], [torch.ones_like(outer_loss)], variables),
        outer_loss=outer_loss.detach(),
        state=state.detached(),
    )


def _checkpointed(loop: InnerLoop, variables: TensorDict, every: int) -> BackendResult:
    """Runs forward keeping states, then goes back segment by segment."""
    starts = range(0, loop.num_steps, every)
    kept, last = _run_keeping(loop, tree.detach(variables), every)
    loop.cost.stored_states = len(kept) + 1
    loop.cost.graph_steps = min(every, loop.num_steps)

    grads, cotangents, outer_loss = _last_term(loop, variables, last)
    arrival = last
    for start in reversed(starts):
        stop = min(start + every, loop.num_steps)
        departure = kept.pop()
        part, cotangents, step_losses = _segment(loop, variables, departure, arrival, cotangents, start, stop)
        grads = _accumulate(grads, part)
        outer_loss = outer_loss + step_losses
        arrival = departure

    with torch.enable_grad():
        initial = loop.initial(variables)
    grads = _accumulate(grads, vjp(initial.tensors(), cotangents, variables))
    return BackendResult(grads=grads, outer_loss=outer_loss, state=last.detached())


def _run_keeping(loop: InnerLoop, variables: TensorDict, every: int) -> tuple[list[InnerState], InnerState]:
    """Returns the states before steps 0, every, 2 every, ..., and the last state."""
    kept: list[InnerState] = []
    with torch.no_grad():
        state = loop.initial(variables)
        for step in range(loop.num_steps):
            if step % every == 0:
                kept.append(state)
            state = loop.step(state, variables, step)
    return kept, state


def _last_term(
    loop: InnerLoop, variables: TensorDict, last: InnerState
) -> tuple[dict[str, Tensor | None], list[Tensor | None], Tensor]:
    """Returns the direct term, the cotangents of the last state and the outer loss there."""
    leaves = loop.leaves(last)
    with torch.enable_grad():
        outer_loss = loop.outer_loss(leaves.params, variables)
    grads, cotangents = _pull_back([outer_loss], [torch.ones_like(outer_loss)], leaves, variables)
    return grads, cotangents, outer_loss.detach()


def _segment(
    loop: InnerLoop,
    variables: TensorDict,
    departure: InnerState,
    arrival: InnerState,
    cotangents: list[Tensor | None],
    start: int,
    stop: int,
) -> tuple[dict[str, Tensor | None], list[Tensor | None], Tensor]:
    """Runs steps `start .. stop - 1` again with a graph and pulls the cotangents of their end back to their start."""
    leaves = loop.leaves(departure)
    with torch.enable_grad():
        state = leaves
        step_losses = torch.zeros((), device=loop.device)
        for step in range(start, stop):
            state = loop.step(state, variables, step)
            if loop.has_step_loss:
                step_losses = step_losses + loop.step_loss(state.params, variables, step)
    _check_replay(state, arrival, start, stop)
    loop.cost.vjps += stop - start
    outputs = [*state.tensors(), step_losses]
    grads, cotangents = _pull_back(outputs, [*cotangents, torch.ones_like(step_losses)], leaves, variables)
    return grads, cotangents, step_losses.detach()


def _pull_back(
    outputs: list[Tensor], cotangents: list[Tensor | None], leaves: InnerState, variables: TensorDict
) -> tuple[dict[str, Tensor | None], list[Tensor | None]]:
    """Returns the cotangents of the variables, by name, and of the state's tensors, in order."""
    # Names of the two cannot clash: the state's are numbered.
    numbered = {f"\0{position}": tensor for position, tensor in enumerate(leaves.tensors())}
    joint = vjp(outputs, cotangents, {**variables, **numbered})
    return {name: joint[name] for name in variables}, [joint[name] for name in numbered]


def _accumulate(total: dict[str, Tensor | None], part: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: tree.add_optional(value, part[name]) for name, value in total.items()}


def _check_replay(replayed: InnerState, expected: InnerState, start: int, stop: int) -> None:
    """Raises `ReplayError` if a segment run again arrived elsewhere.

    Some backward kernels differ in the last bit with and without a graph, hence the tolerance.
    """
    with torch.no_grad():
        for name, again, first in zip(expected.names(), replayed.tensors(), expected.tensors(), strict=True):
            if not tree.is_differentiable(first):
                continue
            scale = first.abs().max() if first.numel() else first.sum()
            gap = (again - first).abs().max() if first.numel() else first.sum()
            bound = _REPLAY_TOLERANCE * (stop - start) * torch.finfo(first.dtype).eps
            if bool(gap > bound * scale.clamp(min=torch.finfo(first.dtype).tiny)):
                raise ReplayError(
                    f"`{name}` after inner step {stop - 1} differs by {float(gap):.3g} from the first run when steps "
                    f"{start} to {stop - 1} are run again: the derivative would belong to another run. Let "
                    "`InnerProblem.batch` and `loss` depend on their arguments only (no iterator, no counter, no "
                    "generator of your own), or use `Reverse()`, which runs every step once."
                )
