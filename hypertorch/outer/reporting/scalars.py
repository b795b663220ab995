"""Figures of a run as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def to_floats(scalars: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Returns the same figures as floats, in the same order.

    Cost: one copy from the accelerator, however many figures there are.

    Args:
        scalars: numbers, and tensors of one entry.
    """
    tensors = {name: value.detach() for name, value in scalars.items() if isinstance(value, Tensor)}
    if not tensors:
        return {name: float(value) for name, value in scalars.items()}
    device = next(iter(tensors.values())).device
    # Apple's GPUs have no double precision.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    # Stacked first: each copy to the host waits for the device.
    values = torch.stack([value.reshape(()).to(device, dtype, non_blocking=True) for value in tensors.values()])
    fetched = dict(zip(tensors, values.tolist(), strict=True))
    return {name: fetched[name] if name in fetched else float(value) for name, value in scalars.items()}
