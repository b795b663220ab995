"""Which problems could not be compiled, so that they are not tried again, and the warning that says so."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable

from hypertorch.compilation import NotCompilableError, TooManyProgramsError

# Each attempt takes a second: problems of a family of which so many were refused are not tried any more.
_MOST_ATTEMPTS = 3

_refused: set[tuple[Hashable, Hashable]] = set()
_attempts: Counter[Hashable] = Counter()
_warned: set[Hashable] = set()


def may_compile(family: Hashable, kind: Callable[[], Hashable]) -> bool:
    """Returns whether nothing is known against compiling a problem.

    Args:
        family: what problems that share programs have in common.
        kind: tells what problems that run the same code have in common; asked only after a refusal.
    """
    if not _attempts[family]:
        return True
    return _attempts[family] < _MOST_ATTEMPTS and (family, kind()) not in _refused


def refuse(family: Hashable, kind: Hashable, what: str, error: NotCompilableError) -> None:
    """Remembers that a problem cannot be compiled, and warns of it once.

    Where there were too many programs those that there are go on being used, by the problems that they belong to.
    """
    _refused.add((family, kind))
    # None more than one, so that others of the family are still looked at.
    _attempts[family] += 0 if isinstance(error, TooManyProgramsError) and _attempts[family] else 1
    last = _attempts[family] == _MOST_ATTEMPTS
    note = " Others of its class are not tried any more." if last else ""
    key = (family, TooManyProgramsError) if isinstance(error, TooManyProgramsError) else (family, kind)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"`compile=True`: {what} cannot be compiled, and runs without compilation, with the same numbers: "
            f"{error}{note}",
            UserWarning,
            stacklevel=2,
        )
