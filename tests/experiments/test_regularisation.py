"""Regularisation: T1-T2 is the paper's formula, and each start learns as if it were alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.regularisation import Regularisation
from tests.experiments.built import built
from tests.experiments.commands import Command

TINY = (
    "experiment=regularisation", "experiment.sizes.train=40", "experiment.sizes.validation=30", "experiment.hidden=[4]",
    "experiment.batch_size=20", "experiment.outer_batch_size=10", "experiment.num_starts=3", "experiment.every=2",
    "experiment.l2=[0.01,0.1]", "experiment.noise=[0.1,0.5]", "outer_loop.num_outer_steps=2",
)  # fmt: skip
LAYERS = ("layer1", "layer2")


def tiny(*overrides: str) -> Regularisation:
    return built(Regularisation, *TINY, "dtype=float64", *overrides)


def test_starts_are_random_wide_and_from_the_seed() -> None:
    experiment = tiny("experiment.num_starts=200", "experiment.l2=[1.0e-6,0.3]", "experiment.noise=[0.01,3.0]")
    for kind, low, high in (("l2", 1e-6, 0.3), ("noise", 0.01, 3.0)):
        drawn = torch.stack([experiment.first[f"log_{kind}.{layer}"] for layer in LAYERS]).exp()
        assert drawn.shape == (2, 200) and len(drawn.unique()) == 400
        assert low <= drawn.min() < 1.3 * low and high / 1.3 < drawn.max() <= high
    again, other = tiny().first["log_l2.layer1"], tiny("seed=1").first["log_l2.layer1"]
    torch.testing.assert_close(again, tiny().first["log_l2.layer1"])
    assert not torch.equal(again, other)


def test_the_inner_loss_is_noise_and_penalty_written_out() -> None:
    problem = tiny().training().at(0)
    hparams, (images, labels) = problem.init_hparams(), problem.inner.batch(0)
    torch.manual_seed(0)
    params = {name: torch.randn_like(value) for name, value in problem.inner.init_params(hparams).items()}
    torch.manual_seed(1)
    found = problem.inner.loss(params, hparams, (images, labels))
    torch.manual_seed(1)
    noises = [torch.randn(20, width, dtype=torch.float64) for width in (64, 4)]
    expected = torch.zeros((), dtype=torch.float64)
    for start in range(3):
        value = images
        for layer, noise in zip(LAYERS, noises, strict=True):
            weight, bias = params[f"{layer}.weight"][start], params[f"{layer}.bias"][start]
            value = value if layer == "layer1" else value.tanh()
            value = (value + hparams[f"log_noise.{layer}"][start].exp() * noise) @ weight.T + bias
            expected = expected + hparams[f"log_l2.{layer}"][start].exp() / 2 * weight.pow(2).sum()
        expected = expected + F.cross_entropy(value, labels)
    torch.testing.assert_close(found, expected)


def test_the_hypergradient_is_that_of_the_paper() -> None:
    """Equation 5, `-lr dE/dw d2L/(dw dvalue)`, for the penalties: there `d2L/(dw dvalue)` is `exp(log_l2) w`."""
    problem = replace(tiny("dynamics.momentum=0.0", "dynamics.lr=0.1").training().at(0), warm_start=False)
    hparams = problem.init_hparams()
    found = ht.hypergradient(problem, hparams, backend=ht.hypergradients.OneStep())
    before = ht.unroll(replace(problem, num_steps=1), hparams).params
    ends = {name: value.requires_grad_() for name, value in found.params.items()}
    outer_loss = problem.outer.loss(ends, hparams, problem.outer.batch(0))
    at_end = dict(zip(ends, torch.autograd.grad(outer_loss, list(ends.values())), strict=True))
    for layer in LAYERS:
        strengths, weight = hparams[f"log_l2.{layer}"].exp(), f"{layer}.weight"
        expected = -0.1 * strengths * (at_end[weight] * before[weight]).sum(dim=(1, 2))
        torch.testing.assert_close(found.grads[f"log_l2.{layer}"], expected)


def test_a_start_learns_as_if_it_were_alone() -> None:
    experiment = tiny()
    together = experiment.training().at(0)
    hparams = together.init_hparams()
    found = ht.hypergradient(together, hparams, backend=ht.hypergradients.Reverse())
    alone = tiny("experiment.num_starts=1").training().at(0)
    for start in range(3):
        own = {name: value[start : start + 1] for name, value in hparams.items()}
        for name, grad in ht.hypergradient(alone, own, backend=ht.hypergradients.Reverse()).grads.items():
            torch.testing.assert_close(found.grads[name][start : start + 1], grad)


def test_the_problem_is_differentiable_through_all_steps() -> None:
    problem = tiny().validation().at(0)
    assert ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse()).passed


def test_the_test_images_choose_nothing() -> None:
    experiment = tiny()
    rows = {split: {tuple(row) for row in images.inputs.tolist()} for split, images in experiment.images.items()}
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [40, 30, 1727]
    assert not any(rows[a] & rows[b] for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")))
    for source in (experiment.training(), experiment.validation()):
        assert {tuple(row) for row in source.at(0).outer.batch(0)[0].tolist()} <= rows["validation"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("experiment.l2=[0.0,1.0]",), r"`experiment.l2` is \[0.0, 1.0\]"),
        (("experiment.noise=[1.0,0.1]",), r"`experiment.noise` is \[1.0, 0.1\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ExpectedFailure, match=message):
        tiny(*words)


def results_of(command: Command, folder: Path, *words: str) -> dict[str, Any]:
    code, error = command(*words, "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    return json.loads((folder / "results.json").read_text())


def test_a_run_judges_reruns_and_draws(command: Command, tmp_path: Path) -> None:
    results = results_of(command, tmp_path / "run", *TINY)
    assert (tmp_path / "run" / "regularisation.png").stat().st_size > 5000
    assert set(results["metrics"]) == {"validation", "test"}
    assert list(results["baselines"]) == ["values of the starts", "nets of the run itself"]
    for figures in (results["metrics"]["test"], *(own["test"] for own in results["baselines"].values())):
        least, mean, greatest = (figures[name]["mean"] for name in ("least_error", "error", "greatest_error"))
        assert least <= mean <= greatest


@pytest.mark.slow
def test_reruns_come_close_together(command: Command, tmp_path: Path) -> None:
    results = results_of(command, tmp_path / "run", "experiment=regularisation")
    learnt, first = results["metrics"]["validation"], results["baselines"]["values of the starts"]["validation"]
    assert learnt["error"]["mean"] < 0.65 * first["error"]["mean"]
    assert learnt["greatest_error"]["mean"] - learnt["least_error"]["mean"] < 0.03
