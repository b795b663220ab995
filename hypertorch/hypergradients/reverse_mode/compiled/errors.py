"""What is raised where a function cannot be compiled."""

from __future__ import annotations

from hypertorch.errors import HypertorchError


class NotCompilableError(HypertorchError):
    """A function cannot be compiled; whoever asked runs it without compilation."""


class TooLargeError(NotCompilableError):
    """The steps of a loop have too many operations: single steps are compiled much faster."""


class TooManyProgramsError(NotCompilableError):
    """A function has become a new program too many times."""
