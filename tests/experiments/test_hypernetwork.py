"""The hypernetwork: what it is trained on, that the strength's derivative is right, and that its answers are those."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.digits import Images
from experiments.hypernetwork import Hypernetwork, losses, penalised, with_wrong_labels
from tests.experiments.built import built
from tests.experiments.commands import Command, results_of
from tests.helpers.problems import normal

TINY = (
    "experiment=hypernetwork", "experiment.sizes.train=20", "experiment.hidden=[3]", "experiment.num_steps=2",
    "experiment.num_drawn=3", "experiment.num_compared=3",
)  # fmt: skip


def tiny(*overrides: str) -> Hypernetwork:
    return built(Hypernetwork, *TINY, "dtype=float64", *overrides)


def some_images() -> Images:
    return Images(inputs=normal(6, 4, seed=0), labels=torch.arange(6))


def test_side_by_side_is_one_by_one() -> None:
    images, weights, log_l2 = some_images(), normal(2, 10, 5, seed=1), torch.tensor([-1.0, 0.5], dtype=torch.float64)
    for own, strength, loss, whole in zip(
        weights, log_l2, losses(weights, images), penalised(weights, log_l2, images), strict=True
    ):
        expected = F.cross_entropy(images.inputs @ own[:, :-1].T + own[:, -1], images.labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(whole, expected + strength.exp() * own.square().sum() / 2)


def test_training_anew_reaches_the_minimum() -> None:
    experiment = tiny("experiment.wrong=0.5")
    weights = experiment.anew.clone().requires_grad_()
    inner = experiment.validation().at(0).inner
    loss = inner.loss({"weights": weights}, {"log_l2": experiment._compared}, None)
    assert isinstance(loss, torch.Tensor)
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-4


def test_strengths_are_drawn_from_all_of_the_range() -> None:
    inner = tiny("experiment.num_drawn=7").training().at(0).inner
    for step in range(5):
        drawn = inner.batch(step)
        assert torch.equal(drawn, inner.batch(step)) and not torch.equal(drawn, inner.batch(step + 1))
        # One in each seventh of the range from -7 to 0.
        assert torch.equal(drawn.floor(), torch.arange(-7.0, 0.0, dtype=torch.float64))


@pytest.mark.parametrize("backend", [ht.hypergradients.FirstOrder(), ht.hypergradients.Reverse()])
def test_the_derivative_runs_through_the_answer(backend: ht.Hypergradient) -> None:
    """Training takes no part in it: central differences of the whole run agree with the answer's own derivative."""
    problem = tiny().training().at(0)
    hparams = {"log_l2": torch.tensor(-2.0, dtype=torch.float64)}
    assert ht.check_hypergradient(problem, hparams, backend).passed


def test_labels_are_wrong_as_often_as_said() -> None:
    images = Images(inputs=torch.zeros(4000, 1), labels=torch.arange(4000) % 10)
    changed = (with_wrong_labels(images, 0.3, seed=0).labels != images.labels).double().mean()
    # A random label is the right one a tenth of the time.
    assert float(changed) == pytest.approx(0.27, abs=0.02)
    assert torch.equal(with_wrong_labels(images, 0.0, seed=0).labels, images.labels)


@pytest.mark.parametrize(
    ("word", "message"),
    [("experiment.log_l2=[1,0]", "the smaller first"), ("experiment.num_compared=1", "a range has two ends")],
)
def test_what_does_not_fit_is_refused(word: str, message: str) -> None:
    with pytest.raises(ExpectedFailure, match=message):
        tiny(word)


def test_a_small_run_leaves_figures_and_a_picture(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(
        command, folder,
        *TINY, "experiment.anew_steps=20", "outer_loop.num_outer_steps=3",
        "validation.every=3",
    )  # fmt: skip
    assert set(results["baselines"]) == {"trained anew", "best of a grid, trained anew"}
    assert 0.0 <= results["metrics"]["test"]["mean_gap"]["mean"] <= results["metrics"]["test"]["greatest_gap"]["mean"]
    assert (folder / "best_response.png").stat().st_size > 5000


@pytest.mark.slow
def test_answers_are_within_five_percent_of_training_anew(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, "experiment=hypernetwork")
    assert results["metrics"]["validation"]["greatest_gap"]["mean"] < 0.05
    # The strength that is learnt through the answers is as good as the best of a grid.
    anew, best = (results["baselines"][name]["validation"]["outer_loss"]["mean"] for name in results["baselines"])
    assert anew < 1.05 * best
