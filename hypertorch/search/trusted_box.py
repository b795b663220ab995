"""How far a search moves from the best point that it knows: further after successes, less far after failures."""

from __future__ import annotations

from torch import Tensor

_SUCCESSES = 3  # in a row, that double the length
_LEAST_FAILURES = 4  # in a row, that halve it; as many as there are numbers if that is more
_SMALLEST = 2.0**-7  # a shorter one starts again
_GAIN = 1e-3  # part of the best value that counts as better


def trusted_length(values: Tensor, first: float, dimension: int) -> float:
    """Returns how long the box of the next move is, as part of the range of each number.

    A pure function of what was seen, so that a search that is taken up moves as one that was not.

    Args:
        values: what the evaluations gave, in their order, NaN where one failed; shape `(evaluations,)`.
        first: the length before the first.
        dimension: how many numbers are searched.

    References:
        Eriksson et al. (2019), Scalable global optimization via local Bayesian optimization, section 2 and appendix.
    """
    length, successes, failures, best = first, 0, 0, float("inf")
    for value in values.tolist():
        # False for NaN: a failed evaluation is not better.
        is_better = value < best - _GAIN * (abs(best) if best < float("inf") else 0.0)
        successes, failures = (successes + 1, 0) if is_better else (0, failures + 1)
        best = value if is_better else best
        if successes == _SUCCESSES:
            # A box of length 2 covers the cube from every point of it.
            length, successes = min(2.0 * length, 2.0), 0
        elif failures == max(_LEAST_FAILURES, dimension):
            length, failures = length / 2.0, 0
        if length < _SMALLEST:
            length = first
    return length


def trusted_box(centre: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Returns the lower and upper ends of the part of the unit cube within half a length of a point.

    Args:
        centre: shape `(dimension,)`.
        length: of its edges.
    """
    return (centre - length / 2.0).clamp(0.0, 1.0), (centre + length / 2.0).clamp(0.0, 1.0)
