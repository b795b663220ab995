"""Which folder a command uses: the newest of several runs of the same command."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from experiments.common.commands.failures import ExpectedFailure
from experiments.common.runs import run_folder
from experiments.common.runs.run_folder import choose_folder


def run_at(folder: Path, minutes: int, overrides: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "overrides.yaml").write_text(yaml.safe_dump(overrides), encoding="utf-8")
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    os.utime(folder / "config.yaml", (1_700_000_000 + 60 * minutes,) * 2)
    return folder


def asking(runs: Path, *overrides: str, resume: bool = True) -> DictConfig:
    return OmegaConf.create(
        {
            "paths": {"run_dir": None, "runs": str(runs), "log_dir": str(runs)},
            "task_name": "train",
            "resume": resume,
            "hydra": {"overrides": {"task": list(overrides)}},
        }
    )


# In both orders: the names of folders say nothing of their age.
@pytest.mark.parametrize("minutes", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_the_newest_of_several_runs_is_gone_on_with(minutes: tuple[int, ...], tmp_path: Path) -> None:
    folders = [run_at(tmp_path / name, at, ["seed=1"]) for name, at in zip("abc", minutes, strict=True)]
    newest = folders[minutes.index(3)]
    run_at(tmp_path / "other", 9, ["seed=2"])
    (tmp_path / "no run").mkdir()
    assert choose_folder(asking(tmp_path, "seed=1", "resume=true")) == newest
    assert choose_folder(asking(tmp_path, "seed=2")) == tmp_path / "other"
    with pytest.raises(ExpectedFailure, match=r"no run of the same command \(seed=3\)"):
        choose_folder(asking(tmp_path, "seed=3"))


def test_the_order_of_settings_and_where_it_is_written_do_not_make_another_command(tmp_path: Path) -> None:
    wanted = run_at(tmp_path / "a", 1, ["dynamics=sgd", "seed=1", "paths.log_dir=there"])
    run_at(tmp_path / "b", 2, ["seed=1"])
    assert choose_folder(asking(tmp_path, "resume=true", "seed=1", "dynamics=sgd")) == wanted


def test_a_new_run_is_in_a_folder_of_its_own(tmp_path: Path) -> None:
    earlier = run_at(tmp_path / "a", 1, ["seed=1"])
    assert choose_folder(asking(tmp_path, "seed=1", resume=False)) != earlier


def test_settings_are_written_whole_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "config.yaml", Path.write_text

    def torn(file: Path, text: str, **named: str) -> None:
        write(file, text[:2], **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", torn)
        with pytest.raises(KeyboardInterrupt):
            run_folder._create_whole(path, "seed: 0\n")
    assert not path.exists()
    run_folder._create_whole(path, "seed: 0\n")
    with pytest.raises(FileExistsError, match=r"config\.yaml'$"):
        run_folder._create_whole(path, "seed: 1\n")
    assert path.read_text() == "seed: 0\n"

    def without_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", without_links)
    run_folder._create_whole(tmp_path / "other.yaml", "seed: 1\n")
    assert (tmp_path / "other.yaml").read_text() == "seed: 1\n"
    assert not list(tmp_path.glob("*.partial"))
