"""Distilled data: ten images are all that a net is trained on, and they are learnt through its training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.distilled_data import DistilledData
from tests.experiments.built import built
from tests.experiments.commands import Command, results_of

TINY = (
    "experiment=distilled_data", "experiment.sizes.train=60", "experiment.sizes.validation=20",
    "experiment.outer_batch_size=8", "experiment.num_steps=3",
)  # fmt: skip


def tiny(*overrides: str) -> DistilledData:
    return built(DistilledData, *TINY, "dtype=float64", *overrides)


def first_weights(problem: ht.BilevelProblem) -> torch.Tensor:
    """Without steps, a run returns them."""
    start = ht.BilevelProblem(problem.inner, problem.outer, dynamics=problem.dynamics, num_steps=0, seed=problem.seed)
    return ht.unroll(start, problem.init_hparams()).params["layer1.weight"]


@pytest.mark.parametrize(("hidden", "rates"), [(0, "one"), (3, "step")])
def test_the_hypergradient_is_right(hidden: int, rates: str) -> None:
    problem = tiny(f"experiment.hidden={hidden}", f"experiment.rates={rates}").training().at(2)
    assert problem.init_hparams()["log_lr"].shape == {"one": (), "step": (3,)}[rates]
    assert ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse()).passed


def test_a_step_is_that_written_out() -> None:
    """That of softmax regression, whose gradient is the mean over the ten images of `(softmax(W x) - e) x^T`."""
    problem = tiny("experiment.num_steps=1").training().at(0)
    hparams = problem.init_hparams()
    images, before = hparams["images"], first_weights(problem)
    errors = F.softmax(images @ before.T, dim=1) - torch.eye(10, dtype=torch.float64)
    after = ht.unroll(problem, hparams).params["layer1.weight"]
    torch.testing.assert_close(after, before - 0.1 * errors.T @ images / 10)


def test_first_weights_are_the_same_in_every_run_or_new() -> None:
    same, new = tiny("experiment.first_weights=same"), tiny("experiment.weight_scale=2.0")
    expected = first_weights(same.training().at(0))
    for source in (same.training(), same.validation(), same.evaluation("test")):
        torch.testing.assert_close(first_weights(source.at(5)), expected, rtol=0, atol=0)
    drawn = [
        first_weights(source.at(step))
        for source in (new.training(), new.validation(), new.evaluation("test"), same.evaluation("test", seed=0))
        for step in (0, 1)
    ]
    assert len({float(weights[0, 0]) for weights in [*drawn, expected]}) == 9
    # Of 64 inputs.
    assert float(torch.stack(drawn[:6]).std()) == pytest.approx(2.0 / 8.0, rel=0.05)


def test_the_real_images_differ_from_split_to_split() -> None:
    experiment = tiny()
    rows = torch.cat([images.inputs for images in experiment.images.values()])
    assert len(rows.unique(dim=0)) == len(rows) == 1797
    for split in ("validation", "test"):
        batch = experiment.evaluation(split).at(0).outer.batch(0)
        assert isinstance(batch, tuple) and batch[0] is experiment.images[split].inputs
    batch = experiment.training().at(0).outer.batch(3)
    assert isinstance(batch, tuple)
    inputs = experiment.images["train"].inputs
    assert all((inputs == image).all(dim=1).any() for image in batch[0])


def test_a_baseline_has_the_rate_that_is_best_on_validation_images() -> None:
    experiment = tiny("experiment.first_weights=same", "experiment.num_steps=20")
    means = experiment.baselines("test")["class means"].hparams
    train = experiment.images["train"]
    torch.testing.assert_close(means["images"][7], train.inputs[train.labels == 7].mean(dim=0))
    chosen, problem = means["log_lr"], experiment.validation().at(0)
    scores = [
        float(ht.unroll(problem, {**means, "log_lr": chosen + shift}).metrics["accuracy"]) for shift in (-1.0, 0.0, 3.0)
    ]
    assert max(scores) == scores[1] > scores[2]


@pytest.mark.parametrize("name", ["first_weights", "rates"])
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(ExpectedFailure, match=f"`experiment.{name}` is 'other', which this experiment does not know"):
        tiny(f"experiment.{name}=other")


def test_a_small_run_draws_its_images(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, error = command(
        *TINY, "outer_loop.progress=false", "outer_loop.num_outer_steps=3", "evaluation.num_episodes=2",
        f"paths.run_dir={folder}",
    )  # fmt: skip
    assert code == 0, error
    assert (folder / "distilled.png").stat().st_size > 0


@pytest.mark.slow
def test_ten_learnt_images_teach_more_than_ten_real_ones(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, "experiment=distilled_data")
    figures = {name: judged["test"]["accuracy"]["mean"] for name, judged in results["baselines"].items()}
    assert results["metrics"]["test"]["accuracy"]["mean"] > 0.93
    assert figures["real images"] < figures["class means"] < 0.92
