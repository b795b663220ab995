"""From an exception of a contestant to the reason that the table shows."""

from __future__ import annotations

from benchmarks.contestant import NotMeasured
from hypertorch.errors import HypertorchError

CONTESTANT_FAILURES = (
    NotMeasured,
    HypertorchError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a library may raise when it cannot do a work: a row of the table. Interrupts are not among them."""

_LONGEST = 200
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "resource_exhausted")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether a contestant failed for want of memory, as PyTorch, JAX and Python say it."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def reason(error: BaseException) -> str:
    """Returns the first line of an exception with its kind, or the message of `NotMeasured` as it is."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    if isinstance(error, NotMeasured):
        return message
    text = f"{type(error).__name__}: {message}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
