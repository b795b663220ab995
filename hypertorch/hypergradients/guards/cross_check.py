"""Another way to differentiate a step, compared once for every kind of problem with reverse over reverse.

Forward mode and compilation rest on formulas of PyTorch that are silently wrong for some operations: backward passes
that cannot be differentiated forwards, and gradients that a hook changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from hypertorch import tree
from hypertorch.autodiff.inner_loss import GradientRoute
from hypertorch.autodiff.products import vjp
from hypertorch.errors import ForwardModeError, IncompatibleBackendError
from hypertorch.hypergradients.guards.faulty_operations import graph_nodes
from hypertorch.hypergradients.guards.jacobian_identity import CoarsestPrecision, Products, by_name, generic_cotangents
from hypertorch.hypergradients.reverse_mode.graph import pulled_back
from hypertorch.hypergradients.reverse_mode.sweep import Cotangents, Grads
from hypertorch.inner import memo
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict

_logger = logging.getLogger(__name__)

FAULTS = "what is wrong with ways to differentiate a step"


class Fault(NamedTuple):
    """What is wrong with a way to differentiate a step, in words.

    Attributes:
        reason: what is wrong, without a full stop.
        advice: what to do, a sentence; empty where there is no more to say than to take another way.
    """

    reason: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The initial state of a loop and one of its steps, differentiated by reverse over reverse.

    The step is the second where there is one: what starts at zero has moved.

    Attributes:
        loop: the loop, with counts of its own.
        variables: hyperparameters and context, as leaves.
        initial: the products of the initial state; None for a run that goes on from another.
        step: the step; 0 without steps.
        departure: the state before it.
        products: the products of the step; None without steps.
    """

    loop: InnerLoop
    variables: TensorDict
    initial: Products | None
    step: int
    departure: InnerState
    products: Products | None


Faults: TypeAlias = Callable[[Reference], Iterable[str]]
"""Yields what is wrong with a way to differentiate a step, in words."""


def case_of(loop: InnerLoop, variables: TensorDict) -> Hashable:
    """Returns what loops have in common whose steps are differentiated by the same formulas of PyTorch.

    Namely the kind of problem, the operations of the inner loss, the names, sizes and dtypes of the variables and of a
    task's state, whether tasks are vectorised, the precision of the inner loss, the device, and which step there is to
    compare: the second has what the first has not (a momentum that moves), and a run that goes on has no initial state.

    Cost: one evaluation of the initial state and of the inner loss, without a derivative.
    """
    loop = loop.uncounted()
    with torch.no_grad():
        # Sizes and dtypes are asked of the state itself: `init_params` alone knows them.
        state = loop.initial(tree.detach(variables))
    own = {*state.params, *state.dynamics, *loop.per_task} if loop.has_tasks_axis else set()
    sizes = tuple(
        (name, tuple(value.shape[name.partition(".")[2] in own :]), value.dtype)
        for name, value in by_name(variables, state.params, state.dynamics).items()
    )
    which = (bool(loop.carry), min(loop.num_steps, 2))
    operations: tuple[str, ...] = ()
    if loop.num_steps:
        # They tell what a switch chooses that no attribute shows: a global, a tensor, a setting deep inside.
        with torch.enable_grad():
            loss = loop.loss_at(state, 0)(tree.leaves_requiring_grad(loop.trained(state.params)), variables)
        operations = tuple(node.name() for node in graph_nodes(loss))
    return kind_of(loop.problem), operations, sizes, loop.has_tasks_axis, loop.inner_eps, loop.device.type, which


def fault_of(loop: InnerLoop, variables: TensorDict, case: Hashable, way: str, faults: Faults) -> Fault | None:
    """Returns what is wrong with a way to differentiate the steps of a loop; None for nothing.

    It is asked once for every kind of problem, and logged. The loop is left as it is: nothing is counted, every
    function of it seeds its own noise, and no tensor is kept.

    Cost: the first time up to two steps, one vjp by reverse over reverse and one past the inner gradient, and what
    `faults` takes; memory of one step's graph.

    Args:
        loop: the loop.
        variables: hyperparameters and context.
        case: the kind of problem, as `case_of` tells it.
        way: names the way.
        faults: compares it with reverse over reverse.

    Raises:
        ReplayError: if a step is another one when it is run again.
        RuntimeError: (PyTorch's own) if reverse over reverse fails.
    """

    def compare() -> Fault | None:
        fault = _first(faults, _reference(loop.uncounted(), tree.leaves_requiring_grad(variables)))
        if fault is not None:
            _logger.info("%s is not taken: %s", way, fault.reason)
        return fault

    return memo.recall(FAULTS, (case, way), compare)


