"""Arithmetic that can be undone bit for bit: integers for numbers, and a buffer for what a product would forget.

A number is held as a 64-bit integer in units of `2^-52`. Adding is then exact, and subtracting undoes it. Multiplying
by a factor below 1 maps several integers to one; which of them it was goes into an information buffer, `log2(1/factor)`
bits per product, and dividing takes it out again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Below 2^62 in units, so that the sum of two cannot wrap around: int64 does that without an error.
LARGEST_NUMBER = 2.0**10
"""Numbers must stay below this: then neither an integer nor the sum of two leaves 64 bits."""

# With it a denominator has some 28 bits at most, and a head has 31 when a word has gone to the stack: their product
# fits.
LEAST_FACTOR = 2.0**-16
GREATEST_FACTOR = 1.0 - 2.0**-53

UNITS = 2.0**52
"""Units per 1.0."""

_WORD_BITS = 32
_LARGEST_NUMERATOR = 2**12  # the noise of a product, in units
_EXCESS = 0.01  # information that a fraction may store beyond need, as a share of that need
_ROUND_OFF = 2.0**-51
_SWEEPS = 4


def encode(numbers: Tensor) -> Tensor:
    """Returns the nearest integers in units of `2^-52`, int64; for numbers below `LARGEST_NUMBER` in magnitude."""
    # Scaling by a power of two is exact, so a number rounds once, and only by what lies below a unit.
    return (numbers.detach().double() * UNITS).round_().long()


def decode(integers: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns the numbers that integers stand for, rounded to `dtype`."""
    # Above 2 an integer has more bits than a double: what is lost is lost to the loss alone, and the integer stays.
    # By a power of two, whose reciprocal is exact: a product has the same bits as the quotient, and is faster.
    return integers.double().mul_(1.0 / UNITS).to(dtype)


def add(integers: Tensor, numbers: Tensor) -> Tensor:
    """Adds the nearest integers to numbers in units of `2^-52`, float64; both in place. Returns the sums."""
    sums = _array(integers)
    sums += _array(numbers.round_().long())
    return integers


def subtract(integers: Tensor, numbers: Tensor) -> Tensor:
    """Undoes `add` of the same numbers, in place. Returns the differences."""
    differences = _array(integers)
    differences -= _array(numbers.round_().long())
    return integers


def largest(values: Sequence[Tensor]) -> Tensor:
    """Returns the largest magnitude in tensors of integers or of numbers, float64; NaN if there is one."""
    # Not by `abs` of the integers: the least int64 has no positive counterpart. `amax` keeps NaN.
    extremes = [extreme.double() for value in values for extreme in value.aminmax()]
    return torch.stack(extremes).abs_().amax()


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """A factor below 1 in the form that a reversible product needs, `value = (numerator / denominator) (1 + rest)`.

    Only the fraction costs information, and noise of the size of its numerator; the rest is tiny and costs none. For
    a tensor of values the numerator is shared.

    Attributes:
        value: the factor, in double precision.
        numerator: of the fraction, at least 1.
        denominator: of the fraction, at least the numerator; int64 if it is a tensor.
        largest_denominator: the largest entry of `denominator`.
        rest: at least 0, and below 1/20.
    """

    value: float | Tensor
    numerator: int
    denominator: int | Tensor
    largest_denominator: int
    rest: float | Tensor


@lru_cache(maxsize=2**14)
def factor_of(value: float) -> Factor:
    """Returns the factor of one value: the smallest fraction from below that stores at most 1 % too much information.

    If no numerator up to `2^12` is that close (values above 0.997 or so), the closest of all.

    Args:
        value: in `[LEAST_FACTOR, GREATEST_FACTOR]`.

    Raises:
        ValueError: if the value is outside.
    """
    _check_factor(value)
    # All candidates at once, on the host: a factor is found once for each value, and kept.
    numerators = np.arange(1, _LARGEST_NUMERATOR + 1, dtype=np.float64)
    # A fraction above the value by its own rounding (49/50 for 0.98) is that value.
    denominators = np.ceil(numerators / value * (1.0 - _ROUND_OFF))
    rests = value * denominators / numerators - 1.0
    # `log(d/n)` is stored and `log(1/value)` is needed: `log(1 + rest)` is the excess.
    close = np.log1p(rests) <= _EXCESS * -math.log(value)
    # `argmax` finds the first, which is the smallest numerator and so the least noise.
    best = int(close.argmax() if close.any() else rests.argmin())
    denominator = int(denominators[best])
    rest = float(rests[best])
    return Factor(
        value=value,
        numerator=best + 1,
        denominator=denominator,
        largest_denominator=denominator,
        # Below zero by rounding only; with a negative rest the last step could map two integers to one.
        rest=rest if rest > 2 * _ROUND_OFF else 0.0,
    )


