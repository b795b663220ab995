"""Progress: a bar on a terminal, rare lines elsewhere, silence unless asked."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from rich.console import Console

from hypertorch.outer import evaluate
from hypertorch.outer.reporting import progress
from hypertorch.outer.reporting.progress import figures_text, progress_display
from tests.outer.problems import Quadratics
from tests.outer.runs import make_loop


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=160, legacy_windows=False), file


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    target, file = console(terminal=False)
    with progress_display(
        enabled=True, title="outer steps", total=100, metric="accuracy", first=20, console=target
    ) as display:
        for done in range(21, 101):
            clock.now += 1.0
            if done % 5 == 0:
                display.show({"outer_loss": 1 / done, "other": 3.0, "accuracy": done / 100})
            display.advance(done)
    lines = file.getvalue().splitlines()
    assert lines == [
        "outer steps 24/100  outer_loss 0.04  accuracy 0.25  0.8/s  1:35 left",
        "outer steps 55/100  outer_loss 0.01818  accuracy 0.55  1/s  0:45 left",
        "outer steps 85/100  outer_loss 0.01176  accuracy 0.85  1/s  0:15 left",
        "outer steps 100/100  outer_loss 0.01  accuracy 1  1/s",
    ]


def test_a_slow_run_shows_a_line_before_its_first_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    target, file = console(terminal=False)
    with progress_display(enabled=True, title="outer steps", total=10, metric=None, console=target) as display:
        for done in range(1, 4):
            clock.now += 20.0
            display.advance(done)
        assert file.getvalue().splitlines() == ["outer steps 2/10  0.05/s  2:40 left"]


def test_a_run_that_takes_no_time_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    target, file = console(terminal=False)
    with progress_display(enabled=True, title="outer steps", total=10, metric=None, console=target) as display:
        display.advance(10)
    assert file.getvalue().splitlines() == ["outer steps 10/10  0/s"]


def test_the_bar_of_a_run_under_way_shows_its_rate() -> None:
    now = [0.0]
    file = io.StringIO()
    target = Console(file=file, force_terminal=True, color_system=None, width=160, get_time=lambda: now[0])
    with progress_display(enabled=True, title="outer steps", total=10, metric=None, console=target) as display:
        for done in (1, 3, 5):
            now[0] += 1.0
            display.advance(done)
    assert " 5/10  2/s 0:00:03 " in file.getvalue()


def test_a_bar_on_a_terminal() -> None:
    target, file = console(terminal=True)
    with progress_display(enabled=True, title="outer steps", total=10, metric=None, console=target) as display:
        display.show({"outer_loss": 0.125, "distance": 0.5})
        display.show({"validation/distance": 0.75})
        display.advance(10)
    text = file.getvalue()
    for part in ("outer steps", "10/10", "outer_loss 0.125  distance 0.5  validation/distance 0.75", "━"):
        assert part in text


def test_silence_unless_asked() -> None:
    target, file = console(terminal=True)
    with progress_display(enabled=False, title="outer steps", total=10, metric=None, console=target) as display:
        display.show({"outer_loss": 0.125})
        display.advance(10)
    assert file.getvalue() == ""


def test_figures_text() -> None:
    assert figures_text({"x": 1.0, "outer_loss": 0.5, "y": 2.0}, "y") == "outer_loss 0.5  y 2"
    assert figures_text({"outer_loss": 0.5, "x": 1.0}, "missing") == "outer_loss 0.5  x 1"
    assert figures_text({"outer_loss": 0.5, "hparams/x": 1.0}, None) == "outer_loss 0.5"
    assert figures_text({"validation/x": 0.25, "x": 1.0}, "x") == "x 1  validation/x 0.25"
    assert figures_text({"outer_loss": 0.5}, "outer_loss") == "outer_loss 0.5"
    assert figures_text({}, None) == ""


def test_hours_minutes_and_seconds() -> None:
    assert progress._clock(59.6) == "1:00"
    assert progress._clock(3725) == "1:02:05"


def test_a_run_and_an_evaluation_show_progress_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    source = Quadratics()
    make_loop(source, optimizer=partial(torch.optim.SGD, lr=0.1), progress=True).run(2)
    evaluate(source, source.init_hparams(), num_episodes=8, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "outer steps 2/2  outer_loss" in captured.err
    assert "distance" in captured.err
    assert "episodes 8/8" in captured.err
