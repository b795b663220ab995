"""Task interactions: the matrix and its penalty, folds of their own, and that equal interactions are a larger `rho`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

import experiments.common.runs.resolvers  # noqa: F401
import hypertorch as ht
from experiments import task_interactions
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.results.learning_curve import logged
from experiments.common.runs.experiment import build_experiment
from experiments.task_interactions import TaskInteractions, matrix
from hypertorch.types import TensorDict
from tests.experiments.commands import Command

TINY = (
    "experiment=task_interactions", "experiment.sizes.labelled=40", "experiment.sizes.unlabelled=60",
    "experiment.components=5", "experiment.num_steps=5",
)  # fmt: skip


def tiny(*overrides: str) -> TaskInteractions:
    return built(*TINY, "dtype=float64", *overrides)


def built(*overrides: str) -> TaskInteractions:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", list(overrides))
    experiment = build_experiment(config, parse(TrainSettings, config))
    assert isinstance(experiment, TaskInteractions)
    return experiment


def scattered() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    return {
        "rho": torch.tensor(0.02, dtype=torch.float64),
        "interactions": 0.02 * torch.rand(45, generator=generator, dtype=torch.float64),
    }


def test_the_penalty_is_the_sum_over_the_matrix() -> None:
    problem, hparams = tiny().evaluation("test").at(0), scattered()
    weight = torch.randn(10, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = {"output.weight": weight, "output.bias": weight.new_zeros(10)}
    batch = problem.inner.batch(0)
    assert isinstance(batch, tuple)
    one_task = tuple(part[0] for part in batch)
    found = problem.inner.loss(params, hparams, one_task) - problem.inner.loss(
        params, {name: torch.zeros_like(value) for name, value in hparams.items()}, one_task
    )
    interactions = matrix(hparams["interactions"])
    assert torch.equal(interactions, interactions.T) and not interactions.diagonal().any()
    distances = torch.cdist(weight, weight).square()
    torch.testing.assert_close(found, hparams["rho"] * weight.square().sum() + (interactions * distances).sum())


def test_equal_interactions_are_the_single_task_with_a_larger_rho() -> None:
    """The weights of all classes sum to 0, so that `sum_jk c ||w_j - w_k||^2 = 20 c ||W||^2`."""
    problem, hparams = tiny().training().at(0), scattered()
    alike = ht.unroll(problem, {**hparams, "interactions": torch.full_like(hparams["interactions"], 0.003)})
    alone = {"rho": hparams["rho"] + 20 * 0.003, "interactions": torch.zeros_like(hparams["interactions"])}
    torch.testing.assert_close(alike.params, ht.unroll(problem, alone).params)
    torch.testing.assert_close(alike.outer_loss, ht.unroll(problem, alone).outer_loss)


def test_every_labelled_image_is_judged_once_and_never_trained_on_then() -> None:
    experiment = tiny()
    problem = experiment.training().at(0)
    trained_on, judged_on = problem.inner.batch(0), problem.outer.batch(0)
    assert isinstance(trained_on, tuple) and isinstance(judged_on, tuple)
    for fold in range(4):
        own = [{tuple(row) for row in part[0][fold].tolist()} for part in (trained_on, judged_on)]
        assert [len(rows) for rows in own] == [30, 10] and not own[0] & own[1]
    judged = {tuple(row) for row in judged_on[0].flatten(0, 1).tolist()}
    labelled = {tuple(row) for row in experiment.images["labelled"].inputs.tolist()}
    assert judged == labelled and len(judged) == 40
    tests = experiment.evaluation("test").at(0)
    again, judged_at_last = tests.inner.batch(0), tests.outer.batch(0)
    assert isinstance(again, tuple) and isinstance(judged_at_last, tuple)
    assert {tuple(row) for row in again[0][0].tolist()} == labelled
    assert len(judged_at_last[1][0]) == 1797 - 100
    assert not labelled & {tuple(row) for row in judged_at_last[0][0].tolist()}


def test_components_are_those_of_the_unlabelled_images() -> None:
    few, more = tiny(), tiny("experiment.sizes.unlabelled=61")
    assert not torch.allclose(few.images["labelled"].inputs, more.images["labelled"].inputs)
    whole = tiny("experiment.sizes.unlabelled=1747", "experiment.sizes.test=10")
    variances = torch.cat([images.inputs for images in whole.images.values()]).var(dim=0)
    assert whole.images["test"].inputs.shape == (10, 5) and float(variances.max()) < 3.0 < 9.0 * float(variances.min())


def test_components_that_are_not_whitened_keep_their_ratio() -> None:
    sizes = ("experiment.sizes.unlabelled=1747", "experiment.sizes.test=10")
    plain, whitened = tiny(*sizes, "experiment.whitened=false"), tiny(*sizes)
    ratios = plain.images["labelled"].inputs / whitened.images["labelled"].inputs
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    torch.testing.assert_close(ratios[0, 0], torch.ones_like(ratios[0, 0]))
    assert ratios[0, 1:].max() < 1.0 and (ratios[0].diff() < 0).all()
    with pytest.raises(ExpectedFailure, match="`experiment.whitened` is 3"):
        tiny("experiment.whitened=3")


def test_the_single_task_has_the_rho_with_the_least_cross_validation_loss() -> None:
    experiment = tiny()
    first = experiment.training().init_hparams()
    assert not first["interactions"].any() and float(first["rho"]) == experiment.single_task_rho
    problem = experiment.training().at(0)
    best = float(ht.unroll(problem, first).outer_loss.mean())
    for factor in (0.5, 2.0):
        other = {**first, "rho": factor * first["rho"] + 1e-4}
        assert float(ht.unroll(problem, other).outer_loss.mean()) >= best


def test_the_hypergradient_is_right() -> None:
    assert ht.check_hypergradient(tiny().training().at(0), scattered(), ht.hypergradients.Reverse()).passed


def test_folds_of_different_sizes_are_refused() -> None:
    for folds in (3, 1):
        with pytest.raises(ExpectedFailure, match=f"`experiment.folds` is {folds}, but 40 labelled images"):
            tiny(f"experiment.folds={folds}").training()
    with pytest.raises(ExpectedFailure, match="`seed` is 1"):
        tiny().evaluation("test", seed=1)


def test_the_command_draws_the_matrix(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, error = command(*TINY, "debug=default", "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    assert (folder / "matrix.png").stat().st_size > 5000
    results = json.loads((folder / "results.json").read_text())
    assert set(results["baselines"]) == {"single task", "one constant for all pairs"}
    hparams = ht.load_hparams(folder)
    assert hparams["interactions"].shape == (45,) and float(hparams["interactions"].min()) >= 0.0


def photographs(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Features of 4 classes of 30 images, without a network."""
    found = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(0))
    found += torch.arange(4)[:, None, None]

    def read(root: str, part: str, *, num_epochs: int, folder: str | None) -> tuple[Tensor, tuple[str, ...]]:
        assert (root, part, num_epochs, folder) == ("root", "meta_test", 12, None)
        return found, ("rose", "poppy", "man", "pickup_truck")

    monkeypatch.setattr(task_interactions, "cifar100_features", read)
    return found


