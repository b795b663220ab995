"""Whether two contestants computed the same hypergradient."""

from __future__ import annotations

import math

from hypertorch.types import TensorDict

_SMALL = 1e-2


def relative_error(found: TensorDict, reference: TensorDict) -> float:
    """Returns the largest relative error of any entry, by its norm; infinity if entries or shapes differ.

    An entry whose norm is below a hundredth of the whole is judged by that hundredth: it may be zero but for rounding.

    Args:
        found: a hypergradient.
        reference: the one it is compared with.
    """
    shapes, expected = ({name: value.shape for name, value in grads.items()} for grads in (found, reference))
    if shapes != expected:
        return math.inf
    norms = {name: float(value.double().norm()) for name, value in reference.items()}
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    if whole == 0.0:
        return 0.0 if all(float(value.double().norm()) == 0.0 for value in found.values()) else math.inf
    errors = [
        float((found[name].double() - value.double()).norm()) / max(norms[name], _SMALL * whole)
        for name, value in reference.items()
    ]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)
