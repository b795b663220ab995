"""The comparison of searches: its functions are the known ones, and its command goes on where it was."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from botorch.test_functions import Ackley, Branin, Hartmann
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

from experiments import search_benchmark
from experiments.common.search.search_methods import METHODS
from experiments.common.search.search_tasks import TASKS, SearchTask, digits_problem

F64 = torch.float64


def points(dimension: int) -> Tensor:
    return torch.rand((4, dimension), generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize(("name", "theirs"), [("branin", Branin()), ("hartmann6", Hartmann(6))])
def test_functions_are_those_of_botorch(name: str, theirs: torch.nn.Module) -> None:
    task, theirs = TASKS[name](0), theirs.double()
    low, high = theirs.bounds.double()
    for point in points(task.dimension):
        value, gradient = task.evaluate(point, True)
        leaf = point.clone().requires_grad_()
        expected = theirs((low + (high - low) * leaf).unsqueeze(0)).squeeze()
        assert value == pytest.approx(float(expected.detach()), rel=1e-6)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0], rtol=1e-5, atol=1e-5)
        assert task.evaluate(point, False) == (pytest.approx(value), None)
    assert task.least == pytest.approx(theirs.optimal_value, abs=1e-5)


def test_the_minimum_of_ackley_is_shifted_by_the_seed() -> None:
    centres = []
    for seed in (0, 1):
        task = TASKS["ackley5"](seed)
        centre = 0.25 + 0.5 * torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=F64)
        centres.append(centre)
        assert task.evaluate(centre, False)[0] == pytest.approx(0.0, abs=1e-12)
        point = torch.full((5,), 0.4, dtype=F64)
        expected = Ackley(5).double().evaluate_true((65.536 * (point - centre)).unsqueeze(0))
        assert task.evaluate(point, False)[0] == pytest.approx(float(expected))
    assert not torch.equal(*centres)


def test_gradients_on_the_digits_are_differences() -> None:
    task = TASKS["digits"](0)
    point = points(10)[0]
    value, gradient = task.evaluate(point, True)
    assert value == pytest.approx(task.evaluate(point, False)[0]) and gradient is not None
    for axis in (0, 4, 9):
        step = torch.zeros(10, dtype=F64)
        step[axis] = 1e-5
        difference = (task.evaluate(point + step, False)[0] - task.evaluate(point - step, False)[0]) / 2e-5
        assert float(gradient[axis]) == pytest.approx(difference, rel=1e-4, abs=1e-8)
    assert not torch.equal(digits_problem(0).inner._labels, digits_problem(0, wrong=0.0).inner._labels)


def bowl(point: Tensor, with_gradient: bool) -> tuple[float, Tensor | None]:
    return float((point - 0.3).square().sum()), 2 * (point - 0.3) if with_gradient else None


@pytest.mark.parametrize("name", METHODS)
def test_searches_make_as_many_evaluations_as_they_are_given(name: str) -> None:
    asked: list[bool] = []

    def counted(point: Tensor, with_gradient: bool) -> tuple[float, Tensor | None]:
        asked.append(with_gradient)
        assert bool(((point >= 0) & (point <= 1)).all())
        return bowl(point, with_gradient)

    task = SearchTask(dimension=2, evaluate=counted, least=0.0)
    values = METHODS[name].run(task, 7, 3)
    assert len(values) == len(asked) == 7
    assert set(asked) == {METHODS[name].with_gradients}
    if name != "TPE":
        # All of them begin at the same point.
        start = torch.quasirandom.SobolEngine(2, scramble=True, seed=3).draw(1, dtype=F64)[0]
        assert values[0] == pytest.approx(bowl(start, False)[0])


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["search_benchmark.py", "paths.log_dir=out", *arguments])
    code = search_benchmark.failures.exit_code(search_benchmark.main)
    GlobalHydra.instance().clear()
    return code


@pytest.mark.slow
def test_the_command_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = (
        "tasks.branin=4",
        "tasks.digits=4",
        "methods.branin=[Adam,TPE]",
        "methods.digits=[Adam,TPE]",
        "digits_with_gradients=3",
        "seeds=2",
    )
    assert command(monkeypatch, *small, "only=[branin]") == 0, capsys.readouterr().err
    folder = tmp_path / "out" / "search_benchmark"
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert len(kept) == 4
    assert command(monkeypatch, *small, "only=[branin,digits]") == 0, capsys.readouterr().err
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["task"], row["search"]): row for row in csv.DictReader(file)}
    assert rows.keys() == {("branin", "Adam"), ("branin", "TPE"), ("digits", "Adam"), ("digits", "TPE")}
    values = [
        json.loads((folder / "cells" / f"branin-TPE-{seed}.json").read_text(encoding="utf-8"))["values"]
        for seed in (0, 1)
    ]
    regret = sum(min(own) for own in values) / 2 - 0.39788735772973816
    assert float(rows["branin", "TPE"]["median"]) == pytest.approx(regret, rel=0.05)
    assert rows["digits", "Adam"]["evaluations"] == "3" and rows["digits", "TPE"]["evaluations"] == "4"
    assert json.loads((folder / "cost.json").read_text(encoding="utf-8"))["ratio"] > 0
    assert (folder / "equal_cpu" / "table.md").is_file()
    assert (folder / "branin.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    # Figures of another length are not taken for those that are asked for.
    assert command(monkeypatch, *small, "tasks.branin=5", "only=[branin]") == 1
    assert "with 4 evaluations, where 5 are asked for" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("only=[rosenbrock]", "names 'rosenbrock', which is no task"),
        ("methods.branin=[grid]", "names 'grid', which is"),
    ],
)
def test_what_is_not_known_is_refused(
    argument: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, argument) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_table_at_equal_cpu_counts_a_gradient_by_its_price(tmp_path: Path) -> None:
    cells = []
    for method, values in (("TPE", [5.0, 4.0, 3.0] + [2.0] * 77), ("gradients", [5.0, 1.0] + [0.99] * 38)):
        file = tmp_path / f"{method}.json"
        file.write_text(json.dumps({"values": values, "cpu_seconds": 1.0}), encoding="utf-8")
        cells.append(
            search_benchmark.SearchCell(task="digits", method=method, evaluations=len(values), seed=0, file=file)
        )
    (tmp_path / "cost.json").write_text(json.dumps({"ratio": 2.0}), encoding="utf-8")
    search_benchmark.write_equal_cpu(tmp_path, cells, run=False)
    with (tmp_path / "equal_cpu" / "table.csv").open(encoding="utf-8", newline="") as file:
        plain, informed = csv.DictReader(file)
    assert plain["loss at cost 20"] == "2.0000 (20)" and informed["loss at cost 20"] == "0.9900 (10)"
    assert informed["loss at cost 70"] == "0.9900 (35)"
    assert plain["evaluations to 3 %"] == "never" and informed["evaluations to 3 %"] == "2"
