"""The problem of the noisy labellers: its data are what it says, and its hypergradient trusts the honest ones."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

import hypertorch as ht
from experiments.noisy_digits import noisy_digits

SGD = ht.dynamics.SGD


def test_the_data_are_the_scans_with_wrong_labels_where_said() -> None:
    problem = noisy_digits(dynamics=SGD(lr=1.0), num_steps=1, num_labellers=5, scans_each=100, num_validation=200)
    inputs, given, labeller = problem.inner.batch(0)
    held_out, true = problem.outer.batch(0)
    pixels, digits = load_digits(return_X_y=True)
    by_pixels = {tuple(row): int(digit) for row, digit in zip(pixels.astype(int).tolist(), digits, strict=True)}
    # Every scan is one of the data set's, and none is on both sides.
    rows = [tuple(row) for row in (16 * torch.cat([inputs, held_out])).long().tolist()]
    assert len(set(rows)) == len(rows) == 700
    truth = torch.tensor([by_pixels[row] for row in rows])
    assert torch.equal(truth[500:], true)
    wrong = (truth[:500] != given).double()
    shares = torch.stack([wrong[labeller == k].mean() for k in range(5)])
    assert shares[0] == 0.0
    # A random label is right one time in ten.
    torch.testing.assert_close(shares, 0.9 * 0.9 * torch.arange(5).double() / 4, rtol=0, atol=0.12)


@pytest.mark.parametrize("hidden", [0, 4])
def test_the_hypergradient_is_right(hidden: int) -> None:
    problem = noisy_digits(
        dynamics=SGD(lr=0.5), num_steps=5, num_labellers=3, scans_each=10, num_validation=20, hidden=hidden
    )
    hparams = problem.init_hparams()
    assert ht.check_hypergradient(problem, hparams, ht.hypergradients.Reverse()).passed


def test_more_trust_in_an_honest_labeller_helps() -> None:
    problem = noisy_digits(dynamics=SGD(lr=0.5), num_steps=60, num_labellers=2, scans_each=200)
    grads = ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse()).grads["trust"]
    assert float(grads[0]) < 0.0 < float(grads[1])
    assert float(ht.unroll(problem, problem.init_hparams()).metrics["accuracy"]) > 0.7


def test_the_same_seed_gives_the_same_problem() -> None:
    first, again, other = (noisy_digits(dynamics=SGD(lr=1.0), num_steps=1, hidden=3, seed=seed) for seed in (0, 0, 1))
    for name, value in first.inner.init_params({}).items():
        assert torch.equal(value, again.inner.init_params({})[name])
    assert torch.equal(first.inner.batch(0)[0], again.inner.batch(0)[0])
    assert not torch.equal(first.inner.batch(0)[0], other.inner.batch(0)[0])


def test_dtype_is_that_of_every_number() -> None:
    problem = noisy_digits(dynamics=SGD(lr=1.0), num_steps=2, dtype=torch.float32)
    result = ht.unroll(problem, problem.init_hparams())
    assert all(value.dtype == torch.float32 for value in [*result.params.values(), result.outer_loss])


def test_refuses_more_scans_than_there_are() -> None:
    with pytest.raises(ValueError, match="is 2500, but there are 1797 scans"):
        noisy_digits(dynamics=SGD(lr=1.0), num_steps=1, num_labellers=20, scans_each=100)
