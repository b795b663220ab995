"""Sets that outer variables are kept in: after each outer step a hyperparameter is moved to the set's nearest point."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hypertorch.checks.argument_types import check_fields


class Constraint(ABC):
    """A closed convex set of tensors, given by its Euclidean projection.

    Projections are deterministic and never wait for an accelerator. NaN stays NaN: finiteness is checked elsewhere.
    """

    @abstractmethod
    def project(self, hparam: Tensor) -> Tensor:
        """Returns the point of the set nearest to `hparam`: same shape, dtype and device, without a graph.

        A point of the set comes back as it is, bit for bit, so projecting twice is projecting once.
        """

    @abstractmethod
    def feasible(self, hparam: Tensor) -> bool:
        """Returns whether `hparam` lies in the set, up to the rounding of its dtype; False if it holds NaN."""


@dataclass(frozen=True, kw_only=True)
class Positive(Constraint):
    """Entries above zero: `x_i >= minimum`.

    Cost: one elementwise operation.

    Args:
        minimum: smallest value allowed, above 0; never below the smallest normal number of the tensor's dtype.

    Raises:
        ValueError: if `minimum` is not a finite number above 0.
        TypeError: (from the methods) if the tensor is not floating-point.
    """

    minimum: float = 1e-12

    def __post_init__(self) -> None:
        check_fields(self, "minimum")
        why = "the smallest allowed value of a positive number is finite and above 0"
        _check_positive("Positive", "minimum", self.minimum, f"{why}. For a set that holds 0, use `Box(lower=0.0)`.")

    def project(self, hparam: Tensor) -> Tensor:
        """Returns `max(hparam, minimum)`, elementwise."""
        _check_floating(self, hparam)
        # `clamp` leaves NaN as it is, for the outer loop to find.
        return hparam.detach().clamp(min=self._floor(hparam))

    def feasible(self, hparam: Tensor) -> bool:
        """Returns whether every entry is at least `minimum`."""
        _check_floating(self, hparam)
        return bool((hparam.detach() >= self._floor(hparam)).all())

    def _floor(self, hparam: Tensor) -> float:
        # In half precision a small minimum would round to 0.
        return max(self.minimum, torch.finfo(hparam.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class Box(Constraint):
    """Entries between two bounds: `lower <= x_i <= upper`.

    Cost: one elementwise operation.

    Args:
        lower: least value allowed; minus infinity for none.
        upper: greatest value allowed; infinity for none.

    Raises:
        ValueError: if `lower` is above `upper`, or one of them is NaN.
        TypeError: (from the methods) if the tensor is not floating-point.
    """

    lower: float = -math.inf
    upper: float = math.inf

    def __post_init__(self) -> None:
        check_fields(self, "lower", "upper")
        _check_bounds("Box", self.lower, self.upper)
        if self.lower == math.inf or self.upper == -math.inf:
            raise ValueError(
                f"`lower` of `Box` is {self.lower} and `upper` {self.upper}: no finite number lies between them. Pass "
                "a `lower` below infinity and an `upper` above minus infinity."
            )

    def project(self, hparam: Tensor) -> Tensor:
        """Returns `min(max(hparam, lower), upper)`, elementwise."""
        _check_floating(self, hparam)
        return hparam.detach().clamp(min=self.lower, max=self.upper)

    def feasible(self, hparam: Tensor) -> bool:
        """Returns whether every entry is between the bounds."""
        _check_floating(self, hparam)
        hparam = hparam.detach()
        return bool(((hparam >= self.lower) & (hparam <= self.upper)).all())


@dataclass(frozen=True, kw_only=True)
class Simplex(Constraint):
    """Weights that sum to a given total, over all entries of the tensor: `x_i >= 0` and `sum_i x_i = total`.

    The projection is `max(x_i - theta, 0)` with the one `theta` for which the sum is `total`.

    Cost: about 70 passes over the tensor.

    Args:
        total: the sum, above 0.

    Raises:
        ValueError: if `total` is not a finite number above 0; (from the methods) if the tensor is empty.
        TypeError: (from the methods) if the tensor is not floating-point.

    References:
        Held, Wolfe and Crowder (1974), Validation of subgradient optimization (the threshold form).
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "total")
        why = "weights that are at least 0 have a finite sum above 0"
        _check_positive("Simplex", "total", self.total, f"{why}. Pass such a number; 1.0 gives proportions.")

    def project(self, hparam: Tensor) -> Tensor:
        """Returns the nearest weights with this total."""
        self._check(hparam)
        values = _in_working_precision(hparam)
        # The simplex does not feel a shift of all entries; after this one, entries that end above 0 are within
        # `total` of 0, and the search below loses no digits to large inputs.
        shifted = (values - values.max()).clamp(min=-self.total)
        low, high = shifted.new_tensor(-self.total), shifted.new_tensor(0.0)
        # No `if` on a value: it would wait for the device. Both are computed and one
        # is taken, so that a point of the set comes back bit for bit.
        nearest = _shift_to_total(shifted, lower=0.0, upper=math.inf, total=self.total, low=low, high=high)
        return torch.where(self._holds(hparam), hparam.detach(), nearest.to(hparam.dtype))

    def feasible(self, hparam: Tensor) -> bool:
        """Returns whether no entry is below 0 and the sum is `total`."""
        self._check(hparam)
        return bool(self._holds(hparam))

    def _holds(self, hparam: Tensor) -> Tensor:
        gap = _in_working_precision(hparam).sum() - self.total
        return (hparam.detach() >= 0.0).all() & (gap.abs() <= self.total * _rounding(hparam))

    def _check(self, hparam: Tensor) -> None:
        _check_floating(self, hparam)
        if hparam.numel() == 0:
            raise ValueError(
                f"`Simplex` got an empty tensor of shape {tuple(hparam.shape)}: no weights sum to {self.total}. Give "
                "the hyperparameter at least one entry, or drop its constraint."
            )


