"""The ensemble: its loss and selections against small sums written out, and its weights on the simplex."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.ensemble import Ensemble, ambiguity, cross_entropy, frequent, greedy, mixed
from tests.experiments.built import built
from tests.experiments.commands import Command, results_of
from tests.helpers.problems import normal

TINY = (
    "experiment=ensemble", "experiment.sizes.train=40", "experiment.num_nets=4", "experiment.train_steps=20",
    "experiment.num_resamples=2", "experiment.num_picks=3",
)  # fmt: skip


def tiny(*overrides: str) -> Ensemble:
    return built(Ensemble, *TINY, "dtype=float64", *overrides)


def some_answers() -> tuple[torch.Tensor, torch.Tensor]:
    return (2.0 * normal(5, 40, 3, seed=0)).softmax(dim=2), torch.arange(40) % 3


def test_the_squared_error_of_the_mean_is_less_by_the_ambiguity() -> None:
    answers, labels = some_answers()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    goal = torch.nn.functional.one_hot(labels, 3).double()
    errors = (answers - goal).square().sum(dim=2).mean(dim=1)
    of_mean = (mixed(answers, weights) - goal).square().sum(dim=1).mean()
    torch.testing.assert_close(of_mean, weights @ errors - ambiguity(answers, weights))


def test_cross_entropy_is_that_of_pytorch() -> None:
    answers, labels = some_answers()
    expected = [torch.nn.functional.nll_loss(own.log(), labels) for own in answers]
    torch.testing.assert_close(cross_entropy(answers, labels), torch.stack(expected))
    assert cross_entropy(torch.zeros(1, 2, 3), torch.tensor([0, 1])).isfinite().all()


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_greedy_takes_the_best_next_net(diversity: float) -> None:
    answers, labels = some_answers()
    picks: list[int] = []
    for _ in range(4):
        criterion = []
        for net in range(5):
            weights = torch.bincount(torch.tensor([*picks, net]), minlength=5).double()
            weights = weights / weights.sum()
            loss = cross_entropy(mixed(answers, weights), labels)
            criterion.append(float(loss - diversity * ambiguity(answers, weights)))
        picks.append(criterion.index(min(criterion)))
    expected = torch.bincount(torch.tensor(picks), minlength=5).double() / 4
    torch.testing.assert_close(greedy(answers, labels, 4, diversity=diversity), expected)


def test_nets_that_are_frequent_enough_are_taken() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.0, 0.1], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(frequent(weights, 0.5), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(frequent(weights, 0.3) * 3.0, torch.tensor([2.4, 0.5, 0.1], dtype=torch.float64))
    # Nobody has it: the most frequent.
    torch.testing.assert_close(frequent(weights[:, 1:], 0.9) * 0.6, torch.tensor([0.5, 0.1], dtype=torch.float64))


def test_the_hypergradient_is_right() -> None:
    problem = tiny().training().at(0)
    assert ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse()).passed


def test_the_problem_is_convex_and_its_solution_is_found() -> None:
    """Without the reward: the best of a fine grid over two nets."""
    experiment = tiny("experiment.num_nets=2", "experiment.num_resamples=1", "experiment.diversity=0.0")
    problem = experiment.training().at(0)
    loop = ht.OuterLoop(
        problem, optimizer=lambda hparams: torch.optim.SGD(hparams, lr=0.05), backend=ht.hypergradients.Reverse()
    )
    found = loop.run(300).hparams["weights.0"]
    assert ht.Simplex().feasible(found)

    def loss(share: float) -> float:
        return float(ht.unroll(problem, {"weights.0": found.new_tensor([share, 1.0 - share])}).outer_loss)

    best = min(itertools.accumulate([0.001] * 999), key=loss)
    assert loss(float(found[0])) <= loss(best) + 1e-5


def test_splits_and_resamples_are_what_they_say() -> None:
    experiment = tiny()
    rows = {tuple(row) for images in experiment._images.values() for row in images.inputs.tolist()}
    assert sum(len(images) for images in experiment._images.values()) == len(rows) == 1797
    assert {split: tuple(own.shape) for split, own in experiment.answers.items()} == {
        "validation": (4, 300, 10), "test": (4, 1457, 10),
    }  # fmt: skip
    labels, resamples = experiment._resamples
    assert len(labels) == 300 and resamples.shape == (2, 300)
    # With repetition, about two thirds of the images are in a resample.
    assert all(150 < len(own.unique()) < 230 for own in resamples)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("experiment.num_nets=0", "`experiment.num_nets` is 0"),
        ("experiment.diversity=-1.0", "`experiment.diversity` is -1.0"),
        ("experiment.least_frequency=1.5", "`experiment.least_frequency` is 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(word: str, message: str) -> None:
    with pytest.raises(ExpectedFailure, match=message):
        tiny(word)


def test_a_small_run_leaves_figures_and_a_picture(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(
        command, folder,
        *TINY, "outer_loop.num_outer_steps=3", "validation.every=3",
    )  # fmt: skip
    assert set(results["baselines"]) == {
        "best net alone", "all alike", "greedy", "greedy, diversity and frequency",
    }  # fmt: skip
    assert results["baselines"]["all alike"]["test"]["nets"]["mean"] == 4.0
    assert (folder / "ensemble.png").stat().st_size > 5000


@pytest.mark.slow
def test_learnt_weights_are_better_than_one_net_and_than_all_alike(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, "experiment=ensemble")
    loss = {name: own["test"]["outer_loss"]["mean"] for name, own in results["baselines"].items()}
    learnt = results["metrics"]["test"]
    assert learnt["outer_loss"]["mean"] < min(loss["best net alone"], loss["all alike"])
    assert learnt["outer_loss"]["mean"] < 1.02 * loss["greedy"]
    assert learnt["accuracy"]["mean"] > results["baselines"]["best net alone"]["test"]["accuracy"]["mean"]
