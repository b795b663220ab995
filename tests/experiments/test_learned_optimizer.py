"""The learnt optimiser: its run and hypergradient are the paper's, what it is compared with is tuned, and it wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import experiments.common.runs.resolvers  # noqa: F401
import hypertorch as ht
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.runs.experiment import build_experiment
from experiments.learned_optimizer import LearnedOptimizer
from tests.experiments.built import built
from tests.experiments.commands import Command

TINY = (
    "experiment=learned_optimizer", "experiment.sizes.train=40", "experiment.sizes.validation=30",
    "experiment.sizes.test=50", "experiment.outer_batch_size=40", "experiment.hidden=[4]", "experiment.batch_size=20",
    "experiment.num_steps=4", "experiment.search_seeds=2", "dynamics.rule.hidden=3",
)  # fmt: skip
EXACT = ht.hypergradients.Reverse()


def tiny(*overrides: str, dtype: str = "float64") -> LearnedOptimizer:
    return built(LearnedOptimizer, *TINY, f"dtype={dtype}", *overrides)


@pytest.mark.parametrize("rule", [(), ("dynamics=learned_update",)], ids=["mlp", "lstm"])
def test_the_hypergradient_is_right(rule: tuple[str, ...]) -> None:
    # Without the logarithm, whose bends central differences would step over.
    problem = tiny(*rule, "dynamics.rule.preprocess=null").training().at(0)
    assert ht.check_hypergradient(problem, problem.init_hparams(), EXACT).passed


@pytest.mark.parametrize("is_constant", [False, True])
def test_the_run_and_its_hypergradient_are_those_of_the_paper(is_constant: bool) -> None:
    """Against the unrolled run written out, with and without what runs through the gradients."""
    problem = tiny(f"dynamics.gradient_is_constant={is_constant}").training().at(1)
    hparams = problem.init_hparams()
    weights = {name: value.clone().requires_grad_() for name, value in hparams.items()}
    start = ht.BilevelProblem(problem.inner, problem.outer, dynamics=problem.dynamics, num_steps=0, seed=problem.seed)
    first = ht.unroll(start, hparams, outer_step=1).params
    params = {name: value.requires_grad_() for name, value in first.items()}
    averages = {name: [torch.zeros_like(value)] * 3 for name, value in params.items()}

    def loss(step: int) -> torch.Tensor:
        images, labels = problem.outer.batch(1) if step == 4 else problem.inner.batch(step)  # type: ignore[misc]
        hidden = torch.tanh(images @ params["layer1.weight"].T + params["layer1.bias"])
        outputs = hidden @ params["layer2.weight"].T + params["layer2.bias"]
        return -outputs.log_softmax(-1)[range(len(labels)), labels].mean()

    for step in range(4):
        grads = dict(
            zip(params, torch.autograd.grad(loss(step), list(params.values()), create_graph=True), strict=True)
        )
        for name, grad in grads.items():
            seen = grad.detach() if is_constant else grad
            averages[name] = [d * old + (1 - d) * seen for d, old in zip((0.5, 0.9, 0.99), averages[name], strict=True)]
            features = []
            for value in (seen, *averages[name]):
                size = value.abs()
                is_large = size >= torch.tensor(-4.0).exp()
                safe = torch.where(is_large, size, torch.ones_like(size))
                features.append(torch.where(is_large, safe.log() / 4, torch.full_like(size, -1.0)))
                features.append(torch.where(is_large, value.sign(), torch.tensor(4.0).exp() * value))
            inside = torch.stack(features, dim=-1) @ weights["update_rule.input.weight"].T
            inside = torch.tanh(inside + weights["update_rule.input.bias"])
            update = inside @ weights["update_rule.output.weight"][0] + weights["update_rule.output.bias"]
            params[name] = params[name] + 0.03 * update
    expected = torch.autograd.grad(loss(4), list(weights.values()))
    found = ht.hypergradient(problem, hparams, backend=EXACT, outer_step=1)
    torch.testing.assert_close(found.outer_loss, loss(4).detach())
    for name, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(found.grads[name], value)


def test_nets_and_images_are_of_their_own() -> None:
    experiment = tiny()
    rows = [{tuple(row) for row in experiment.images[name].inputs.tolist()} for name in ("train", "validation", "test")]
    assert [len(own) for own in rows] == [40, 30, 50] and len(set.union(*rows)) == 120
    twice = experiment.evaluation("test_twice_as_long")
    sources = (experiment.training(), experiment.validation(), experiment.evaluation("test"))
    for own, source in zip(rows, sources, strict=True):
        images, _ = source.at(2).inner.batch(1)  # type: ignore[misc]
        assert {tuple(row) for row in images.tolist()} <= own
    seeds = [source.at(step).seed for source in sources for step in range(20)]
    assert len(set(seeds)) == len(seeds) and experiment.evaluation("test", seed=1).at(0).seed not in seeds
    assert [source.at(0).num_steps for source in (*sources, twice)] == [4, 4, 4, 8]
    assert twice.at(0).seed == sources[2].at(0).seed


def test_the_others_are_tuned_on_the_nets_of_validation() -> None:
    experiment = tiny()
    own = experiment.baselines("test")["SGD, rate tuned"]
    assert set(own.hparams) == {"lr", "decay"} and float(own.hparams["decay"]) == 0.0
    rates = [10.0 ** (power / 6) for power in range(-18, 7)]
    judged = [experiment.validation().at(net) for net in range(2)]
    losses = [
        sum(
            float(ht.unroll(_by_hand(problem, rate), {"idle": torch.zeros(())}, outer_step=0).outer_loss)
            for problem in judged
        )
        for rate in rates
    ]
    assert float(own.hparams["lr"]) == pytest.approx(rates[losses.index(min(losses))])
    # It is tuned anew for twice as many steps.
    names = set(experiment.baselines("test_twice_as_long"))
    assert names == set(experiment.baselines("test")) and len(names) == 4


def _by_hand(problem: ht.BilevelProblem, rate: float) -> ht.BilevelProblem:
    rule = ht.dynamics.SGD(lr=rate)
    return ht.BilevelProblem(problem.inner, problem.outer, dynamics=rule, num_steps=4, seed=problem.seed)


def test_dynamics_without_a_rule_are_refused() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["experiment=learned_optimizer"])
        config.dynamics = {"_target_": "hypertorch.dynamics.SGD", "lr": 0.1}
    with pytest.raises(ExpectedFailure, match="`dynamics` is SGD, which has no update rule to learn"):
        build_experiment(config, parse(TrainSettings, config))


def test_a_small_run_has_a_table_and_a_picture(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = (*TINY, "experiment.search_seeds=1", "debug=default", "evaluation.num_episodes=2")
    code, error = command(*words, "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    results = json.loads((folder / "results.json").read_text())
    assert set(results["metrics"]) == {"validation", "test_twice_as_long", "test"}
    assert len(results["baselines"]) == 4
    assert (folder / "training_curves.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_learnt_rule_beats_tuned_adam(command: Command, tmp_path: Path) -> None:
    code, error = command("experiment=learned_optimizer", "outer_loop.progress=false", f"paths.run_dir={tmp_path}/run")
    assert code == 0, error
    results = json.loads((tmp_path / "run/results.json").read_text())
    for split in ("test", "test_twice_as_long"):
        adam = results["baselines"]["Adam, rate and decay tuned"][split]["training_loss"]["mean"]
        assert results["metrics"][split]["training_loss"]["mean"] < 0.85 * adam
