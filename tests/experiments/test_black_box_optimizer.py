"""The learnt search: its functions are what they are said to be, its run and hypergradient are right, and it learns."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from experiments.black_box_optimizer import BlackBoxOptimizer, Curve, table
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.search.black_boxes import GaussianProcess, Varied, branin, hartmann3
from experiments.common.search.optuna_search import SamplerName, search
from tests.experiments.built import built
from tests.experiments.commands import Command

TINY = (
    "experiment=black_box_optimizer", "experiment.queries=5", "experiment.num_functions=3", "experiment.hidden=4",
    "experiment.curve_functions=150",
)  # fmt: skip
EXACT = ht.hypergradients.Reverse()
F64 = torch.zeros((), dtype=torch.float64)


def tiny(*overrides: str) -> BlackBoxOptimizer:
    return built(BlackBoxOptimizer, *TINY, "dtype=float64", *overrides)


@pytest.mark.parametrize("dimension", [1, 3])
def test_draws_have_the_covariance_of_the_process(dimension: int) -> None:
    functions = GaussianProcess(dimension, 0.3, cosines=50)
    drawn = functions.draw(20_000, 5, F64)
    places = torch.rand((4, dimension), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.vmap(functions, in_dims=(None, 0))(places, drawn)
    expected = (-torch.cdist(places, places).square() / (2 * 0.3**2)).exp()
    torch.testing.assert_close(values.mean(dim=0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=0.04)
    torch.testing.assert_close(values.T @ values / 20_000, expected, rtol=0, atol=0.04)


def test_the_classical_functions_have_their_minima() -> None:
    places = torch.tensor([[-math.pi, 12.275], [math.pi, 2.275], [9.42478, 2.475]], dtype=torch.float64)
    unit = (places + torch.tensor([5.0, 0.0])) / 15
    torch.testing.assert_close(branin(unit), torch.full((3,), 0.397887, dtype=torch.float64), rtol=0, atol=1e-5)
    place = torch.tensor([0.114614, 0.555649, 0.852547], dtype=torch.float64)
    assert float(hartmann3(place)) == pytest.approx(-3.86278, abs=1e-5)
    for at, function in ((unit[0], branin), (place, hartmann3)):
        (slope,) = torch.autograd.grad(function(leaf := at.clone().requires_grad_()), leaf)
        assert float(slope.norm()) < 1e-3


def test_a_varied_function_is_standardised_shifted_and_turned() -> None:
    functions = Varied(2, branin)
    none = {"shifts": torch.zeros(2), "flips": torch.zeros(2), "order": torch.arange(2), "factors": torch.ones(())}
    places = torch.rand((50_000, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = functions(places, none)
    assert float(plain.mean()) == pytest.approx(0.0, abs=0.02) and float(plain.std()) == pytest.approx(1.0, abs=0.02)
    own = {
        "shifts": torch.tensor([0.05, -0.1]), "flips": torch.tensor([1.0, 0.0]), "order": torch.tensor([1, 0]),
        "factors": torch.tensor(1.1),
    }  # fmt: skip
    turned = torch.stack([places[:, 1] + 0.05, 1 - places[:, 0] - 0.1], dim=1)
    torch.testing.assert_close(functions(places, own), 1.1 * functions(turned, none))
    drawn = functions.draw(500, 3, F64)
    assert drawn["shifts"].abs().max() <= 0.1 and 0.9 <= drawn["factors"].min() < drawn["factors"].max() <= 1.1
    assert set(drawn["flips"].flatten().tolist()) == {0.0, 1.0}
    assert {tuple(row) for row in drawn["order"].tolist()} == {(0, 1), (1, 0)}


def by_hand(experiment: BlackBoxOptimizer, hparams: dict[str, Tensor]) -> list[Tensor]:
    """Returns the values of all queries of each search of the first outer step."""
    problem = experiment.training().at(0)
    coefficients = problem.outer.batch(0)
    assert isinstance(coefficients, dict)
    cell, output = nn.LSTMCell(4, 4).double(), nn.Linear(4, 2).double()
    weights = {name.removeprefix("proposer."): value for name, value in hparams.items()}
    searches = []
    for task in range(3):
        frequencies, phases, amplitudes = (coefficients[name][task] for name in ("frequencies", "phases", "amplitudes"))
        place, memory, values = hparams["first_query"].sigmoid(), (torch.zeros(1, 4).double(),) * 2, []
        for _ in range(5):
            values.append(((frequencies * place).sum(dim=1) + phases).cos().mul(amplitudes).sum())
            seen = torch.cat([2 * place - 1, values[-1].reshape(1), torch.stack(values).min().reshape(1)])
            own = {name.removeprefix("cell."): value for name, value in weights.items() if name.startswith("cell.")}
            memory = torch.func.functional_call(cell, own, (seen.unsqueeze(0), memory))
            own = {name.removeprefix("output."): value for name, value in weights.items() if name.startswith("output.")}
            place = torch.func.functional_call(output, own, (memory[0][0],)).sigmoid()
        searches.append(torch.stack(values))
    return searches


def test_the_search_and_its_hypergradient_are_those_of_the_paper() -> None:
    """Against the search written out, with the sum of observed improvements as the loss."""
    experiment = tiny()
    problem = experiment.training().at(0)
    hparams = {name: value + 0.3 for name, value in problem.init_hparams().items()}
    leaves = {name: value.clone().requires_grad_() for name, value in hparams.items()}
    searches = by_hand(experiment, leaves)
    improvements = [
        sum((values[step] - values[:step].min()).clamp(max=0.0) for step in range(1, 5)) + values[0]
        for values in searches
    ]
    loss = torch.stack(improvements).mean()  # type: ignore[arg-type]
    found = ht.hypergradient(problem, hparams, backend=EXACT)
    torch.testing.assert_close(found.outer_loss, loss.detach())
    for name, value in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(found.grads[name], value)
    run = ht.unroll(problem, hparams, metrics_after=range(5))
    expected = torch.stack([values.detach().cummin(dim=0).values for values in searches])
    torch.testing.assert_close(run.metrics_after["best_value"], expected)


def test_the_hypergradient_is_right() -> None:
    problem = tiny().training().at(0)
    assert ht.check_hypergradient(problem, problem.init_hparams(), EXACT).passed


def test_functions_are_of_their_own() -> None:
    experiment = tiny("experiment.dimension=3")
    assert experiment.splits == ("validation", "hartmann3", "test") and tiny("experiment.dimension=1").splits[1:] == (
        "test",
    )
    sources = [experiment.training(), experiment.validation(), experiment.evaluation("test")]
    sources += [experiment.evaluation("test", seed=1)]
    firsts = [source.at(step).outer.batch(step)["phases"][0, 0] for source in sources for step in range(5)]  # type: ignore[index,call-overload]
    assert len({float(first) for first in firsts}) == len(firsts)


def test_random_search_draws_as_many_queries_on_the_same_functions() -> None:
    experiment = tiny()
    own, twice = experiment.baselines("test").values()
    problem, judged = twice.source.at(1), experiment.evaluation("test").at(1)
    torch.testing.assert_close(problem.outer.batch(1), judged.outer.batch(1), rtol=0, atol=0)
    places = ht.unroll(problem, twice.hparams, outer_step=1).params["place"]
    assert places.shape == (100, 10, 2) and len({float(place) for place in places.flatten()}) == 2000
    assert places.min() >= 0.0 and places.max() <= 1.0 and float(places.mean()) == pytest.approx(0.5, abs=0.03)
    best = [ht.evaluate(one.source, one.hparams, num_episodes=300).metrics["best_value"].mean for one in (own, twice)]
    assert best[1] < best[0] - 0.1


def test_the_table_takes_differences_on_the_same_functions() -> None:
    learnt = Curve(best=torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]]), microseconds=2.0)
    other = Curve(best=torch.tensor([[2.0, 2.0, 1.0], [4.0, 3.0, 1.0]]), microseconds=50.0)
    rows = table("test", {"learnt": learnt, "other": other})
    assert [row["queries"] for row in rows] == [1, 2, 1, 2, 3]
    assert [row["best value"] for row in rows[2:]] == [3.0, 2.5, 1.0]
    assert [row.get("above the learnt") for row in rows[2:]] == [1.0, 1.5, None]


def test_a_small_run_has_a_table_and_a_picture(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = (*TINY, "debug=default", "validation.num_episodes=100", "evaluation.num_episodes=100")
    code, error = command(*words, "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    results = json.loads((folder / "results.json").read_text())
    assert set(results["metrics"]) == {"validation", "branin", "test"}
    assert set(results["baselines"]) == {"random", "random, twice as many queries"}
    assert (folder / "queries.png").stat().st_size > 5000
    with (folder / "queries.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["functions"], row["search"]) for row in rows} == {
        (split, name) for split in ("branin", "test") for name in ("learnt LSTM", "random")
    }
    assert {row["number of functions"] for row in rows} == {"150"}


def test_without_optuna_its_searches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ExpectedFailure, match=r"`experiment.search_functions` asks for searches of Optuna.*\[search\]"):
        tiny("experiment.search_functions=2")


@pytest.mark.parametrize("name", ["TPE", "GP-EI"])
def test_optuna_searches_the_function(name: SamplerName) -> None:
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    seen: list[Tensor] = []

    def bowl(place: Tensor) -> float:
        seen.append(place)
        return float((place - 0.3).square().sum())

    values = search(name, bowl, 2, 12, seed=1)
    assert values == [float((place - 0.3).square().sum()) for place in seen] and len(values) == 12
    assert min(values) < 0.05
    assert search(name, bowl, 2, 12, seed=1) == values


@pytest.mark.slow
def test_the_learnt_search_beats_random_search(command: Command, tmp_path: Path) -> None:
    words = ("experiment=black_box_optimizer", "outer_loop.progress=false", f"paths.run_dir={tmp_path}/run")
    code, error = command(*words)
    assert code == 0, error
    results = json.loads((tmp_path / "run/results.json").read_text())
    found = results["metrics"]["test"]["best_value"]["mean"]
    assert found < results["baselines"]["random"]["test"]["best_value"]["mean"]
