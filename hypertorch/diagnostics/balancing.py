"""A diagonal change of basis that makes the entries of a map alike in size, found from its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PROBES = 5
_MOST_AT_ONCE = 1e3
_BASE = 256.0


def balancing(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Returns the diagonals `D` for which the rows of `D^-1 A D` have about the same size, shape `(maps, entries)`.

    Eigenvalues do not change; but where a map mixes units, such as a parameter and the square of its gradient, they
    are lost in the rounding of its largest entries. A row's size is that of its product with random signs, and `D`
    moves by the square root of it. It is then rounded to powers of 256: what the chance of the signs does to a map
    that is balanced already is undone.

    Cost: five products.

    Args:
        apply: the product of each map `A` with its vector, `(maps, entries)` to `(maps, entries)`.
        like: a tensor of the shape, type and device of the vectors.

    References:
        Chen and Demmel (2000), Balancing sparse matrices for computing eigenvalues, algorithm KrylovAz.
    """
    generator = torch.Generator().manual_seed(0)
    log_scale = torch.zeros_like(like)
    for _ in range(_PROBES):
        signs = torch.randint(2, like.shape[1:], generator=generator).to(like) * 2 - 1
        scale = log_scale.exp()
        sizes = (apply(signs * scale) / scale).abs()
        nonzero = sizes > 0
        logs = torch.where(nonzero, sizes, torch.ones_like(sizes)).log()
        mean = logs.sum(dim=1, keepdim=True) / nonzero.sum(dim=1, keepdim=True).clamp(min=1)
        bound = math.log(_MOST_AT_ONCE)
        log_scale = log_scale + torch.where(nonzero, (logs - mean).clamp(-bound, bound), torch.zeros_like(logs)) / 2
    return _BASE ** (log_scale / math.log(_BASE)).round()
