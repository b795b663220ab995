"""Products that the loop forward has made are handed to the loop back, in place of making them again.

A program with a loop over the steps and one back through them runs every step twice: once for its state, once for its
derivative. Most of that time are matrix products and convolutions, of the same numbers. Those that cost more to make
than to read are kept.

A loop back gets the states in another order. PyTorch writes them all once more, turned around; here each step reads its
own.

Loading this module loads the compiler, which takes seconds.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils import _pytree as pytree

_aten: Any = torch.ops.aten
_scan: Any = torch.ops.higher_order.scan
_turned: Any = torch.ops.prims.rev.default
_iota: Any = torch.ops.prims.iota.default

# Products, with the position of the factor whose last axis is summed over.
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}

# The same numbers, elsewhere in memory or not.
_COPIES = (_aten.clone.default, _aten.alias.default)

# Numbers that an entry of a product sums. To make it from fewer is as quick as to write and read it: on MLP 20-32-10,
# keeping products of 20 and more saves a tenth of the time, and keeping those of 10 costs a quarter.
_FEWEST_SUMMED = 16


class KeptProducts(CustomGraphPass):
    """Lets a loop back through a loop read what that one has made."""

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph in place, and the graphs of its loops."""
        loops = [_Loop.of(node) for node in graph.find_nodes(op="call_function", target=_scan)]
        for forward in loops:
            for back in loops:
                if back.reads(forward):
                    _keep(forward, back)
                    _read_in_turn(_Loop.of(back.node))

    def uuid(self) -> bytes:
        """Returns what this pass is called in the compiler's cache of programs."""
        # Programs are kept on disk under it: the number goes up with what is rewritten, or old ones would be taken.
        return b"hypertorch.KeptProducts.1"


class _Loop(NamedTuple):
    """A loop in a graph, a call of `scan`.

    Attributes:
        node: the call.
        body: a step, of what is carried, of what differs between steps, and of what all steps share, in this order.
        carried: what the first step gets, in the outer graph.
        stacked: what differs between steps, in the outer graph, with a leading axis of steps.
        shared: what all steps get, in the outer graph.
    """

    node: fx.Node
    body: fx.GraphModule
    carried: list[Any]
    stacked: list[Any]
    shared: list[Any]

    @classmethod
    def of(cls, node: fx.Node) -> _Loop:
        """Returns the loop of a call."""
        arguments: Any = node.args
        body, carried, stacked, shared = arguments
        return cls(node, getattr(node.graph.owning_module, body.target), [*carried], [*stacked], [*shared])

    @property
    def inputs(self) -> list[fx.Node]:
        """What a step gets, in its own graph."""
        return [*self.body.graph.find_nodes(op="placeholder")]

    @property
    def outputs(self) -> list[fx.Node]:
        """What a step returns: first what is carried on, then what is stacked."""
        returned: Any = self.body.graph.output_node().args[0]
        return [*returned]

    def reads(self, other: _Loop) -> bool:
        """Returns whether the steps get results of another loop's steps, from the last to the first."""
        return any(_result_of(other, _source(value)) is not None for value in self.stacked)


def _source(value: Any) -> Any:
    """Returns what is turned around to be read from the last step to the first; None for what is not."""
    return value.args[0] if value.target is _turned and [*value.args[1]] == [0] else None


def _result_of(loop: _Loop, value: Any) -> fx.Node | None:
    """Returns the node of a loop's step whose results a value of the outer graph holds."""
    if value is None or value.target is not operator.getitem or value.args[0] is not loop.node:
        return None
    return loop.outputs[value.args[1]]


def _keep(forward: _Loop, back: _Loop) -> None:
    """Makes the loop forward return the products that the loop back makes too, and the loop back read them."""
    known: dict[Hashable, int] = {}
    meanings = _meanings(forward, _inputs_forward(forward), known)
    made: dict[Hashable, fx.Node] = {}
    for node, meaning in meanings.items():
        made.setdefault(meaning, node)
    found = {
        node: made[meaning]
        for node, meaning in _meanings(back, _inputs_back(meanings, forward, back), known).items()
        if node.target in _PRODUCTS and meaning in made and _is_worth_keeping(node)
    }
    stacks = _returned(forward, [*dict.fromkeys(found.values())])
    stacked = [*back.stacked]
    place = back.inputs[len(back.carried) + len(back.stacked) - 1]
    for node, source in found.items():
        with back.node.graph.inserting_before(back.node):
            turned = back.node.graph.call_function(_turned, (stacks[source], [0]))
        turned.meta["val"] = stacks[source].meta["val"]
        stacked.append(turned)
        with back.body.graph.inserting_after(place):
            place = back.body.graph.placeholder(f"kept_{len(stacked)}")
        place.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(place)
    back.node.args = (back.node.args[0], back.carried, stacked, back.shared)
    back.body.graph.eliminate_dead_code()
    back.body.recompile()


def _is_worth_keeping(node: fx.Node) -> bool:
    factor: Any = node.args[_PRODUCTS[node.target]]
    return factor.meta["val"].shape[-1] >= _FEWEST_SUMMED


