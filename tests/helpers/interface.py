"""The public interface as text: every name, with its parameters, defaults and kinds, one a line.

To write the record anew: PYTHONPATH=. python tests/helpers/interface.py > tests/interface.txt
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import hypertorch

_PLAIN = (bool, int, float, str, tuple, frozenset, type(None), enum.Enum)


def described() -> list[str]:
    """Returns the lines of the record."""
    known: dict[int, str] = {}
    lines: list[str] = []
    for module in sorted(_modules(), key=lambda module: (module.__name__.count("."), module.__name__)):
        for name in sorted(_public(module)):
            value, path = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.ismodule(value):
                lines.append(f"{path}: module")
            elif id(value) in known and callable(value):
                lines.append(f"{path} is {known[id(value)]}")
            else:
                known[id(value)] = path
                lines += _object(path, value)
    return sorted(lines)


def _modules() -> list[ModuleType]:
    """Returns the package, its subpackages, and the modules that it exports."""
    packages = [found.name for found in pkgutil.walk_packages(hypertorch.__path__, "hypertorch.") if found.ispkg]
    exported = [value.__name__ for name in hypertorch.__all__ if inspect.ismodule(value := getattr(hypertorch, name))]
    return [importlib.import_module(name) for name in {"hypertorch", *packages, *exported}]


def _public(module: ModuleType) -> list[str]:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return list(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def _object(path: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield from _class(path, value)
    elif inspect.isfunction(value):
        yield f"{path}{_parameters(value)}"
    else:
        yield f"{path}: {type(value).__name__}"


def _class(path: str, value: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    flags = [f"class({bases})" if bases else "class"]
    if inspect.isabstract(value):
        flags.append("abstract")
    if "__dataclass_fields__" in vars(value):
        settings = vars(value)["__dataclass_params__"]
        flags += [name for name in ("frozen", "eq", "order") if getattr(settings, name)]
    yield f"{path}: {', '.join(flags)}"
    if issubclass(value, enum.Enum):
        yield from (f"{path}.{member.name} = {member.value!r}" for member in value)
    elif not getattr(value, "_is_protocol", False):
        yield f"{path}{_parameters(value)}"
    fields = vars(value).get("__dataclass_fields__", ())
    for name, member in vars(value).items():
        if (not name.startswith("_") or name == "__call__") and name not in fields:
            yield from _member(f"{path}.{name}", member)


def _member(path: str, member: Any) -> Iterator[str]:
    abstract = ", abstract" if getattr(member, "__isabstractmethod__", False) else ""
    if isinstance(member, (property, functools.cached_property)):
        yield f"{path}: property{abstract}"
    elif isinstance(member, (classmethod, staticmethod)):
        yield f"{path}{_parameters(member.__func__)}: {type(member).__name__}{abstract}"
    elif inspect.isfunction(member):
        yield f"{path}{_parameters(member)}: method{abstract}"
    elif isinstance(member, _PLAIN):
        yield f"{path} = {_shown(member)}"


def _parameters(value: Callable[..., Any]) -> str:
    """Returns the parameters with their defaults; without annotations, which the type checker sees to."""
    try:
        signature = inspect.signature(value)
    except ValueError:  # made in C, by an exception's base
        return "(...)"
    factories = {}
    if dataclasses.is_dataclass(value):
        factories = {
            field.name: field.default_factory
            for field in dataclasses.fields(value)
            if field.default_factory is not dataclasses.MISSING
        }
    parameters = []
    for parameter in signature.parameters.values():
        plain = parameter.replace(annotation=inspect.Parameter.empty)
        if parameter.default is not inspect.Parameter.empty:
            made = factories[parameter.name]() if parameter.name in factories else parameter.default
            plain = plain.replace(default=_Text(_shown(made)))
        parameters.append(plain)
    return str(inspect.Signature(parameters))


def _shown(value: Any) -> str:
    """Returns a text of a value that is the same in every process."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__qualname__
    if isinstance(value, frozenset):
        return f"frozenset({sorted(map(_shown, value))})"
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


class _Text(str):
    """A text that is shown without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


if __name__ == "__main__":
    sys.stdout.write("\n".join(described()) + "\n")
