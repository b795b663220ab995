"""Norms that keep what they have stored: constant maps, in every learner, by every route and backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot import (
    ANIL,
    IMAML,
    MAML,
    R2D2,
    Episode,
    EpisodeSource,
    Examples,
    HyperRepresentation,
    Learner,
    MetaSGD,
    ProtoNet,
    Reptile,
)
from tests.helpers.problems import normal

F64 = torch.float64
WAY, TASKS = 3, 2
SGD = ht.dynamics.SGD
backends = ht.hypergradients


class Episodes(EpisodeSource):
    num_tasks = TASKS

    def at(self, step: int) -> Episode:
        labels = (torch.arange(2 * WAY) % WAY).expand(TASKS, -1)
        support, query = (normal(TASKS, 2 * WAY, 1, 4, 4, seed=seed) for seed in (1, 2))
        return Episode(Examples(support, labels), Examples(query, labels))


class Affine(nn.Module):
    """What a batch norm in evaluation mode is, written out."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self.mean, self.scale = norm.running_mean.clone(), (norm.running_var + norm.eps).rsqrt()
        self.weight, self.bias = nn.Parameter(norm.weight.detach().clone()), nn.Parameter(norm.bias.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        centred = (images - self.mean[:, None, None]) * self.scale[:, None, None]
        return centred * self.weight[:, None, None] + self.bias[:, None, None]


def pretrained() -> nn.Sequential:
    """Returns a network whose batch norm has stored the statistics of other images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 5)).double()
    network.num_features = 5  # type: ignore[assignment]
    for step in range(20):
        network(2.0 * normal(8, 1, 4, 4, seed=step) + 1.0)
    return network.eval()


def written_out() -> nn.Sequential:
    network = pretrained()
    network[1] = Affine(network[1])  # type: ignore[arg-type]
    return network


LEARNERS: dict[str, Callable[[nn.Module], Learner]] = {
    "ProtoNet": lambda network: ProtoNet(network, way=WAY),
    "R2D2": lambda network: R2D2(network, way=WAY),
    "ANIL": lambda network: ANIL(network, way=WAY, dynamics=SGD(lr=0.1), num_steps=2),
    "HyperRepresentation": lambda network: HyperRepresentation(network, way=WAY, dynamics=SGD(lr=0.1), num_steps=2),
    "MAML": lambda network: MAML(network, dynamics=SGD(lr=0.1), num_steps=2),
    "MetaSGD": lambda network: MetaSGD(network, dynamics=SGD(lr=0.1), num_steps=2),
    "IMAML": lambda network: IMAML(network, dynamics=SGD(lr=0.1), num_steps=3),
    "Reptile": lambda network: Reptile(network, dynamics=SGD(lr=0.1), num_steps=2),
}
HEADS = ("ProtoNet", "R2D2", "ANIL", "HyperRepresentation")
BACKENDS: dict[str, ht.Hypergradient] = {
    "whole graph": backends.Reverse(),
    "segments": backends.Reverse(checkpoint_every=1),
    "mixed": backends.Reverse(derivative="mixed"),
    "forward": backends.Forward(),
    "first order": backends.FirstOrder(),
    "implicit": backends.Implicit(stationarity_tolerance=None, residual_tolerance=None),
}
FOLLOWS = {
    **{name: ["whole graph"] for name in LEARNERS},
    "MAML": ["whole graph", "segments", "mixed", "forward", "first order"],
    "HyperRepresentation": ["whole graph", "segments", "mixed"],
    "IMAML": ["whole graph", "implicit"],
    "Reptile": ["whole graph", "first order"],
}


def learner(name: str, network: nn.Module) -> Learner:
    torch.manual_seed(3)
    return LEARNERS[name](network if name in HEADS else nn.Sequential(network, nn.Linear(5, WAY).double()))


def grads(made: Learner, backend: ht.Hypergradient, route: str) -> dict[str, Tensor]:
    problem, execution = made.on(Episodes()).at(0), ht.Execution(tasks=route)  # type: ignore[arg-type]
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend, execution=execution).grads


@pytest.mark.parametrize(("name", "backend"), [(name, backend) for name in LEARNERS for backend in FOLLOWS[name]])
@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_stored_statistics_are_a_constant_affine_map(name: str, backend: str, route: str) -> None:
    found = grads(learner(name, pretrained()), BACKENDS[backend], route)
    expected = grads(learner(name, written_out()), BACKENDS[backend], route)
    assert found.keys() == expected.keys()
    for entry, value in expected.items():
        torch.testing.assert_close(found[entry], value, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_trained_learner_predicts_by_them_too(name: str) -> None:
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in Episodes().at(0))
    outputs = []
    for network in (pretrained(), written_out()):
        made = learner(name, network)
        outputs.append(made.adapt(made.init_hparams(), support)(query.inputs))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_the_network_of_the_user_is_left_alone() -> None:
    network = pretrained()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    made = learner("MAML", network)
    grads(made, BACKENDS["whole graph"], "loop")
    assert not network[1].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [name for name, _ in network.named_buffers()]


def test_a_layer_frozen_by_itself_stays_frozen_in_a_network_that_trains() -> None:
    """Dropout beside it is on while the network fits: only the norm is in evaluation mode."""
    network = nn.Sequential(pretrained(), nn.Dropout(0.5), nn.Linear(5, WAY).double()).train()
    network[0][1].eval()  # type: ignore[index]
    made = MAML(network, dynamics=SGD(lr=0.1), num_steps=1)
    fit = made._fit.module
    assert fit[1].training  # type: ignore[index]
    assert not fit[0][1].training  # type: ignore[index]
    assert not made._fit.buffers


class StaysInEvaluation(nn.BatchNorm2d):
    """A norm that cannot be put into training mode."""

    def train(self, mode: bool = True) -> StaysInEvaluation:
        return super().train(False)


def test_a_norm_that_never_trains_is_taken() -> None:
    network = pretrained()
    norm = StaysInEvaluation(2).double()
    norm.load_state_dict(network[1].state_dict())
    network[1] = norm
    found = grads(learner("ProtoNet", network.train()), BACKENDS["whole graph"], "vmap")
    expected = grads(learner("ProtoNet", written_out()), BACKENDS["whole graph"], "vmap")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def with_spectral_norm(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), wrap(nn.Linear(16, 5)), nn.Tanh()).double()
    network.num_features = 5  # type: ignore[assignment]
    return network


@pytest.mark.parametrize("wrap", [spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("name", ["MAML", "ProtoNet", "HyperRepresentation"])
def test_spectral_norm_is_exact_in_evaluation_mode_and_refused_in_training_mode(
    name: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    with pytest.raises(IncompatibleBackendError, match="in training mode, .*call `.eval"):
        learner(name, with_spectral_norm(wrap))
    made = learner(name, with_spectral_norm(wrap).eval())
    problem = made.on(Episodes()).at(0)
    # The old implementation starts from vectors that fit badly, so that the function is steep.
    verdict = ht.check_hypergradient(
        problem,
        problem.init_hparams(),
        backends.Reverse(),
        num_directions=1,
        step_size=1e-4,
        execution=ht.Execution(tasks="loop"),
    )
    assert verdict.passed, str(verdict)
