"""The study of horizons as a command: what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import horizon_bias
from tests.experiments.diagnosis_commands import Commands

SHORT = ("horizon=6", "windows=[4,2,6]", "num_steps=[2,4]")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def test_a_run_leaves_a_table_json_csv_and_a_picture(command: Commands) -> None:
    code, out, error = command(horizon_bias, *SHORT)
    assert code == 0, error
    rows = command.results()["rows"]
    assert [(row["series"], row["length"]) for row in rows] == [
        *(("truncated", length) for length in (2, 4, 6)),
        *((name, length) for name in ("implicit", "implicit to longest", "unrolled to longest") for length in (2, 4)),
    ]
    assert rows[0]["error"] > rows[1]["error"] > 1e-6 > rows[2]["error"]
    assert [row["error"] for row in command.table("horizon_bias.csv")] == [str(row["error"]) for row in rows]
    assert 0.0 < command.results()["spectral_radius"] < 1.0
    assert command.results()["rates"]["truncated"] is None
    assert "truncated: no geometric rate was found" in out
    assert "the inner map at step 5" in out
    assert command.is_picture("horizon_bias.png")


def test_unrolled_runs_alone(command: Commands) -> None:
    code, _, error = command(horizon_bias, *SHORT, "implicit=null")
    assert code == 0, error
    assert {row["series"] for row in command.results()["rows"]} == {"truncated", "unrolled to longest"}


def test_a_mistake_gives_one_message(command: Commands) -> None:
    code, _, error = command(horizon_bias, *SHORT, "windows=[0]")
    assert code == 1
    assert "`windows` is [0]" in error
