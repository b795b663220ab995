"""Which problems could not be compiled, so that they are not tried again, and the warning that says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError, TooManyProgramsError
from hypertorch.inner import memo

# An attempt takes a second. After this number of refusals no other problem of the family is tried.
_MOST_ATTEMPTS = 3

REFUSED = "problems that cannot be compiled"
ATTEMPTS = "failed compilations"
WARNED = "warnings of what cannot be compiled"


def may_compile(family: Hashable, kind: Callable[[], Hashable]) -> bool:
    """Returns whether nothing is known against compiling a problem.

    Args:
        family: what problems that share programs have in common.
        kind: tells what problems that run the same code have in common; asked only after a refusal.
    """
    attempts = memo.get(ATTEMPTS, family, 0)
    return not attempts or (attempts < _MOST_ATTEMPTS and not memo.get(REFUSED, (family, kind()), False))


def refuse(family: Hashable, kind: Hashable, what: str, error: NotCompilableError) -> None:
    """Remembers that a problem cannot be compiled, and warns of it once.

    Where there are too many programs, problems that have one already go on using it.
    """
    memo.note(REFUSED, (family, kind), True)
    attempts = memo.get(ATTEMPTS, family, 0)
    # Too many programs count once, so that others of the family are still looked at.
    attempts += 0 if isinstance(error, TooManyProgramsError) and attempts else 1
    memo.note(ATTEMPTS, family, attempts)
    note = " Others of its class are not tried any more." if attempts == _MOST_ATTEMPTS else ""
    # Too many programs are a matter of the family, and said once for it.
    key = (family, TooManyProgramsError) if isinstance(error, TooManyProgramsError) else (family, kind)
    if not memo.get(WARNED, key, False):
        memo.note(WARNED, key, True)
        warnings.warn(
            f"`compile=True`: {what} cannot be compiled, and runs without compilation, with the same numbers: "
            f"{error}{note}",
            UserWarning,
            stacklevel=2,
        )
