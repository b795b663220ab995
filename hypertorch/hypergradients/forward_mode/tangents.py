"""Forward mode through the inner loop: tangents that are carried along with the inner state, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.missing_derivatives import forward_mode
from hypertorch.autodiff.products import jvps, vjp
from hypertorch.checks.values import check_count
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardState:
    """An inner state, and its derivatives along some directions in the variables.

    Attributes:
        state: the inner state `s_t`.
        tangents: `ds_t/dvariables` times each direction, of shape `(directions, *entry)`; only for those entries of
            the state that depend on what the directions move.
        directions: of shape `(directions, *variable)`; only for those variables that they move.
        outer_loss: the terms of the outer loss up to here, a scalar.
        derivative: their derivative along each direction, of shape `(directions,)`.
        route: how the tangents are carried through a step.
    """

    state: InnerState
    tangents: InnerState
    directions: TensorDict
    outer_loss: Tensor
    derivative: Tensor
    route: TangentRoute


@dataclass(frozen=True, kw_only=True)
class TangentRoute:
    """How tangents are carried through a step: all of a chunk at once by `torch.func`, or one by one on dual numbers.

    Attributes:
        backend: name of the backend, for messages.
        vectorised: whether by `torch.func`.
    """

    backend: str
    vectorised: bool

    def start(self, loop: InnerLoop, variables: TensorDict, directions: TensorDict) -> ForwardState:
        """Returns the state before the first step, `s_0 = Phi_0(variables)`, and its derivatives along directions.

        Args:
            loop: the inner loop.
            variables: hyperparameters and context.
            directions: for at least one of the variables, of shape `(directions, *variable)`.

        Raises:
            IncompatibleBackendError: if an operation has no forward derivative, or cannot be vectorised.
        """

        def initial(variables: TensorDict) -> tuple[InnerState, TensorDict]:
            return loop.initial(variables), {}

        with forward_mode(self._one_by_one):
            pushed = jvps(initial, [tree.detach(variables)], [directions], vectorised=self.vectorised)
        row = next(iter(directions.values()))
        # A constant of the user's that asks for its gradient has left a graph.
        return ForwardState(
            state=InnerState(*pushed.outputs).detached(),
            tangents=InnerState(*pushed.tangents).detached(),
            directions=directions,
            outer_loss=torch.zeros((), device=loop.device),
            derivative=row.new_zeros(len(row)),
            route=self,
        )

    def advance(self, loop: InnerLoop, variables: TensorDict, run: ForwardState, step: int) -> ForwardState:
        """Returns the state after a step: `Z_t = dPhi_t/ds Z_{t-1} + dPhi_t/dvariables`, along every direction.

        Args:
            loop: the inner loop.
            variables: hyperparameters and context.
            run: the state before the step.
            step: position in the horizon.

        Raises:
            IncompatibleBackendError: if an operation has no forward derivative, or cannot be vectorised.
        """

        def after(variables: TensorDict, params: TensorDict, dynamics: TensorDict) -> tuple[InnerState, TensorDict]:
            route = "functional" if self.vectorised else "dual"
            end, loss = loop.transition(InnerState(params, dynamics), variables, step, route)
            return end, {} if loss.value is None else {"loss": loss.value}

        # State and variables move in one push: `dPhi_t/ds Z_{t-1} +
        # dPhi_t/dvariables` is a single jvp for each direction.
        arguments = [tree.detach(variables), *run.state]
        with forward_mode(self._one_by_one):
            pushed = jvps(after, arguments, [run.directions, *run.tangents], vectorised=self.vectorised)
        num_directions = len(run.derivative)
        # One by one the step is run for every tangent, which is counted.
        for _ in range(1 if self.vectorised else num_directions):
            loop.record.add_step(step, pushed.values.get("loss"))
        loop.record.add_jvps(num_directions)
        run = replace(run, state=InnerState(*pushed.outputs), tangents=InnerState(*pushed.tangents))
        return _with_term(run, variables, lambda params, own: loop.term(run.state._replace(params=params), own, step))

    def run(self, loop: InnerLoop, variables: TensorDict, start: ForwardState) -> ForwardState:
        """Returns the state after all steps, with the outer loss at its params among the terms.

        Args:
            loop: the inner loop.
            variables: hyperparameters and context.
            start: the state before the first step.
        """
        last = scan(partial(self.advance, loop, variables), start, range(loop.num_steps))
        return with_last_term(loop, variables, last)

    @property
    def _one_by_one(self) -> str | None:
        return f"{self.backend}(chunk_size=1)" if self.vectorised else None


def with_last_term(loop: InnerLoop, variables: TensorDict, run: ForwardState) -> ForwardState:
    """Returns the state with the outer loss at its params among its terms, `df = dE/ds Z_T + dE/dvariables`.

    Cost: one evaluation of the outer loss and one vjp of it, whatever the number of directions.
    """
    return _with_term(run, variables, loop.outer)


def directional_grads(variables: TensorDict, run: ForwardState) -> dict[str, Tensor | None]:
    """Returns `sum_k (df . v_k) v_k` over the directions `v_k`, for those variables that they move; else None.

    With the unit vectors for directions this is the derivative itself.
    """
    return {name: _weighted_sum(run.derivative, run.directions.get(name)) for name in variables}


def complete_grads(variables: TensorDict, parts: list[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """Returns the sum of the grads of several sets of directions; zeros where none moves a floating-point variable."""
    total: dict[str, Tensor | None] = {
        name: torch.zeros_like(value) if tree.is_differentiable(value) else None
        for name, value in tree.detach(variables).items()
    }
    for part in parts:
        total = tree.accumulate(total, part)
    return total


def check_chunk_size(chunk_size: int | None, what: str) -> None:
    """Raises `ValueError` if a chunk would hold nothing."""
    if chunk_size is not None:
        why = f"it is the number of {what} that are carried through the inner loop together"
        check_count("`chunk_size`", chunk_size, why, advice=", or None for all of them")


def _with_term(
    run: ForwardState, variables: TensorDict, term: Callable[[TensorDict, TensorDict], Tensor | None]
) -> ForwardState:
    """Returns the state with a term `term(params, variables)` of the outer loss added, and its derivatives."""
    params = tree.leaves_requiring_grad({name: run.state.params[name] for name in run.tangents.params})
    moved = tree.leaves_requiring_grad({name: variables[name] for name in run.directions})
    with torch.enable_grad():
        value = term({**run.state.params, **params}, {**tree.detach(variables), **moved})
    if value is None:
        return run
    leaves = {**tree.with_prefix("params", params), **tree.with_prefix("variables", moved)}
    # By reverse mode: one vjp of a scalar, contracted with all tangents, in place of a jvp for each.
    cotangents = vjp([value], [torch.ones_like(value)], leaves)
    derivative = run.derivative
    for name, tangent in run.tangents.params.items():
        cotangent = cotangents[f"params.{name}"]
        if cotangent is not None:
            # dE/ds Z_t
            derivative = derivative + tangent.reshape(len(tangent), -1) @ cotangent.reshape(-1)
    for name, direction in run.directions.items():
        cotangent = cotangents[f"variables.{name}"]
        if cotangent is not None:
            # dE/dvariables
            derivative = derivative + _product(direction, cotangent).reshape(len(direction), -1).sum(1)
    return replace(run, outer_loss=run.outer_loss + value.detach(), derivative=derivative)


def _weighted_sum(weights: Tensor, directions: Tensor | None) -> Tensor | None:
    if directions is None:
        return None
    return _product(directions, weights.to(directions.dtype).reshape(-1, *[1] * (directions.dim() - 1))).sum(0)


def _product(directions: Tensor, factor: Tensor) -> Tensor:
    """Returns the product; an infinite factor says nothing of the variables that a direction leaves alone."""
    return (directions * factor).masked_fill(directions == 0, 0.0)