def forget(case: Hashable, ways: Iterable[str]) -> None:
    """Forgets what was found out, after a refusal: following its advice may change the answer (a switch of PyTorch)."""
    for way in ways:
        memo.forget(FAULTS, (case, way))


def vjp_faults(products: Products, grads: Grads, cotangents: Cotangents, departure: InnerState) -> Iterator[str]:
    """Yields how the vjp of a step by another way differs, entry by entry.

    Args:
        products: the step's.
        grads: the vjp in the variables.
        cotangents: the vjp in the tensors of the state before the step, in order.
        departure: that state.
    """
    vjps = _vjps_by_name(grads, cotangents, departure)
    for name in products.directions:
        fault = products.fault(products.of_inputs(vjps, [name]), [name])
        if fault is not None:
            yield fault


def _first(faults: Faults, reference: Reference) -> Fault | None:
    try:
        reason = next(iter(faults(reference)), None)
        return None if reason is None else Fault(reason)
    except ForwardModeError as error:
        return Fault(error.reason, error.advice)
    except IncompatibleBackendError as error:
        return Fault(str(error).removesuffix("."))
    except RuntimeError as error:
        # Reverse over reverse has run, or it would have raised the same. What forward mode lacks is on no list.
        return Fault(f"PyTorch says: {str(error).splitlines()[0].removesuffix('.')}")


def _reference(loop: InnerLoop, variables: TensorDict) -> Reference:
    step = max(min(1, loop.num_steps - 1), 0)
    with torch.no_grad():
        constants = tree.detach(variables)
        first = loop.initial(constants)
        # The second step where there is one: momentum is zero in the first, and hides what is wrong with it.
        departure = scan(lambda state, earlier: loop.advance(state, constants, earlier), first, range(step))
        if loop.has_buffers and loop.num_steps:
            loop.advance(departure, constants, step)  # tells which of them have a derivative
    return Reference(
        loop=loop,
        variables=variables,
        initial=None if loop.carry else _products_of_initial(loop, variables, first),
        step=step,
        departure=departure,
        products=_products_of_step(loop, variables, departure, step) if loop.num_steps else None,
    )


def _products_of_initial(loop: InnerLoop, variables: TensorDict, state: InnerState) -> Products:
    cotangents = generic_cotangents(state)
    with torch.enable_grad():
        initial = loop.initial(variables)
    vjps = by_name(vjp(initial.tensors(), cotangents, variables), {}, {})
    return Products("the initial state", state, cotangents, by_name(variables, {}, {}), vjps, {})


def _products_of_step(loop: InnerLoop, variables: TensorDict, departure: InnerState, step: int) -> Products:
    cotangents = generic_cotangents(departure)

    def differentiated(route: GradientRoute) -> tuple[InnerState, Grads]:
        leaves = loop.leaves(departure)
        with torch.enable_grad():
            end, _, term = loop.step(leaves, variables, step, route)
        grads, before, _ = pulled_back(end, term, leaves, variables, list(cotangents))
        return end.detached(), _vjps_by_name(grads, before, departure)

    with CoarsestPrecision() as precision:
        # Rounding is judged by the coarsest dtype on the way, which may be that of the loss and not of the params.
        arrival, vjps = differentiated("differentiable")
    return Products(
        "a step",
        arrival,
        cotangents,
        by_name(variables, departure.params, departure.dynamics),
        vjps,
        # The part past the inner gradient, beside which an error in the gradient's own part would look small.
        differentiated("constant")[1],
        inner_eps=max(loop.inner_eps, precision.eps),
    )


def _vjps_by_name(grads: Grads, cotangents: Cotangents, state: InnerState) -> Grads:
    params = dict(zip(state.params, cotangents, strict=False))
    return by_name(grads, params, dict(zip(state.dynamics, cotangents[len(params) :], strict=True)))
