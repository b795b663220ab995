"""What a bilevel problem refuses, and the names it merges."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import hypertorch as ht
from hypertorch.checks.values import check_hparams
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter

INNER = LambdaInner(lambda h: {"w": h["c"]}, lambda p, h, b: p["w"].square())
OUTER = LambdaOuter({"c": torch.ones(())}, lambda p, h, b: p["w"])
SGD = ht.dynamics.SGD


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "`num_steps` is -1.*at least 0"),
        ({"num_steps": 1.5}, "`num_steps` is 1.5"),
        ({"num_tasks": 0}, "`num_tasks` is 0.*Pass None"),
        ({"warm_start": True, "dynamics": SGD(lr=[0.1, 0.1])}, "`lr` of the dynamics is a schedule.*`warm_start`"),
        ({"warm_start": True, "dynamics": SGD(lr=ht.Hyper("lr", per="step"))}, "has no horizon"),
    ],
)
def test_wrong_options_are_explained(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ht.BilevelProblem(INNER, OUTER, **{"dynamics": SGD(lr=0.1), "num_steps": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warm_start": 3}, "`warm_start` is 3, which is neither True nor False"),
        ({"allow_unused": "c"}, "`allow_unused` is 'c', but it lists names"),
        ({"allow_unused": (3,)}, r"`allow_unused` is \(3,\), but it lists names"),
        ({"shared_context": "c"}, "`shared_context` is 'c', but it lists names"),
        ({"seed": True}, "`seed` is True, a bool: it chooses the random"),
        ({"seed": 1.5}, "`seed` is 1.5, a float: it chooses the random"),
    ],
)
def test_options_of_another_kind_are_explained(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ht.BilevelProblem(INNER, OUTER, **{"dynamics": SGD(lr=0.1), "num_steps": 2, **options})


@pytest.mark.parametrize("outer_step", [-1, True, 1.5, float("nan"), None])
def test_an_outer_step_is_a_count(outer_step: object) -> None:
    problem = ht.BilevelProblem(INNER, OUTER, dynamics=SGD(lr=0.1), num_steps=1)
    backend = ht.hypergradients.Reverse()
    with pytest.raises(ValueError, match="`outer_step` is .*: it counts outer steps"):
        ht.hypergradient(problem, problem.init_hparams(), backend=backend, outer_step=outer_step)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`outer_step` is .*: it counts outer steps"):
        ht.unroll(problem, problem.init_hparams(), outer_step=outer_step)  # type: ignore[arg-type]


def test_wrong_parts_are_explained() -> None:
    with pytest.raises(TypeError, match="`inner` is a LambdaOuter, not a `InnerProblem`"):
        ht.BilevelProblem(OUTER, OUTER, dynamics=SGD(lr=0.1), num_steps=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`dynamics` is a float"):
        ht.BilevelProblem(INNER, OUTER, dynamics=0.1, num_steps=1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Owning(ht.GradientDynamics):
    """Dynamics with an outer variable of its own."""

    name: str

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def init_hparams(self) -> TensorDict:
        return {self.name: torch.tensor(0.5)}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        return {name: value - hparams[self.name] * grads[name] for name, value in params.items()}, state


def test_outer_variables_of_problem_and_dynamics_are_merged() -> None:
    problem = ht.BilevelProblem(INNER, OUTER, dynamics=Owning("rate"), num_steps=1)
    assert set(problem.init_hparams()) == {"c", "rate"}
    grads = ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse()).grads
    assert float(grads["rate"]) == pytest.approx(-2.0)  # w = c - rate 2c


def test_a_clash_of_names_is_refused() -> None:
    problem = ht.BilevelProblem(INNER, OUTER, dynamics=Owning("c"), num_steps=1)
    with pytest.raises(ValueError, match=r"both return \['c'\].*Rename one"):
        problem.init_hparams()


def test_a_problem_is_its_own_source() -> None:
    problem = ht.BilevelProblem(INNER, OUTER, dynamics=SGD(lr=0.1), num_steps=1)
    assert problem.at(7) is problem


def test_calling_step_loss_of_a_problem_without_one_is_an_error() -> None:
    assert not OUTER.has_step_loss
    with pytest.raises(TypeError, match="no terms at inner steps"):
        OUTER.step_loss({}, {}, None, 0)


def test_problems_come_from_a_function_of_the_outer_step() -> None:
    source = ht.Problems(lambda outer_step: ht.BilevelProblem(INNER, OUTER, dynamics=SGD(lr=0.1), num_steps=outer_step))
    assert [source.at(outer_step).num_steps for outer_step in (0, 3)] == [0, 3]
    assert source.init_hparams().keys() == {"c"}


def test_problems_need_a_function_that_returns_one() -> None:
    with pytest.raises(TypeError, match="`make` is a BilevelProblem, not a function of the outer step"):
        ht.Problems(ht.BilevelProblem(INNER, OUTER, dynamics=SGD(lr=0.1), num_steps=1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`make\(2\)` returned a NoneType, not a `BilevelProblem`"):
        ht.Problems(lambda outer_step: None).at(2)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3, device="meta"), "is a tensor on the meta device"),
        (torch.ones(3).to_sparse(), "is a tensor of torch.sparse_coo layout"),
        (torch.ones(3).to(torch.float8_e4m3fn), "has dtype torch.float8_e4m3fn, in which nothing is computed"),
        (torch.ones(3, dtype=torch.int64), "has dtype torch.int64, which has no derivative"),
        (torch.ones(3, dtype=torch.complex64), "has dtype torch.complex64, which has no derivative"),
    ],
    ids=["meta", "sparse", "float8", "int64", "complex64"],
)
def test_outer_variables_are_dense_tensors_that_can_be_computed_with(value: torch.Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=rf"`hparams\['x'\]` {message}"):
        check_hparams({"x": value})


def test_outer_variables_are_called_by_text() -> None:
    with pytest.raises(TypeError, match="`hparams` has the name 3, a int"):
        check_hparams({3: torch.ones(3)})  # type: ignore[dict-item]
