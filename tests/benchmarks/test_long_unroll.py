"""The command that shows a long unroll within a bound on memory."""

from __future__ import annotations

import re

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
    with pytest.raises(SystemExit, match="--memory 10.0 MiB: the process takes"):
        long_unroll.main([*TINY, "--memory", "10MiB"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "argument --steps: '0' is no whole number of at least 1"),
        (["--rows", "-1"], "argument --rows: '-1' is no whole number of at least 1"),
        (["--memory", "abc"], "argument --memory: .* no number of bytes"),
        (["--folder", "README.md"], "argument --folder: 'README.md' is no folder"),
        (["--steps", "7", "--every", "8"], "argument --every: 8 between kept states is more than --steps 7"),
    ],
)
def test_a_wrong_word_is_one_message(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        long_unroll.main(words)
    assert re.search(said, capsys.readouterr().err)
