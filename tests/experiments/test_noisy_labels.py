"""Noisy labels: what is flipped, what the weight net does, and that the classifier of the run is what is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.digits import digit_splits
from experiments.noisy_labels import NoisyLabels, weights_of, with_flipped_labels
from hypertorch.types import TensorDict
from tests.experiments.built import built
from tests.experiments.commands import Command, results_of

TINY = (
    "experiment=noisy_labels",
    "experiment.sizes.train=40",
    "experiment.sizes.clean=12",
    "experiment.sizes.validation=10",
    "experiment.sizes.test=20",
    "experiment.hidden=4",
    "experiment.batch_size=8",
    "experiment.outer_batch_size=6",
    "experiment.warm_up=2",
    "outer_loop.num_outer_steps=5",
    "outer_loop.log_every=1",
    "outer_loop.progress=false",
)


def experiment(*overrides: str) -> NoisyLabels:
    return built(NoisyLabels, *TINY, "dtype=float64", *overrides)


def learnt(problem: ht.BilevelProblem) -> TensorDict:
    """Returns a weight net that is far from its start."""
    generator = torch.Generator().manual_seed(1)
    first = problem.init_hparams()
    return {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in first.items()}


def parts(problem: ht.BilevelProblem) -> Any:
    return problem.inner.batch(0)


def test_each_class_is_flipped_to_one_other_class() -> None:
    labels = torch.arange(5000) % 10
    given = with_flipped_labels(labels, 0.4, seed=3)
    assert int((given != labels).sum()) == 2000
    others = [set(given[(labels == digit) & (given != labels)].tolist()) for digit in range(10)]
    assert all(len(found) == 1 for found in others)
    # A class for each: no label becomes more frequent than the others.
    assert set.union(*others) == set(range(10))
    assert torch.equal(given, with_flipped_labels(labels, 0.4, seed=3))
    assert not torch.equal(given, with_flipped_labels(labels, 0.4, seed=4))
    with pytest.raises(ExpectedFailure, match=r"`experiment.flipped_share` is 1.5"):
        with_flipped_labels(labels, 1.5, seed=0)


def test_the_four_sets_do_not_overlap() -> None:
    tiny = experiment("experiment.batch_size=40", "experiment.outer_batch_size=12")
    learning = tiny.training().at(0)
    judged: list[Any] = [
        learning.outer.batch(0),
        *(tiny.evaluation(split).at(0).outer.batch(0) for split in tiny.splits),
    ]
    sets = [parts(learning)[0], *(batch[0] for batch in judged)]
    assert [tuple(images.shape) for images in sets] == [(40, 64), (12, 64), (10, 64), (20, 64)]
    assert len({tuple(row) for images in sets for row in images.tolist()}) == 82
    # Of the labels that the weight net and the classifier are judged by, none is flipped.
    true = digit_splits("digits", {"train": 40, "clean": 12, "validation": 10, "test": 20}, seed=0)
    for batch, split in zip(judged, ("clean", "validation", "test"), strict=True):
        assert sorted(batch[1].tolist()) == sorted(true[split].labels.tolist())
    assert sorted(parts(learning)[1].tolist()) != sorted(true["train"].labels.tolist())


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_the_hypergradient_is_right(net: str) -> None:
    problem = experiment(f"experiment.net={net}").training().at(0)
    assert ht.check_hypergradient(problem, learnt(problem), ht.hypergradients.Reverse()).passed


def test_the_hypergradient_is_that_of_the_paper() -> None:
    """An image's weight rises as its gradient agrees with that of the clean images: equation 12 of Shu et al.

    dE/dV = -lr / n sum_i (dE/dw at the new params . dl_i/dw) dV(l_i), without a second derivative.
    """
    problem = experiment().training().at(0)
    hparams = learnt(problem)
    result = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse())
    inner: Any = problem.inner
    inputs, labels, _ = parts(problem)
    first = {name: value.requires_grad_() for name, value in problem.inner.init_params({}).items()}
    losses = F.cross_entropy(inner._net(first, inputs), labels, reduction="none")
    rows = [torch.autograd.grad(loss, list(first.values()), retain_graph=True) for loss in losses]
    weights = weights_of(hparams, losses.detach())
    grads = [
        sum(weight * row[position] for weight, row in zip(weights, rows, strict=True)) for position in range(len(first))
    ]
    moved = {
        name: (value - 0.2 / len(losses) * grad).detach().requires_grad_()
        for (name, value), grad in zip(first.items(), grads, strict=True)
    }
    outward = torch.autograd.grad(problem.outer.loss(moved, hparams, problem.outer.batch(0)), list(moved.values()))
    agreement = torch.stack([sum((a * b).sum() for a, b in zip(outward, row, strict=True)) for row in rows])
    leaves = {name: value.clone().requires_grad_() for name, value in hparams.items()}
    expected = torch.autograd.grad(
        -0.2 / len(losses) * agreement @ weights_of(leaves, losses.detach()), list(leaves.values())
    )
    for value, wanted in zip(result.grads.values(), expected, strict=True):
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-14)


def test_a_new_training_begins_with_equal_weights_and_baselines_have_no_others() -> None:
    tiny = experiment()
    problem = tiny.evaluation("test").at(0)
    hparams, params = learnt(problem), problem.inner.init_params({})

    def loss(problem: ht.BilevelProblem, weight_net: TensorDict, step: int) -> torch.Tensor:
        value = problem.inner.loss(params, weight_net, problem.inner.batch(step))
        assert isinstance(value, torch.Tensor)
        return value

    inner: Any = problem.inner
    for step in (0, 1, 2):
        batch: Any = problem.inner.batch(step)
        losses = F.cross_entropy(inner._net(params, batch[0]), batch[1], reduction="none")
        weights = torch.full_like(losses, 0.5) if step < 2 else weights_of(hparams, losses)
        torch.testing.assert_close(loss(problem, hparams, step), (weights * losses).mean())
    for name, baseline in tiny.baselines("test").items():
        run = baseline.source.at(0)
        batch = run.inner.batch(2)
        losses = F.cross_entropy(inner._net(params, batch[0]), batch[1], reduction="none")
        torch.testing.assert_close(loss(run, baseline.hparams, 2), losses.mean(), rtol=1e-6, atol=0)
        assert (run.num_steps == 5) or "best step" in name


def test_the_classifier_of_the_run_is_judged_as_it_is() -> None:
    tiny = experiment()
    problem = tiny.training().at(0)
    step = ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse())
    trained = ht.Trained(
        hparams=problem.init_hparams(),
        best_hparams=problem.init_hparams(),
        best_step=1,
        best_value=None,
        num_outer_steps=1,
        seconds=0.0,
        carry=step.carry,
    )
    judged = ht.unroll(tiny.after(trained).evaluation("test").at(0), problem.init_hparams())
    assert len(judged.inner_losses) == 0
    for name, value in step.params.items():
        assert torch.equal(judged.params[name], value)
    # The experiment itself is not changed.
    assert tiny.evaluation("test").at(0).num_steps == 5


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ExpectedFailure, match=r"`experiment.net` is 'resnet'.* Use mlp or conv"):
        experiment("experiment.net=resnet")
    with pytest.raises(ExpectedFailure, match="`seed` is 1, but this experiment has one problem for each split"):
        experiment().evaluation("test", seed=1)


@pytest.mark.parametrize("choice", [(), ("hypergradient=evo_grad", "experiment.net=conv")])
def test_the_command_leaves_figures_and_a_picture(choice: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, *TINY, *choice)
    assert set(results["baselines"]) == {
        "equal weights, true labels", "equal weights, best step", "clean images alone, best step",
    }  # fmt: skip
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 5
    # The outcome is the classifier that the last step leaves; the test images are seen at the end alone.
    assert results["metrics"]["validation"]["accuracy"]["mean"] == pytest.approx(last["validation_accuracy"])
    assert "test_accuracy" not in last
    for split in ("validation", "test"):
        assert 0.0 <= results["metrics"][split]["accuracy"]["mean"] <= 1.0
    assert (folder / "weights.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_weight_net_finds_the_flipped_labels_of_embedded_digits(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, "experiment=noisy_labels")
    accuracy = {name: judged["test"]["accuracy"]["mean"] for name, judged in results["baselines"].items()}
    found = results["metrics"]["test"]["accuracy"]["mean"]
    assert found > 0.87
    assert found > accuracy["equal weights, best step"] + 0.1
    weights = weights_of(ht.load_hparams(folder), torch.tensor([0.0, 1.0, 4.0]))
    assert float(weights[0]) > 0.3
    assert float(weights[1]) < 0.5 * float(weights[0])
    assert float(weights[2]) < 0.05
