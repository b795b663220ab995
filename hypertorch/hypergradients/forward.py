"""Forward-mode differentiation: the derivative of the inner state in every hyperparameter goes along with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, PathBlind
from hypertorch.hypergradients.forward_mode.tangent_choice import serving_route
from hypertorch.hypergradients.forward_mode.tangents import (
    ForwardState,
    TangentRoute,
    check_chunk_size,
    complete_grads,
    directional_grads,
    with_last_term,
)
from hypertorch.hypergradients.guards.replay import Replays
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict, TensorMapping

_COUNT = "shared.tangents"  # in a carry: how many tangents it holds


@dataclass(frozen=True, kw_only=True)
class Forward(PathBlind):
    """The exact hypergradient by forward mode: tangents of all hyperparameters are carried through every inner step.

    With `Z_t = ds_t/dhparams`, one column for every scalar entry of the hyperparameters and of the context:

        Z_0 = dPhi_0/dhparams,   Z_t = dPhi_t/ds Z_{t-1} + dPhi_t/dhparams,   df/dhparams = dE/ds Z_T + dE/dhparams

    Its memory does not grow with `num_steps`, and after any step the hypergradient up to there can be read: for few
    hyperparameters and long runs. The columns of a chunk are carried together, by `torch.func.vmap` of
    `torch.func.jvp`; one at a time (`chunk_size=1`, or a single entry) they are dual numbers over plain autograd,
    which asks less of a model.

    PyTorch's forward mode is silently wrong for some operations. Before a route serves a kind of problem (the same
    classes, sizes and dtypes), the initial state and one step are therefore compared with reverse over reverse. Where
    a route is wrong, or PyTorch does not support it, the other one is taken, and the log says so once. Where both fail,
    the problem is refused. An error that appears at some values only is not searched for again.

    `start`, `advance` and `read` are `compute` in three parts, for a run whose hypergradient is read between steps.

    Cost: with `P` scalar entries, `num_steps` steps for each of the `P / chunk_size` chunks, `P num_steps` jvps, and
    one vjp of the outer loss per chunk. Memory: `1 + chunk_size` states, as many directions in the hyperparameters,
    and one step with as many tangents, whatever `num_steps` is; with `keep_tangents` all `P` tangents at the end.
    The comparison is not counted. The first time for a kind of problem it takes at most 7 steps, 4 jvps and 2 vjps, and
    the memory of one step's graph by reverse over reverse; later, one evaluation of `init_params` and of the
    inner loss.

    Args:
        chunk_size: entries of the hyperparameters whose tangents are carried at once (at least 1); None for all.
        keep_tangents: go on from the tangents of the last outer step, where the inner run goes on too
            (`warm_start=True`): the derivative then reaches back to the start of the run, through hyperparameters
            that have changed since (real-time hyperparameter optimisation). Not with a context.

    Raises:
        ValueError: if `chunk_size` is below 1; (from `compute`) if `carry` holds no tangents, or other ones.
        IncompatibleBackendError: (from `compute`) if PyTorch has no forward derivative of an operation, or a wrong
            one, or `keep_tangents` meets a problem that starts afresh or has a context.
        ReplayError: (from `compute`) if a step, or the run of another chunk, does not arrive at the same state.

    References:
        Franceschi, Donini, Frasconi and Pontil (2017), algorithm 2 and section 3.3 (real time).
    """

    chunk_size: int | None = None
    keep_tangents: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "keep_tangents")
        check_chunk_size(self.chunk_size, "entries")

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the exact derivative of the outer loss in `variables`."""
        grads = complete_grads(variables, [])
        carries: list[TensorDict] = []
        first: BackendResult | None = None
        replays = Replays(inner_eps=loop.inner_eps)
        # Chosen before the chunks, so that all of them take the same route.
        route = self._route(loop, variables)
        for entries in self._chunks(loop.share(_num_entries(variables))):
            part = self._chunk(loop, variables, entries, route)
            # Every chunk runs the inner loop again: its columns belong to
            # those of the others only if it is the same run.
            if first is None:
                first = part
            else:
                replays.add(part.state, first.state, 0, loop.num_steps)
            grads = complete_grads(variables, [grads, part.grads])
            carries.append(part.carry)
        replays.check()
        return BackendResult(
            grads=grads,
            outer_loss=part.outer_loss,
            state=part.state,
            carry=_join_carries(carries, 1 if loop.has_tasks_axis else 0),
        )

    def num_parts(self, hparams: TensorMapping) -> int:
        """Returns the number of scalar entries; 1 with `keep_tangents`, whose tangents one process carries on."""
        return 1 if self.keep_tangents else _num_entries(hparams)

    def start(self, loop: InnerLoop, variables: TensorDict, entries: range | None = None) -> ForwardState:
        """Returns the inner state before the first step, with its tangents.

        Args:
            loop: the inner loop.
            variables: hyperparameters and context.
            entries: which scalar entries of the variables, counted through all of them; None for all.
        """
        entries = range(_num_entries(variables)) if entries is None else entries
        return self._started(loop, variables, entries, self._route(loop, variables))

    def advance(self, loop: InnerLoop, variables: TensorDict, run: ForwardState, step: int) -> ForwardState:
        """Returns the inner state after a step, with its tangents; the one before is left as it is.

        Args:
            loop: the inner loop.
            variables: hyperparameters and context.
            run: the state before.
            step: position in the horizon.
        """
        return run.route.advance(loop, variables, run, step)

    def read(self, loop: InnerLoop, variables: TensorDict, run: ForwardState) -> BackendResult:
        """Returns the derivative of the outer loss at the state reached so far, in the entries whose tangents it has.

        Args:
            loop: the inner loop.
            variables: hyperparameters and context.
            run: the state; it can be advanced further afterwards.
        """
        return self._result(loop, variables, with_last_term(loop, variables, run))

    def _result(self, loop: InnerLoop, variables: TensorDict, done: ForwardState) -> BackendResult:
        return BackendResult(
            grads=complete_grads(variables, [directional_grads(variables, done)]),
            outer_loss=done.outer_loss,
            state=done.state,
            carry=_carry(done, loop.has_tasks_axis) if self.keep_tangents else {},
        )

    def _chunk(self, loop: InnerLoop, variables: TensorDict, entries: range, route: TangentRoute) -> BackendResult:
        """Returns the derivative in some entries; their tangents live no longer than this call."""
        start = self._started(loop, variables, entries, route)
        return self._result(loop, variables, route.run(loop, variables, start))

    def _chunks(self, entries: range) -> Iterator[range]:
        size = self.chunk_size or len(entries)
        yield from (entries[start : start + size] for start in range(0, len(entries), size))

    def _route(self, loop: InnerLoop, variables: TensorDict) -> TangentRoute:
        if self.keep_tangents:
            _check_real_time(loop)
        at_once = min(self.chunk_size or math.inf, _num_entries(variables))
        return serving_route(loop, variables, TangentRoute(backend="Forward", vectorised=at_once > 1))

    def _started(self, loop: InnerLoop, variables: TensorDict, entries: range, route: TangentRoute) -> ForwardState:
        run = route.start(loop, variables, _unit_vectors(variables, entries))
        return self._resumed(loop, run, entries, _num_entries(variables)) if self.keep_tangents else run

    def _resumed(self, loop: InnerLoop, run: ForwardState, entries: range, total: int) -> ForwardState:
        """Returns the first state with the tangents that the carry holds."""
        # The first outer step of a run: its tangents are those of `init_params`.
        if not loop.carried("params"):
            return run
        count = loop.carried("shared").get("tangents")
        if count is None or int(count) != total:
            found = "no tangents" if count is None else f"the tangents of {int(count)} entries"
            raise ValueError(
                f"`carry` holds {found}, but `Forward(keep_tangents=True)` differentiates in {total} entries of the "
                "hyperparameters: the derivative up to here is unknown. Pass the carry of the same backend and "
                "hyperparameters, or `carry=None` to start afresh."
            )
        # A carry has the tasks axis first, along which it is cut; tangents have their own axis first.
        held = loop.carried("tangents")
        if loop.has_tasks_axis:
            held = {name: value.movedim(1, 0) for name, value in held.items()}
        held = {name: value[entries.start : entries.stop] for name, value in held.items()}
        return replace(
            run, tangents=InnerState(tree.without_prefix("params", held), tree.without_prefix("dynamics", held))
        )


