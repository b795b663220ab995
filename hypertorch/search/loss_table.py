"""Tables of losses: a row for each data set, a column for each configuration."""

from __future__ import annotations

from torch import Tensor

from hypertorch.checks.values import check_dense


def check_loss_table(name: str, losses: Tensor) -> None:
    """Checks a table of losses.

    Args:
        name: of the argument, for the message.
        losses: shape `(sets, configurations)`.

    Raises:
        TypeError: if its entries cannot be looked at.
        ValueError: if it has another form, or holds what is not finite.
    """
    check_dense(name, losses)
    if losses.dim() != 2 or not losses.numel() or not losses.is_floating_point():
        raise ValueError(
            f"`{name}` has the shape {tuple(losses.shape)} and dtype {losses.dtype}: it has a row for each data set "
            "and a column for each configuration, of floating-point numbers. Stack the losses of the data sets."
        )
    if not bool(losses.isfinite().all()):
        raise ValueError(
            f"`{name}` holds NaN or infinity: such a configuration has no place in a mean. Replace it by the worst "
            "finite loss of its data set, or drop its column."
        )


def check_count_of(count: int, available: int) -> None:
    """Checks how many configurations are asked for.

    Raises:
        ValueError: if there are fewer, or the number is no count.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= available:
        raise ValueError(
            f"`count` is {count!r}, but each of {available} configurations is tried at most once. Pass a whole number "
            f"from 1 to {available}."
        )
