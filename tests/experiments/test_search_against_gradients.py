"""Search against hypergradients: the problems by their size, the end of a search's time, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import search_against_gradients
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.results.result_page import write_figures
from experiments.common.search.budget import spend
from experiments.common.search.search_methods import METHODS, SearchMethod
from experiments.common.search.search_tasks import SearchTask
from experiments.search_against_gradients import AgainstCell, by_group, leaders
from experiments.sized_tasks import SIZED
from tests.experiments.commands import runner

F64 = torch.float64


def one_each(name: str, few: Tensor) -> Tensor:
    """The most numbers that there can be, with the values of fewer that stand for them."""
    if name == "penalties":  # one for all, or for each row of the image
        return few.repeat_interleave(64 // len(few)).repeat(10)
    if name == "schedules":  # rates of four tensors, then momenta, which fewer numbers leave at a half
        return torch.cat([few.repeat_interleave(50 // len(few)).repeat(4), torch.full((200,), 0.5, dtype=F64)])
    return few.repeat_interleave(1000 // len(few))


@pytest.mark.parametrize(("name", "size"), [("penalties", 8), ("penalties", 64), ("schedules", 10), ("weights", 10)])
def test_few_numbers_train_as_the_many_that_share_them(name: str, size: int) -> None:
    sizes, make = SIZED[name]
    few = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = []
    for point in (few, one_each(name, few)):
        search = make(len(point), 0, dtype=F64).search_task()  # type: ignore[call-arg]
        assert search.dimension == len(point)
        found.append(search.evaluate(point, False)[0])
    assert len(few) < len(one_each(name, few)) == sizes[-1]
    assert found[0] == pytest.approx(found[1], rel=1e-10)


@pytest.mark.parametrize("name", SIZED)
def test_hypergradients_are_differences(name: str) -> None:
    sizes, make = SIZED[name]
    size = sizes[-1]
    search = make(size, 0, dtype=F64).search_task()  # type: ignore[call-arg]
    point = 0.4 + 0.1 * torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=F64)
    value, gradient = search.evaluate(point, True)
    assert gradient is not None and value == pytest.approx(search.evaluate(point, False)[0])
    # Along the gradient: a single one of a thousand numbers hardly changes the loss.
    step = 1e-4 * gradient / gradient.norm()
    difference = (search.evaluate(point + step, False)[0] - search.evaluate(point - step, False)[0]) / 2e-4
    assert float(gradient.norm()) == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("name", SIZED)
def test_the_test_has_images_of_its_own(name: str) -> None:
    sizes, make = SIZED[name]
    task = make(sizes[0], 0)
    seen, _ = task.problem.outer.batch(0)
    hidden = [problem.outer.batch(0)[0] for problem in task.tests]
    assert all(torch.equal(images, hidden[0]) for images in hidden)
    # As rows of their pixels, of which scans of digits have no two alike.
    assert not {tuple(row) for row in seen.tolist()} & {tuple(row) for row in hidden[0].tolist()}
    assert task.problem.seed not in {problem.seed for problem in task.tests}
    start = torch.full((sizes[0],), 0.5)
    assert task.test_loss(start) != task.search_task().evaluate(start, False)[0]


class Clock:
    """A clock that goes on where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def bowl(clock: Clock, start: Tensor | None = None) -> SearchTask:
    def evaluate(point: Tensor, with_gradient: bool) -> tuple[float, Tensor | None]:
        clock.now += 2.0 if with_gradient else 1.0
        return float((point - 0.3).square().sum()), 2 * (point - 0.3) if with_gradient else None

    return SearchTask(dimension=2, evaluate=evaluate, least=0.0, start=start)


@pytest.mark.parametrize("name", ["random", "TPE", "Adam", "gradients"])
def test_searches_begin_at_the_first_values_and_end_with_their_time(name: str) -> None:
    clock, start = Clock(), torch.tensor([0.9, 0.2], dtype=F64)
    clock.now = 100.0
    method = METHODS[name]
    spent = spend(method, bowl(clock, start), 0, budget=15.0, clock=clock)
    price = 2 if method.with_gradients else 1
    # The last one would end after the time is up: it is run, and does not count.
    assert len(spent.values) == 15 // price
    assert spent.seconds == [float(price * number) for number in range(1, len(spent.values) + 1)]
    assert torch.equal(spent.points[0], start) and not torch.equal(spent.points[1], start)
    assert spent.values[spent.best] == min(spent.values)
    assert spent.values[spent.best] == pytest.approx(float((spent.points[spent.best] - 0.3).square().sum()))


