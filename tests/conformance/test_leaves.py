"""Every leaf that is exported, found by looking: a new one is tested here without being listed anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch import fewshot
from hypertorch.types import TensorDict
from tests.conformance.checks import (
    NUM_STEPS,
    check_backend,
    check_dynamics,
    check_episodes,
    check_learner,
    check_setting_ranges,
    check_solver,
)
from tests.conformance.test_matrix import ESTIMATES
from tests.fewshot.learners.test_learners import Blobs
from tests.helpers.leaves import first_values, learner_of, leaves, required, rules

F64 = torch.float64


# Those that hold other dynamics, modules or options are made in the matrix of every backend and dynamics.
RULES = rules()
BACKENDS = {name: leaf for name, leaf in leaves(ht.hypergradients, ht.Hypergradient).items() if leaf not in ESTIMATES}
SOLVERS = leaves(ht.linear_solvers, ht.LinearSolver)
LEARNERS = leaves(fewshot, fewshot.Learner)
SOURCES = {name: leaf for name, leaf in leaves(fewshot, fewshot.EpisodeSource).items() if not required(leaf)}

# What the defaults of a leaf are not made for, by the name of the leaf.
BACKEND_SETTINGS: dict[str, dict[str, Any]] = {"Truncated": {"window": NUM_STEPS}}
SOLVER_SETTINGS: dict[str, dict[str, Any]] = {
    "ConjugateGradient": {"max_iterations": 60, "tolerance": 1e-13},
    "Neumann": {"num_terms": 150, "step_size": 0.9},
    "FixedPoint": {"max_iterations": 400, "tolerance": 1e-14, "step_size": 0.8},
    "Nystrom": {"rank": 50, "damping": 1e-13},
}
# Lion moves by signs and Muon takes matrices of one scale: not every outer variable of the problem has a path there.
# The matrix of every backend and dynamics says which have.
OWN_RULES = {"Lion", "Muon"}


@pytest.mark.parametrize("name", sorted(set(RULES) - OWN_RULES))
def test_dynamics(name: str) -> None:
    values = first_values(RULES[name])
    rule = RULES[name](**{setting: ht.Hyper(setting) for setting in values})
    check_dynamics(rule, {setting: torch.tensor(value, dtype=F64) for setting, value in values.items()})


@pytest.mark.parametrize("name", RULES)
def test_ranges_of_settings(name: str) -> None:
    check_setting_ranges(RULES[name], dict.fromkeys(required(RULES[name]), 0.1))


# `Reversible` serves one dynamics alone, which the matrix holds.
@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"Reversible"}))
def test_an_exact_backend(name: str) -> None:
    check_backend(BACKENDS[name](**BACKEND_SETTINGS.get(name, {})))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_linear_solver(name: str) -> None:
    check_solver(SOLVERS[name](**SOLVER_SETTINGS.get(name, {})))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner(name: str) -> None:
    made = learner_of(LEARNERS[name], 16, 3, ht.dynamics.SGD(lr=0.2), F64)
    check_learner(made, Blobs(), differentiable=name != "Reptile")


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_of_episodes(name: str) -> None:
    check_episodes(SOURCES[name]())


@pytest.mark.parametrize(
    "make",
    [
        lambda: fewshot.StrokeCharacters(split="meta_val", num_classes=6, drawings=6, image_size=8),
        lambda: fewshot.TensorClasses.of({name: torch.rand(6, 3) for name in "abcd"}),
    ],
    ids=["images", "tensors"],
)
def test_a_set_of_classes(make: Callable[[], Any]) -> None:
    check_episodes(fewshot.EpisodeSampler(make(), way=3, shot=2, num_queries=3, num_tasks=2))


def test_the_checks_notice_what_is_wrong() -> None:
    """Each check fails for a leaf that is wrong on purpose."""

    @dataclasses.dataclass(frozen=True)
    class Halved(ht.Hypergradient):
        def compute(self, loop: Any, variables: TensorDict) -> Any:
            result = ht.hypergradients.Reverse().compute(loop, variables)
            halved = {name: None if value is None else 0.5 * value for name, value in result.grads.items()}
            return dataclasses.replace(result, grads=halved)

    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
    class Cut(ht.GradientDynamics):
        lr: ht.dynamics.Setting = ht.dynamics.setting(ht.dynamics.Range(0.0, 1.0, ht.Positive(), "It is a step size."))

        def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
            return {}

        def update(
            self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
        ) -> tuple[TensorDict, TensorDict]:
            (lr,) = self.values(params, hparams, index)
            return {
                name: value - lr[name] * (grads[name] + grads[name].detach()) / 2 for name, value in params.items()
            }, {}

    class Mixing(ht.LinearSolver):
        def solve(self, matvec: Any, rhs: TensorDict, *, tasks_axis: bool = False) -> Any:
            found = ht.linear_solvers.Dense().solve(matvec, rhs, tasks_axis=tasks_axis)
            mixed = {name: value.mean(0, keepdim=True).expand_as(value) for name, value in found.solution.items()}
            return dataclasses.replace(found, solution=mixed) if tasks_axis else found

    class Impure(Blobs):
        drawn: list[int] = []  # noqa: RUF012

        def at(self, step: int) -> fewshot.Episode:
            self.drawn.append(step)
            return super().at(len(self.drawn))

    class OtherAnswers(fewshot.ProtoNet):
        def outputs(self, head: TensorDict, features: Tensor, hparams: TensorDict) -> Tensor:
            return super().outputs(head, features, hparams).detach() * features.sum() ** 2

    with pytest.raises(AssertionError, match="relative error 0.5"):
        check_backend(Halved())
    with pytest.raises(AssertionError):
        check_dynamics(Cut(lr=ht.Hyper("lr")), {"lr": torch.tensor(0.3, dtype=F64)})
    with pytest.raises(AssertionError):
        check_solver(Mixing())
    with pytest.raises(AssertionError):
        check_episodes(Impure())
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh()).double()
    with pytest.raises(AssertionError):
        check_learner(OtherAnswers(backbone, way=3), Blobs())
