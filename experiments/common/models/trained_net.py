"""Params that were trained already, as the inner problem of a judgement that takes no more steps."""

from __future__ import annotations

from torch import Tensor

import hypertorch as ht
from hypertorch.types import Batch, TensorDict


class TrainedNet(ht.InnerProblem):
    """A net that was trained already.

    Args:
        params: its weights.
    """

    def __init__(self, params: TensorDict) -> None:
        self._params = params

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the weights."""
        return dict(self._params)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Refuses: there are no steps."""
        raise AssertionError("a trained net takes no steps")
