"""The index of a step in a program is no number of Python: what traced code may do with it, and what would go wrong.

In a loop it is a tensor, and in a single step a symbol. Code may compute with it. What asks for its kind, its identity
or its attributes would get the answer for a tensor or a symbol, and what counts too far would be rounded: both are
refused.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError

LATEST_STEP = 2**24
"""Loops in programs are for indices below this. What is computed with one of them alone is exact up to there."""

_EXACT = 2**53  # whole numbers of double precision are exact up to it
OWN_CODE = frozenset({"torch", "hypertorch", "builtins"})
"""Packages whose code is no user's."""
_ARITHMETIC = frozenset({builtins.__name__, math.__name__, operator.__name__, "_operator"})
# What makes numbers of any length of short ones, with the first operands of which it does not.
_GROWING: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys((operator.pow, operator.ipow, builtins.pow), (-1, 0, 1)),
    **dict.fromkeys((operator.lshift, operator.ilshift), (0,)),
}
# Of bits, which a tensor in double precision does not give.
_OF_BITS = frozenset(
    {
        *(operator.and_, operator.or_, operator.xor, operator.invert, operator.lshift, operator.rshift),
        *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    }
)


def as_number(counter: Tensor) -> Any:
    """Returns the index of a step, a whole number, in double precision: powers of it are exact in every dtype."""
    # A whole number no longer: in whole numbers of 64 bits PyTorch would wrap around, and divide otherwise than Python.
    return counter.double()


