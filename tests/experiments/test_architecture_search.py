"""Architecture search: the mixture is what it says, lost operations take no part, and the weights rank as alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from experiments.architecture_search import ArchitectureSearch, MixedNet, rank_correlation
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.models.mlp import MLP
from tests.experiments.built import built
from tests.experiments.commands import Command, results_of
from tests.helpers.problems import normal

TINY = (
    "experiment=architecture_search", "experiment.sizes.train=40", "experiment.hidden=[4]", "experiment.num_alone=1",
    "experiment.batch_size=20", "experiment.num_steps=6", "experiment.final_steps=30",
)  # fmt: skip


def tiny(*overrides: str) -> ArchitectureSearch:
    return built(ArchitectureSearch, *TINY, "dtype=float64", *overrides)


def test_a_mixture_is_the_weighted_sum() -> None:
    net = MixedNet(mlp=MLP((5, 4, 3)), operations=("tanh", "cube", "square"), left_out=("cube",))
    params, images = net.mlp.draw(normal(1, seed=0)), normal(6, 5, seed=1)
    hparams = {"choice": torch.tensor([[0.3, 9.0, -0.2]], dtype=torch.float64)}
    (weights,) = net.mixture(hparams)
    assert list(weights) == ["tanh", "square"]
    share = 1 / (1 + math.exp(-0.5))
    assert float(weights["tanh"]) == pytest.approx(share)
    hidden = F.linear(images, params["layer1.weight"], params["layer1.bias"])
    mixed = share * hidden.tanh() + (1 - share) * hidden.square()
    expected = F.linear(mixed, params["layer2.weight"], params["layer2.bias"])
    torch.testing.assert_close(net(params, [weights], images), expected)
    cut = MixedNet(mlp=net.mlp, operations=net.operations, left_out=("cube",), is_cut=True)
    expected = F.linear(hidden.tanh(), params["layer2.weight"], params["layer2.bias"])
    torch.testing.assert_close(cut(params, cut.mixture(hparams), images), expected)


@pytest.mark.parametrize("backend", [ht.hypergradients.Reverse(), ht.hypergradients.Forward()])
def test_the_hypergradient_is_right(backend: ht.Hypergradient) -> None:
    problem = tiny("experiment.operations=[tanh,identity,square]").training().at(0)
    hparams = {"choice": 0.3 * normal(1, 3, seed=0)}
    assert ht.check_hypergradient(problem, hparams, backend).passed


def test_an_operation_that_ends_in_nan_takes_no_part() -> None:
    experiment = tiny("experiment.operations=[tanh,cube]", "experiment.hidden=[8,8]", "dynamics.lr=1.0")
    with pytest.raises(ExpectedFailure, match="fewer than two can be trained"):
        experiment.training()
    experiment = tiny("experiment.operations=[tanh,cube,relu]", "experiment.hidden=[8,8]", "dynamics.lr=0.2")
    assert not math.isfinite(experiment.alone["cube"])
    problem = experiment.training().at(0)
    grads = ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse()).grads["choice"]
    assert grads.isfinite().all() and (grads[:, 1] == 0.0).all() and (grads[:, [0, 2]] != 0.0).all()
    assert "cube alone" not in experiment.baselines("test")


def test_ranks_are_spearmans() -> None:
    alone = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "lost": math.nan}
    assert rank_correlation({"a": 0.6, "b": 0.3, "c": 0.08, "d": 0.02}, alone) == pytest.approx(1.0)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 1, 1, 0, 0.
    assert rank_correlation({"a": 0.3, "b": 0.6, "c": 0.08, "d": 0.02}, alone) == pytest.approx(0.8)


def test_choices_that_are_none_are_refused() -> None:
    for operations in ("[tanh]", "[tanh,tanh]", "[tanh,nonsense]"):
        with pytest.raises(ExpectedFailure, match="`experiment.operations` is"):
            tiny(f"experiment.operations={operations}")


def test_a_small_run_leaves_figures_and_a_picture(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(
        command, folder,
        *TINY, "outer_loop.num_outer_steps=3", "validation.every=3",
        "validation.num_episodes=1", "evaluation.num_episodes=1",
    )  # fmt: skip
    assert {"tanh alone", "relu alone", "equal mixture"} <= set(results["baselines"])
    assert -1.0 <= results["metrics"]["test"]["rank_correlation"]["mean"] <= 1.0
    assert (folder / "choice.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_choice_ranks_operations_as_they_rank_alone(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, "experiment=architecture_search")
    assert results["metrics"]["test"]["rank_correlation"]["mean"] >= 0.8
    alone = [own["test"]["accuracy"]["mean"] for name, own in results["baselines"].items() if name.endswith("alone")]
    assert results["metrics"]["test"]["accuracy"]["mean"] >= max(alone) - 0.01
