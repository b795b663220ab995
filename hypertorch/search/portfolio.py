"""A portfolio: configurations that do well together over many data sets, whatever the next one is like."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch.checks.argument_types import typed
from hypertorch.search.loss_table import check_count_of, check_loss_table


@typed("losses")
def greedy_portfolio(losses: Tensor, count: int) -> list[int]:
    """Returns configurations, each of which lowers most what the best of those before it reaches, in the mean.

    What is minimised is `mean over data sets of min over the chosen configurations of the loss`. Its fall from the
    greatest loss of the table is at least `1 - 1/e = 0.63` of the greatest fall that this number of configurations
    allows, because the fall is a submodular function of them.

    Cost: `count` passes over the table.

    Args:
        losses: validation losses, shape `(sets, configurations)`.
        count: how many, at most all. The first of equally good ones is taken.

    Returns:
        Columns of `losses`, the first to try first.

    Raises:
        ValueError: if the losses are not finite, or `count` is out of range.

    References:
        Krause and Golovin (2014), Submodular function maximization. Feurer et al. (2022), Auto-sklearn 2.0.
    """
    check_loss_table("losses", losses)
    check_count_of(count, losses.shape[1])
    chosen: list[int] = []
    reached = losses.new_full((len(losses), 1), torch.inf)
    for _ in range(count):
        means = torch.minimum(losses, reached).mean(dim=0)
        # A chosen one lowers nothing any more, and would be taken again where no other does.
        means[chosen] = torch.inf
        chosen.append(int(means.argmin()))
        reached = torch.minimum(reached, losses[:, chosen[-1:]])
    return chosen
