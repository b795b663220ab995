"""Schedules: the rule is the paper's, running backwards gives the same numbers as storing, and they are learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.schedules import Schedules
from hypertorch.dynamics import schedules
from hypertorch.types import TensorDict
from tests.experiments.built import built
from tests.experiments.commands import Command

TINY = (
    "experiment=schedules", "experiment.sizes.train=40", "experiment.hidden=[4]", "experiment.batch_size=20",
    "experiment.num_steps=6",
)  # fmt: skip
TENSORS = [f"layer{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")]


def tiny(*overrides: str) -> Schedules:
    return built(Schedules, *TINY, "dtype=float64", *overrides)


def scattered(first: TensorDict) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in first.items()
    }


def results_of(command: Command, folder: Path, *words: str) -> dict[str, Any]:
    code, error = command(*words, "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    return json.loads((folder / "results.json").read_text())


def test_every_step_and_tensor_has_a_rate_of_its_own() -> None:
    hparams = tiny().training().init_hparams()
    shapes = {"log_lr": (6,), "logit_momentum": (6,), "log_scale": (), "log_l2": ()}
    expected = {f"{kind}.{name}": shape for kind, shape in shapes.items() for name in TENSORS}
    assert {name: tuple(value.shape) for name, value in hparams.items()} == expected
    assert hparams["log_lr.layer2.bias"].exp()[3] == pytest.approx(0.37)
    assert hparams["logit_momentum.layer1.weight"].sigmoid()[5] == pytest.approx(0.5)


def test_the_run_is_that_of_the_paper() -> None:
    """Against algorithm 1 of the paper, written out."""
    problem = tiny().training().at(3)
    hparams = scattered(problem.init_hparams())
    torch.manual_seed(1)
    params = problem.inner.init_params(hparams)
    torch.manual_seed(1)
    for name, value in params.items():
        torch.testing.assert_close(value, hparams[f"log_scale.{name}"].exp() * torch.randn_like(value))
    # The seed of the first weights is the problem's own; without steps, a run returns them.
    start = ht.BilevelProblem(problem.inner, problem.outer, dynamics=problem.dynamics, num_steps=0, seed=problem.seed)
    params = ht.unroll(start, hparams, outer_step=3).params
    velocity = {name: torch.zeros_like(value) for name, value in params.items()}
    for step in range(6):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        images, labels = problem.inner.batch(step)
        hidden = torch.tanh(images @ leaves["layer1.weight"].T + leaves["layer1.bias"])
        outputs = hidden @ leaves["layer2.weight"].T + leaves["layer2.bias"]
        loss = -outputs.log_softmax(-1)[range(len(labels)), labels].mean()
        loss = loss + sum(hparams[f"log_l2.{name}"].exp() / 2 * value.pow(2).sum() for name, value in leaves.items())
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for name, grad in grads.items():
            momentum = hparams[f"logit_momentum.{name}"].sigmoid()[step]
            velocity[name] = momentum * velocity[name] - (1 - momentum) * grad
            params[name] = params[name] + hparams[f"log_lr.{name}"].exp()[step] * velocity[name]
    found = ht.unroll(problem, hparams, outer_step=3).params
    for name, value in params.items():
        torch.testing.assert_close(found[name], value)


def test_running_backwards_and_storing_give_the_same_numbers() -> None:
    problem = tiny().training().at(0)
    hparams = scattered(problem.init_hparams())
    stored = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse())
    reversed_ = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reversible())
    for name, grad in stored.grads.items():
        torch.testing.assert_close(reversed_.grads[name], grad, rtol=1e-9, atol=1e-14)


def test_the_hypergradient_is_right() -> None:
    problem = tiny("experiment.log_l2=-4.0").training().at(0)
    assert ht.check_hypergradient(problem, scattered(problem.init_hparams()), ht.hypergradients.Reverse()).passed


def test_splits_and_seeds_are_of_their_own() -> None:
    experiment = tiny()
    rows = {tuple(row) for images in experiment.images.values() for row in images.inputs.tolist()}
    assert [len(images) for images in experiment.images.values()] == [40, 300, 1457] and len(rows) == 1797
    for split in experiment.splits:
        judged = experiment.evaluation(split).at(0)
        assert judged.outer.batch(0)[0] is experiment.images[split].inputs
        images, _ = judged.inner.batch(0)
        assert {tuple(row) for row in images.tolist()} <= {
            tuple(row) for row in experiment.images["train"].inputs.tolist()
        }
    sources = [experiment.training(), experiment.validation(), experiment.evaluation("test")]
    seeds = [source.at(step).seed for source in sources for step in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert experiment.evaluation("test", seed=1).at(0).seed not in seeds


ONE_CYCLE = "dynamics.lr={_target_:hypertorch.dynamics.schedules.one_cycle,num_steps:6,peak:0.4,share_up:0.5}"


def test_a_learnt_schedule_starts_from_one_that_people_use() -> None:
    hparams = tiny(ONE_CYCLE).training().init_hparams()
    for name in TENSORS:
        expected = torch.tensor(schedules.one_cycle(6, peak=0.4, share_up=0.5), dtype=torch.float64)
        torch.testing.assert_close(hparams[f"log_lr.{name}"].exp(), expected)
    with pytest.raises(ExpectedFailure, match=r"`dynamics.lr` has 6 values between .* at each of 5 steps"):
        tiny(ONE_CYCLE, "experiment.num_steps=5")
    with pytest.raises(
        ExpectedFailure, match="`dynamics.momentum` has 6 values between 1 and 1, .* below 1 are needed"
    ):
        tiny("dynamics=sgd", "dynamics.momentum=1.0")


@pytest.mark.parametrize(
    ("word", "message"),
    [("dynamics.momentum=0.0", "`momentum`"), ("dynamics.momentum=1.0", "`momentum`"), ("dynamics.lr=0.0", "log")],
)  # fmt: skip
def test_a_first_value_without_a_logarithm_is_refused(word: str, message: str) -> None:
    with pytest.raises((ExpectedFailure, ValueError), match=message):
        tiny(word)


def test_a_run_draws_and_searches_for_as_long_as_it_learnt(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = (*TINY, "debug=default", "evaluation.num_episodes=2")
    results = results_of(command, folder, *words)
    for name in ("schedules.png", "random_search.png"):
        assert (folder / name).stat().st_size > 5000
    assert set(results["metrics"]) == {"train", "validation", "test"}
    assert list(results["baselines"]) == ["first constants", "best random constants"]
    # What an interrupted run took before is not known, so nothing can be given as much.
    results = results_of(command, folder, *words, "resume=true")
    assert list(results["baselines"]) == ["first constants"]
    results = results_of(command, tmp_path / "other", *words, "experiment.search_seeds=null")
    assert list(results["baselines"]) == ["first constants"]


@pytest.mark.slow
def test_learnt_schedules_beat_the_first_constants(command: Command, tmp_path: Path) -> None:
    results = results_of(command, tmp_path / "run", "experiment=schedules", "experiment.search_seeds=null")
    before = results["baselines"]["first constants"]["train"]["outer_loss"]["mean"]
    assert results["metrics"]["train"]["outer_loss"]["mean"] < 0.12 * before
