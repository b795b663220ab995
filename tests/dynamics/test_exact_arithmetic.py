"""Every operation on integers is undone bit for bit, at the price in information that theory asks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hypertorch.dynamics.reversible.exact_arithmetic import (
    GREATEST_FACTOR,
    LARGEST_NUMBER,
    LEAST_FACTOR,
    Factor,
    InformationBuffer,
    decode,
    encode,
    factor_of,
    factors_of,
)

F64 = torch.float64
UNITS = 2.0**52
# Powers of two, decimal fractions whose double lies above and below them, what needs a rest, and both ends.
MOMENTA = [0.5, 0.875, 0.9, 0.98, 0.99, 0.8731, 0.03347, 0.2 / 3.0, 0.999, 0.9999, LEAST_FACTOR, GREATEST_FACTOR]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, dtype=F64, generator=generator)


def integers_of_all_sizes(generator: torch.Generator, count: int = 500) -> Tensor:
    """Integers of either sign with 1 to 62 bits, a few small ones and the largest among them."""
    parts = [((2.0 * uniform(count, generator=generator) - 1.0) * 2.0**bits).long() for bits in range(1, 63)]
    return torch.cat([*parts, torch.arange(-300, 300), torch.tensor([2**62 - 1, -(2**62)])])


# Numbers.


def test_decoding_undoes_encoding(generator: torch.Generator) -> None:
    integers = (2.0 * uniform(1000, generator=generator) - 1.0).mul(2.0**53).long()
    assert torch.equal(encode(decode(integers)), integers)


def test_numbers_are_rounded_to_the_nearest_integer(generator: torch.Generator) -> None:
    numbers = (2.0 * uniform(1000, generator=generator) - 1.0) * (LARGEST_NUMBER - 1.0)
    assert float((decode(encode(numbers)) - numbers).abs().max()) == 0.0  # they have no finer bits
    tiny = 1e-3 * (2.0 * uniform(1000, generator=generator) - 1.0)
    assert float((decode(encode(tiny)) - tiny).abs().max()) <= 0.5 / UNITS
    assert encode(torch.tensor([1.6, -1.6, 0.4], dtype=F64) / UNITS).tolist() == [2, -2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_held_exactly_and_decoded_by_rounding(dtype: torch.dtype) -> None:
    numbers = torch.linspace(-3.0, 3.0, 101).to(dtype)
    assert decode(encode(numbers), dtype).dtype == dtype
    assert torch.equal(decode(encode(numbers), dtype), numbers)


def test_the_largest_number_leaves_room_for_a_sum() -> None:
    largest = encode(torch.tensor(LARGEST_NUMBER * (1.0 - 1e-15), dtype=F64))
    assert float(decode(largest + largest)) > LARGEST_NUMBER
    assert float(decode(-largest - largest)) < -LARGEST_NUMBER


# The known test of Maclaurin et al.'s code: 100-vectors, 200 random factors.


def test_sums_and_products_are_undone_bit_for_bit_where_floats_are_not(generator: torch.Generator) -> None:
    start = torch.randn(100, dtype=F64, generator=generator)
    factors = (0.01 + 0.98 * uniform(200, generator=generator)).tolist()
    terms = torch.randn(200, 100, dtype=F64, generator=generator)
    integers, floats = encode(start), start
    buffer = InformationBuffer(integers)
    first = integers.clone()
    for factor, term in zip(factors, terms, strict=True):
        integers = buffer.multiply(integers, factor_of(factor)) + encode(term)
        floats = floats * factor + term
        assert float((decode(integers) - floats).abs().max()) < 1e-10
    for factor, term in reversed(list(zip(factors, terms, strict=True))):
        integers = buffer.divide(integers - encode(term), factor_of(factor))
        floats = (floats - term) / factor
    assert torch.equal(integers, first)
    assert buffer.is_empty()
    assert float((floats == start).double().mean()) < 0.2


@pytest.mark.parametrize("broadcast", [(4, 25), (25,), (4, 1)])
def test_elementwise_products_are_undone_bit_for_bit(broadcast: tuple[int, ...], generator: torch.Generator) -> None:
    integers = encode(torch.randn(4, 25, dtype=F64, generator=generator))
    buffer, first = InformationBuffer(integers), integers.clone()
    values = [0.05 + 0.94 * uniform(*broadcast, generator=generator) for _ in range(200)]
    factors = [factors_of(value, float(value.min()), float(value.max())) for value in values]
    for value, factor in zip(values, factors, strict=True):
        exact = decode(integers) * value
        integers = buffer.multiply(integers, factor)
        assert float((decode(integers) - exact).abs().max()) < 1e-12
        integers = integers + encode(value.expand(4, 25))
    for value, factor in reversed(list(zip(values, factors, strict=True))):
        integers = buffer.divide(integers - encode(value.expand(4, 25)), factor)
    assert torch.equal(integers, first)
    assert buffer.is_empty()


@pytest.mark.parametrize("value", MOMENTA)
def test_integers_of_all_sizes_and_signs_come_back(value: float, generator: torch.Generator) -> None:
    integers = integers_of_all_sizes(generator)
    first, buffer = integers.clone(), InformationBuffer(integers)
    for _ in range(3):
        integers = buffer.multiply(integers, factor_of(value))
    for _ in range(3):
        integers = buffer.divide(integers, factor_of(value))
    assert torch.equal(integers, first)
    assert buffer.is_empty()


def test_integers_of_all_sizes_come_back_for_the_largest_rests(generator: torch.Generator) -> None:
    values = torch.linspace(0.02, 0.99, 400, dtype=F64).tolist()
    worst = sorted((factor_of(value) for value in values), key=lambda factor: factor.rest)[-10:]  # type: ignore[arg-type,return-value]
    assert float(worst[-1].rest) > 0.02
    for factor in worst:
        integers = integers_of_all_sizes(generator, count=50)
        buffer = InformationBuffer(integers)
        assert torch.equal(buffer.divide(buffer.multiply(integers, factor), factor), integers)


# The factor.


def exact_value(factor: Factor) -> Tensor:
    fraction = torch.as_tensor(factor.numerator, dtype=F64) / torch.as_tensor(factor.denominator)
    return fraction * (1.0 + torch.as_tensor(factor.rest, dtype=F64))


@pytest.mark.parametrize(
    "value", [*MOMENTA, 0.9 * (1.0 - 2.0**-45), *torch.linspace(0.01, 0.995, 50, dtype=F64).tolist()]
)
def test_a_factor_is_its_value_to_round_off(value: float) -> None:
    factor = factor_of(value)
    assert isinstance(factor.denominator, int)
    assert isinstance(factor.rest, float)
    assert float(exact_value(factor)) == pytest.approx(value, rel=2e-15, abs=0.0)
    assert 1 <= factor.numerator <= 2**12
    assert factor.numerator <= factor.denominator == factor.largest_denominator
    assert 0.0 <= factor.rest < 0.05
    if value < 0.997:
        assert math.log2(factor.denominator / factor.numerator) <= 1.0101 * math.log2(1.0 / value)


@pytest.mark.parametrize(("value", "fraction"), [(0.5, (1, 2)), (0.9, (9, 10)), (0.98, (49, 50)), (0.99, (99, 100))])
def test_a_decimal_fraction_is_found(value: float, fraction: tuple[int, int]) -> None:
    factor = factor_of(value)
    assert (factor.numerator, factor.denominator, factor.rest) == (*fraction, 0.0)


def test_elementwise_factors_are_their_values_to_round_off(generator: torch.Generator) -> None:
    values = LEAST_FACTOR + (1.0 - 2.0 * LEAST_FACTOR) * uniform(10_000, generator=generator)
    factor = factors_of(values, float(values.min()), float(values.max()))
    assert isinstance(factor.denominator, Tensor)
    torch.testing.assert_close(exact_value(factor), values, rtol=2e-15, atol=0.0)
    assert int(factor.denominator.max()) <= factor.largest_denominator
    assert factor.numerator < int(factor.denominator.min())
    rest = torch.as_tensor(factor.rest)
    assert 0.0 <= float(rest.min()) <= float(rest.max()) < 0.05


@pytest.mark.parametrize("value", [0.9, 0.98, 0.9999, 0.03347])
def test_the_noise_of_a_product_is_small_and_has_no_mean(value: float, generator: torch.Generator) -> None:
    count = 200_000
    integers = encode(1e-3 * torch.randn(count, dtype=F64, generator=generator))
    buffer = InformationBuffer(integers)
    factor = factor_of(value)
    for _ in range(4):  # fill the lanes
        integers = buffer.multiply(integers, factor)
    noise = buffer.multiply(integers, factor).double() - integers.double() * value
    assert float(noise.abs().max()) <= factor.numerator + 1
    assert abs(float(noise.mean())) <= 0.5 + 5.0 * float(noise.std()) / math.sqrt(count)


# The information.


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.98, 0.99])
def test_information_grows_as_theory_says(momentum: float, elementwise: bool, generator: torch.Generator) -> None:
    num_steps, lanes = 1000, 500
    if elementwise:
        values = torch.full((lanes,), momentum, dtype=F64)
        factor = factors_of(values, momentum, momentum)
    else:
        factor = factor_of(momentum)
    integers = encode(torch.randn(lanes, dtype=F64, generator=generator))
    buffer, first = InformationBuffer(integers), integers.clone()
    terms = encode(torch.randn(num_steps, lanes, dtype=F64, generator=generator))
    needed = math.log2(1.0 / momentum)
    for step, term in enumerate(terms, start=1):
        integers = buffer.multiply(integers, factor) + term
        # A head of 64 bits and words of 32 hold what is needed and at most one head more.
        assert step * needed <= 64 + 32 * len(buffer.words) <= step * needed + 64
        assert bool((buffer.head >= 0).all())
    information = buffer.information_bits()
    assert information.shape == (lanes,)
    assert float(information.mean()) / num_steps == pytest.approx(needed, rel=0.1)
    assert float(information.max()) <= buffer.capacity_bits
    assert {word.dtype for word in buffer.words} <= {torch.int32}
    for term in reversed(terms):
        integers = buffer.divide(integers - term, factor)
    assert torch.equal(integers, first)
    assert buffer.is_empty()
    assert buffer.capacity_bits == 0.0
    assert not buffer.head.any()


def test_factors_may_change_between_products(generator: torch.Generator) -> None:
    integers = integers_of_all_sizes(generator, count=20)
    buffer, first = InformationBuffer(integers), integers.clone()
    values = [LEAST_FACTOR, 0.999, 0.5, GREATEST_FACTOR, 0.0123, 0.9] * 20
    for value in values:
        integers = buffer.multiply(integers, factor_of(value))
    assert len(buffer.words) > 10
    for value in reversed(values):
        integers = buffer.divide(integers, factor_of(value))
    assert torch.equal(integers, first)
    assert buffer.is_empty()


def test_another_factor_does_not_lead_back(generator: torch.Generator) -> None:
    integers = encode(torch.randn(100, dtype=F64, generator=generator))
    buffer = InformationBuffer(integers)
    back = buffer.divide(buffer.multiply(integers, factor_of(0.9)), factor_of(0.91))
    assert not torch.equal(back, integers)


def test_a_buffer_with_products_left_is_not_empty() -> None:
    integers = torch.zeros(3, dtype=torch.int64)
    buffer = InformationBuffer(integers)
    assert buffer.is_empty()
    assert not buffer.multiply(integers, factor_of(0.5)).any()
    assert not buffer.is_empty()  # although the zeros that were multiplied left no bit


def test_dividing_what_was_not_multiplied_is_refused() -> None:
    integers = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(IndexError, match="no product to undo"):
        InformationBuffer(integers).divide(integers, factor_of(0.5))


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0, 1.5, 1e-9, math.nan, math.inf])
def test_a_factor_that_cannot_be_undone_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"a factor is .*, outside .*Use one such as 0\.9"):
        factor_of(value)
    with pytest.raises(ValueError, match="a factor is"):
        factors_of(torch.tensor([0.5, value]), value, 0.5)
    with pytest.raises(ValueError, match="a factor is"):
        factors_of(torch.tensor([0.5, value]), 0.5, value)
