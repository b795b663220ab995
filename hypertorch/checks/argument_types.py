"""Arguments are of the types that their annotations name: another one is refused, by its name, before it is used."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from hypertorch.checks.values import is_number

_P = ParamSpec("_P")
_T = TypeVar("_T")
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", NoneType: "None"}


def check_fields(instance: Any, *names: str) -> None:
    """Checks fields of a dataclass by their annotations, before `__post_init__` looks at their values.

    A bool is no number, and a text no sequence. What an annotation says of tensors, generators and types of other
    libraries is left to those who use them.

    Cost: microseconds for each field.

    Args:
        instance: the dataclass.
        names: of the fields.

    Raises:
        TypeError: naming the field, its value and what it takes.
    """
    kind = type(instance)
    hints, defaults = _hints(kind), {field.name: field.default for field in dataclasses.fields(instance)}
    for name in names:
        check_type(kind.__name__, name, getattr(instance, name), hints.get(name, Any), defaults[name])


def typed(*names: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Returns a decorator of a function, or of an `__init__`, that checks arguments by their annotations.

    Args:
        names: of the arguments.

    Raises:
        TypeError: (from the function) naming the argument, its value and what it takes.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        signature = inspect.signature(function)
        owner = function.__qualname__.removesuffix(".__init__")

        @wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            given = signature.bind(*args, **kwargs).arguments
            for name in names:
                if name in given:
                    hint, default = _hints(function).get(name, Any), signature.parameters[name].default
                    check_type(owner, name, given[name], hint, default)
            return function(*args, **kwargs)

        return checked

    return decorate


def check_type(owner: str, name: str, value: object, hint: Any, default: object) -> None:
    """Raises a `TypeError` unless a value is of the type that an annotation names.

    Args:
        owner: whose argument it is, for the message.
        name: the argument.
        value: what was passed for it.
        hint: the annotation.
        default: the argument's default, an example for the message; `inspect.Parameter.empty` or
            `dataclasses.MISSING` for none.
    """
    if accepts(hint, value):
        return
    has_example = default not in (inspect.Parameter.empty, dataclasses.MISSING, None)
    raise TypeError(
        f"`{name}` of `{owner}` is {repr(value)[:200]}, a `{type(value).__name__}`: what is read there is "
        f"{described(hint)}. Pass such a value{f', for example {default!r}' if has_example else ''}."
    )


def accepts(hint: Any, value: object) -> bool:
    """Returns whether a value is of the type that an annotation names, as far as that can be told."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is None or hint is NoneType:
        return value is None
    if hint is float:
        return is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (Union, UnionType):
        return any(accepts(one, value) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return _accepts_items(inner, value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        keys, values = inner
        return isinstance(value, Mapping) and all(
            accepts(keys, key) and accepts(values, item) for key, item in value.items()
        )
    if origin is not None and issubclass(origin, Callable):  # type: ignore[arg-type]
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        # A tensor without axes can be walked through only by name.
        is_one = isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) == 0
        return isinstance(value, origin) and not is_one and _all_accepted(inner, value)
    # A protocol is met by what has its methods, which is told when they are called.
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


def _all_accepted(inner: tuple[Any, ...], value: Any) -> bool:
    # What can be walked through only once is left as it is.
    return not isinstance(value, Collection) or all(accepts(inner[0], item) for item in value)


def _accepts_items(inner: tuple[Any, ...], value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return False
    if len(inner) == 2 and inner[1] is not Ellipsis:
        return len(value) == 2 and all(accepts(one, item) for one, item in zip(inner, value, strict=True))
    return all(accepts(inner[0], item) for item in value)


def described(hint: Any) -> str:
    """Returns what an annotation names, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(described(one) for one in inner))
    if origin is Literal:
        return " or ".join(repr(one) for one in inner)
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return f"a sequence of {described(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping from {described(inner[0])} to {described(inner[1])}"
    if origin is not None and issubclass(origin, Callable):  # type: ignore[arg-type]
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a collection of {described(inner[0])}"
    return f"a `{getattr(hint, '__name__', hint)}`"


@cache
def _hints(owner: Any) -> dict[str, Any]:
    """Returns the annotations of a class or function, as types; they are read once."""
    try:
        return get_type_hints(owner)
    # A class of a user's own may name what only its type checker imports, or what is local to a function.
    except (NameError, AttributeError, TypeError):
        return {}
