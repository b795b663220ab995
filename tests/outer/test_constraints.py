"""What an outer loop keeps the outer variables in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import outer
from hypertorch.types import Batch, TensorDict
from tests.outer.problems import Quadratics
from tests.outer.runs import make_loop


def test_constraints_hold_after_every_step() -> None:
    memory = outer.MemoryLogger()
    constraints = {"st*": ht.constraints.Simplex(), "curvature": ht.constraints.Box(lower=1.999, upper=2.001)}
    trained = make_loop(constraints=constraints, loggers=[memory]).run(5)
    assert ht.constraints.Simplex().feasible(trained.hparams["start"])
    assert all(1.999 <= value <= 2.001 for value in memory.series("hparams/curvature")[1])
    assert float(trained.hparams["curvature"]) in (1.999, 2.001)


def test_the_first_step_starts_from_inside() -> None:
    memory = outer.MemoryLogger()
    make_loop(constraints={"curvature": ht.constraints.Box(upper=1.5)}, loggers=[memory]).run(1)
    assert memory.records[0]["hparams/curvature"] == 1.5


@dataclass(frozen=True, kw_only=True)
class LearntRate(Quadratics):
    """Quadratics whose inner step size is learnt directly, so that it has a natural constraint."""

    def init_hparams(self) -> TensorDict:
        return {**super().init_hparams(), "lr": torch.tensor(0.01, dtype=torch.float64)}

    def at(self, outer_step: int) -> ht.BilevelProblem:
        return replace(super().at(outer_step), dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr")))


def test_natural_constraints_apply_unless_replaced() -> None:
    optimizer = partial(torch.optim.SGD, lr=10.0, maximize=True)
    natural = make_loop(LearntRate(), optimizer=optimizer).run(1)
    assert float(natural.hparams["lr"]) == 1e-12
    chosen = make_loop(LearntRate(), optimizer=optimizer, constraints={"l?": ht.constraints.Box(lower=0.25)}).run(1)
    assert float(chosen.hparams["lr"]) == 0.25
    free = make_loop(LearntRate(), optimizer=optimizer, constraints={"lr": ht.constraints.Box()}).run(1)
    assert float(free.hparams["lr"]) < 0


class KeptInside(ht.OuterProblem):
    """The outer problem of `Quadratics` with constraints of its own.

    Args:
        problem: the outer problem.
        own: the constraints.
    """

    def __init__(self, problem: ht.OuterProblem, own: dict[str, ht.Constraint]) -> None:
        self.problem, self.own = problem, own

    def init_hparams(self) -> TensorDict:
        return self.problem.init_hparams()

    def constraints(self) -> dict[str, ht.Constraint]:
        return self.own

    def batch(self, outer_step: int) -> Batch:
        return self.problem.batch(outer_step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self.problem.loss(params, hparams, batch)


@dataclass(frozen=True, kw_only=True)
class KeptRate(LearntRate):
    """Quadratics whose outer problem keeps the learnt step size in a set."""

    own: dict[str, ht.Constraint]

    def at(self, outer_step: int) -> ht.BilevelProblem:
        problem = super().at(outer_step)
        return replace(problem, outer=KeptInside(problem.outer, self.own))


def test_constraints_of_the_outer_problem_win_over_natural_ones_and_lose_to_chosen_ones() -> None:
    optimizer = partial(torch.optim.SGD, lr=10.0, maximize=True)
    source = KeptRate(own={"l*": ht.Box(lower=0.5), "curvature": ht.Box(lower=1.0, upper=1.25)})
    trained = make_loop(source, optimizer=optimizer).run(1)
    assert float(trained.hparams["lr"]) == 0.5
    assert float(trained.hparams["curvature"]) in (1.0, 1.25)
    chosen = make_loop(source, optimizer=optimizer, constraints={"l?": ht.Box(lower=0.25)}).run(1)
    assert float(chosen.hparams["lr"]) == 0.25
    with pytest.raises(ValueError, match="`OuterProblem.constraints` has the entry 'rate', which matches none"):
        make_loop(KeptRate(own={"rate": ht.Box()})).run(1)


def test_a_name_wins_over_a_pattern_and_the_first_pattern_over_the_second() -> None:
    nine, eight, seven = (ht.constraints.Box(lower=value, upper=value) for value in (9.0, 8.0, 7.0))
    trained = make_loop(constraints={"*": nine, "c*": eight, "start": seven}).run(1)
    assert trained.hparams["start"].tolist() == [7.0, 7.0, 7.0]
    assert float(trained.hparams["curvature"]) == 9.0


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    message = r"`constraints` has the entry 'lr\*', which matches none of .*'start', 'curvature'"
    with pytest.raises(ValueError, match=message):
        make_loop(constraints={"lr*": ht.constraints.Positive()}).run(1)
