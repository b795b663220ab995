"""Penalties by pixel: the run is the one written out, and a pixel without ink has no hypergradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.pixel_penalty import PixelPenalty
from hypertorch.types import TensorDict
from tests.experiments.built import built
from tests.experiments.commands import Command

TINY = (
    "experiment=pixel_penalty", "experiment.sizes.train=40", "experiment.sizes.validation=30",
    "experiment.batch_size=20", "experiment.num_steps=5",
)  # fmt: skip


def tiny(*overrides: str) -> PixelPenalty:
    return built(PixelPenalty, *TINY, "dtype=float64", *overrides)


def scattered(problem: ht.ProblemSource) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in problem.init_hparams().items()
    }


def test_the_run_is_penalised_softmax_regression_written_out() -> None:
    problem = tiny("dynamics.lr=0.2", "dynamics.momentum=0.5").training().at(0)
    hparams = scattered(problem)
    assert hparams["log_l2"].shape == (10, 64)
    weight, bias = torch.zeros(10, 64, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(5):
        images, labels = problem.inner.batch(step)
        wrong = (images @ weight.T + bias).softmax(dim=1) - torch.eye(10, dtype=torch.float64)[labels]
        grads = wrong.T @ images / 20 + hparams["log_l2"].exp() * weight, wrong.mean(dim=0)
        velocity = tuple(0.5 * old + grad for old, grad in zip(velocity, grads, strict=True))
        weight, bias = weight - 0.2 * velocity[0], bias - 0.2 * velocity[1]
    found = ht.unroll(problem, hparams).params
    torch.testing.assert_close(found["output.weight"], weight)
    torch.testing.assert_close(found["output.bias"], bias)


def test_the_hypergradient_is_right_and_zero_where_there_is_never_ink() -> None:
    experiment = tiny()
    problem = experiment.training().at(0)
    hparams = scattered(problem)
    assert ht.check_hypergradient(problem, hparams, ht.hypergradients.Reverse()).passed
    grad = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse()).grads["log_l2"]
    empty = (experiment.images["train"].inputs == 0).all(dim=0)
    assert empty.any() and (grad[:, empty] == 0).all() and (grad[:, ~empty] != 0).any(dim=0).sum() > 40


def test_no_penalty_is_none_and_no_other_problems_are_made_up() -> None:
    experiment = tiny()
    baselines = experiment.baselines("test")
    first, none, best, more = baselines
    assert (first, none) == ("the first penalty", "no penalty") and best == "best single penalty"
    assert float(baselines[none].hparams["log_l2"].exp().max()) < 1e-20
    images = baselines[more].source.at(0).inner._batches.dataset
    assert len(images) == 70 and list(experiment.baselines("validation")) == [first, none, best]
    with pytest.raises(ExpectedFailure, match="one problem for each split"):
        experiment.evaluation("test", seed=1)


def results_of(command: Command, folder: Path, *words: str) -> dict[str, Any]:
    code, error = command(*words, "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    return json.loads((folder / "results.json").read_text())


def test_a_run_draws(command: Command, tmp_path: Path) -> None:
    results = results_of(command, tmp_path / "run", *TINY, "debug=default")
    assert (tmp_path / "run" / "penalties.png").stat().st_size > 5000
    assert set(results["metrics"]) == {"validation", "test"}


@pytest.mark.slow
def test_learnt_penalties_beat_the_best_single_one_on_test_images(command: Command, tmp_path: Path) -> None:
    results = results_of(command, tmp_path / "run", "experiment=pixel_penalty")
    (single,) = (own for name, own in results["baselines"].items() if name.startswith("best single"))
    gain = results["metrics"]["test"]["accuracy"]["mean"] - single["test"]["accuracy"]["mean"]
    assert gain > 0.01
