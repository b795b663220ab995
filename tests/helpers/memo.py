"""What the library has found out, set aside for one test."""

from __future__ import annotations

import pytest

from hypertorch.inner import memo


def set_aside(monkeypatch: pytest.MonkeyPatch, *topics: str) -> None:
    """Lets a test find out anew what is known of these topics; it is known again afterwards."""
    rest = {name: value for name, value in memo.entries().items() if name[0] not in topics}
    monkeypatch.setattr(memo, "_entries", rest)
