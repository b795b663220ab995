"""Where a search on a new data set starts: at what was best on the data sets that are nearest to it."""

from __future__ import annotations

from torch import Tensor

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import check_dense
from hypertorch.search.loss_table import check_count_of, check_loss_table


@typed("distances", "losses")
def nearest_best(distances: Tensor, losses: Tensor, count: int) -> list[int]:
    """Returns the best configuration of the nearest data set, then that of the next nearest, and so on, each once.

    Where all data sets' best are taken, the second best of each follow in the same order.

    Args:
        distances: of a new data set from those known, shape `(sets,)`; by a `DatasetDistance`, or any other.
        losses: validation losses on those known, shape `(sets, configurations)`.
        count: how many, at most all.

    Returns:
        Columns of `losses`, the first to try first.

    Raises:
        ValueError: if the distances do not belong to the losses or are NaN, the losses are not finite, or `count` is
            out of range.
    """
    check_loss_table("losses", losses)
    check_count_of(count, losses.shape[1])
    check_dense("distances", distances)
    if not distances.is_floating_point():
        raise TypeError(
            f"`distances` has dtype {distances.dtype}: distances are real numbers. Convert it with "
            "`.to(torch.float64)`."
        )
    if distances.shape != losses.shape[:1] or bool(distances.isnan().any()):
        raise ValueError(
            f"`distances` has the shape {tuple(distances.shape)}, and {int(distances.isnan().sum())} of its entries "
            f"are NaN: there is one for each of the {len(losses)} data sets. Pass a row of `DatasetDistance(...)`."
        )
    ranked = losses[distances.argsort(stable=True)].argsort(dim=1, stable=True)
    # A dict keeps the first place of each.
    return list(dict.fromkeys(ranked.T.flatten().tolist()))[:count]
