"""Operations whose second derivatives PyTorch returns wrongly, or cannot take and does not name: refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict


class Fault(NamedTuple):
    """An operation with a wrong second derivative, or with none.

    Attributes:
        node: part of the name of its node in a graph.
        operation: its name for the user.
        advice: what to write instead.
        reason: what is wrong with its second derivative, a clause of the message.
        applies: tells whether a node with that name has the fault; None if every one has.
    """

    node: str
    operation: str
    advice: str
    reason: str = (
        "whose second derivative PyTorch returns wrongly, without a word: a hypergradient through a gradient of it "
        "would be wrong too"
    )
    applies: Callable[[Any], bool] | None = None

    def is_in(self, nodes: list[Any]) -> bool:
        """Returns whether one of a graph's nodes has the fault."""
        return any(self.node in node.name() and (self.applies is None or self.applies(node)) for node in nodes)


def _differentiates_a_bias_alone(node: Any) -> bool:
    # The inputs of the node are the tensor, the weight and the bias; what needs no derivative has no node.
    return node._saved_weight is None and node.next_functions[2][0] is not None


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
    Fault(
        "NativeLayerNormBackward",
        "a layer norm with a learnt bias and no weight",
        "Normalise without a bias and add it afterwards, or pass a weight of ones.",
        "which PyTorch cannot differentiate twice: the hypergradient of an unrolled gradient step needs that second "
        "derivative",
        _differentiates_a_bias_alone,
    ),
)


def refuse_faulty_operations(loop: InnerLoop, variables: TensorDict) -> None:
    """Raises if the inner loss uses an operation whose second derivative PyTorch gets wrong, or lacks without a name.

    The graph of the loss is looked through. (Differences of gradients would find faults that nobody knows of, but in
    float32 they cannot tell a fault from a kink, such as that of a ReLU.)

    Cost: one inner loss.

    Args:
        loop: a loop of at least one step and without a tasks axis, which is left as it is. (The graph of vectorised
            tasks shows less: batching rules take some operations apart.)
        variables: hyperparameters and context.

    Raises:
        IncompatibleBackendError: naming the operation.
    """
    with torch.enable_grad():
        state = loop.initial(tree.detach(variables))
        params = tree.leaves_requiring_grad(loop.trained(state.params))
        nodes = list(graph_nodes(loop.loss_at(state, 0)(params, tree.detach(variables))))
    fault = next((fault for fault in FAULTS if fault.is_in(nodes)), None)
    if fault is not None:
        raise IncompatibleBackendError(f"`InnerProblem.loss` uses {fault.operation}, {fault.reason}. {fault.advice}")


def graph_nodes(value: Tensor) -> Iterator[Any]:
    """Yields the nodes of a tensor's graph."""
    # A list and no recursion: the graph of a recurrent network is deeper than Python's stack.
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]