def factors_of(values: Tensor, least: float, greatest: float) -> Factor:
    """Returns the factor of a tensor of values, one for each entry, without waiting for the device.

    All lanes of the information buffer have the width that the least value needs.

    Args:
        values: each in `[least, greatest]`.
        least: a number that the host knows, at least `LEAST_FACTOR`.
        greatest: likewise, at most `GREATEST_FACTOR`.

    Raises:
        ValueError: if `least` or `greatest` is outside.
    """
    _check_factor(least)
    _check_factor(greatest)
    values = values.detach().double()
    # With the denominator rounded up, `rest < value / numerator`.
    numerator = min(_LARGEST_NUMERATOR, math.ceil(greatest / (_EXCESS * -math.log(greatest))))
    denominator = (numerator / values).ceil()
    return Factor(
        value=values,
        numerator=numerator,
        denominator=denominator.long(),
        largest_denominator=math.ceil(numerator / least) + 1,
        rest=(values * denominator / numerator - 1.0).clamp(min=0.0),
    )


def _check_factor(value: float) -> None:
    """Raises `ValueError` if no reversible product with this factor exists."""
    if not LEAST_FACTOR <= value <= GREATEST_FACTOR:
        raise ValueError(
            f"a factor is {value}, outside [{LEAST_FACTOR:.3g}, 1): a product with 0 forgets everything, one with 1 or "
            "more is no decay. Use one such as 0.9."
        )


