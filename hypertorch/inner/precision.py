"""The inner loss computed in fewer bits than its params have."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch.autodiff.inner_loss import LossFunction
from hypertorch.types import Batch, TensorDict


def in_precision(
    function: LossFunction, dtype: torch.dtype, params: TensorDict, hparams: TensorDict, batch: Batch
) -> tuple[Tensor, TensorDict]:
    """Returns what the inner loss returns, with matrix products and convolutions in another dtype.

    By `torch.autocast`: the params are cast where they are used, so that gradients arrive in the params' own dtype.

    Args:
        function: the inner loss of one task.
        dtype: of the products.
        params: of float32.
        hparams: the outer variables.
        batch: the data of a step.

    Raises:
        ValueError: if a param has another dtype, which autocast leaves as it is.
    """
    some = next(iter(params.values()))
    others = sorted({str(value.dtype) for value in params.values() if value.is_floating_point()} - {"torch.float32"})
    if others:
        raise ValueError(
            f"`inner_dtype` of the execution is {dtype}, and the inner params have the dtype {others[0]}: only float32 "
            "is cast. Make the params and hyperparameters float32, or leave `inner_dtype` out."
        )
    # Casts that were kept for later would be without the graph of the evaluation that meets them.
    with torch.autocast(some.device.type, dtype=dtype, cache_enabled=False):
        value, buffers = function(params, hparams, batch)
    # Losses are summed over tasks, and compared when steps run again, in the precision of the params.
    return value.to(some.dtype), buffers
