"""The command that shows a long unroll within a bound on memory."""

from __future__ import annotations

import pytest

from benchmarks import long_unroll

TINY = ["--steps", "7", "--rows", "5", "--against", "4"]


def test_it_says_what_is_in_the_file_and_whether_the_bound_was_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert long_unroll.main([*TINY, "--every", "2", "--memory", "1TiB"]) == 0
    said = capsys.readouterr().out
    assert "3 states of 795.0 KiB in a file of 2.3 MiB" in said and "7 steps: " in said
    monkeypatch.setattr(long_unroll, "most_resident", lambda: 2**40 + 1)
    assert long_unroll.main([*TINY, "--every", "2", "--memory", "1TiB"]) == 1


def test_without_a_distance_it_plans() -> None:
    assert long_unroll.main([*TINY, "--memory", "1TiB"]) == 0
    with pytest.raises(SystemExit, match="--memory 10MiB: the process takes"):
        long_unroll.main([*TINY, "--memory", "10MiB"])