class InformationBuffer:
    """What products of integers with factors below 1 have forgotten, so that each can be undone, last one first.

    Every entry of the tensor has a lane of its own: a 64-bit head, a number below a bound that all lanes share. The
    bound depends on the factors alone. Where it would pass `2^63`, the low 32 bits of all heads go to a stack as one
    int32 tensor. Storage so is `64 + 32 words` bits per entry: at most 64 more than the information.

    Attributes:
        head: the heads, int64, of the integers' shape.
        words: the stack of int32 tensors.

    Args:
        like: integers of the shape and on the device of those that will be multiplied.

    References:
        Maclaurin, Duvenaud and Adams (2015), section 2.2 and algorithm 3 (there with integers of any length).
    """

    def __init__(self, like: Tensor) -> None:
        self.head = torch.zeros_like(like, dtype=torch.int64)
        self.words: list[Tensor] = []
        self._bounds: list[int] = [1]  # before every product so far, and now

    @property
    def capacity_bits(self) -> float:
        """The most information that a lane can hold by now, whatever the integers were (unit: bits)."""
        return _WORD_BITS * len(self.words) + math.log2(self._bounds[-1])

    def information_bits(self) -> Tensor:
        """Returns the information in every lane, of the integers' shape, float64 (unit: bits)."""
        return _WORD_BITS * len(self.words) + (self.head.double() + 1.0).log2()

    def left(self) -> Tensor:
        """Returns what is left, of the integers' shape: zeros for nothing, neither a product to undo nor a bit."""
        return self.head if len(self._bounds) == 1 and not self.words else torch.ones_like(self.head)

    def is_empty(self) -> bool:
        """Returns whether nothing is left; it waits for the device."""
        return not bool(self.left().any())

    def multiply(self, integers: Tensor, factor: Factor) -> Tensor:
        """Returns the integers times the factor, up to noise of its numerator, and keeps what that forgets.

        With `c` the integer, `i` its lane, and the fraction `n/d` (floor division and its remainder):

            i = i d + (c mod d);   c = c // d;   c = c n + (i mod n);   i = i // n;   c = c + round(rest c)

        What `i mod n` puts in is spread like the part of the exact product that `c // d` has left out, so the noise
        has the mean zero without being centred. The last step is strictly increasing in `c`, so it forgets nothing.

        Args:
            integers: int64, of the shape of `head`.
            factor: the factor.
        """
        # The bound, not the heads, says when a word goes to the stack: all lanes agree, and the device is not waited
        # for.
        bound = self._bounds[-1]
        if _overflows(bound, factor):
            # Shifted down by half of the range, since int32 has a sign and a word has none.
            self.words.append((self.head.bitwise_and(2**_WORD_BITS - 1) - 2 ** (_WORD_BITS - 1)).int())
            self.head = self.head >> _WORD_BITS
            bound = (bound >> _WORD_BITS) + 1
        # Rounded up: the bound must hold for every lane, whatever the integers were.
        self._bounds.append((bound * factor.largest_denominator - 1) // factor.numerator + 1)

        integers = self._exchange(integers, factor.denominator, factor.numerator)
        return integers if _is_fraction(factor) else integers + _growth(integers, factor)

    def divide(self, integers: Tensor, factor: Factor) -> Tensor:
        """Returns the integers that the last product was made of, bit for bit.

        Args:
            integers: what `multiply` returned.
            factor: the same factor.

        Raises:
            IndexError: if there is no product to undo.
        """
        if len(self._bounds) == 1:
            raise IndexError("the information buffer holds no product to undo")
        integers = self._exchange(_undo_growth(integers, factor), factor.numerator, factor.denominator)
        # The bound before the product is the last one again, so the same question as in `multiply` has the same answer.
        self._bounds.pop()
        if _overflows(self._bounds[-1], factor):
            word = self.words.pop().long() + 2 ** (_WORD_BITS - 1)
            self.head = (self.head << _WORD_BITS) + word
        return integers

    def _exchange(self, integers: Tensor, divisor: int | Tensor, multiplier: int | Tensor) -> Tensor:
        """Returns the integers divided and multiplied; the heads take the first remainder in and give another out.

        With divisor and multiplier exchanged it undoes itself.
        """
        head, numbers, divisor, multiplier = (_array(value) for value in (self.head, integers, divisor, multiplier))
        numbers, taken = _divmod(numbers, divisor)
        # In place: fresh memory is what costs most.
        taken += head * divisor
        head, given = _divmod(taken, multiplier)
        numbers *= multiplier
        numbers += given
        self.head = _tensor(head)
        return _tensor(numbers)


def _overflows(bound: int, factor: Factor) -> bool:
    """Returns whether heads below this bound could leave 64 bits in a product."""
    return bound * factor.largest_denominator > 2**63


def _array(integers: Any) -> Any:
    """Returns integers as what computes them fastest: on the host a NumPy array, with the same memory.

    PyTorch's own kernels for int64 take two to eight times as long there. Both know the same operators.
    """
    return integers.numpy() if isinstance(integers, Tensor) and integers.device.type == "cpu" else integers


def _tensor(array: Any) -> Tensor:
    # NumPy makes a number of what has no axes.
    return array if isinstance(array, Tensor) else torch.from_numpy(np.asarray(array))


def _divmod(integers: Any, divisor: Any) -> tuple[Any, Any]:
    """Returns the quotient rounded down, and the remainder, which is never negative."""
    quotient = integers // divisor
    # The remainder by a product: one of its own would divide once more.
    remainder = quotient * -divisor
    remainder += integers
    return quotient, remainder


def _is_fraction(factor: Factor) -> bool:
    """Returns whether a factor is known to be its fraction, without a rest."""
    return isinstance(factor.rest, float) and factor.rest == 0.0


def _growth(integers: Tensor, factor: Factor) -> Tensor:
    """Returns `round(rest c)`, which never decreases as `c` increases: each of its operations does not."""
    return integers.double().mul_(factor.rest).round_().long()


def _undo_growth(grown: Tensor, factor: Factor) -> Tensor:
    """Returns `c` from `c + round(rest c)`.

    The quotient is off by its rounding, and each sweep of `c <- grown - round(rest c)` divides that by 20 or more: two
    are enough for all integers of 64 bits.
    """
    if _is_fraction(factor):
        return grown
    integers = grown.double().div_(1.0 + factor.rest).round_().long()
    # Always four: a test of convergence would wait for the device, and a sweep changes nothing that is right.
    for _ in range(_SWEEPS):
        integers = grown - _growth(integers, factor)
    return integers