def test_what_a_search_computes_itself_counts() -> None:
    clock = Clock()

    def slow(task: SearchTask, count: int, seed: int) -> list[float]:
        for _ in range(count):
            clock.now += 4.0
            task.evaluate(torch.zeros(2, dtype=F64), False)
        return []

    spent = spend(SearchMethod(run=slow, with_gradients=False), bowl(clock), 0, budget=14.0, clock=clock)
    assert spent.seconds == [5.0, 10.0]


def test_a_search_that_ended_nothing_in_its_time_has_no_best() -> None:
    clock = Clock()
    spent = spend(METHODS["random"], bowl(clock), 0, budget=0.5, clock=clock)
    with pytest.raises(ExpectedFailure, match="none of the 0 evaluations"):
        _ = spent.best
    spent.values.extend([math.nan, 2.0, 1.0])
    assert spent.best == 2


def cell(folder: Path, method: str, seed: int, loss: float) -> AgainstCell:
    file = folder / f"{method}-{seed}.json"
    figures = {"budget": 1.0, "evaluations": 3, "first": 2.0, "validation": loss, "test": loss, "cpu_seconds": 1.0}
    file.write_text(json.dumps(figures), encoding="utf-8")
    return AgainstCell(task="weights", size=10, method=method, seed=seed, budget=1.0, file=file)


@pytest.mark.parametrize(
    ("random", "adam", "expected"),
    [
        ((1.0, 1.0), (0.5, 0.6), (["Adam"], True)),
        ((1.0, 1.0), (0.5, 1.1), (["Adam"], False)),
        ((1.0, 1.0), (1.005, 1.005), (["random", "Adam"], False)),
        # The least in both seeds, but in one of them by less than a hundredth.
        ((1.0, 1.0), (0.5, 0.995), (["Adam"], False)),
    ],
)
def test_who_leads(
    random: tuple[float, float], adam: tuple[float, float], expected: tuple[list[str], bool], tmp_path: Path
) -> None:
    losses = {"random": random, "Adam": adam}
    cells = [cell(tmp_path, name, seed, own[seed]) for name, own in losses.items() for seed in (0, 1)]
    assert leaders(by_group(cells), "weights", 10, "test") == expected


def test_what_stands_around_the_figures_stays(tmp_path: Path) -> None:
    page = tmp_path / "page" / "README.md"
    write_figures(page, "a.py", ["first"])
    page.write_text(f"before\n{page.read_text(encoding='utf-8')}after\n", encoding="utf-8")
    write_figures(page, "a.py", ["second"])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n# page\n") and text.endswith("after\n") and "second" in text and "first" not in text
    with pytest.raises(ExpectedFailure, match="written by b.py"):
        write_figures(page, "b.py", ["third"])


@pytest.mark.slow
def test_the_command_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = runner(monkeypatch, capsys)
    small = ("~tasks.schedules", "~tasks.weights", "tasks.penalties=[1,640]", "seeds=1", "budget=0.5", "page=page")
    code, error = run(*small, "methods=[random]", module=search_against_gradients)
    assert code == 0, error
    cells = tmp_path / "outputs" / "search_against_gradients" / "cells"
    kept = {path: path.stat().st_mtime_ns for path in cells.iterdir()}
    assert {path.name for path in kept} == {"penalties-1-random-0.json", "penalties-640-random-0.json"}
    code, error = run(*small, "methods=[random,Adam,gradients]", module=search_against_gradients)
    assert code == 0, error
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    # No Gaussian process where there are too many numbers.
    assert {path.name for path in set(cells.iterdir()) - set(kept)} == {
        "penalties-1-Adam-0.json",
        "penalties-640-Adam-0.json",
        "penalties-1-gradients-0.json",
    }
    figures = json.loads((cells / "penalties-640-Adam-0.json").read_text(encoding="utf-8"))
    assert figures["validation"] < figures["first"] and figures["seconds_to_best"] <= 0.5
    page = (tmp_path / "page" / "README.md").read_text(encoding="utf-8")
    assert f"| penalties | 640 | hypergradient descent (Adam) | {figures['evaluations']} |" in page
    assert f"{figures['validation']:.4f} | {figures['test']:.4f}" in page
    assert (tmp_path / "page" / "search_against_gradients.png").read_bytes().startswith(b"\x89PNG")
    # Figures of another budget are not taken for those that are asked for.
    code, error = run(*small, "budget=0.6", "run=false", module=search_against_gradients)
    assert code == 1 and "with budget=0.5, where 0.6 is asked for" in " ".join(error.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tasks.penalties=[1,7]",), "`tasks.penalties` is [1, 7]"),
        (("+tasks.kernels=[1]",), "names 'kernels', which is no problem"),
        (("methods=[grid]",), "names 'grid', which is no search"),
        ((), "has no search, and run=false runs none"),
        (("budget=0",), "`budget` is 0"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = runner(monkeypatch, capsys)(*arguments, "run=false", module=search_against_gradients)
    assert code == 1 and message in " ".join(error.split())
