"""The check that outer variables are finite."""

from __future__ import annotations

from collections.abc import Callable

from hypertorch import tree
from hypertorch.errors import NonFiniteError
from hypertorch.types import TensorMapping


def check_finite(hparams: TensorMapping, *, where: str, remedy: str | Callable[[], str]) -> None:
    """Raises if an outer variable holds NaN or infinity.

    Cost: one pass over the outer variables; it waits for the accelerator once.

    Args:
        hparams: the outer variables.
        where: when or where they are not finite, a clause of the message.
        remedy: what to do, the end of the message; or what makes it, once it is needed.

    Raises:
        NonFiniteError: naming the first such variable.
    """
    # All at once, since each test waits for the device; one by one only to find the name.
    if tree.all_finite(hparams.values()):
        return
    name = next(name for name, value in hparams.items() if not tree.all_finite([value]))
    text = remedy if isinstance(remedy, str) else remedy()
    raise NonFiniteError(f"`hparams[{name!r}]` holds NaN or infinity {where}: nothing can be computed from it. {text}")