@dataclass(frozen=True, kw_only=True)
class BoundedSum(Constraint):
    """Bounded weights with a bounded sum, over all entries: `lower <= x_i <= upper` and `sum_i x_i <= total`.

    The projection is `clamp(x_i - theta, lower, upper)`, with `theta = 0` if the sum allows it, and else the one
    `theta > 0` for which the sum is `total`.

    Cost: about 70 passes over the tensor.

    Args:
        lower: least value of an entry, finite.
        upper: greatest value of an entry, finite.
        total: greatest sum of all entries.

    Raises:
        ValueError: if a number is not finite or `lower` is above `upper`; (from the methods) if the tensor has so many
            entries that even at `lower` their sum exceeds `total`.
        TypeError: (from the methods) if the tensor is not floating-point.

    References:
        Franceschi et al. (2017), Forward and reverse gradient-based hyperparameter optimization, section 5.1.
    """

    total: float
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "total", "lower", "upper")
        _check_bounds("BoundedSum", self.lower, self.upper)
        for name, value in (("lower", self.lower), ("upper", self.upper), ("total", self.total)):
            if not math.isfinite(value):
                raise ValueError(
                    f"`{name}` of `BoundedSum` is {value}: the bounds and the greatest sum are finite numbers. Without "
                    "a bound on the sum, use `Box`."
                )

    def project(self, hparam: Tensor) -> Tensor:
        """Returns the nearest weights within the bounds and the greatest sum."""
        self._check(hparam)
        if hparam.numel() == 0:
            return hparam.detach().clone()
        values = _in_working_precision(hparam)
        clipped = values.clamp(self.lower, self.upper)
        low = values.new_tensor(0.0)
        high = (values.max() - self.lower).clamp(min=0.0)
        shifted = _shift_to_total(values, lower=self.lower, upper=self.upper, total=self.total, low=low, high=high)
        nearest = torch.where(clipped.sum() <= self.total, clipped, shifted)
        return torch.where(self._holds(hparam), hparam.detach(), nearest.to(hparam.dtype))

    def feasible(self, hparam: Tensor) -> bool:
        """Returns whether all entries are within the bounds and their sum is at most `total`."""
        self._check(hparam)
        return bool(self._holds(hparam))

    def _holds(self, hparam: Tensor) -> Tensor:
        entries = hparam.detach()
        within = ((entries >= self.lower) & (entries <= self.upper)).all()
        # Rounding errors are relative to the entries' absolute values, whose sum is at most this.
        scale = abs(self.total) + 2.0 * hparam.numel() * max(0.0, -self.lower)
        return within & (_in_working_precision(hparam).sum() <= self.total + scale * _rounding(hparam))

    def _check(self, hparam: Tensor) -> None:
        _check_floating(self, hparam)
        if hparam.numel() * self.lower > self.total:
            raise ValueError(
                f"`total` of `BoundedSum` is {self.total}, but the tensor has {hparam.numel()} entries of at least "
                f"`lower` = {self.lower}: no point satisfies both. Raise `total` or lower `lower`."
            )


# More than a double has binary digits, which are 53.
_HALVINGS = 64
# The first may push an entry onto a bound, and the second spreads what that entry does not take.
_CORRECTIONS = 2


def _shift_to_total(values: Tensor, *, lower: float, upper: float, total: float, low: Tensor, high: Tensor) -> Tensor:
    """Returns `clamp(values - theta, lower, upper)` with `theta` in `[low, high]` such that the sum is `total`.

    The sum falls as theta grows: bisection finds which entries are strictly between the bounds, and spreading what is
    left over these entries then makes the sum exact. Sums are deterministic on every device; a cumulative sum over
    sorted entries is not.
    """
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        too_large = (values - middle).clamp(lower, upper).sum() > total
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    # The upper end, where the sum is not too large.
    result = (values - high).clamp(lower, upper)
    for _ in range(_CORRECTIONS):
        free = (result > lower) & (result < upper)
        # Where no entry is free nothing is spread, and 0 / 0 must not come of it.
        excess = (result.sum() - total) / free.sum().clamp(min=1)
        result = torch.where(free, result - excess, result).clamp(lower, upper)
    return result


def _in_working_precision(hparam: Tensor) -> Tensor:
    # Half and single precision would lose the sum of many entries; Apple's GPUs have no double precision.
    return hparam.detach().to(torch.float32 if hparam.device.type == "mps" else torch.float64)


def _rounding(hparam: Tensor) -> float:
    """Returns how far, relatively, the sum of a tensor may be off once its entries are rounded to its dtype."""
    return torch.finfo(hparam.dtype).eps * (8.0 + math.log2(max(hparam.numel(), 1)))


def _check_positive(owner: str, name: str, value: float, why: str) -> None:
    # Written as what is allowed, so that NaN is refused.
    if not 0.0 < value < math.inf:
        raise ValueError(f"`{name}` of `{owner}` is {value}: {why}")


def _check_bounds(owner: str, lower: float, upper: float) -> None:
    if not lower <= upper:
        raise ValueError(
            f"`lower` and `upper` of `{owner}` are {lower} and {upper}: no number lies between them. Pass `lower` at "
            "most `upper`."
        )


def _check_floating(constraint: Constraint, hparam: Tensor) -> None:
    if not hparam.is_floating_point():
        raise TypeError(
            f"`{type(constraint).__name__}` got a tensor of dtype {hparam.dtype}: only floating-point hyperparameters "
            "are moved by an outer step. Convert it with `.float()` or `.double()`."
        )
