"""What is looked at once for each kind of problem hides no mistake in a later problem of the same kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.hypergradients import Reverse
from hypertorch.inner import memo
from hypertorch.inner.kinds import kind_of
from hypertorch.types import TensorDict

TASKS = 3
ONE = torch.ones(())
HPARAMS = {"c": torch.tensor(0.5), "eta": torch.tensor(0.1)}
RATE = ht.Hyper("eta")


class Inner(ht.InnerProblem):
    def __init__(self, weights: Tensor, first: TensorDict, data: Tensor) -> None:
        self.weights, self.first, self.data = weights, first, data

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {name: value.clone() for name, value in self.first.items()}

    def batch(self, step: int) -> Tensor:
        return self.data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        return self.weights * (params["w"] - hparams["c"] * batch.sum()).square().sum()


class Outer(ht.OuterProblem):
    def __init__(self, weights: Tensor, data: Tensor) -> None:
        self.weights, self.data = weights, data

    def init_hparams(self) -> TensorDict:
        return HPARAMS

    def batch(self, outer_step: int) -> Tensor:
        return self.data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        return self.weights * (params["w"] - batch.sum()).square().sum()


def problem(
    *,
    weights: Tensor = ONE,
    first: Tensor | None = None,
    data: Tensor | None = None,
    outer_weights: Tensor = ONE,
    outer_data: Tensor | None = None,
    lr: Any = RATE,
    **options: Any,
) -> ht.BilevelProblem:
    """Returns a problem of one kind, whatever the tensors are."""
    data = torch.ones(TASKS, 2) if data is None else data
    outer_data = torch.ones(TASKS, 2) if outer_data is None else outer_data
    inner = Inner(weights, {"w": torch.zeros(2) if first is None else first}, data)
    outer = Outer(outer_weights, outer_data)
    if lr is not RATE:
        options = {"allow_unused": ("eta",), **options}
    return ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=lr), num_steps=3, **options)


TENSOR_RATE, SCHEDULE = torch.tensor(0.1), [0.1, 0.2, 0.3]
TOGETHER = {"execution": ht.Execution(tasks="vmap")}
# What makes the first problem, what is changed in the second, what the second is called with, and the words.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "loss of two numbers": ({}, {"weights": torch.ones(2)}, {}, "`InnerProblem.loss` returned a tensor of shape"),
    "loss without a derivative": ({}, {"weights": torch.ones((), dtype=torch.complex64)}, {}, "a real number"),
    "outer loss of two numbers": ({}, {"outer_weights": torch.ones(2)}, {}, "`OuterProblem.loss` returned a tensor"),
    "params without a derivative": ({}, {"first": torch.zeros(2, dtype=torch.int64)}, {}, "cannot be trained"),
    "params without values": ({}, {"first": torch.zeros(2, device="meta")}, {}, "on the meta device"),
    "outer variable without a derivative": (
        {},
        {},
        {"hparams": {**HPARAMS, "c": torch.tensor(1)}},
        r"`hparams\['c'\]` has dtype torch.int64",
    ),
    "outer variable that is no tensor": ({}, {}, {"hparams": {**HPARAMS, "c": 0.5}}, "from names to tensors"),
    "outer variable that a setting lacks": ({}, {}, {"hparams": {"c": ONE, "other": ONE}}, "`eta`, which is not among"),
    "outer variable of two rates": ({}, {}, {"hparams": {**HPARAMS, "eta": torch.ones(2)}}, "reads it as one value"),
    "rate that fits no param": ({"lr": TENSOR_RATE}, {"lr": torch.full((3,), 0.1)}, {}, "does not broadcast"),
    "rate of another dtype": (
        {"lr": torch.tensor([0.1, 0.1])},
        {"lr": torch.full((2,), 0.1, dtype=torch.float64)},
        {},
        "torch.float64",
    ),
    "schedule of another length": ({"lr": SCHEDULE}, {"lr": [*SCHEDULE, 0.4]}, {}, "a schedule of 4 values"),
    "schedule of another horizon": ({"lr": SCHEDULE}, {"lr": SCHEDULE[:2]}, {}, "a schedule of 2 values"),
    "unknown name that may be unused": ({}, {"allow_unused": ("etta",)}, {}, "`allow_unused` names"),
    "outer step below 0": ({}, {}, {"outer_step": -1}, "it counts outer steps"),
    "carry of a problem that starts afresh": ({}, {}, {"carry": {"index": torch.tensor(3)}}, "`warm_start=False`"),
    "execution that is none": ({}, {}, {"execution": "loop"}, "not an `Execution`"),
    "backend that is none": ({}, {}, {"backend": "reverse"}, "not a `Hypergradient`"),
    "bits of params that are not cast": (
        {"first": torch.zeros(2)},
        {"first": torch.zeros(2, dtype=torch.float64)},
        {"execution": ht.Execution(inner_dtype=torch.bfloat16)},
        "only float32 is cast",
    ),
    "data without an axis of tasks": (
        {"num_tasks": TASKS},
        {"data": torch.ones(TASKS + 1, 2)},
        TOGETHER,
        "`InnerProblem.batch` has a tensor of shape",
    ),
    "outer data without an axis of tasks": (
        {"num_tasks": TASKS},
        {"outer_data": torch.ones(())},
        TOGETHER,
        "`OuterProblem.batch` has a tensor of shape",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_in_the_second_problem_of_a_kind_is_refused_as_in_the_first(case: str) -> None:
    first, changes, call, words = CASES[case]
    sound, faulty = problem(**first), problem(**{**first, **changes})
    assert kind_of(sound) == kind_of(faulty)
    memo.clear()
    execution = call.get("execution")
    known = {"execution": execution} if isinstance(execution, ht.Execution) else {}
    for _ in range(2):
        ht.hypergradient(sound, HPARAMS, backend=Reverse(), **known)
    with pytest.raises((TypeError, ValueError), match=words):
        ht.hypergradient(faulty, **{"hparams": HPARAMS, "backend": Reverse(), **call})
    # A mistake is not remembered: the sound one is served again.
    ht.hypergradient(sound, HPARAMS, backend=Reverse(), **known)
