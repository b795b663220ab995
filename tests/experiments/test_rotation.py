"""Rotation: images turn the right way, and the angle is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy.ndimage import affine_transform

import hypertorch as ht
from experiments.common.models.labelled_images import CleanImages
from experiments.common.models.mlp import MLP
from experiments.rotation import RotatedTraining, angle, rotate
from tests.experiments.commands import Command, results_of

SGD = ht.dynamics.SGD


def degrees(angle: float) -> torch.Tensor:
    return torch.tensor(angle, dtype=torch.float64)


def tiny_problem() -> ht.BilevelProblem:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 16, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 3
    net = MLP((16, 5, 3))
    data = torch.utils.data.TensorDataset(images, labels)
    return ht.BilevelProblem(
        RotatedTraining(net=net, batches=ht.Minibatches(data, 6)),
        CleanImages(
            data=lambda _: (rotate(images, degrees(30.0)), labels),
            first={"angle": degrees(7.0)},
            figures=angle,
            net=net,
        ),
        dynamics=SGD(lr=0.5),
        num_steps=4,
    )


def test_a_quarter_turn_is_counterclockwise() -> None:
    image = torch.arange(9, dtype=torch.float64).reshape(3, 3)
    turned = rotate(image.reshape(1, 9), degrees(90.0)).reshape(3, 3)
    torch.testing.assert_close(turned, torch.rot90(image, 1))
    torch.testing.assert_close(rotate(image.reshape(1, 9), degrees(0.0)).reshape(3, 3), image)


def test_a_rotation_is_that_of_scipy() -> None:
    image = torch.rand(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angle = degrees(23.0)
    cos, sin = float(angle.deg2rad().cos()), float(angle.deg2rad().sin())
    matrix = torch.tensor([[cos, sin], [-sin, cos]]).double()
    offset = 3.0 - matrix @ torch.full((2,), 3.0, dtype=torch.float64)
    padded = affine_transform(image.numpy(), matrix.numpy(), offset.numpy(), order=1, mode="grid-constant")
    torch.testing.assert_close(rotate(image.reshape(1, 49), angle).reshape(7, 7), torch.from_numpy(padded))


@pytest.mark.parametrize("backend", [ht.hypergradients.Reverse(), ht.hypergradients.Forward()])
def test_the_hypergradient_is_right(backend: ht.Hypergradient) -> None:
    problem = tiny_problem()
    assert ht.check_hypergradient(problem, problem.init_hparams(), backend).passed


def test_a_small_run_turns_the_angle_the_right_way(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(
        command, folder,
        "experiment=rotation", "experiment.sizes.train=300", "experiment.final_steps=30",
        "outer_loop.num_outer_steps=5",
    )  # fmt: skip
    assert results["metrics"]["test"]["angle"]["mean"] > 2.0
    assert results["baselines"]["no rotation"]["test"]["angle"]["mean"] == 0.0
    assert results["baselines"]["true angle"]["test"]["angle"]["mean"] == 30.0
    assert (folder / "rotation.png").stat().st_size > 0


@pytest.mark.slow
def test_the_angle_is_found(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, error = command("experiment=rotation", "outer_loop.progress=false", f"paths.run_dir={folder}")
    assert code == 0, error
    test = json.loads((folder / "results.json").read_text())["metrics"]["test"]
    assert abs(test["angle"]["mean"] - 30.0) < 5.0
    assert test["accuracy"]["mean"] > 0.93
