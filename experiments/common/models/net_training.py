"""A net that is trained on minibatches, with nothing of the loss learnt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.models.mlp import MLP
from hypertorch.types import Batch, TensorDict


class NetTraining(ht.InnerProblem):
    """Trains a net from random first weights by the cross-entropy.

    Args:
        net: the net.
        batches: images and labels of an inner step.
        like: a tensor of the weights' dtype and device.
    """

    def __init__(self, *, net: MLP, batches: Callable[[int], Batch], like: Tensor) -> None:
        self._net = net
        self._batches = batches
        self._like = like

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights."""
        return self._net.draw(self._like)

    def batch(self, step: int) -> Batch:
        """Returns images and labels."""
        return self._batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self._net(params, images), labels)
