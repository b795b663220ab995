"""Minibatches are a pure function of the step, and every epoch visits every item once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

import hypertorch as ht


def test_an_epoch_visits_every_item_once_and_the_next_in_another_order() -> None:
    minibatches = ht.Minibatches(range(12), batch_size=4, seed=1)
    epochs = [[int(i) for step in range(3) for i in minibatches.indices(3 * epoch + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_the_remainder_of_an_epoch_is_dropped() -> None:
    minibatches = ht.Minibatches(range(11), batch_size=4)
    assert minibatches.num_batches == 2
    assert len(set(minibatches.indices(0)) | set(minibatches.indices(1))) == 8


def test_pure_in_the_step_and_pinned_across_platforms() -> None:
    minibatches = ht.Minibatches(range(10), batch_size=5, seed=3)
    first = [minibatches.indices(step).tolist() for step in (7, 0, 7)]
    assert first[0] == first[2]
    assert ht.Minibatches(range(10), batch_size=5, seed=3).indices(0).tolist() == first[1] == GOLDEN
    assert ht.Minibatches(range(10), batch_size=5, seed=4).indices(0).tolist() != first[1]
    unnamed, zero = ht.Minibatches(range(10), batch_size=5), ht.Minibatches(range(10), batch_size=5, seed=0)
    assert unnamed.indices(0).tolist() == zero.indices(0).tolist()


def test_tensor_datasets_are_gathered_and_others_collated() -> None:
    x, y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
    fast = ht.Minibatches(TensorDataset(x, y), batch_size=3, seed=2)
    slow = ht.Minibatches([(x[i], y[i]) for i in range(6)], batch_size=3, seed=2)
    for step in range(4):
        for a, b in zip(fast(step), slow(step), strict=True):
            assert torch.equal(a, b)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="`batch_size` is 7, but the data set has 6 items.*Choose"):
        ht.Minibatches(range(6), batch_size=7)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        ht.Minibatches(range(6), batch_size=0)
    with pytest.raises(TypeError, match="`dataset` is a Stream without a length.*map-style"):
        ht.Minibatches(Stream(), batch_size=1)  # type: ignore[arg-type]


GOLDEN = [1, 9, 7, 4, 2]
