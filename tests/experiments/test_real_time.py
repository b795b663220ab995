"""Real time: three hyperparameters are learnt within one run, and the outcome is the net of that run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.real_time import RealTime, neighbour_map
from tests.experiments.built import built
from tests.experiments.commands import Command, results_of

TINY = (
    "experiment=real_time", "experiment.sizes.unlabelled=200", "experiment.sizes.validation=30", "experiment.hidden=4",
    "experiment.batch_size=10", "experiment.map_axes=3", "experiment.every=4", "outer_loop.num_outer_steps=3",
)  # fmt: skip


def tiny(*overrides: str) -> RealTime:
    return built(RealTime, *TINY, "dtype=float64", *overrides)


def as_in_the_command(experiment: RealTime, num_updates: int) -> ht.Trained:
    optimizer = partial(torch.optim.Adam, lr=0.05)
    backend = ht.hypergradients.Forward(keep_tangents=True)
    return ht.OuterLoop(experiment.training(), optimizer=optimizer, backend=backend).run(num_updates)


def test_the_hypergradient_of_a_whole_run_is_right() -> None:
    problem = tiny("experiment.auxiliary=0.1", "dynamics.lr=0.3").validation().at(0)
    assert problem.num_steps == 12 and not problem.warm_start
    assert ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Forward(), step_size=1e-5).passed


def test_it_is_the_librarys_real_time() -> None:
    experiment = tiny()
    run = experiment.validation().at(0)
    expected = ht.RealTime(run, optimizer=partial(torch.optim.Adam, lr=0.05), every=4).run(12)
    found = as_in_the_command(experiment, 3)
    for name in ("lr", "momentum", "auxiliary"):
        torch.testing.assert_close(found.hparams[name], expected.hparams[name], rtol=0, atol=0)
        assert found.hparams[name] != run.init_hparams()[name]


def test_the_outcome_is_the_net_of_the_run() -> None:
    """Against the whole run in one piece, where the hyperparameters do not move."""
    experiment = tiny()
    optimizer = partial(torch.optim.SGD, lr=0.0)
    backend = ht.hypergradients.Forward(keep_tangents=True)
    trained = ht.OuterLoop(experiment.training(), optimizer=optimizer, backend=backend).run(3)
    ended = experiment.after(trained)
    for split in ("validation", "test"):
        found = ht.evaluate(ended.evaluation(split), trained.hparams, num_episodes=1).metrics["outer_loss"].mean
        source = experiment.baselines(split)["not learnt"].source
        plain = ht.evaluate(source, trained.hparams, num_episodes=1).metrics["outer_loss"].mean
        assert found == pytest.approx(plain, rel=1e-12)
    moved = as_in_the_command(experiment, 3)
    ended = experiment.after(moved)
    assert ht.evaluate(ended.evaluation("test"), moved.hparams, num_episodes=1).metrics["outer_loss"].mean != plain


def test_the_loss_is_that_of_both_heads() -> None:
    inner = tiny().validation().at(0).inner
    batch = inner.batch(5)
    (images, labels), (others, places) = batch  # pyright: ignore[reportGeneralTypeIssues]
    hparams = {name: torch.tensor(0.3, dtype=torch.float64) for name in ("lr", "momentum", "auxiliary")}
    params = inner.init_params(hparams)

    def outputs(inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(inputs @ params["layer1.weight"].T + params["layer1.bias"])
        return hidden @ params["layer2.weight"].T + params["layer2.bias"]

    expected = F.nll_loss(outputs(images)[:, :10].log_softmax(1), labels)
    expected = expected + 0.3 * sum(F.mse_loss(outputs(others)[:, 10 + axis], places[:, axis]) for axis in range(3))
    torch.testing.assert_close(inner.loss(params, hparams, batch), expected)


def test_no_image_is_in_two_sets() -> None:
    images = tiny().images
    rows = torch.cat([part.inputs for part in images.values()])
    assert {name: len(part) for name, part in images.items()} == {
        "labelled": 100, "unlabelled": 200, "validation": 30, "test": 1467,
    }  # fmt: skip
    assert len(rows.unique(dim=0)) == 1797


def test_neighbours_are_near_each_other_in_the_map() -> None:
    inputs = tiny().images["unlabelled"].inputs
    places = neighbour_map(inputs, 3)
    torch.testing.assert_close(places.mean(dim=0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(places.std(dim=0), torch.ones(3, dtype=torch.float64))
    nearest = torch.as_tensor(NearestNeighbors(n_neighbors=2).fit(inputs.numpy()).kneighbors(inputs.numpy())[1][:, 1])
    to_nearest = (places - places[nearest]).norm(dim=1).mean()
    assert to_nearest < 0.5 * torch.pdist(places).mean()


def test_there_is_no_outcome_without_the_run() -> None:
    with pytest.raises(ExpectedFailure, match="`experiment` is RealTime, whose outcome is the net of its single run"):
        tiny().evaluation("test")
    with pytest.raises(ExpectedFailure, match="`seed` is 1, but this experiment has one problem"):
        tiny().evaluation("test", seed=1)


def test_a_small_run_draws_its_course(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, error = command(*TINY, "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    baselines = json.loads((folder / "results.json").read_text())["baselines"]
    assert list(baselines) == ["not learnt", "best random run"]
    assert all((folder / name).stat().st_size > 5000 for name in ("real_time.png", "random_search.png"))


@pytest.mark.slow
def test_learning_beats_the_bad_start(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, "experiment=real_time")
    plain = results["baselines"]["not learnt"]["test"]["accuracy"]["mean"]
    assert results["metrics"]["test"]["accuracy"]["mean"] > plain + 0.025
