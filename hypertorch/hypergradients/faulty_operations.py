"""Operations whose second derivatives PyTorch returns wrongly and without a word: refused by name."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.inner_loop import InnerLoop
from hypertorch.types import TensorDict


class Fault(NamedTuple):
    """An operation with a wrong second derivative.

    Attributes:
        node: part of the name of its node in a graph.
        operation: what it is called.
        advice: what to write instead.
    """

    node: str
    operation: str
    advice: str


# Found by running PyTorch 2.13's database of operations against central differences.
FAULTS = (
    Fault(
        "linear_cross_entropy_batch_chunked",
        "`linear_cross_entropy` in chunks",
        "Pass it `options=None`, which computes the loss as a whole.",
    ),
    Fault("AsStridedScatterBackward", "`as_strided_scatter`", "Use `slice_scatter`, `index_put` or `torch.where`."),
    Fault(
        "WeightNormInterfaceBackward",
        "PyTorch's weight normalisation",
        "Write the weight as `g * v / v.norm(...)` of two params.",
    ),
)
_known: dict[Hashable, Fault | None] = {}


def refuse_faulty_operations(kind: Hashable, loop: InnerLoop, variables: TensorDict) -> None:
    """Raises if the inner loss uses an operation whose second derivative is wrong in PyTorch.

    The graph of the loss is looked through once for every kind of problem. (Differences of gradients would find faults
    that nobody knows of, but in float32 they cannot tell a fault from a kink, such as that of a ReLU.)

    Cost: one inner loss, the first time.

    Args:
        kind: what is the same for problems that run the same code.
        loop: a loop of at least one step, which is left as it is.
        variables: hyperparameters and context.

    Raises:
        IncompatibleBackendError: naming the operation.
    """
    if kind not in _known:
        _known[kind] = _first_fault(loop, tree.detach(variables))
    fault = _known[kind]
    if fault is not None:
        raise IncompatibleBackendError(
            f"`InnerProblem.loss` uses {fault.operation}, whose second derivative PyTorch returns wrongly, without a "
            f"word: a hypergradient through a gradient of it would be wrong too. {fault.advice}"
        )


def _first_fault(loop: InnerLoop, variables: TensorDict) -> Fault | None:
    with torch.enable_grad():
        state = loop.initial(variables)
        params = tree.leaves_requiring_grad(loop.trained(state.params))
        names = set(_operations(loop.bound_loss(state, 0)(params, variables)))
    return next((fault for fault in FAULTS if any(fault.node in name for name in names)), None)


def _operations(value: Tensor) -> Iterator[str]:
    """Yields the names of the nodes of a tensor's graph."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            waiting += [before for before, _ in node.next_functions]
