"""Data cleaning: which labels are wrong, what the weights are, and that the wrong ones are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.digits import digit_splits
from experiments.data_cleaning import DataCleaning, f1, with_wrong_labels
from tests.experiments.built import built
from tests.experiments.commands import runner

TINY = (
    "experiment=data_cleaning",
    "experiment.num_training=40",
    "experiment.num_validation=30",
    "experiment.num_test=20",
    "experiment.num_steps=4",
    "experiment.retrain_steps=5",
    "outer_loop.progress=false",
)
SIGMOID = ("experiment.weights=sigmoid", "experiment.mean_bound=null")


def experiment(*overrides: str) -> DataCleaning:
    return built(DataCleaning, *TINY, "dtype=float64", *overrides)


def inner_data(problem: ht.ProblemSource) -> tuple[Any, ...]:
    batch = problem.at(0).inner.batch(0)
    assert isinstance(batch, tuple)
    return batch


def test_a_share_of_the_labels_is_replaced_by_other_ones() -> None:
    labels = torch.arange(9000) % 10
    given = with_wrong_labels(labels, 0.5, seed=3)
    assert int((given != labels).sum()) == 4500
    # Of the nine others each is as likely: 500 of each shift, with a standard deviation of 21.
    shifts = torch.bincount((given - labels)[given != labels] % 10, minlength=10)
    assert shifts[0] == 0 and int((shifts[1:] - 500).abs().max()) < 85
    assert torch.equal(given, with_wrong_labels(labels, 0.5, seed=3))
    assert not torch.equal(given, with_wrong_labels(labels, 0.5, seed=4))


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    found, wrong = torch.tensor([True, True, True, False, False]), torch.tensor([True, False, False, True, False])
    assert float(f1(found, wrong)) == pytest.approx(2 / (1 / (1 / 3) + 1 / (1 / 2)))
    assert float(f1(torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))) == 0.0


def test_training_validation_and_test_images_do_not_overlap() -> None:
    tiny = experiment()
    learning, final = inner_data(tiny.training()), inner_data(tiny.evaluation("test"))
    sets = [learning[0], *(tiny.evaluation(split).at(0).outer.batch(0)[0] for split in ("validation", "test"))]
    assert [tuple(images.shape) for images in sets] == [(40, 64), (30, 64), (20, 64)]
    rows = {tuple(row) for images in sets for row in images.tolist()}
    assert len(rows) == 90
    # Trained again on training and validation images, the labels of the first as given.
    assert torch.equal(final[0], torch.cat(sets[:2]))
    assert torch.equal(final[1][:40], learning[1])
    assert torch.equal(final[1][40:], tiny.evaluation("validation").at(0).outer.batch(0)[1])
    # The other view of the test images trains on the training images alone.
    alone = tiny.evaluation("test_training_alone")
    assert torch.equal(inner_data(alone)[0], sets[0])
    assert torch.equal(alone.at(0).outer.batch(0)[0], sets[2])


@pytest.mark.parametrize("form", [(), SIGMOID])
@pytest.mark.parametrize("l2", ["experiment.l2=0.0", "experiment.l2=0.5"])
def test_the_hypergradient_is_right(form: tuple[str, ...], l2: str) -> None:
    problem = experiment(*form, l2).training().at(0)
    hparams = {"weight": torch.linspace(-0.3, 0.4, 40, dtype=torch.float64) + problem.init_hparams()["weight"]}
    assert ht.check_hypergradient(problem, hparams, ht.hypergradients.Reverse()).passed


def test_the_implicit_hypergradient_is_that_of_a_long_run() -> None:
    problem = experiment(*SIGMOID, "experiment.l2=0.5", "experiment.num_steps=400").training().at(0)
    hparams = {"weight": torch.linspace(-1.0, 1.0, 40, dtype=torch.float64)}
    solver = ht.linear_solvers.ConjugateGradient(max_iterations=400, tolerance=1e-12)
    implicit, reverse = (
        ht.hypergradient(problem, hparams, backend=backend).grads["weight"]
        for backend in (ht.hypergradients.Implicit(solver=solver), ht.hypergradients.Reverse())
    )
    torch.testing.assert_close(implicit, reverse, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("form", [(), SIGMOID])
def test_weights_start_alike_and_act_as_a_share_of_the_training_set(form: tuple[str, ...]) -> None:
    """With weights of 0 and 1, the final training is that on the images with 1 alone."""
    tiny = experiment(*form)
    source = tiny.training().at(0)
    first = source.init_hparams()
    torch.testing.assert_close(
        tiny.evaluation("validation").at(0).inner.loss({**source.inner.init_params({})}, first, inner_data(source)),
        torch.tensor(10.0, dtype=torch.float64).log(),
    )
    baselines = tiny.baselines("test")
    problem = baselines["right labels alone"].source.at(0)
    inputs, labels, _ = inner_data(problem)
    right = labels[:40] == digit_splits("digits", {"training": 40}, seed=0)["training"].labels
    params = {name: torch.randn_like(value) for name, value in problem.inner.init_params({}).items()}
    images = {
        "all weights one": torch.ones_like(right),
        "right labels alone": right,
        "validation images alone": torch.zeros_like(right),
    }
    for name, own in images.items():
        kept = torch.cat([own, torch.ones(30, dtype=torch.bool)])
        logits = inputs[kept] @ params["output.weight"].T + params["output.bias"]
        torch.testing.assert_close(
            problem.inner.loss(params, baselines[name].hparams, problem.inner.batch(0)),
            torch.nn.functional.cross_entropy(logits, labels[kept]),
            rtol=1e-5,  # a sigmoid of 1e-7 is not 0
            atol=0.0,
        )
    assert float(ht.unroll(problem, baselines["right labels alone"].hparams).metrics["F1"]) == 1.0


def test_settings_that_do_not_fit_are_refused() -> None:
    for overrides, message in (
        (("experiment.weights=simplex",), "`experiment.weights` is 'simplex'.*Use box or sigmoid"),
        (("experiment.weights=sigmoid",), "`experiment.mean_bound` is 0.3.*Write experiment.mean_bound=null"),
        (("experiment.mean_bound=null",), "`experiment.mean_bound` is None.*above 0 and at most 1"),
        (("experiment.wrong_share=1.5",), "`experiment.wrong_share` is 1.5"),
    ):
        with pytest.raises(ExpectedFailure, match=message):
            experiment(*overrides)
    with pytest.raises(ExpectedFailure, match="`seed` is 1, but this experiment has one problem for each split"):
        experiment().evaluation("test", seed=1)


@pytest.mark.parametrize("backend", [(), (*SIGMOID, "hypergradient=implicit", "experiment.l2=0.5")])
def test_the_command_leaves_figures_and_a_picture(
    backend: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ("hypergradient.stationarity_tolerance=null", "hypergradient.residual_tolerance=null")
    arguments = (*TINY, *backend, *(quiet if backend else ()), "debug=default", f"paths.run_dir={tmp_path}")
    code, error = runner(monkeypatch, capsys)(*arguments)
    assert code == 0, error
    assert (tmp_path / "weights.png").stat().st_size > 5000
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["metrics"]["test"]) >= {"accuracy", "F1", "outer_loss"}
    assert set(results["baselines"]) == {"all weights one", "right labels alone", "validation images alone"}


@pytest.mark.slow
def test_most_wrong_labels_of_embedded_digits_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = runner(monkeypatch, capsys)(
        "experiment=data_cleaning", "outer_loop.progress=false", f"paths.run_dir={tmp_path}"
    )
    assert code == 0, error
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"]["test"]["F1"]["mean"] > 0.9
    accuracy = {name: judged["test"]["accuracy"]["mean"] for name, judged in results["baselines"].items()}
    assert results["metrics"]["test"]["accuracy"]["mean"] > accuracy["all weights one"] + 0.015
