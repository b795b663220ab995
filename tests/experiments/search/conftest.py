"""What the tests of searches share."""

from __future__ import annotations

import pytest
from rich.console import Console

from hydra_plugins.hypertorch_search import _summary


@pytest.fixture
def pictures() -> None:
    """Lets a search draw its pictures."""


@pytest.fixture(autouse=True)
def _without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take as long as the rest of a search; the tests that look at them ask for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(_summary, "draw_study", lambda *_: [])


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a search prints."""
    lines: list[str] = []
    monkeypatch.setattr(Console, "print", lambda self, *what, **_: lines.extend(map(str, what)))
    return lines
