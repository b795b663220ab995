"""Tables and figures as people read them."""

from __future__ import annotations

import pytest

from hypertorch.diagnostics.text_table import aligned, in_bytes, in_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1024**2, "1 MiB"),
        (1.5 * 1024**2, "1.5 MiB"),
        (1024**3, "1 GiB"),
        (2048 * 1024**3, "2.05e+03 GiB"),
    ],
)
def test_bytes_in_the_unit_that_suits_them(count: float, text: str) -> None:
    assert in_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5e-6, "2.5 us"), (0.000999, "999 us"), (1e-3, "1 ms"), (0.25, "250 ms"), (1.0, "1 s"), (90.25, "90.2 s")],
)
def test_seconds_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert in_seconds(seconds) == text


def test_the_first_column_is_flush_left_and_the_others_right() -> None:
    table = aligned(["backend", "steps", "error"], [["Reverse()", "7", "1e-12"], ["Forward", "12345678", ""]])
    assert table.split("\n") == [
        "backend       steps  error",
        "Reverse()         7  1e-12",
        "Forward    12345678",
    ]
