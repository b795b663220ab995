"""Data selection: half of a pool is junk, the loss is weighted by what is learnt, and a scorer weighs a new pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.data_selection import KINDS, DataSelection
from hypertorch.types import TensorDict
from tests.experiments.built import built
from tests.experiments.commands import Command

TINY = (
    "experiment.sizes.pool=24", "experiment.sizes.validation=20", "experiment.num_copied=2", "experiment.hidden=4",
    "experiment.scorer_hidden=3", "experiment.batch_size=9", "experiment.num_steps=5",
)  # fmt: skip
WEIGHTS = ("experiment=data_selection", *TINY)
SCORER = ("experiment=data_selection_scorer", *TINY, "experiment.sizes.new_pool=16")


def tiny(*words: str) -> DataSelection:
    return built(DataSelection, *words, "dtype=float64")


def scattered(source: ht.ProblemSource) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in source.init_hparams().items()
    }


def test_half_of_a_pool_is_junk_of_three_kinds() -> None:
    experiment = tiny(*WEIGHTS)
    pool, digits = experiment.pools["pool"], experiment.images["pool"]
    assert len(KINDS) == 4 and torch.bincount(pool.kinds).tolist() == [18, 6, 6, 6]
    right, wrong, copies, strange = (pool.kinds == kind for kind in range(4))
    torch.testing.assert_close(pool.inputs[right], digits.inputs[:18])
    torch.testing.assert_close(pool.inputs[wrong], digits.inputs[18:])
    torch.testing.assert_close(pool.true[~strange], torch.cat([digits.labels, digits.labels[:2].repeat(3)]))
    assert ((pool.labels == pool.true) == (right | copies)).all()
    torch.testing.assert_close(pool.inputs[copies], digits.inputs[:2].repeat(3, 1))
    assert len({tuple(row) for row in pool.inputs[strange].tolist()}) == 6 and (pool.true[strange] == -1).all()
    assert 0.0 < pool.inputs[strange].max() <= 1.0


def test_an_example_counts_by_its_weight() -> None:
    experiment = tiny(*WEIGHTS)
    problem, pool = experiment.training().at(4), experiment.pools["pool"]
    hparams = scattered(problem)
    weights = hparams["score"].sigmoid() / hparams["score"].sigmoid().mean()
    torch.manual_seed(0)
    params = {name: torch.randn_like(value) for name, value in problem.inner.init_params(hparams).items()}
    (places,) = problem.inner.batch(2)
    hidden = torch.relu(pool.inputs[places] @ params["layer1.weight"].T + params["layer1.bias"])
    outputs = hidden @ params["layer2.weight"].T + params["layer2.bias"]
    expected = (weights[places] * F.cross_entropy(outputs, pool.labels[places], reduction="none")).mean()
    assert problem.context is not None
    context = problem.context(hparams, problem.outer.batch(4))
    found = problem.inner.loss(params, {**hparams, **context}, problem.inner.batch(2))
    torch.testing.assert_close(found, expected)
    junk = weights[pool.kinds > 0].sum() / weights.sum()
    torch.testing.assert_close(ht.unroll(problem, hparams).metrics["junk_share"], junk)


def test_a_scorer_reads_image_and_label_of_any_pool() -> None:
    experiment = tiny(*SCORER)
    problem, pool = experiment.evaluation("new_pool").at(0), experiment.pools["new_pool"]
    hparams = scattered(problem)
    hidden = torch.relu(pool.inputs @ hparams["layer1.weight"].T + hparams["layer1.bias"])
    scores = (hidden @ hparams["layer2.weight"].T + hparams["layer2.bias"])[torch.arange(24), pool.labels]
    assert problem.context is not None
    weights = problem.context(hparams, problem.outer.batch(0))["weights"]
    torch.testing.assert_close(weights, scores.sigmoid() / scores.sigmoid().mean())
    # Of the new pool nothing is seen before it is judged, and the test images are judged on alone.
    seen = {tuple(row) for name in ("pool", "validation") for row in experiment.images[name].inputs.tolist()}
    for name in ("new_pool", "test"):
        assert not seen & {tuple(row) for row in experiment.images[name].inputs.tolist()}
    for source in (experiment.training(), experiment.validation()):
        assert source.at(0).outer.batch(0)[0] is experiment.images["validation"].inputs


@pytest.mark.parametrize("words", [WEIGHTS, SCORER], ids=["weights", "scorer"])
def test_the_hypergradient_is_right_and_replaying_gives_the_same(words: tuple[str, ...]) -> None:
    problem = tiny(*words, "dynamics.eps=0.01").training().at(0)
    hparams = scattered(problem)
    assert ht.check_hypergradient(problem, hparams, ht.hypergradients.Reverse()).passed
    stored = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse()).grads
    for backend in (ht.hypergradients.Reverse(checkpoint_every="sqrt"), ht.hypergradients.Reverse(snapshots=2)):
        for name, grad in ht.hypergradient(problem, hparams, backend=backend).grads.items():
            torch.testing.assert_close(grad, stored[name], rtol=1e-10, atol=1e-14)


def test_baselines_train_on_what_their_name_says() -> None:
    experiment = tiny(*WEIGHTS)
    pool = experiment.pools["pool"]

    def chosen(name: str, index: int = 0) -> torch.Tensor:
        baseline = experiment.baselines("test")[name]
        problem = baseline.source.at(index)
        assert problem.context is not None
        return problem.context(baseline.hparams, problem.outer.batch(index))["chosen"]

    assert chosen("all of the pool").tolist() == list(range(36))
    halves = chosen("random halves"), chosen("random halves", 1)
    assert all(len(set(half.tolist())) == 18 for half in halves) and not torch.equal(*halves)
    low, high = chosen("half with the lowest loss, once trained"), chosen("half with the highest loss, once trained")
    assert sorted([*low.tolist(), *high.tolist()]) == list(range(36))
    assert (pool.kinds[low] == 1).sum() < (pool.kinds[high] == 1).sum()
    assert (pool.kinds[chosen("the half without junk")] == 0).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WEIGHTS, "experiment.selector=nonsense"), "`experiment.selector` is 'nonsense', which selects nothing"),
        ((*WEIGHTS, "experiment.norm=nonsense"), "`experiment.norm` is 'nonsense'"),
        ((*WEIGHTS, "experiment.num_copied=7"), "has copies of 1 to 6 images"),
        ((*WEIGHTS, "+experiment.sizes.new_pool=16"), "Write ~experiment.sizes.new_pool with weights"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ExpectedFailure, match=message):
        tiny(*words)


def test_hidden_units_are_normalised_where_it_is_said() -> None:
    values = torch.linspace(-1.0, 2.0, 8, dtype=torch.float64)[None]
    plain, before, after = (tiny(*WEIGHTS, f"experiment.norm={norm}")._net.activation(values) for norm in
                            ("none", "before", "after"))  # fmt: skip
    torch.testing.assert_close(plain, values.clamp(min=0.0))
    centred = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(before, centred.clamp(min=0.0))
    torch.testing.assert_close(after, (plain - plain.mean()) / (plain.var(correction=0) + 1e-5).sqrt())


def results_of(command: Command, folder: Path, *words: str) -> dict[str, Any]:
    code, error = command(*words, "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("words", "splits"),
    [(WEIGHTS, ["validation", "test"]), (SCORER, ["validation", "new_pool", "test"])],
    ids=["weights", "scorer"],
)
def test_a_run_draws_and_compares(words: tuple[str, ...], splits: list[str], command: Command, tmp_path: Path) -> None:
    results = results_of(command, tmp_path / "run", *words, "debug=default", "evaluation.num_episodes=2")
    assert (tmp_path / "run" / "selection.png").stat().st_size > 5000
    assert list(results["metrics"]) == splits
    assert all(list(own) == splits[1:] for own in results["baselines"].values()) and len(results["baselines"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "split"), [("data_selection", "test"), ("data_selection_scorer", "new_pool")])
def test_learnt_weights_beat_all_examples_and_selection_by_loss(
    name: str, split: str, command: Command, tmp_path: Path
) -> None:
    results = results_of(command, tmp_path / "run", f"experiment={name}")
    learnt = results["metrics"][split]["accuracy"]["mean"]
    for other in ("all of the pool", "random halves", "half with the lowest loss, once trained"):
        assert learnt > results["baselines"][other][split]["accuracy"]["mean"] + 0.01, other
