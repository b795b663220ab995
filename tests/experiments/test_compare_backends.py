"""The comparison of backends as a command: what it runs, what it leaves, how it fails."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments.common.runs.resolvers  # noqa: F401
import hypertorch as ht
from experiments import compare_backends
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.diagnostics.diagnosis import build_backends
from tests.experiments.diagnosis_commands import Commands

SHORT = ("num_steps=[3,2]", "repeats=1")
FEW = (*SHORT, "only=[reverse,truncated_20,first_order]")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def test_every_backend_that_the_package_exports_is_run() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        backends = build_backends(compose("compare_backends"), None)
    exported = {getattr(ht.hypergradients, name) for name in ht.hypergradients.__all__}
    leaves = {item for item in exported if inspect.isclass(item) and issubclass(item, ht.Hypergradient)}
    assert {type(backend) for backend in backends.values()} == leaves - {ht.Hypergradient}


def test_a_run_leaves_a_table_json_csv_and_a_picture(command: Commands) -> None:
    code, out, error = command(compare_backends, *SHORT)
    assert code == 0, error
    names = {row["backend"] for row in command.table("comparison.csv")}
    rows = command.results()["rows"]
    assert [(row["num_steps"], row["backend"]) for row in rows] == [
        (int(row["num_steps"]), row["backend"]) for row in command.table("comparison.csv")
    ]
    assert {row["num_steps"] for row in rows} == {2, 3}
    by_name = {row["backend"]: row for row in rows if row["num_steps"] == 3}
    for exact in ("reverse", "reverse_sqrt", "reverse_snapshots", "reversible", "forward", "truncated_20"):
        assert by_name[exact]["error"] < 1e-11, exact
    assert "`hparams['trust']` reaches the outer loss" in by_name["first_order"]["refusal"]
    assert all(name in out for name in names)
    assert "3 inner steps" in out
    assert "first_order refused" in out
    assert "everything is in" in out
    assert command.is_picture("comparison.png")
    assert "python experiments/compare_backends.py" in command.results()["command"]
    assert (command.run_folder / "config.yaml").exists()


def test_other_backends_and_dynamics_from_the_command_line(command: Commands) -> None:
    code, _, error = command(
        compare_backends,
        "num_steps=[4]",
        "repeats=1",
        "dynamics=adam",
        "dynamics.lr=0.01",
        "~dynamics.momentum",
        "+hypergradient@backends.mine=truncated",
        "backends.mine.window=2",
        "only=[mine,reversible]",
    )
    assert code == 0, error
    rows = {row["backend"]: row for row in command.results()["rows"]}
    assert rows["mine"]["error"] > 1e-3
    assert rows["mine"]["vjps"] == 2
    assert "reversible" in rows["reversible"]["refusal"].lower()


def test_earlier_results_are_not_overwritten(command: Commands) -> None:
    assert command(compare_backends, *FEW)[0] == 0
    before = (command.run_folder / "results.json").read_bytes()
    code, _, error = command(compare_backends, *FEW)
    assert code == 1
    assert "`paths.run_dir` is" in error
    assert (command.run_folder / "results.json").read_bytes() == before


FAILURES = {
    "unknown backend": (("only=[revers]",), "`only` names 'revers'"),
    "unknown backend alone": (("only=revers",), "`only` names 'revers'"),
    "no backend": (("only=[]",), "`only` is [], but it lists names"),
    "no list of steps": (("num_steps=10",), "`num_steps` is 10, but a list"),
    "no steps": (("num_steps=[]",), "`num_steps` is []"),
    "half a step": (("num_steps=[1.5]",), "`num_steps` is [1.5]"),
    "no repeats": (("repeats=0",), "`repeats` is 0"),
    "no seed": (("seed=-1",), "`seed` is -1"),
    "nothing to resume": (("resume=true",), "`resume` is True"),
    "no threads": (("threads=0",), "`threads` is 0"),
    "too much data": (("experiment.scans_each=10000",), "there are 1797 scans"),
    "unknown argument": (("+experiment.shape=3",), "`experiment.shape` is no argument of NoisyDigits"),
    "wrong setting": (("backends.truncated_20.window=0",), "`window` is 0"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", FAILURES)
def test_a_mistake_gives_one_message(case: str, command: Commands) -> None:
    overrides, expected = FAILURES[case]
    code, _, error = command(compare_backends, *FEW, *overrides)
    assert code == 1
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert expected in error