def hash_of_no_index(hash_of: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the hash of tensors in traced code, for all but the index of a step and what is counted from it.

    A dictionary or a set finds a tensor by identity, so that it would miss the index at every step, in silence.
    """

    def hash_impl(tensor: Any, tx: Any) -> Any:
        if _is_counted(tensor, tx):
            raise NotCompilableError(
                "the index of a step, a tensor in a loop, is looked up in a dictionary or a set, which finds tensors "
                "by identity. Compare it (`index == 10`), or look it up in a tensor"
            )
        return hash_of(tensor, tx)

    return hash_impl


def type_of_no_index(is_instance: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `isinstance` says in traced code, where it says the same of a whole number and of a tensor."""

    def call_isinstance(function: Any, tx: Any, value: Any, types_: Any) -> Any:
        if _is_counted(value, tx):
            asked = types_.as_python_constant()
            asked = asked if isinstance(asked, tuple) else (asked,)
            as_int, as_tensor = (any(issubclass(kind, own) for own in asked) for kind in (int, Tensor))
            # Code of PyTorch and of this library asks whether it is a tensor, and means it.
            if as_int != as_tensor and (as_int or _is_users(tx)):
                raise _refusal()
        return is_instance(function, tx, value, types_)

    return call_isinstance


def number_of_index(call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns how traced code calls a function, if it makes a number of the index of a step where it is given one.

    Whatever else it finds (a type, whether it is a tensor) is about a tensor.
    """

    def call_function(function: Any, tx: Any, arguments: Any, named: Any) -> Any:
        found = call(function, tx, arguments, named)
        is_no_number = _is_users(tx) and not found.is_tensor()
        if is_no_number and any(_is_counted(value, tx) for value in (*arguments, *named.values())):
            raise _refusal()
        return found

    return call_function


def attribute_of_no_index(look_up: Callable[..., Any]) -> Callable[..., Any]:
    """Returns how traced code looks up an attribute, or asks for one: not of the index of a step."""

    def call_function(function: Any, tx: Any, arguments: Any, named: Any) -> Any:
        if _is_users(tx) and (_is_counted(arguments[0], tx) or _is_symbol(arguments[0])):
            raise _refusal()
        return look_up(function, tx, arguments, named)

    return call_function


def identity_of_no_index(compare: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `is` and `is not` say in traced code: not of the index of a step, other than that it is not None."""

    def compared(tx: Any, arguments: Any, named: Any) -> Any:
        is_asked = _is_users(tx) and any(_is_counted(value, tx) or _is_symbol(value) for value in arguments)
        if is_asked and None not in [value.as_python_constant() for value in arguments if value.is_python_constant()]:
            raise _refusal()
        return compare(tx, arguments, named)

    return compared


def no_index(call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns how traced code calls a function of NumPy, which is given no index of a step.

    Of a tensor PyTorch computes some with less than double precision. A symbol it takes for a constant, which makes a
    program for each step.
    """

    def call_function(function: Any, tx: Any, arguments: Any, named: Any) -> Any:
        if any(_is_counted(value, tx) or _is_symbol(value) for value in (*arguments, *named.values())):
            raise NotCompilableError(
                "a function of NumPy is given the index of a step. Take one of `math` or of PyTorch"
            )
        return call(function, tx, arguments, named)

    return call_function


def refuse_large_numbers(graph: fx.GraphModule) -> None:
    """Raises `NotCompilableError` if a program counts from the index of a step to whole numbers that are not exact.

    Python's whole numbers have any length. Those of a loop are in double precision, those of a single step wrap around.

    Args:
        graph: as traced, with loops in it.
    """
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            _count(module.graph)


def _count(graph: fx.Graph) -> None:
    """Counts as one of the last steps does, with numbers of Python, and raises where one of them is too large."""
    known: dict[Any, Any] = {}

    def value_of(argument: Any) -> Any:
        return known.get(argument) if isinstance(argument, fx.Node) else argument

    for node in graph.nodes:
        target: Any = node.target
        if not _counts(node):
            continue
        if node.op == "call_function":
            kinds = [getattr(used.meta.get("example_value"), "dtype", None) for used in node.all_input_nodes]
            if target in _OF_BITS and torch.float64 in kinds:
                raise NotCompilableError("the index of a step, a tensor in a loop, is asked for its bits")
            value = _evaluated(target, [value_of(argument) for argument in node.args])
            if isinstance(value, int) and abs(value) > _EXACT:
                raise NotCompilableError(
                    f"the index of a step is counted with in whole numbers that may be above 2^53 "
                    f"(`{target.__name__}`), which are not exact in a program"
                )
            known[node] = value
        else:
            known[node] = LATEST_STEP - 1


def _evaluated(function: Any, arguments: list[Any]) -> Any:
    """Returns what a function makes of numbers of Python; None if nothing, or something that it takes long to make."""
    if not all(isinstance(argument, (int, float)) for argument in arguments):
        return None
    if function in _GROWING and isinstance(arguments[1], int) and arguments[1] > _EXACT.bit_length():
        is_whole = isinstance(arguments[0], int)
        return 2 * _EXACT if is_whole and arguments[0] not in _GROWING[function] else None
    try:
        return function(*arguments)
    except (ArithmeticError, TypeError, ValueError):
        return None


def _refusal() -> NotCompilableError:
    return NotCompilableError(
        "the index of a step is asked for its type, its identity or an attribute, and is no number of Python in a "
        "program. Compute with it alone"
    )


def _is_symbol(value: Any) -> bool:
    dynamo: Any = torch._dynamo
    return isinstance(value.realize(), dynamo.variables.SymNodeVariable)


def _is_users(tx: Any) -> bool:
    """Returns whether the code that is traced is neither PyTorch's nor of this library.

    Args:
        tx: what the tracer is at.
    """
    return tx.f_globals.get("__name__", "").partition(".")[0] not in OWN_CODE


def _is_counted(value: Any, tx: Any) -> bool:
    """Returns whether a value of traced code is the index of a step in a loop, or computed from it alone.

    Args:
        value: as PyTorch's tracer holds it.
        tx: what the tracer is at. The body of a loop is traced inside of what surrounds it.
    """
    # A loop is looked for first: it costs next to nothing, and this is asked of every call.
    if tx.output.current_tracer.parent is None or not value.is_tensor():
        return False
    return _counts(value.as_proxy().node)


def _counts(node: fx.Node) -> bool:
    """Returns whether a node stands for the index of a step, or for what is computed from it alone."""
    seen: set[fx.Node] = set()
    left = [node]
    while left:
        own = left.pop()
        if own in seen or _is_index(own):
            continue
        seen.add(own)
        if not _is_arithmetic(own):
            return False
        left.extend(own.all_input_nodes)
    return True


def _is_index(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return isinstance(node.meta.get("example_value"), torch.SymInt)  # of a single step
    # What `as_number` makes of a counter.
    counter: Any = node.args[0] if node.op == "call_method" else node
    value = counter.meta.get("example_value") if counter.op == "placeholder" else None
    is_whole = isinstance(value, Tensor) and value.ndim == 0 and value.dtype is torch.int64
    return is_whole and node.target == Tensor.double.__name__


def _is_arithmetic(node: fx.Node) -> bool:
    """Returns whether a node stands for arithmetic of Python, which makes numbers of numbers and tensors of tensors."""
    is_pythons = node.op == "call_function" and getattr(node.target, "__module__", None) in _ARITHMETIC
    return is_pythons and bool(node.all_input_nodes)
