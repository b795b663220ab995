"""The stack of states in a file by itself: what comes back, one state on its way, and damage that is noticed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from io import FileIO
from pathlib import Path

import pytest
import torch

import hypertorch as ht
from hypertorch.hypergradients.reverse_mode.spilled_states import SpilledStates
from hypertorch.inner.state import InnerState

Reverse = ht.hypergradients.Reverse


def states() -> list[InnerState]:
    """Returns states of every kind of tensor, the later ones larger."""
    base = torch.randn(24, generator=torch.Generator().manual_seed(1))
    tensors = [
        base,
        base.reshape(4, 6).T,
        base.reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        base[::2],
        base[:1].expand(5),
        base[3],
        base[:0],
        base.double(),
        base.bfloat16(),
        base.half(),
        base > 0,
        base.long(),
        torch.complex(base, -base),
        torch.complex(base, -base).conj(),
    ]
    made = []
    for step in range(7):
        params = {f"p{position}": tensor.clone() + step for position, tensor in enumerate(tensors[:4])}
        rest = {f"p{position}": tensor for position, tensor in enumerate(tensors)}
        longer = {"long": torch.arange(10 * step), "count": torch.tensor(step)}
        made.append(InnerState(params, {**rest, **longer}))
    return made


def assert_same_state(found: InnerState, expected: InnerState) -> None:
    assert found.names() == expected.names()
    for name, value, right in zip(found.names(), found.tensors(), expected.tensors(), strict=True):
        assert (value.dtype, value.shape, value.device) == (right.dtype, right.shape, right.device), name
        if right.numel() and right.is_contiguous(memory_format=torch.preserve_format):
            assert value.stride() == right.stride(), name
        assert torch.equal(value, right), name
        assert not value.requires_grad


def test_what_comes_back_is_what_was_kept_in_the_opposite_order(tmp_path: Path) -> None:
    kept = states()
    with SpilledStates(tmp_path, len(kept)) as stack:
        for position, state in enumerate(kept):
            stack.append(state)
            assert len(stack) == position + 1
        for state in reversed(kept):
            assert_same_state(stack[-1], state)
            assert_same_state(stack.pop(), state)
        assert len(stack) == 0
        with pytest.raises(IndexError, match="position -1 of 0 kept states"):
            stack.pop()


def test_strides_come_back(tmp_path: Path) -> None:
    state = InnerState(
        {"w": torch.randn(4, 6).T, "c": torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)}, {}
    )
    with SpilledStates(tmp_path, 2) as stack:
        stack.append(state)
        stack.append(state)
        stack.pop()
        assert [value.stride() for value in stack[-1].tensors()] == [(1, 6), (12, 1, 6, 3)]


def test_states_that_are_covered_again_and_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, *others = states()
    starts = []
    write = SpilledStates._write_all
    monkeypatch.setattr(
        SpilledStates, "_write_all", lambda self, start, *rest: (starts.append(start), write(self, start, *rest))
    )
    with SpilledStates(tmp_path, 7) as stack:
        for state in (first, second, third):
            stack.append(state)
        stack.pop()
        # Read back already, and covered without having been asked for.
        for state in others:
            stack.append(state)
        for state in (*reversed(others), second, first):
            assert_same_state(stack.pop(), state)
    # The second state is not written again, nor are the third, which was dropped, and the last, which was in memory.
    assert len(starts) == 2 + len(others) - 1


def test_one_state_at_a_time_is_on_its_way(tmp_path: Path) -> None:
    """Others would wait in memory for a slow disk."""
    kept, asked = states(), []
    with SpilledStates(tmp_path, len(kept)) as stack:
        submit = stack._thread.submit

        def slowly(function: Callable[..., None], *arguments: object) -> Future[None]:
            assert all(future.done() for future in asked)
            submit(time.sleep, 0.01)
            asked.append(submit(function, *arguments))
            return asked[-1]

        stack._thread.submit = slowly  # type: ignore[method-assign, assignment]
        for state in kept:
            stack.append(state)
        for state in reversed(kept):
            assert_same_state(stack.pop(), state)
    assert len(asked) == 2 * (len(kept) - 1)


class _Hesitant:
    """A file that takes and gives a few bytes at a time, as the system may."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def write(self, view: memoryview) -> int:
        return self._file.write(view[:7])

    def readinto(self, view: memoryview) -> int:
        return self._file.readinto(view[:5])

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_the_system_may_write_and_read_less_than_it_is_asked_to(tmp_path: Path) -> None:
    first, second, third, *_ = states()
    with SpilledStates(tmp_path, 3) as stack:
        stack._file = _Hesitant(stack._file)  # type: ignore[assignment]
        for state in (first, second, third):
            stack.append(state)
        for state in (third, second):
            assert_same_state(stack.pop(), state)


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    first, second, third, *_ = states()
    with SpilledStates(tmp_path, 3) as stack:
        for state in (first, second, third):
            stack.append(state)
        stack._wait()
        os.ftruncate(stack._file.fileno(), 40)
        stack.pop()
        with pytest.raises(OSError, match=r"could not be .* read back \(the file is shorter than what was written"):
            stack.pop()


def test_the_next_state_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_read, started = threading.Event(), threading.Event()
    read = SpilledStates._read_all

    def waiting(self: SpilledStates, start: int, views: list[memoryview]) -> None:
        started.set()
        assert threading.current_thread() is not threading.main_thread()
        assert may_read.wait(10)
        read(self, start, views)

    monkeypatch.setattr(SpilledStates, "_read_all", waiting)
    kept = states()
    with SpilledStates(tmp_path, len(kept)) as stack:
        for state in kept:
            stack.append(state)
        assert not started.is_set()
        assert stack.pop() is kept[-1]  # which does not wait
        assert started.wait(10)
        may_read.set()
        assert_same_state(stack.pop(), kept[-2])
