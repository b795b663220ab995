"""The gallery: runs of several seeds become a page with means, spreads, commands and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments.common.commands.failures import ExpectedFailure
from experiments.gallery import SeedCell, planned_cells, write_page

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config(*overrides: str, name: str = "gallery") -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))


def rotation(tmp_path: Path) -> list[SeedCell]:
    chosen = ("experiments=[rotation]", f"data={tmp_path}", f"cells={tmp_path / 'cells'}")
    return list(planned_cells(config(*chosen)))


def finished(cell: SeedCell, accuracy: float, baseline: float, seconds: float | None) -> None:
    def judged(mean: float) -> dict:
        return {"accuracy": {"mean": mean, "half_width_95": None, "num_episodes": 1}}

    cell.folder.path.mkdir(parents=True)
    results = {
        "metrics": {"validation": judged(0.5), "test": judged(accuracy)},
        "baselines": {"no rotation": {"test": judged(baseline)}},
        "cpu_seconds": seconds, "device": "cpu", "torch_threads": 1,
    }  # fmt: skip
    cell.folder.results.write_text(json.dumps(results))
    OmegaConf.save(OmegaConf.create({"experiment": {"_target_": "experiments.rotation.Rotation"}}), cell.folder.config)
    (cell.folder.path / "rotation.png").write_bytes(b"picture")


def test_every_known_run_composes(tmp_path: Path) -> None:
    cells = list(planned_cells(config(f"data={tmp_path}")))
    assert {cell.experiment for cell in cells} == set(config().known)
    assert len({cell.folder.path for cell in cells}) == len(cells)
    for cell in {(cell.experiment, cell.variant): cell for cell in cells}.values():
        composed = config(*cell.overrides, name="train")
        # None of an experiment on embedded data, or without any.
        folders = (str(tmp_path), *(f"{tmp_path}/{name}" for name in ("mnist", "omniglot", "cifar100")))
        assert OmegaConf.select(composed, "experiment.root") in (None, *folders)
        assert composed.seed == cell.seed


def test_a_page_has_mean_and_standard_deviation_over_the_seeds(tmp_path: Path) -> None:
    cells = rotation(tmp_path)
    finished(cells[0], accuracy=0.91, baseline=0.7, seconds=10.0)
    finished(cells[1], accuracy=0.94, baseline=0.8, seconds=14.0)
    page = tmp_path / "rotation" / "README.md"
    write_page(page.parent, cells, str(tmp_path))
    lines = page.read_text(encoding="utf-8").splitlines()
    assert "| test | learnt | 92.50 ± 2.12 |" in lines
    assert "| test | no rotation | 75.00 ± 7.07 |" in lines
    # The baseline has no figure on this split.
    assert [line for line in lines if line.startswith("| validation")] == ["| validation | learnt | 50.00 ± 0.00 |"]
    assert (
        "Mean ± standard deviation over seeds 0, 1; 12 ± 3 CPU seconds each, baselines included (cpu, 1 thread(s))."
        in lines
    )
    assert "Learnt minus the baseline of the same run, accuracy (%) on test: no rotation +17.50 ± 4.95." in lines
    assert "| 1 | 94.00 | 14 |" in lines
    assert "Not run: seed 2, 3, 4." in lines
    assert any(line.startswith("- Published, EvoGrad") for line in lines)
    assert "    scripts/train experiment=rotation_mnist experiment.root=.../mnist seed=0 threads=1" in lines
    assert (page.parent / "mnist_rotation.png").read_bytes() == b"picture"


def test_the_words_around_the_figures_stay(tmp_path: Path) -> None:
    cells = rotation(tmp_path)
    finished(cells[0], accuracy=0.91, baseline=0.7, seconds=None)
    page = tmp_path / "rotation" / "README.md"
    write_page(page.parent, cells, None)
    page.write_text("Before.\n" + page.read_text(encoding="utf-8") + "\nAfter.\n", encoding="utf-8")
    once = page.read_text(encoding="utf-8")
    write_page(page.parent, cells, None)
    assert page.read_text(encoding="utf-8") == once
    assert once.startswith("Before.\n") and once.endswith("\nAfter.\n")
    assert "Learnt minus" not in once
    assert "over seed 0 alone (cpu" in once and "| test | learnt | 91.00 |" in once and "| 0 | 91.00 |  |" in once
    page.write_text("A page without marks.\n", encoding="utf-8")
    with pytest.raises(ExpectedFailure, match="so there is no place for its figures"):
        write_page(page.parent, cells, None)


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpectedFailure, match="`experiments` names 'rotations', which is not among"):
        list(planned_cells(config("experiments=[rotations]", f"data={tmp_path}")))
    with pytest.raises(ExpectedFailure, match="`data` is not given"):
        list(planned_cells(config("experiments=[rotation]", "data=null")))
    gone = tmp_path / "gone"
    with pytest.raises(ExpectedFailure, match="which is no folder"):
        list(planned_cells(config(f"data={gone}")))
    small = '+known.small={seeds:[0],pictures:[],variants:{digits:["experiment=rotation"]}}'
    assert len(list(planned_cells(config("experiments=[small]", small, "data=null")))) == 1


def test_a_folder_that_names_foreign_code_is_refused(tmp_path: Path) -> None:
    cells = rotation(tmp_path)
    finished(cells[0], accuracy=0.91, baseline=0.7, seconds=10.0)
    cells[0].folder.config.write_text("experiment: {_target_: os.remove}\n", encoding="utf-8")
    with pytest.raises(ExpectedFailure, match=r"os\.remove"):
        write_page(tmp_path / "rotation", cells, None)
