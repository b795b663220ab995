"""A diagonal change of basis that balances a linear map, found from its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PROBES = 5
_MOST_AT_ONCE = 1e3  # a product may cancel by chance: no size counts for more than this factor
_BASE = 256.0  # a power of 2, by which scaling is exact in floating point


def balancing(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Returns the diagonals `D` for which the rows of `D^-1 A D` have about the same size, shape `(maps, entries)`.

    Eigenvalues do not change. But where a map mixes units, such as a parameter and the square of its gradient, the
    rounding of its largest entries hides them. The size of a row is estimated by its product with random signs, and `D`
    moves by the square root of that size. `D` is then rounded to powers of 256, so that a map that is balanced already
    is left as it is, whatever the random signs.

    Cost: five products.

    Args:
        apply: the product of each map `A` with its vector, `(maps, entries)` to `(maps, entries)`.
        like: a tensor of the shape, type and device of the vectors.

    References:
        Chen and Demmel (2000), Balancing sparse matrices for computing eigenvalues, algorithm KrylovAz.
    """
    # A generator of its own on the host: the result is the same at every call and on every device.
    generator = torch.Generator().manual_seed(0)
    # In logarithms: `D` moves by the square root of a size, which is half of its logarithm.
    log_scale = torch.zeros_like(like)
    for _ in range(_PROBES):
        # Random signs, so that the entries of a row rarely cancel; the same for each map of the batch.
        signs = torch.randint(2, like.shape[1:], generator=generator).to(like) * 2 - 1
        scale = log_scale.exp()
        sizes = (apply(signs * scale) / scale).abs()
        nonzero = sizes > 0  # an empty row has no size, and stays as it is
        logs = torch.where(nonzero, sizes, torch.ones_like(sizes)).log()
        # Relative to the mean of the rows: a factor that all share changes no basis.
        mean = logs.sum(dim=1, keepdim=True) / nonzero.sum(dim=1, keepdim=True).clamp(min=1)
        bound = math.log(_MOST_AT_ONCE)
        log_scale = log_scale + torch.where(nonzero, (logs - mean).clamp(-bound, bound), torch.zeros_like(logs)) / 2
    return _BASE ** (log_scale / math.log(_BASE)).round()
