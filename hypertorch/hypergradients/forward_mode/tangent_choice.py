"""Which route pushes tangents: the one that is asked for, or the other one where PyTorch does not serve it right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.forward_mode.tangents import ForwardState, TangentRoute
from hypertorch.hypergradients.guards.cross_check import Fault, Reference, case_of, fault_of, forget
from hypertorch.hypergradients.guards.jacobian_identity import Products, by_name
from hypertorch.hypergradients.guards.replay import check_replay
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict

_WAYS = {True: "forward mode by torch.func", False: "forward mode by dual numbers"}


def serving_route(loop: InnerLoop, variables: TensorDict, asked: TangentRoute) -> TangentRoute:
    """Returns the route that is asked for if it agrees with reverse over reverse, else the other one.

    The initial state and one step are compared, once for every kind of problem and route; nothing of it is counted.

    Args:
        loop: the loop.
        variables: hyperparameters and context.
        asked: the route that is asked for.

    Raises:
        IncompatibleBackendError: if PyTorch serves neither with right numbers, or a variable is complex.
        ReplayError: if a step is another one when it is run again.
    """
    _check_real(variables)
    case = case_of(loop, variables)
    faults: dict[bool, Fault] = {}
    # The other route only where the first one fails: most problems pay for one comparison.
    for vectorised in (asked.vectorised, not asked.vectorised):
        route = replace(asked, vectorised=vectorised)
        fault = fault_of(loop, variables, case, _WAYS[vectorised], partial(_faults, route))
        if fault is None:
            return route
        faults[vectorised] = fault
    forget(case, _WAYS.values())
    # Dual numbers ask less of PyTorch: what they lack says more.
    reason, advice = faults[False]
    raise IncompatibleBackendError(
        f"`{asked.backend}` cannot serve this problem, with tangents carried together or one by one: {reason}. "
        f"{advice or 'Use reverse mode, for example `Reverse()`.'}"
    )


def _check_real(variables: TensorDict) -> None:
    """Raises `IncompatibleBackendError` if a variable is complex, which only an entry of the context can be."""
    for name, value in variables.items():
        if value.is_complex():
            raise IncompatibleBackendError(
                f"the context's `{name}` has dtype {value.dtype}: tangents are taken along real directions only. "
                "Return its real and imaginary parts (`torch.view_as_real`), or use reverse mode, for example "
                "`Reverse()`."
            )


def _faults(route: TangentRoute, at: Reference) -> Iterator[str]:
    """Yields how the tangents that a route pushes differ from what reverse over reverse has."""
    products = at.initial or at.products
    if products is None:
        return
    moved = tree.without_prefix("variables", products.directions)
    run = route.start(at.loop, at.variables, {name: value[None] for name, value in moved.items()})
    if at.initial is not None:
        yield from _judged(at.initial, [list(at.initial.directions)], run, step=-1)
    if at.products is None:
        return
    run = scan(partial(route.advance, at.loop, at.variables), run, range(at.step))
    # What a run pushes on, and no more: a buffer of which PyTorch does not differentiate the new value has no tangent.
    held = {*by_name({}, *run.tangents), *at.loop.carried("tangents")}
    parts = ("variables", "params", "dynamics")
    groups = [
        [name for name in at.products.directions if name.startswith(f"{part}.") and (part == parts[0] or name in held)]
        for part in parts
    ]
    # A tangent for each part, so that a message can say where the fault is.
    groups = [names for names in groups if names]
    along = {
        name: torch.stack([direction * (name in names) for names in groups])
        for name, direction in at.products.directions.items()
        if any(name in names for names in groups)
    }
    variables, params, dynamics = (tree.without_prefix(part, along) for part in parts)
    run = replace(
        run,
        state=at.departure,
        directions=variables,
        tangents=InnerState(params, dynamics),
        derivative=run.derivative.new_zeros(len(groups)),
    )
    yield from _judged(at.products, groups, route.advance(at.loop, at.variables, run, at.step), step=at.step)


def _judged(products: Products, groups: Sequence[list[str]], end: ForwardState, *, step: int) -> Iterator[str]:
    """Yields how the tangents of a state differ, of which each comes from one group of what it is a function of.

    Raises:
        ReplayError: if they differ because the step is another one when it is run again.
    """
    for row, names in enumerate(groups):
        found = products.of_outputs(end.tangents, row) + float(end.derivative[row])
        fault = products.fault(found, names)
        if fault is not None:
            check_replay(end.state, products.outputs, step, step + 1)
            yield fault
