"""Arithmetic that update rules share: one operation where a setting is a number, finite derivatives at zero."""

from __future__ import annotations

import torch
from torch import Tensor


def descend(param: Tensor, direction: Tensor, lr: float | Tensor) -> Tensor:
    """Returns `param - lr * direction`."""
    if isinstance(lr, Tensor):
        # `alpha` takes numbers only; the product keeps the derivative of a learnt step size.
        return param - lr * direction
    # The derivative of `sub` takes a negation more.
    return param.add(direction, alpha=-lr)


def decayed(direction: Tensor, param: Tensor, weight_decay: float | Tensor) -> Tensor:
    """Returns `direction + weight_decay * param`, the direction with the slope of an L2 penalty."""
    if isinstance(weight_decay, Tensor):
        return direction + weight_decay * param
    # Out of place, one operation for two: every inner step pays for each in time and in the graph.
    return direction.add(param, alpha=weight_decay)


def descend_quotient(param: Tensor, numerator: Tensor, denominator: Tensor, lr: float | Tensor) -> Tensor:
    """Returns `param - lr * numerator / denominator`."""
    if isinstance(lr, Tensor):
        return param - lr * (numerator / denominator)
    # The operation of `torch.optim.Adam`, so that the steps agree to round-off.
    return torch.addcdiv(param, numerator, denominator, value=-lr)


def running_mean(mean: Tensor, value: Tensor, decay: float | Tensor) -> Tensor:
    """Returns `decay * mean + (1 - decay) * value`."""
    if isinstance(decay, Tensor):
        return decay * mean + (1.0 - decay) * value
    # PyTorch's optimisers take this form for their first moments.
    return torch.lerp(mean, value, 1.0 - decay)


def running_square(mean: Tensor, value: Tensor, decay: float | Tensor) -> Tensor:
    """Returns `decay * mean + (1 - decay) * value ** 2`."""
    if isinstance(decay, Tensor):
        return decay * mean + (1.0 - decay) * value.square()
    # PyTorch's form for second moments, without a square in memory.
    return torch.addcmul(decay * mean, value, value, value=1.0 - decay)


def power(base: float | Tensor, count: int) -> float | Tensor:
    """Returns `base ** count`.

    PyTorch's compiler cannot trace the derivative of a tensor's power by a whole number that changes from call to call,
    so that the number is a tensor there.
    """
    if isinstance(base, Tensor) and not isinstance(count, Tensor) and torch.compiler.is_compiling():
        return base ** torch.full((), count, dtype=base.dtype, device=base.device)
    return base**count


def safe_sqrt(value: Tensor) -> Tensor:
    """Returns the square root, with derivatives of every order zero where `value` is zero.

    The square root has no derivative at zero, and PyTorch's infinity there becomes NaN as soon as the chain rule
    multiplies it by the zero gradient that the sum of squares came from. A coordinate that has had no gradient so far
    has a sum of squares that is zero whatever the outer variables are, so its derivative is zero. The inner `where`
    keeps the infinity from arising: multiplied by the outer one's zero it would be NaN as well.

    A negative value, which rounding makes of a difference of equal numbers, counts as zero; NaN stays NaN.
    """
    # False for NaN: it goes through the root, and the checks see it.
    at_zero = value <= 0.0
    return torch.where(at_zero, 0.0, torch.where(at_zero, 1.0, value).sqrt())
