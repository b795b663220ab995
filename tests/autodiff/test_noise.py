"""Noise is a function of its key."""

from __future__ import annotations

import pytest
import torch

from hypertorch.autodiff.noise import (
    _cuda_index,
    mix,
    preserved_generators,
    random_permutation,
    random_words,
    seed_generators,
)

CPU = torch.device("cpu")


def test_words_are_pinned_across_platforms() -> None:
    assert [int(word) for word in random_words(2, 0, 0)] == WORDS
    assert mix(1, 2, 3) == MIXED


def test_neighbouring_keys_are_unrelated() -> None:
    seeds = {mix(a, b, c) for a in range(10) for b in range(10) for c in range(-3, 10)}
    assert len(seeds) == 10 * 10 * 13
    assert mix(0, 1) != mix(1, 0)
    assert mix(1) != mix(1, 0)


def test_permutations_are_permutations() -> None:
    assert sorted(random_permutation(50, 1)) == list(range(50))
    assert list(random_permutation(50, 1)) != list(random_permutation(50, 2))


def test_generators_are_seeded_by_the_key_and_put_back() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with preserved_generators(CPU):
        seed_generators(CPU, 1, -1)
        first = torch.rand(2)
        seed_generators(CPU, 1, -2)
        assert not torch.equal(torch.rand(2), first)
        seed_generators(CPU, 1, -1)
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.rand(2), expected)


def test_generators_are_put_back_after_an_error() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    def fail() -> None:
        with preserved_generators(CPU):
            seed_generators(CPU, 1)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert torch.equal(torch.rand(2), expected)


WORDS = [15744299189795819943, 11424349517701572599]
MIXED = 7702586659592502839


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _cuda_index(torch.device("cuda")) == 3
    assert _cuda_index(torch.device("cuda", 1)) == 1
