"""What was found out about problems, kept so that it is found out once for each kind.

Entries are measured choices, passed comparisons, faults and compiled programs. They are kept for the life of the
process, at most `MOST_ENTRIES` of them: the entry that was unused for the longest time is dropped first, and found out
again when it is needed. No entry is a number of a result, and none holds a tensor or a problem.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

MOST_ENTRIES = 4096
"""Most entries of all topics together."""

# None is an answer too (nothing is wrong), so an unknown entry needs another mark.
_MISSING: Any = object()
# In the order of use: the entry that was unused for the longest time comes first.
_entries: dict[tuple[str, Hashable], Any] = {}


def recall(topic: str, key: Hashable, find_out: Callable[[], T]) -> T:
    """Returns what is known; the first time, it calls `find_out` and keeps the answer. An error is not kept.

    Args:
        topic: what kind of knowledge it is.
        key: what it is known about.
        find_out: finds it out.
    """
    # As in `get`, written out: every run asks.
    value = _entries.pop((topic, key), _MISSING)
    if value is _MISSING:
        value = find_out()
        note(topic, key, value)
    else:
        _entries[topic, key] = value
    return value


def get(topic: str, key: Hashable, default: T) -> T:
    """Returns what is known, or the default."""
    # Taken out and put back at the end: a dict keeps its order of insertion, so the first entry is the oldest.
    value = _entries.pop((topic, key), _MISSING)
    if value is _MISSING:
        return default
    _entries[topic, key] = value
    return value


def note(topic: str, key: Hashable, value: object) -> None:
    """Keeps what was found out, in place of what was known."""
    _entries.pop((topic, key), None)
    _entries[topic, key] = value
    while len(_entries) > MOST_ENTRIES:
        _entries.pop(next(iter(_entries)))


def forget(topic: str, key: Hashable) -> None:
    """Drops what is known, if anything."""
    _entries.pop((topic, key), None)


def entries(topic: str | None = None) -> dict[tuple[str, Hashable], Any]:
    """Returns what is known, by topic and key, of one topic or of all."""
    return {name: value for name, value in _entries.items() if topic in (None, name[0])}


def clear(topic: str | None = None) -> None:
    """Drops what is known of a topic, or all of it: it is found out again, and programs are compiled again."""
    for name in entries(topic):
        _entries.pop(name, None)


class Same:
    """A key that equals another one made of the very same objects, and keeps none of them alive.

    Args:
        objects: the objects; each can be referred to weakly.
    """

    __slots__ = ("_hash", "_references")

    def __init__(self, *objects: object) -> None:
        # Kept, because the memo finds and drops the entry by its hash after the objects are gone.
        self._hash = hash(tuple(map(id, objects)))
        self._references = tuple(weakref.ref(thing) for thing in objects)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Same):
            return False
        # An object that is gone is the same as no other: its address may be used again.
        mine, theirs = ([reference() for reference in key._references] for key in (self, other))
        return len(mine) == len(theirs) and all(
            own is not None and own is thing for own, thing in zip(mine, theirs, strict=True)
        )
