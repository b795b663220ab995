"""The range test as a command: what it leaves, also where there is nothing to suggest."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import lr_range_test
from tests.experiments.diagnosis_commands import Commands


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def test_a_run_leaves_a_table_json_csv_and_a_picture(command: Commands) -> None:
    code, out, error = command(lr_range_test, "constant_rates=[0.1,1e6]")
    assert code == 0, error
    results, rows = command.results(), command.table("lr_range_test.csv")
    assert f"suggested learning rate: {results['suggestion']:.3g}" in out
    assert results["suggestion"] < results["lowest"] < results["blow_up"]
    assert len(rows) == 100 and str(results["suggestion"]) in [row["rate"] for row in rows]
    assert list(results["outer_losses"]) == ["0.1", f"{results['suggestion']:g}", "1e+06"]
    assert results["outer_losses"]["1e+06"] is None  # no finite number
    assert command.is_picture("lr_range_test.png")


def test_nothing_to_suggest_is_an_error_with_a_picture(command: Commands) -> None:
    code, _, error = command(lr_range_test, "max_lr=1e-2")
    assert code == 1
    assert "is lowest at the largest rates, up to 0.01" in error and "The curve is in" in error
    assert command.results()["suggestion"] is None
    assert command.is_picture("lr_range_test.png")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("max_lr=1e-6", "`min_lr` and `max_lr` are 1e-05 and 1e-06"),
        ("min_lr=0", "`min_lr` is 0"),
        ("scale=loglog", "`scale` is 'loglog'"),
        ("constant_rates=[-1]", "`constant_rates` is [-1]"),
        ("constant_rates=1", "`constant_rates` is 1"),
    ],
)
def test_a_mistake_gives_one_message(overrides: str, expected: str, command: Commands) -> None:
    code, _, error = command(lr_range_test, overrides)
    assert code == 1
    assert expected in error
    assert "Traceback" not in error
