"""PyTorch's database of modules through every exact backend: the right number, or a refusal."""

from __future__ import annotations

import pytest

from tests.databases.expected import assert_right_or_refused
from tests.databases.samples import MODULES, module_samples

# The first sample in training mode: what has parameters, statistics, noise, state, or a refusal.
SHORT = (
    "nn.Linear",
    "nn.Conv2d",
    "nn.BatchNorm1d",
    "nn.LayerNorm",
    "nn.LSTM",
    "nn.TransformerEncoderLayer",
    "nn.Bilinear",
    "nn.PReLU",
)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SHORT)
def test_modules_of_every_family(name: str) -> None:
    assert_right_or_refused(module_samples(name, 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_every_module(name: str) -> None:
    for sample in module_samples(name, 2):
        assert_right_or_refused(sample)
