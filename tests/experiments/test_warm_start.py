"""Starts of searches: what the data sets are, that all trainings at once are those one by one, and the figures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.digit_sets import (
    NUM_CLASSES,
    Configurations,
    DigitSet,
    draw_sets,
    validation_losses,
)
from experiments.common.data_sets.digits import Images
from experiments.warm_start import WarmStart, correlation, mean_regrets, meta_features
from tests.experiments.built import built
from tests.experiments.commands import Command, results_of
from tests.helpers.problems import normal

TINY = (
    "experiment=warm_start", "experiment.num_sets={train:8,validation:4,test:4}", "experiment.num_steps=4",
    "experiment.width=4", "experiment.num_outputs=2", "experiment.batch_size=3", "experiment.num_lr=3",
    "experiment.num_l2=2", "experiment.num_neighbours=3",
)  # fmt: skip


def tiny(*overrides: str) -> WarmStart:
    return built(WarmStart, *TINY, "dtype=float64", *overrides)


def pool() -> Images:
    """Images that can be told from each other: the pixels are the number of the image, and its digit its last digit."""
    numbers = torch.arange(300)
    return Images(inputs=numbers[:, None].double().expand(300, 4), labels=numbers % 10)


def some_sets(count: int = 5) -> list[DigitSet]:
    generator = torch.Generator().manual_seed(0)
    return draw_sets(pool(), count, sizes=(5, 20), num_validation=10, generator=generator)


def test_a_data_set_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.common.data_sets.digit_sets._PIXEL_NOISE", (0.0, 0.0))
    sizes = set()
    for one in some_sets(30):
        sizes.add(len(one.train))
        assert len(one.classes) == NUM_CLASSES and len(one.validation) == 10
        assert torch.isin(one.train.labels, one.classes).all() and torch.isin(one.validation.labels, one.classes).all()
        pixels = torch.cat([one.train.inputs, one.validation.inputs])[:, 0]
        assert len(pixels.unique()) == len(pixels)
        # The validation labels are right: the same factor makes all pixels the numbers of images of these digits.
        factors = [
            factor
            for number in range(1, 300)
            if 0.25 <= (factor := float(pixels.max()) / number) <= 4.0
            and torch.allclose(pixels / factor, (pixels / factor).round(), atol=1e-6)
            and torch.equal((one.validation.inputs[:, 0] / factor).round().long() % 10, one.validation.labels)
        ]
        assert factors
    assert 5 <= min(sizes) < 8 and 15 < max(sizes) <= 20


def test_examples_show_the_labels_that_are_trained_on() -> None:
    one = some_sets()[0]
    examples = one.examples()
    assert torch.equal(examples[:, :4], one.train.inputs)
    assert torch.equal(examples[:, 4:].argmax(dim=1), one.train.labels)
    assert torch.equal(examples[:, 4:].sum(dim=1), torch.ones(len(examples), dtype=torch.float64))


def test_splits_are_made_of_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.common.data_sets.digit_sets._PIXEL_NOISE", (0.0, 0.0))
    experiment = tiny()
    assert {split: len(sets) for split, sets in experiment.sets.items()} == {"train": 8, "validation": 4, "test": 4}
    drawn = []
    for sets in experiment.sets.values():
        pixels = torch.cat([part.inputs for one in sets for part in (one.train, one.validation)])
        # Without noise, images are known by their pixels, whatever the factor.
        drawn.append({tuple(row) for row in (pixels / pixels.amax(dim=1, keepdim=True)).mul(1e6).round().tolist()})
    for first, second in pairwise([*drawn, drawn[0]]):
        assert first and not first & second


def test_all_trainings_at_once_are_those_one_by_one() -> None:
    sets = [
        DigitSet(
            train=Images(inputs=normal(size, 4, seed=size), labels=torch.tensor([1, 3, 4, 6, 9, 1, 3])[:size]),
            validation=Images(inputs=normal(6, 4, seed=9 + size), labels=torch.tensor([9, 6, 4, 3, 1, 1])),
            classes=torch.tensor([1, 3, 4, 6, 9]),
        )
        for size in (5, 7)
    ]
    configurations = Configurations(
        lr=torch.tensor([0.1, 0.7, 0.3]).double(), l2=torch.tensor([0.0, 0.2, 0.5]).double()
    )
    found = validation_losses(sets, configurations, num_steps=6)
    assert found.shape == (2, 3)
    for one, row in zip(sets, found, strict=True):
        for lr, l2, loss in zip(configurations.lr, configurations.l2, row, strict=True):
            net = torch.nn.Linear(4, 5).double()
            for part in net.parameters():
                torch.nn.init.zeros_(part)
            optimizer = torch.optim.SGD(net.parameters(), lr=float(lr), momentum=0.9)
            for _ in range(6):
                optimizer.zero_grad()
                labels = torch.searchsorted(one.classes, one.train.labels)
                (F.cross_entropy(net(one.train.inputs), labels) + l2 * net.weight.square().sum() / 2).backward()
                optimizer.step()
            expected = F.cross_entropy(
                net(one.validation.inputs), torch.searchsorted(one.classes, one.validation.labels)
            )
            torch.testing.assert_close(loss, expected.detach())


def test_the_derivative_is_that_of_central_differences() -> None:
    experiment = tiny()
    problem = experiment.training()
    # Steps that are small enough to meet no kink of a unit.
    check = ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse(), step_size=1e-5)
    assert check.passed


def test_the_figures_are_those_of_the_test_alone() -> None:
    """What is tried on a data set of the test is chosen by the losses of training: its own only judge."""
    experiment, other = tiny(), tiny()
    weights = experiment.distance.init_hparams()
    before = {name: orders for name, orders in experiment.other_starts("test").items() if name != "true distance"}
    other.losses["test"] = other.losses["test"].flip(1)
    after = other.other_starts("test")
    assert before == {name: after[name] for name in before}
    for split in ("validation", "test"):
        report = ht.evaluate(experiment.evaluation(split), weights, num_episodes=1).metrics
        starts = experiment.starts(experiment.learnt_distances(weights, split))
        regrets = mean_regrets(experiment.losses[split], starts)
        assert report["outer_loss"].mean == pytest.approx(float(regrets.mean()))
        assert [report[f"regret_{count}"].mean for count in (1, 3, 5)] == pytest.approx(regrets[[0, 2, 4]].tolist())
    assert ht.evaluate(other.evaluation("test"), weights, num_episodes=1).metrics["regret_1"].mean != pytest.approx(
        report["regret_1"].mean
    )


def test_starts_are_portfolios_of_the_neighbours() -> None:
    experiment = tiny()
    known = experiment.losses["train"]
    distances = normal(1, 8, seed=0).abs()
    nearest = distances[0].argsort()[:3]
    assert experiment.starts(distances) == [ht.search.greedy_portfolio(known[nearest], 5)]
    assert experiment.other_starts("test")["greedy portfolio"][0] == ht.search.greedy_portfolio(known, 5)


def test_correlation_is_over_pairs_of_different_sets() -> None:
    true = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0], [2.0, 4.0, 0.0]])
    assert float(correlation(3 * true + 1, true)) == pytest.approx(1.0)
    pairs = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 5.0]])
    learnt = torch.tensor([[9.0, 2.0, 1.0], [2.0, 9.0, 5.0], [1.0, 5.0, 9.0]])
    assert float(correlation(learnt, true)) == pytest.approx(float(torch.corrcoef(pairs)[0, 1]))


def test_meta_features_by_hand() -> None:
    train = Images(inputs=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), labels=torch.tensor([1, 2]))
    one = DigitSet(train=train, validation=train, classes=torch.arange(NUM_CLASSES))
    torch.testing.assert_close(meta_features(one), torch.tensor([2.0, (5.0 / 3.0) ** 0.5]).log())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("experiment.num_sets={train:8,validation:2,test:4}", "a correlation needs several pairs"),
        ("experiment.lr=[1,0.1]", "the smaller first"),
        ("experiment.num_lr=2", "`experiment.num_lr` times `experiment.num_l2` is 4"),
        ("experiment.num_neighbours=9", "`experiment.num_neighbours` is 9"),
        ("experiment.batch_size=9", "`experiment.batch_size` is 9"),
        ("experiment.validation_images=300", "are too few|may have only"),
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
    assert set(results["metrics"]["test"]) >= {"correlation", "regret_1", "regret_3", "regret_5"}
    assert set(results["baselines"]) == {
        "hand-made features", "greedy portfolio", "best on average", "random", "true distance",
    }  # fmt: skip
    assert (folder / "warm_start.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_learnt_distance_halves_the_first_regret(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, "experiment=warm_start", "threads=1")
    learnt = {name: figure["mean"] for name, figure in results["metrics"]["test"].items()}
    first = {name: splits["test"]["regret_1"]["mean"] for name, splits in results["baselines"].items()}
    assert learnt["correlation"] > 0.8
    assert learnt["regret_1"] < first["greedy portfolio"] / 2
    assert learnt["regret_1"] < first["hand-made features"]
