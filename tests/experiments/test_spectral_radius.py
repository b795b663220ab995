"""The spectrum of the inner map as a command: what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import spectral_radius
from tests.experiments.diagnosis_commands import Commands

SHORT = ("horizon=4", "steps=[0,2]", "experiment.hidden=2", "dimension=8")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def test_a_run_leaves_a_table_json_csv_and_a_picture(command: Commands) -> None:
    code, out, error = command(spectral_radius, *SHORT)
    assert code == 0, error
    results = command.results()
    assert [row["step"] for row in results["rows"]] == [0, 2, 3]
    for row in results["rows"]:
        assert row["radius"] == pytest.approx(abs(complex(row["real"], row["imaginary"])))
        assert f"the inner map at step {row['step']} {row['verdict']}" in out
    assert len(results["step_growths"]) == 4
    assert [row["radius"] for row in command.table("spectral_radius.csv")] == [
        str(row["radius"]) for row in results["rows"]
    ]
    assert command.is_picture("spectral_radius.png")


def test_a_large_step_size_explodes(command: Commands) -> None:
    code, out, error = command(
        spectral_radius, "horizon=10", "steps=[0]", "experiment.hidden=0", "dynamics=sgd",
        "dynamics.lr=150", "dynamics.momentum=0",
    )  # fmt: skip
    assert code == 0, error
    assert command.results()["verdict"] == "explodes"
    assert "the step size is too large" in out


@pytest.mark.parametrize(("overrides", "expected"), [("steps=[4]", "`step` is 4"), ("dimension=2", "`dimension` is 2")])
def test_a_mistake_gives_one_message(overrides: str, expected: str, command: Commands) -> None:
    code, _, error = command(spectral_radius, *SHORT, overrides)
    assert code == 1
    assert expected in error
    assert "Traceback" not in error
