"""The few-shot table: its cells are training commands, finished ones are read, the others are said to be not run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from experiments.common.commands.failures import ExpectedFailure
from experiments.fewshot_table import NOT_RUN, LearnerCell, failures, planned_cells, write_table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config(*overrides: str, name: str = "fewshot_table") -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))


def test_nine_learners_are_planned_in_every_setting(tmp_path: Path) -> None:
    known = list(config().known_settings)
    cells = list(planned_cells(config(f"data={tmp_path}", f"cells={tmp_path}", f"settings=[{','.join(known)}]")))
    assert len(cells) == 9 * len(known) == 54
    assert len({cell.folder.path for cell in cells}) == 54
    with_settings = {(learner, setting) for learner, settings in config().cell_settings.items() for setting in settings}
    assert with_settings <= {(cell.learner, cell.setting) for cell in cells}
    for cell in (*cells[:9], *(cell for cell in cells if (cell.learner, cell.setting) in with_settings)):
        composed = config(*cell.overrides, name="train")
        assert composed.dataset.root.startswith(f"{tmp_path}/")
        assert composed.learner_needs.outputs in (None, composed.episodes.way)


def finished(cell: LearnerCell) -> None:
    means = {"meta_train": (0.99887, 0.0012), "meta_val": (0.9, 0.0456), "meta_test": (0.98765, 0.0031)}
    cell.folder.path.mkdir(parents=True)
    results = {
        "metrics": {
            split: {"accuracy": {"mean": mean, "half_width_95": width, "num_episodes": 600}}
            for split, (mean, width) in means.items()
        },
        "seed": 0, "training_minutes": 12.4, "device": "cpu", "torch_threads": 2,
    }  # fmt: skip
    cell.folder.results.write_text(json.dumps(results))


def test_what_was_not_run_is_said_to_be_not_run(tmp_path: Path) -> None:
    cells = list(planned_cells(config("run=false", "data=/secret/place", f"cells={tmp_path / 'cells'}")))
    finished(cells[0])
    write_table(tmp_path, cells, "/secret/place")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0]["accuracy (%)"] == "98.77 ± 0.31" and rows[0]["minutes"] == "12"
    assert rows[0]["published (%)"] == "98.7 ± 0.4"
    assert rows[0]["meta-train"] == "99.89 ± 0.12" and rows[0]["meta-val"] == "90.00 ± 4.56"
    assert rows[0]["gap (train - test)"] == "1.12" and rows[0]["hardware"] == "cpu, 2 threads"
    assert all(row["accuracy (%)"] == NOT_RUN and not row["minutes"] for row in rows[1:])
    assert all(row["command"].startswith("scripts/train experiment=") for row in rows)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "secret" not in text and len(text.splitlines()) == 2 + len(cells)


def test_a_finished_cell_is_shown_with_its_own_command_and_only_what_was_judged(tmp_path: Path) -> None:
    (cell,) = planned_cells(config(f"data={tmp_path}", f"cells={tmp_path / 'cells'}", "learners=maml", "seed=3"))
    finished(cell)
    results = json.loads(cell.folder.results.read_text())
    del results["metrics"]["meta_test"]
    words = f"scripts/train experiment=maml learner.num_steps=9 dataset.root={tmp_path}/omniglot paths.run_dir=x"
    cell.folder.results.write_text(json.dumps({**results, "command": words, "hardware": "cpu, abacus"}))
    row = cell.row(str(tmp_path))
    assert row["command"] == "scripts/train experiment=maml learner.num_steps=9 dataset.root=.../omniglot"
    assert row["accuracy (%)"] == "not evaluated" and row["gap (train - test)"] == ""
    assert row["meta-val"] == "90.00 ± 4.56" and row["hardware"] == "cpu, abacus, 2 threads"


def test_a_finished_cell_of_other_settings_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    (cell,) = planned_cells(config(f"data={tmp_path}", f"cells={tmp_path / 'cells'}", "learners=[maml]"))
    finished(cell)
    results = json.loads(cell.folder.results.read_text())
    same = " ".join(["scripts/train", *cell.overrides, "paths.run_dir=elsewhere", "resume=true"])
    cell.folder.results.write_text(json.dumps({**results, "command": same.replace(str(tmp_path), "/another/place")}))
    cell.check_command()
    cell.folder.results.write_text(json.dumps({**results, "command": same + " backbone.hidden=8"}))
    with pytest.raises(ExpectedFailure, match=r"made by another command: \['backbone.hidden=8'\] there, \[\] here"):
        cell.check_command()


def test_a_cell_goes_on_with_the_run_that_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(
        "experiments.common.runs.cells.subprocess.run", lambda words, **_: (calls.append(words), Done())[1]
    )
    cell = next(planned_cells(config(f"data={tmp_path}", f"cells={tmp_path}")))
    cell.run(failures, "data")
    cell.folder.path.mkdir(parents=True)
    cell.folder.config.write_text("")
    cell.run(failures, "data")
    assert "resume=true" not in calls[0] and calls[1][-1] == "resume=true"
    Done.returncode = 1
    with pytest.raises(ExpectedFailure, match="the cell maml in omniglot_5way_1shot ended with exit code 1"):
        cell.run(failures, "data")


def test_mistakes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERTORCH_DATA", raising=False)
    with pytest.raises(ExpectedFailure, match="`data` is not given"):
        list(planned_cells(config()))
    with pytest.raises(ExpectedFailure, match="`settings` names 'omniglot', which is not among"):
        list(planned_cells(config(f"data={tmp_path}", "settings=[omniglot]")))
    with pytest.raises(ExpectedFailure, match="`learners` names 'protonett'.*maml"):
        list(planned_cells(config(f"data={tmp_path}", "learners=[maml,protonett]")))
    with pytest.raises(ExpectedFailure, match="`data` is '/nope', which is no folder"):
        list(planned_cells(config("data=/nope")))


def test_a_cell_shows_its_error_without_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cell = next(planned_cells(config(f"data={tmp_path}", f"cells={tmp_path / 'cells'}")))
    with pytest.raises(ExpectedFailure, match="ended with exit code 1"):
        cell.run(failures, str(tmp_path))
    error = capfd.readouterr().err
    assert "`root` is" in error
    assert "Traceback" not in error
