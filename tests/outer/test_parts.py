"""Small parts of the outer loop: norms, host copies, interrupts, the stopwatch."""

from __future__ import annotations

import math
import signal
import threading
import time

import pytest
import torch

from hypertorch.outer.reporting.scalars import to_floats
from hypertorch.outer.reporting.stopwatch import Stopwatch
from hypertorch.outer.steps.clipping import clip_to_norm, total_norm
from hypertorch.outer.storage.interrupts import uninterrupted


def test_the_norm_is_over_all_entries() -> None:
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor(4.0, dtype=torch.float64), "c": torch.empty(0)}
    norm = total_norm(grads)
    assert norm.dtype == torch.float64
    assert float(norm) == 5.0


def test_the_norm_of_half_precision_does_not_overflow() -> None:
    grads = {"a": torch.full((4,), 6e4, dtype=torch.float16)}
    assert float(total_norm(grads)) == pytest.approx(2 * float(grads["a"][0]))
    clipped = clip_to_norm(grads, total_norm(grads), 2.0)
    assert clipped["a"].dtype == torch.float16
    assert clipped["a"].tolist() == pytest.approx([1.0] * 4, rel=1e-3)


@pytest.mark.parametrize(("size", "dtype"), [(1e30, torch.float32), (3e38, torch.float32), (1e200, torch.float64)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_hypergradients_are_clipped_and_not_zeroed(size: float, dtype: torch.dtype, sign: float) -> None:
    grads = {"a": torch.tensor([0.6 * size * sign, 0.0], dtype=dtype), "b": torch.tensor(0.8 * size, dtype=dtype)}
    assert float(total_norm(grads)) == pytest.approx(size, rel=1e-6)
    clipped = clip_to_norm(grads, total_norm(grads), 2.0)
    assert clipped["a"].tolist() == pytest.approx([1.2 * sign, 0.0], rel=1e-5)
    assert float(clipped["b"]) == pytest.approx(1.6, rel=1e-5)


def test_clipping() -> None:
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    clipped = clip_to_norm(grads, total_norm(grads), 1.0)
    assert [float(value) for value in clipped.values()] == pytest.approx([0.6, 0.8])
    kept = clip_to_norm(grads, total_norm(grads), 5.0)
    assert [float(value) for value in kept.values()] == [3.0, 4.0]
    zero = {"a": torch.zeros(2)}
    assert clip_to_norm(zero, total_norm(zero), 1.0)["a"].tolist() == [0.0, 0.0]


def test_scalars_keep_order_and_double_precision() -> None:
    figures = {
        "b": 1,
        "a": torch.tensor(0.1, dtype=torch.float64),
        "n": torch.tensor([7]),
        "h": torch.tensor(0.5).half(),
    }
    assert list(to_floats(figures).items()) == [("b", 1.0), ("a", 0.1), ("n", 7.0), ("h", 0.5)]
    assert to_floats({"x": 2}) == {"x": 2.0}
    assert to_floats({}) == {}


def test_an_interrupt_is_held_back_to_the_end_of_the_block() -> None:
    reached = []

    def interrupted_work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.001)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted_work()
    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_termination_handler_of_the_application_is_held_back_too() -> None:
    calls = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            assert calls == []
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_handlers_come_back_after_an_error() -> None:
    with pytest.raises(ValueError, match=r"inside"), uninterrupted():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_are_left_alone() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_the_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch(seconds=100.0, step=10)
    now[0] += 4.0
    assert watch.rate(12) == 0.5
    now[0] += 1.0
    with watch.excluded():
        now[0] += 60.0
    assert watch.rate(15) == 3.0
    assert watch.seconds == 165.0
    assert math.isfinite(watch.rate(16))