PHOTOGRAPHS = (
    "experiment=task_interactions_cifar100", "experiment.root=root", "experiment.sizes.labelled=40",
    "experiment.sizes.unlabelled=30", "experiment.components=5", "experiment.num_steps=5",
)  # fmt: skip


def test_photographs_have_the_labels_and_names_of_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = photographs(monkeypatch)
    experiment = built(*PHOTOGRAPHS, "dtype=float64", "experiment.components=8")
    assert experiment.names == ("rose", "poppy", "man", "pickup_truck")
    drawn = experiment.read_images()
    assert {split: len(images) for split, images in drawn.items()} == {"labelled": 40, "unlabelled": 30, "test": 50}
    for images in drawn.values():
        for image, label in zip(images.inputs, images.labels, strict=True):
            assert (found[label] == image.float()).all(dim=1).any()
    rows = {tuple(row) for images in drawn.values() for row in images.inputs.tolist()}
    assert len(rows) == 120  # no image is in two sets


def test_the_hypergradient_is_right_for_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(monkeypatch)
    problem = built(*PHOTOGRAPHS, "dtype=float64").training().at(0)
    hparams = {"rho": scattered()["rho"], "interactions": scattered()["interactions"][:6]}
    assert problem.outer.init_hparams()["interactions"].shape == (6,)
    assert ht.check_hypergradient(problem, hparams, ht.hypergradients.Reverse()).passed


def test_the_command_draws_the_matrix_of_photographs(
    monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path
) -> None:
    photographs(monkeypatch)
    folder = tmp_path / "run"
    code, error = command(*PHOTOGRAPHS, "debug=default", "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    assert (folder / "matrix.png").stat().st_size > 5000
    assert matrix(ht.load_hparams(folder)["interactions"]).shape == (4, 4)


def test_settings_that_photographs_cannot_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExpectedFailure, match="`experiment.num_epochs` is 0, but the network of the features"):
        built(*PHOTOGRAPHS, "experiment.num_epochs=0")
    photographs(monkeypatch)
    with pytest.raises(ExpectedFailure, match="asks for 121 images .*`experiment.classes=meta_test` has 120"):
        built(*PHOTOGRAPHS, "experiment.sizes.test=51").training()


@pytest.mark.slow
def test_learnt_interactions_lower_the_cross_validation_loss(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, error = command("experiment=task_interactions", "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    single = logged(folder / "metrics.jsonl", "outer_loss")[1][0]
    assert logged(folder / "metrics.jsonl", "validation/outer_loss")[1][-1] < 0.9 * single
