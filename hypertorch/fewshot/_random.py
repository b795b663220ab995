"""Uniform random numbers that are equal on every platform."""

from __future__ import annotations

from math import prod

import numpy as np

from hypertorch.autodiff.noise import random_words


def random_uniform(shape: tuple[int, ...], *key: int) -> np.ndarray:
    """Returns float64 numbers in [0, 1) of the given shape, a pure function of the key.

    The 53 leading bits of each word of the Philox stream become the number, exactly.
    """
    # Not by `Generator.random`, whose stream numpy may change from version to version.
    words = random_words(prod(shape), *key)
    # A float64 holds 53 bits, and the factor is a power of two: nothing is rounded, on no platform, and 1 itself cannot
    # occur.
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)
