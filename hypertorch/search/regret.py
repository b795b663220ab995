"""How much is lost by the configurations that were tried."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hypertorch.checks.argument_types import typed
from hypertorch.search.loss_table import check_loss_table


@typed("losses", "order")
def regrets(losses: Tensor, order: Sequence[int]) -> Tensor:
    """Returns what the best of the first evaluations is above the best of all configurations.

    Args:
        losses: validation losses on one data set, shape `(configurations,)`.
        order: the configurations in the order in which they are tried, each once.

    Returns:
        Entry `k` after `k + 1` evaluations, at least 0 and never growing, shape `(len(order),)`.

    Raises:
        ValueError: if the losses are not finite, or `order` is empty or lists what is not there, or one twice.
    """
    check_loss_table("losses", losses.unsqueeze(0))
    tried = list(order)
    if not tried or len(set(tried)) < len(tried) or not set(tried) <= set(range(len(losses))):
        raise ValueError(
            f"`order` is {tried}: it lists some of the {len(losses)} configurations, each once, from 0. Pass what "
            "`nearest_best` or `greedy_portfolio` returns."
        )
    return losses[tried].cummin(dim=0).values - losses.min()
