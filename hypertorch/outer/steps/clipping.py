"""The norm of a hypergradient, and its clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from hypertorch.types import TensorDict, TensorMapping


def total_norm(grads: TensorMapping) -> Tensor:
    """Returns the Euclidean norm over all entries of all tensors, a scalar in at least single precision."""
    # The widest type of all, so that the sum loses no digits of any variable.
    widest = torch.float32
    for grad in grads.values():
        widest = torch.promote_types(widest, grad.dtype)
    flat = [grad.detach().flatten().to(widest) for grad in grads.values() if grad.numel()]
    if not flat:
        return torch.zeros((), dtype=widest)
    # Squares of large entries overflow, and clipping by an infinite norm would make zeros. A power of two of the size
    # of the largest entry is taken out first, which changes no digit.
    largest = torch.stack([values.abs().amax() for values in flat]).amax()
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    norms = [torch.linalg.vector_norm(values / scale) for values in flat]
    return scale * torch.linalg.vector_norm(torch.stack(norms))


def clip_to_norm(grads: TensorMapping, norm: Tensor, clip_norm: float) -> TensorDict:
    """Returns the hypergradient scaled by `min(1, clip_norm / norm)`: the same direction, at most this long.

    Args:
        grads: the hypergradient.
        norm: its `total_norm`.
        clip_norm: greatest norm allowed, above 0.
    """
    # A zero norm gives an infinite quotient, which the clamp turns into 1. No branch: that would wait for the device.
    factor = (clip_norm / norm).clamp(max=1.0)
    # A wider factor would change the type of a hypergradient without axes, which its variable refuses as `.grad`.
    return {name: grad * factor.to(grad.dtype) for name, grad in grads.items()}
