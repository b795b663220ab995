"""PyTorch's database of operations through every exact backend: the right number, or a refusal."""

from __future__ import annotations

import pytest

from tests.databases.expected import assert_right_or_refused
from tests.databases.samples import OPERATIONS, operation_sample, operation_samples

# An operation of each large family, and those that a backend answers wrongly if it is not watched. The number is that
# of a small sample in the database.
SHORT: dict[str, int] = {
    "linalg.det": 2,
    "logdet": 2,
    "linalg.slogdet": 2,
    "linalg.solve": 0,
    "triangular_solve": 0,
    "linalg.inv": 0,
    "linalg.eigvalsh": 0,
    "linalg.eigh": 0,
    "linalg.svdvals": 1,
    "linalg.pinv.hermitian": 0,
    "cholesky_inverse": 6,
    "linalg.cholesky": 0,
    "linalg.matrix_norm": 0,
    "prod": 1,
    "cumprod": 0,
    "scatter_reduce.prod": 0,
    "index_reduce.prod": 2,
    "select_scatter": 4,
    "as_strided_scatter": 1,
    "sort": 2,
    "nn.functional.silu": 0,
    "nn.functional.mish": 0,
    "nn.functional.rrelu": 3,
    "nn.functional.relu": 1,
    "logit": 2,
    "nn.functional.layer_norm": 1,
    "nn.functional.group_norm": 0,
    "nn.functional.batch_norm": 1,
    "nn.functional.instance_norm": 0,
    "nn.functional.scaled_dot_product_attention": 0,
    "nn.functional.conv2d": 4,
    "nn.functional.max_pool2d": 0,
    "nn.functional.embedding": 0,
    "nn.functional.dropout": 0,
    "nn.functional.mse_loss": 1,
    "nn.functional.huber_loss": 0,
    "nn.functional.cross_entropy": 0,
    "nn.functional.linear_cross_entropy.chunked": 0,
    "fft.rfft": 3,
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SHORT)
def test_operations_of_every_family(name: str) -> None:
    assert_right_or_refused(operation_sample(name, SHORT[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation(name: str) -> None:
    for sample in operation_samples(name, 3):
        assert_right_or_refused(sample)
