"""The memo: found out once, bounded, to be looked at and cleared, and nothing kept alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

import hypertorch as ht
from hypertorch.inner import memo
from tests.helpers.problems import Ridge, net_problem


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "_entries", {})


def test_what_is_found_out_is_kept_by_topic_and_key() -> None:
    answers = iter(range(10))
    found = [memo.recall(topic, key, lambda: next(answers)) for topic in ("a", "b") for key in (1, 2, 1)]
    assert found == [0, 1, 0, 2, 3, 2]
    assert memo.entries() == {("a", 2): 1, ("a", 1): 0, ("b", 2): 3, ("b", 1): 2}
    memo.forget("a", 1)
    memo.forget("a", 5)
    assert memo.entries("a") == {("a", 2): 1}
    memo.clear("a")
    assert memo.entries("a") == {} and len(memo.entries("b")) == 2
    memo.clear()
    assert memo.entries() == {}


def test_none_is_an_answer_and_an_error_is_not() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    answers: Iterator[None] = iter([None])
    assert memo.recall("a", 1, lambda: next(answers)) is memo.recall("a", 1, lambda: next(answers)) is None
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            memo.recall("a", 2, fail)
    assert memo.entries() == {("a", 1): None}


def test_what_was_not_asked_for_the_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST_ENTRIES", 3)
    for key in (1, 2, 3):
        memo.note("a", key, key)
    assert memo.get("a", 1, 0) == 1
    memo.note("a", 4, 4)
    assert list(memo.entries()) == [("a", 3), ("a", 1), ("a", 4)]
    memo.note("a", 3, 5)
    assert list(memo.entries()) == [("a", 1), ("a", 4), ("a", 3)]
    assert memo.get("a", 2, 7) == 7


class Thing:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_same_is_told_by_identity_and_keeps_nothing_alive() -> None:
    one, other = Thing(), Thing()
    assert memo.Same(one, other) == memo.Same(one, other)
    assert memo.Same(one, other) != memo.Same(other, one)
    assert memo.Same(one) != memo.Same(one, other)
    assert memo.Same(one) != 1
    key, gone = memo.Same(one), weakref.ref(one)
    again = memo.Same(one)
    assert hash(key) == hash(again)
    del one
    gc.collect()
    assert gone() is None
    assert key != again and key == key


def test_no_tensor_and_no_problem_is_kept() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {})
    references = [weakref.ref(part) for part in (problem, problem.inner, problem.outer, problem.dynamics)]
    hparams = problem.init_hparams()
    for backend in (ht.hypergradients.Reverse(derivative="auto"), ht.hypergradients.Forward(chunk_size=40)):
        ht.hypergradient(problem, hparams, backend=backend)
    ht.hypergradient(problem, hparams, backend=ht.hypergradients.EvolutionStrategies(num_pairs=1, sigma=0.1))
    assert memo.entries()
    assert not any(isinstance(value, torch.Tensor) for value in memo.entries().values())
    del problem
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_after_clear_the_number_is_the_same() -> None:
    problem = Ridge().problem(5)
    hparams = problem.init_hparams()
    first = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse()).grads
    known = set(memo.entries())
    ht.memo.clear()
    again = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse()).grads
    assert known == set(memo.entries()) and known
    assert all(torch.equal(again[name], value) for name, value in first.items())
