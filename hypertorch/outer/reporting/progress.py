"""How far a run is: a bar on a terminal, an occasional line in a log file."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_BETWEEN_LINES = 30.0  # a log file of a run of hours stays readable


class ProgressDisplay(ABC):
    """Shows how far a run is and its newest figures. Never waits for an accelerator."""

    @abstractmethod
    def advance(self, completed: int) -> None:
        """Shows how many steps are done."""

    @abstractmethod
    def show(self, scalars: Mapping[str, float]) -> None:
        """Shows new figures beside earlier ones: the outer loss, the main metric and its validation."""


@contextmanager
def progress_display(
    *, enabled: bool, title: str, total: int, metric: str | None, first: int = 0, console: Console | None = None
) -> Iterator[ProgressDisplay]:
    """Yields a display for a run: a bar on a terminal or in a notebook, plain lines elsewhere, or nothing.

    Args:
        enabled: False shows nothing.
        title: what is counted.
        total: how many make the whole.
        metric: the figure shown beside the outer loss; None for the first there is.
        first: how many are done at the start (of a resumed run).
        console: where to write; standard error by default, so that piped output stays clean.
    """
    console = console or Console(stderr=True)
    if not enabled:
        yield _Nothing()
    elif (console.is_terminal and not console.is_dumb_terminal) or console.is_jupyter:
        with _bar(console) as bar:
            yield _Bar(bar, title=title, total=total, metric=metric, first=first)
    else:
        lines = _Lines(console, title=title, total=total, metric=metric, first=first)
        yield lines
        lines.finish()


def figures_text(scalars: Mapping[str, float], metric: str | None) -> str:
    """Returns those of the outer loss, the main metric and its validation that are given, as text.

    Example: `outer_loss 0.0123  accuracy 0.98  validation/accuracy 0.95`.
    """
    if metric is None or metric not in scalars:
        metric = next((name for name in scalars if name != "outer_loss" and "/" not in name), metric)
    names = dict.fromkeys(["outer_loss", metric or "outer_loss", f"validation/{metric}"])
    return "  ".join(f"{name} {scalars[name]:.4g}" for name in names if name in scalars)


class _Nothing(ProgressDisplay):
    def advance(self, completed: int) -> None:
        pass

    def show(self, scalars: Mapping[str, float]) -> None:
        pass


class _Bar(ProgressDisplay):
    def __init__(self, bar: Progress, *, title: str, total: int, metric: str | None, first: int) -> None:
        self._bar, self._metric = bar, metric
        self._scalars: dict[str, float] = {}
        self._task = bar.add_task(title, total=total, completed=first, figures="")

    def advance(self, completed: int) -> None:
        self._bar.update(self._task, completed=completed)

    def show(self, scalars: Mapping[str, float]) -> None:
        self._scalars.update(scalars)
        self._bar.update(self._task, figures=figures_text(self._scalars, self._metric))


class _Lines(ProgressDisplay):
    """The first figures at once, then a line every half minute, and one at the end."""

    def __init__(self, console: Console, *, title: str, total: int, metric: str | None, first: int) -> None:
        self._console, self._title, self._total, self._metric = console, title, total, metric
        self._first = self._completed = first
        self._scalars: dict[str, float] = {}
        self._start = time.monotonic()
        self._last_line = self._start
        self._any_line = False

    def advance(self, completed: int) -> None:
        self._completed = completed
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._write()

    def show(self, scalars: Mapping[str, float]) -> None:
        self._scalars.update(scalars)
        if not self._any_line:
            self._write()

    def finish(self) -> None:
        """Writes the last line."""
        self._write()

    def _write(self) -> None:
        self._last_line, self._any_line = time.monotonic(), True
        seconds = self._last_line - self._start
        rate = (self._completed - self._first) / seconds if seconds > 0 else 0.0
        parts = [
            f"{self._title} {self._completed}/{self._total}",
            figures_text(self._scalars, self._metric),
            f"{rate:.3g}/s",
        ]
        if rate > 0 and self._completed < self._total:
            parts.append(f"{_clock((self._total - self._completed) / rate)} left")
        # Names of metrics are text: brackets in them are no markup, and a log file has no width to wrap at.
        self._console.print("  ".join(part for part in parts if part), highlight=False, markup=False, soft_wrap=True)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s", style="progress.data.speed")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        refresh_per_second=4,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
