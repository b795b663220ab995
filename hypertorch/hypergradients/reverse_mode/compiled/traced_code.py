"""What traced code may not do, and what is asked before its program runs again: PyTorch would be wrong in silence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any, NoReturn

import torch

from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError
from hypertorch.hypergradients.reverse_mode.compiled.step_index import (
    OWN_CODE,
    attribute_of_no_index,
    hash_of_no_index,
    identity_of_no_index,
    no_index,
    number_of_index,
    type_of_no_index,
)


@contextmanager
def traced_code_is_checked(dynamo: Any) -> Iterator[None]:
    """Refuses what PyTorch would trace wrongly, and has it ask for changes that it would not see, while it lasts.

    Args:
        dynamo: PyTorch's tracer, a module that is loaded when first asked for.

    Raises:
        NotCompilableError: from the tracer, where code does such a thing.
        AttributeError: where this PyTorch lacks what is watched.
    """
    kinds = dynamo.variables
    with ExitStack() as stack:

        def change(holder: Any, name: str, change_of: Callable[[Any], object]) -> None:
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, change_of(getattr(holder, name)))

        # Inside of a transform PyTorch sees no gradient asked for, and traces only the forward pass of a custom
        # function.
        change(kinds.misc.AutogradFunctionVariable, "call_apply", lambda _: _refuse_custom_function)
        change(kinds.TensorVariable, "hash_impl", hash_of_no_index)
        # What PyTorch has made of functions before is put aside: it was made without these changes.
        change(kinds.BuiltinVariable, "call_function_handler_cache", lambda _: {})
        change(kinds.BuiltinVariable, "call_isinstance", type_of_no_index)
        for holder in (kinds.BuiltinVariable, kinds.TorchInGraphFunctionVariable):
            change(holder, "call_function", number_of_index)
        change(kinds.NumpyVariable, "call_function", no_index)
        for holder in (kinds.builtin.GetAttrBuiltinVariable, kinds.builtin.HasAttrBuiltinVariable):
            change(holder, "call_function", attribute_of_no_index)
        # The tracer looks these two up by their names.
        handlers = dynamo.symbolic_convert.compare_op_handlers
        for name in ("is", "is not"):
            stack.callback(handlers.__setitem__, name, handlers[name])
            handlers[name] = identity_of_no_index(handlers[name])
        change(kinds.builder, "make_dupe_guard", _guard_of_one_object)
        for holder in (kinds.UserDefinedObjectVariable, kinds.UserDefinedClassVariable):
            change(holder, "get_source_by_walking_mro", _guard_of_methods)
        for name in ("call_method", "generic_getattr"):
            change(kinds.UserDefinedObjectVariable, name, _guard_of_new_objects)
        yield


def is_checked(dynamo: Any) -> bool:
    """Returns whether what is traced now is checked.

    Args:
        dynamo: PyTorch's tracer.
    """
    return dynamo.variables.misc.AutogradFunctionVariable.call_apply is _refuse_custom_function


def _refuse_custom_function(*_: Any) -> NoReturn:
    """Raises `NotCompilableError` for a `torch.autograd.Function`, in place of tracing it.

    Once traced, its backward pass has no derivative any more, or is that of its forward pass: a hypergradient would
    lack what passes through it.
    """
    raise NotCompilableError(
        "a custom `torch.autograd.Function` is on the way, whose backward pass is lost when it is traced. Written out "
        "of operations of PyTorch it could be compiled."
    )


def _guard_of_one_object(guard_of: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what is asked before a program runs again in which two names stood for one object: whether they still do.

    PyTorch asks nothing where one of the names is global and the other is not. Where one of them is given another
    tensor, the program would read the other's in its place.
    """
    dynamo: Any = torch._dynamo

    def make_dupe_guard(source: Any, known: Any) -> Any:
        asked = guard_of(source, known)
        if asked is None and known is not None and known != source:
            asked = partial(dynamo.guards.GuardBuilder.DUPLICATE_INPUT, source_b=known)
        return asked

    return make_dupe_guard


def _guard_of_methods(source_of: Callable[..., Any]) -> Callable[..., Any]:
    """Returns where PyTorch finds an attribute of a class, with the code of a method asked for before a program runs.

    PyTorch does not ask. Where a class is given another method (a notebook that loads edited modules again does so),
    the program would go on with the old one.
    """
    dynamo: Any = torch._dynamo
    guards, sources = dynamo.guards.GuardBuilder, dynamo.source

    def get_source_by_walking_mro(variable: Any, tx: Any, name: str) -> Any:
        found = source_of(variable, tx, name)
        is_class = isinstance(variable, dynamo.variables.UserDefinedClassVariable)
        own, at = (variable.value, variable.source) if is_class else (type(variable.value), variable.cls_source)
        if name not in vars(own):  # a method of its own would come first
            own_attributes = sources.TypeDictSource(at)
            dynamo.guards.install_guard(own_attributes.make_guard(partial(guards.DICT_NOT_CONTAINS, key=name)))
        attribute, at = inspect.getattr_static(own, name), found
        if isinstance(attribute, (classmethod, staticmethod)):
            attribute, at = attribute.__func__, sources.AttrSource(found, "__func__")
        elif isinstance(attribute, property):
            attribute, at = attribute.fget, sources.AttrSource(found, "fget")
        if isinstance(attribute, FunctionType):
            dynamo.guards.install_guard(at.make_guard(guards.CLOSURE_MATCH))
        return found

    return get_source_by_walking_mro


def _guard_of_new_objects(look_up: Callable[..., Any]) -> Callable[..., Any]:
    """Returns how PyTorch looks up an attribute, with the code of methods asked for if traced code made the object.

    Where PyTorch finds an attribute of such an object is not asked by itself.
    """

    def looked_up(variable: Any, tx: Any, name: str, *rest: Any, **more: Any) -> Any:
        own = type(variable.value)
        # Thousands of lookups are those of objects of PyTorch and of this library, which nobody edits in between.
        is_users = own.__module__.partition(".")[0] not in OWN_CODE
        if is_users and variable.source is None and variable.cls_source is not None:
            found = inspect.getattr_static(own, name, None)
            if isinstance(found, (FunctionType, property, classmethod, staticmethod)):
                variable.get_source_by_walking_mro(tx, name)
        return look_up(variable, tx, name, *rest, **more)

    return looked_up
