"""What traced code may not do, because PyTorch would trace it wrongly without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError


@contextmanager
def traced_code_is_checked(dynamo: Any) -> Iterator[None]:
    """Refuses, while it lasts, what PyTorch would trace wrongly.

    Args:
        dynamo: PyTorch's tracer, a module that is loaded when first asked for.

    Raises:
        NotCompilableError: from the tracer, where code does such a thing.
        AttributeError: where this PyTorch lacks what is watched.
    """
    with ExitStack() as stack:
        # Inside of a transform PyTorch sees no gradient asked for, and traces only the forward pass of a custom
        # function.
        applied = dynamo.variables.misc.AutogradFunctionVariable
        stack.callback(setattr, applied, "call_apply", applied.call_apply)
        applied.call_apply = _refuse_custom_function
        tensors, functions = dynamo.variables.TensorVariable, dynamo.variables.BuiltinVariable
        stack.callback(setattr, tensors, "hash_impl", tensors.hash_impl)
        tensors.hash_impl = _hash_of_no_number(tensors.hash_impl)
        stack.callback(setattr, functions, "call_isinstance", functions.call_isinstance)
        functions.call_isinstance = _type_of_no_number(functions.call_isinstance)
        yield


def _refuse_custom_function(*_: Any) -> NoReturn:
    """Raises `NotCompilableError` for a `torch.autograd.Function`, in place of tracing it.

    Once traced, its backward pass has no derivative any more, or is that of its forward pass: a hypergradient would
    lack what passes through it.
    """
    raise NotCompilableError(
        "a custom `torch.autograd.Function` is on the way, whose backward pass is lost when it is traced. Written out "
        "of operations of PyTorch it could be compiled."
    )


def _hash_of_no_number(hash_of: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the hash of tensors in traced code, for all but single numbers.

    The index of a step is a tensor in a loop. A dictionary or a set finds a tensor by identity, so that it would miss
    the index at every step, in silence.
    """

    def hash_impl(tensor: Any, tx: Any) -> Any:
        if _may_be_index(tensor, tx):
            raise NotCompilableError(
                "a number that is a tensor in a loop, such as the index of a step, is looked up in a dictionary or a "
                "set, which finds tensors by identity. Compare it (`index == 10`), or look it up in a tensor"
            )
        return hash_of(tensor, tx)

    return hash_impl


def _type_of_no_number(is_instance: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `isinstance` says in traced code, but not whether a number that may be an index is a whole one."""
    dynamo: Any = torch._dynamo

    def call_isinstance(function: Any, tx: Any, value: Any, types_: Any) -> Any:
        if isinstance(value, dynamo.variables.TensorVariable) and _may_be_index(value, tx):
            asked = types_.as_python_constant()
            asked = asked if isinstance(asked, tuple) else (asked,)
            if any(issubclass(int, own) and not issubclass(Tensor, own) for own in asked):
                raise NotCompilableError(
                    "a number that is a tensor in a loop, such as the index of a step, is asked whether it is an `int`"
                )
        return is_instance(function, tx, value, types_)

    return call_isinstance


def _may_be_index(tensor: Any, tx: Any) -> bool:
    """Returns whether a tensor of traced code may be the index of a step in a loop, or be computed from one.

    Args:
        tensor: as PyTorch's tracer holds it.
        tx: what the tracer is at. The body of a loop is traced inside of what surrounds it.
    """
    value = tensor.as_proxy().node.meta["example_value"]
    return tx.output.current_tracer.parent is not None and value.ndim == 0 and value.dtype is torch.float64