def _num_entries(variables: TensorMapping) -> int:
    return sum(value.numel() for value in variables.values() if tree.is_differentiable(value))


def _unit_vectors(variables: TensorDict, entries: range) -> TensorDict:
    """Returns the unit vectors of some scalar entries, for the variables that have one of them.

    Args:
        variables: hyperparameters and context; integers among them have no entries.
        entries: counted through all variables.
    """
    found: TensorDict = {}
    first = 0
    for name, value in variables.items():
        if not tree.is_differentiable(value):
            continue
        # A chunk may begin and end inside a variable.
        start, stop = max(entries.start, first), min(entries.stop, first + value.numel())
        if start < stop:
            # A row for every entry of the chunk, zero where the entry is
            # another variable's: all tangents have one length.
            rows = torch.zeros(len(entries), value.numel(), dtype=value.dtype, device=value.device)
            rows[start - entries.start : stop - entries.start, start - first : stop - first].fill_diagonal_(1.0)
            found[name] = rows.reshape(len(entries), *value.shape)
        first += value.numel()
    return found


def _check_real_time(loop: InnerLoop) -> None:
    if not loop.problem.warm_start:
        raise IncompatibleBackendError(
            "`Forward(keep_tangents=True)` got a problem with `warm_start=False`: each of its runs starts from "
            "`init_params`, where no earlier tangent belongs. Set `warm_start=True`, or `keep_tangents=False`."
        )
    if loop.problem.context is not None:
        raise IncompatibleBackendError(
            "`Forward(keep_tangents=True)` got a problem with a `context`, which is computed anew at every outer step: "
            "tangents in the last one's entries mean nothing in this one's. Compute it in the losses instead, or pass "
            "`keep_tangents=False`."
        )


def _carry(run: ForwardState, has_tasks_axis: bool) -> TensorDict:
    """Returns the tangents as a carry: the tasks axis, if there is one, comes first."""
    held = {
        **tree.with_prefix("tangents.params", run.tangents.params),
        **tree.with_prefix("tangents.dynamics", run.tangents.dynamics),
    }
    if has_tasks_axis:
        held = {name: value.movedim(0, 1) for name, value in held.items()}
    # Stored apart: where no entry of the state has a tangent, nothing else holds the number of tangents.
    return {**held, _COUNT: torch.tensor(len(run.derivative))}


def _join_carries(carries: list[TensorDict], axis: int) -> TensorDict:
    """Returns the tangents of all chunks; an entry of the state that a chunk does not move has zeros there."""
    if len(carries) == 1 or not carries[0]:
        return carries[0]
    examples = {name: value for carry in carries for name, value in carry.items() if name != _COUNT}

    def rows(carry: TensorDict, name: str) -> Tensor:
        if name in carry:
            return carry[name]
        shape = list(examples[name].shape)
        shape[axis] = int(carry[_COUNT])
        return examples[name].new_zeros(shape)

    joined = {name: torch.cat([rows(carry, name) for carry in carries], dim=axis) for name in examples}
    return {**joined, _COUNT: torch.stack([carry[_COUNT] for carry in carries]).sum()}
