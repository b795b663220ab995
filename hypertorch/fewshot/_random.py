"""Uniform random numbers that are equal on every platform."""

from __future__ import annotations

from math import prod

import numpy as np

from hypertorch.autodiff.noise import random_words


def random_uniform(shape: tuple[int, ...], *key: int) -> np.ndarray:
    """Returns float64 numbers in [0, 1) of the given shape, a pure function of the key.

    The 53 leading bits of each word of the Philox stream become the number, exactly.
    """
    words = random_words(prod(shape), *key)
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)
