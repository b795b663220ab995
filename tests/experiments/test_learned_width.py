"""Learnt width: gates of units, blocks and a first layer between dense and convolutional, each at a price."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.learned_width import ElasticNets, NetTraining, PricedNets, pooled
from tests.experiments.commands import Command, results_of

LIKE = torch.zeros((), dtype=torch.float64)
SURE = 50.0


def elastic_nets(num_nets: int = 2) -> ElasticNets:
    return ElasticNets(num_nets=num_nets, side=5, channels=3, width=4, num_blocks=2)


def random_params(nets: ElasticNets) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: value + torch.randn_like(value) for name, value in nets.init_params(LIKE).items()}


def some_images() -> torch.Tensor:
    return torch.rand(6, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_cut_net_is_the_smaller_net_alone() -> None:
    nets, params, images = elastic_nets(), random_params(elastic_nets()), some_images()
    hparams = {
        # 16 units of the cut-off are a whole layer.
        "channels.cutoff": torch.tensor([16.0, 2 / 3 * 16.0]), "stream.cutoff": torch.tensor([16.0, 0.75 * 16.0]),
        "block1.cutoff": torch.tensor([16.0, 0.5 * 16.0]), "block2.cutoff": torch.tensor([16.0, 16.0]),
        "blocks": torch.tensor([[1.0, 1.0], [0.1, -0.1]]), "convolution": torch.tensor([-0.1, 0.1]),
    }  # fmt: skip
    hparams = {name: value.double() for name, value in hparams.items()}
    cut = nets.cut(1)
    own = {name: value[1:] for name, value in params.items()}
    gates = cut.gates(hparams)
    outputs = cut(own, gates, images)[0]

    weights = {name: value[0] for name, value in own.items()}
    kernels = weights["convolution"].T.reshape(3, 1, 3, 3)[:2]
    first = F.conv2d(images.reshape(-1, 1, 5, 5), kernels, stride=2, padding=1)
    # Positions come before channels.
    first = (first.permute(0, 2, 3, 1) + weights["channels.bias"][0, :2]).relu().reshape(6, 9 * 2)
    stream_weights = weights["stream"].reshape(9, 3, 4)[:, :2, :3].reshape(18, 3)
    stream = (first @ stream_weights + weights["stream.bias"][0, :3]).relu()
    inner = (stream @ weights["block1.in"][:3, :2] + weights["block1.bias"][0, :2]).relu()
    assert (inner > 0).any(dim=0).all() and (stream > 0).any(dim=0).all()  # all units take part in the comparison
    stream = stream + inner @ weights["block1.out"][:2, :3]
    torch.testing.assert_close(outputs, stream @ weights["output"][:3] + weights["output.bias"][0])
    # The second block is the identity, so that none of its units is in use.
    assert {layer: units.tolist() for layer, units in gates.layer_units().items()} == {
        "channels": [2.0], "stream": [3.0], "block1": [2.0], "block2": [0.0],
    }  # fmt: skip
    assert gates.total().tolist() == [7.0]


def test_nets_side_by_side_are_those_alone() -> None:
    nets, params, images = elastic_nets(), random_params(elastic_nets()), some_images()
    hparams = nets.given(torch.tensor([1.0, 0.5]).double(), convolution=0.3, blocks=-0.4)
    together = nets(params, nets.gates(hparams), images)
    alone = elastic_nets(num_nets=1)
    for net in range(2):
        own = alone.gates({name: value[net : net + 1] for name, value in hparams.items()})
        torch.testing.assert_close(alone({name: value[net : net + 1] for name, value in params.items()}, own, images),
                                   together[net : net + 1])  # fmt: skip
    # They start alike.
    assert all(torch.equal(value[0], value[1]) for value in nets.init_params(LIKE).values())


def test_gates_fall_around_the_cutoff() -> None:
    nets = ElasticNets(num_nets=1, side=5, channels=3, width=32, num_blocks=1)
    soft = nets.gates(nets.given(torch.tensor([0.5]).double(), convolution=0.0)).units["stream"][0]
    assert soft[:16].min() > 0.5 > soft[16:].max()
    torch.testing.assert_close(soft + soft.flip(0), torch.ones_like(soft))
    assert float(soft[15]) == pytest.approx(1 / (1 + math.exp(-0.25)))
    cut = nets.cut(0).gates(nets.given(torch.tensor([0.5]).double(), convolution=0.0, blocks=-SURE))
    assert cut.units["stream"].sum() == 16.0 and cut.layer_units()["block1"] == 0.0


def tiny_problem(prices: torch.Tensor) -> ht.BilevelProblem:
    images, labels = some_images(), torch.arange(6) % 3
    nets = elastic_nets()
    train = torch.utils.data.TensorDataset(images[:4], labels[:4])
    return ht.BilevelProblem(
        NetTraining(nets=nets, batches=ht.Minibatches(train, 3)),
        PricedNets(nets=nets, data=(images[4:], labels[4:]), prices=prices, shows_layers=True),
        dynamics=ht.dynamics.SGD(lr=0.1, momentum=0.9),
        num_steps=3,
    )


@pytest.mark.parametrize("backend", [ht.hypergradients.Reverse(), ht.hypergradients.Forward()])
def test_the_hypergradient_is_right(backend: ht.Hypergradient) -> None:
    problem = tiny_problem(torch.tensor([0.01, 0.1]).double())
    # Within the layers: a gate at the edge of its box would be pushed out of it.
    hparams = {name: 0.8 * value if "cutoff" in name else value + 0.1 for name, value in problem.init_hparams().items()}
    assert ht.check_hypergradient(problem, hparams, backend).passed


def test_each_net_pays_its_own_price() -> None:
    def grads(*prices: float) -> dict[str, torch.Tensor]:
        problem = tiny_problem(torch.tensor(prices).double())
        return ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse()).grads

    free, priced = grads(0.0, 0.0), grads(0.0, 1.0)
    for name, value in free.items():
        torch.testing.assert_close(value[0], priced[name][0])
    # A price is the same at every step of training: the difference is that of the units themselves, by autograd.
    nets = elastic_nets()
    hparams = {name: value.requires_grad_() for name, value in tiny_problem(LIKE.expand(2)).init_hparams().items()}
    units = nets.gates(hparams).total()[1] / 2
    for name, value in zip(hparams, torch.autograd.grad(units, list(hparams.values()), allow_unused=True), strict=True):
        expected = 0.0 if value is None else value[1]
        torch.testing.assert_close(priced[name][1] - free[name][1], torch.zeros_like(free[name][1]) + expected)


def test_what_does_not_fit_is_refused() -> None:
    images = torch.arange(16.0).reshape(1, 16)
    torch.testing.assert_close(pooled(images, 2), torch.tensor([[2.5, 4.5, 10.5, 12.5]]))
    with pytest.raises(ExpectedFailure, match="`experiment.pool` is 3, but the images have 4 pixels a side"):
        pooled(images, 3)


def test_a_small_run_leaves_figures_and_a_picture(command: Command, tmp_path: Path) -> None:
    small = (
        "experiment=learned_width", "outer_loop.progress=false", "experiment.num_steps=4", "experiment.final_steps=10",
        "evaluation.num_episodes=1",
    )  # fmt: skip
    folder = tmp_path / "run"
    results = results_of(command, folder, *small, "outer_loop.num_outer_steps=3")
    assert results["baselines"]["0.25 of the units, dense"]["test at price 0.01"]["units"]["mean"] == 26.0
    assert (
        results["baselines"]["0.25 of the units, dense without blocks"]["test at price 0.01"]["units"]["mean"] == 10.0
    )
    assert (folder / "sizes.png").stat().st_size > 0
    code, error = command(*small, "experiment.prices=[0.1]", f"paths.run_dir={tmp_path / 'none'}")
    assert code == 1 and "for 1 prices: the baselines train as many nets as are learnt" in error


@pytest.mark.slow
def test_units_fall_with_their_price(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(command, folder, "experiment=learned_width")
    judged = [figures for split, figures in results["metrics"].items() if split.startswith("test at price")]
    units = [figures["units"]["mean"] for figures in judged]
    # The net without a price is only moved by its loss, which hardly tells sizes apart.
    assert units[1:] == sorted(units[1:], reverse=True) and units[-1] < 0.5 * min(units[0], 104.0)
    # Smaller than half of the full size, and better than half of every layer.
    halved = results["baselines"]["0.5 of the units, dense"]["test at price 0.003"]
    assert judged[2]["units"]["mean"] < halved["units"]["mean"] and judged[2]["loss"]["mean"] < halved["loss"]["mean"]