def _inputs_forward(loop: _Loop) -> list[Hashable]:
    """Returns what the inputs of a step forward are called."""
    carried: list[Hashable] = [("carried", position) for position, _ in enumerate(loop.carried)]
    stacked = [("stacked", value) for value in loop.stacked]
    return [*carried, *stacked, *(("shared", value) for value in loop.shared)]


def _inputs_back(meanings: dict[fx.Node, Hashable], forward: _Loop, back: _Loop) -> list[Hashable]:
    """Returns what the inputs of a step back are called by the step forward whose derivative it takes."""
    inputs: list[Hashable] = [object() for _ in back.carried]
    for value in back.stacked:
        source = _source(value)
        result = _result_of(forward, source)
        if result is not None:
            # Such as the state before the step.
            inputs.append(meanings[result])
        else:
            inputs.append(object() if source is None else ("stacked", source))
    return [*inputs, *(("shared", value) for value in back.shared)]


def _meanings(loop: _Loop, inputs: list[Hashable], known: dict[Hashable, int]) -> dict[fx.Node, Hashable]:
    """Returns what the nodes of a step compute; it is equal for those that compute the same.

    Args:
        loop: the loop of the step.
        inputs: what the inputs of the step are called.
        known: a number for what nodes compute, to which new ones are added. A number does not hold those that it was
            made of: to compare what is nested as deep as a step is long would take hours.
    """
    meanings: dict[fx.Node, Hashable] = dict(zip(loop.inputs, inputs, strict=True))
    for node in loop.body.graph.nodes:
        if node in meanings:
            continue
        if node.op != "call_function" or node.is_impure():
            meanings[node] = object()
            continue
        if node.target in _COPIES:
            meanings[node] = meanings[node.args[0]]
            continue
        leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
        # With their types: PyTorch computes another thing with 1 than with 1.0.
        own = tuple(meanings[leaf] if isinstance(leaf, fx.Node) else (type(leaf), leaf) for leaf in leaves)
        meanings[node] = known.setdefault((node.target, own, structure), len(known))
    return meanings


def _returned(loop: _Loop, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Makes the steps of a loop return some of their nodes; returns these in the outer graph, stacked."""
    first = len(loop.outputs)
    loop.body.graph.output_node().args = ([*loop.outputs, *nodes],)
    loop.body.recompile()
    length = loop.stacked[0].meta["val"].shape[0]
    stacks: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(nodes, start=first):
        value = node.meta["val"]
        with loop.node.graph.inserting_after(loop.node):
            stacks[node] = loop.node.graph.call_function(operator.getitem, (loop.node, position))
        stacks[node].meta["val"] = value.new_empty((length, *value.shape))
    loop.node.meta["val"] = (*loop.node.meta["val"], *(stack.meta["val"] for stack in stacks.values()))
    return stacks


def _read_in_turn(loop: _Loop) -> None:
    """Makes each step of a loop read at its own position what has been turned around for it whole."""
    graph, body, inputs = loop.node.graph, loop.body.graph, loop.inputs
    of_stacked = dict(zip(inputs[len(loop.carried) :], loop.stacked, strict=False))
    turned = {own: value for own, value in of_stacked.items() if _source(value) is not None}
    position, positions = _positions(loop, next(iter(turned.values())))
    place = inputs[-1]
    stacks: dict[fx.Node, fx.Node] = {}
    for own, value in turned.items():
        with body.inserting_after(place):
            place = stacks[own] = body.placeholder(f"{own.name}_stack")
        place.meta["val"] = value.meta["val"]
    for own, stack in stacks.items():
        with body.inserting_after(place):
            read = body.call_function(_aten._unsafe_index.Tensor, (stack, [position]))
        read.meta["val"] = own.meta["val"]
        own.replace_all_uses_with(read)
        body.erase_node(own)
    rest = [value for value in loop.stacked if _source(value) is None]
    sources = [_source(value) for value in turned.values()]
    loop.node.args = (loop.node.args[0], loop.carried, [*rest, positions], [*loop.shared, *sources])
    for value in dict.fromkeys(turned.values()):
        if not value.users:
            graph.erase_node(value)
    loop.body.recompile()


def _positions(loop: _Loop, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Returns the position of a step back, as an input of it, and those of all steps, in the outer graph."""
    graph, value = loop.node.graph, like.meta["val"]
    length = value.shape[0]
    with graph.inserting_before(loop.node):
        size: Any = length
        if not isinstance(length, int):
            size = graph.call_function(_aten.sym_size.int, (like.args[0], 0))
            size.meta["val"] = length
        how = {"start": 0, "step": 1, "dtype": torch.int64, "device": value.device, "requires_grad": False}
        count = graph.call_function(_iota, (size,), how)
        positions = graph.call_function(_turned, (count, [0]))
    for node in (count, positions):
        node.meta["val"] = value.new_empty((length,), dtype=torch.int64)
    with loop.body.graph.inserting_after(loop.inputs[len(loop.carried) + len(loop.stacked) - 1]):
        position = loop.body.graph.placeholder("position")
    position.meta["val"] = value.new_empty((), dtype=torch.int64)
    return position, positions
