"""From a configuration to a typed object: each command declares its settings once, as the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig

T = TypeVar("T")
Reader = Callable[[DictConfig, str], T]
"""`(configuration, dotted name) -> value`, which refuses what cannot be the setting's value."""

_READER = "reader"


def setting(reader: Reader[T]) -> T:
    """Returns the field of a setting, for the body of a dataclass.

    Args:
        reader: reads and checks it.
    """
    return field(metadata={_READER: reader})


def parse(kind: type[T], config: DictConfig, prefix: str = "") -> T:
    """Returns the settings that a dataclass declares; a field that is a dataclass is a block of settings.

    Args:
        kind: the dataclass.
        config: the configuration.
        prefix: dotted name of the block that holds them, with a dot behind it.

    Raises:
        ExpectedFailure: if a value cannot be that of its setting.
    """
    values: dict[str, Any] = {}
    for name, inner, reader in _declared(kind):
        key = f"{prefix}{name}"
        values[name] = parse(inner, config, f"{key}.") if reader is None else reader(config, key)
    return kind(**values)


def setting_keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of the settings that a dataclass declares."""
    for name, inner, reader in _declared(kind):
        if reader is None:
            yield from setting_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _declared(kind: Any) -> Iterator[tuple[str, Any, Reader[Any] | None]]:
    """Yields name, type and reader of each field; a block of settings, whose type is a dataclass, has no reader."""
    kinds = get_type_hints(kind)
    for item in fields(kind):
        reader = item.metadata.get(_READER)
        if reader is None and not is_dataclass(kinds[item.name]):
            raise TypeError(f"`{item.name}` of {kind.__name__} is neither a setting nor a block of settings")
        yield item.name, kinds[item.name], reader
