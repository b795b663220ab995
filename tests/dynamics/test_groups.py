"""Different rules for parts of the params."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.constraints import Box
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

F64 = torch.float64
Hyper = ht.Hyper
Groups, SGD, Adam, RMSprop = ht.dynamics.Groups, ht.dynamics.SGD, ht.dynamics.Adam, ht.dynamics.RMSprop
Reverse = ht.hypergradients.Reverse
START = {"body.a": normal(4, 5, seed=1), "head.a": normal(5, 2, seed=2), "body.b": normal(5, seed=3)}


class Owner(ht.GradientDynamics):
    """A rule with outer variables of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def init_hparams(self) -> TensorDict:
        return {self.name: torch.tensor(0.1, dtype=F64)}

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        return {name: value - hparams[self.name] * grads[name] for name, value in params.items()}, {}


class WithoutUpdate(ht.Dynamics):
    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def step(self, loss, params, state, hparams, index):
        return params, state


def loss_of(params: TensorDict) -> Tensor:
    hidden = torch.tanh(normal(8, 4, seed=4) @ params["body.a"] + params["body.b"])
    return (hidden @ params["head.a"]).square().mean() + params["head.a"].sum().sin()


def test_values_are_those_of_two_optimisers() -> None:
    params = {name: value.clone().requires_grad_() for name, value in START.items()}
    body = torch.optim.SGD([params["body.a"], params["body.b"]], lr=0.1, momentum=0.9)
    head = torch.optim.Adam([params["head.a"]], lr=0.05)
    for _ in range(10):
        body.zero_grad(), head.zero_grad()
        loss_of(params).backward()
        body.step(), head.step()
    rule = Groups({"head.*": Adam(lr=0.05), "*": SGD(lr=0.1, momentum=0.9)})
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: START, lambda p, h, b: loss_of(p)),
        LambdaOuter({"idle": torch.zeros((), dtype=F64)}, lambda p, h, b: p["body.a"].sum()),
        dynamics=rule,
        num_steps=10,
    )
    ours = ht.unroll(problem, problem.init_hparams()).params
    assert list(ours) == list(START)
    for name in START:
        torch.testing.assert_close(ours[name], params[name].detach(), rtol=1e-12, atol=1e-12)
    assert set(rule.init(START, {})) == {
        "0.exp_avg.head.a", "0.exp_avg_sq.head.a", "1.momentum.body.a", "1.momentum.body.b",
    }  # fmt: skip


def learnt_groups() -> tuple[Groups, TensorDict]:
    """Members that share a variable, have schedules, own variables, and are groups themselves."""
    rule = Groups(
        {
            "second": Groups({"second": Adam(lr=Hyper("lr"), eps=1e-2, beta2=Hyper("beta2"))}),
            "*": SGD(lr=Hyper("lr"), momentum=Hyper("momentum", per="step"), weight_decay={"first": Hyper("decay")}),
        }
    )
    values = {"lr": 0.1, "beta2": 0.9, "decay": 0.05}
    extra = {name: torch.tensor(value, dtype=F64) for name, value in values.items()}
    return rule, {**extra, "momentum": torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=F64)}


@pytest.mark.parametrize("every", [None, 2])
def test_hypergradients_equal_central_differences(every: int | None) -> None:
    problem = net_problem(*learnt_groups(), num_steps=4)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(checkpoint_every=every), step_size=1e-4)
    assert check.passed, str(check)


def test_members_own_outer_variables() -> None:
    problem = net_problem(Groups({"first": Owner("a"), "second": Owner("b")}), {}, num_steps=4)
    hparams = problem.init_hparams()
    assert {"a", "b"} <= set(hparams)
    check = ht.check_hypergradient(problem, hparams, Reverse())
    assert check.passed, str(check)


def test_vectorised_tasks_equal_a_loop_over_tasks() -> None:
    rule = Groups({"bias": SGD(lr=Hyper("b", per="parameter"), momentum=0.5), "*": Adam(lr=Hyper("w"), eps=1e-2)})
    problem = task_problem(nn.Linear(3, 2).double(), item=(3,), num_tasks=2, way=2)
    problem = dataclasses.replace(problem, dynamics=rule)
    hparams = {**problem.init_hparams(), "b.bias": normal(2, seed=1), "w": torch.tensor(0.1, dtype=F64)}
    del hparams["lr"]
    vectorised = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="vmap"))
    looped = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    for name in hparams:
        torch.testing.assert_close(vectorised.grads[name], looped.grads[name], rtol=1e-10, atol=1e-13)


def test_settings_and_constraints_are_those_of_all_members() -> None:
    rule, _ = learnt_groups()
    settings = rule.settings()
    assert settings["[*].momentum"] == Hyper("momentum", per="step")
    assert settings["[second].[second].lr"] == Hyper("lr")
    assert set(rule.constraints()) == {"lr", "beta2", "momentum", "decay"}
    shared = Groups({"a": SGD(lr=Hyper("x")), "*": SGD(lr=0.1, dampening=Hyper("x"), momentum=0.5)})
    assert shared.constraints() == {"x": Box(lower=1e-12, upper=1.0)}


def test_schedules_of_members_are_seen() -> None:
    rule, extra = learnt_groups()
    with pytest.raises(ValueError, match=r"`\[\*\].momentum` of the dynamics is a schedule"):
        dataclasses.replace(net_problem(rule, extra, num_steps=4), warm_start=True)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Groups({"first": SGD(lr=0.1)}), r"`members` of `Groups` has the entries \['first'\], none .*`second`"),
        (
            Groups({"third": SGD(lr=0.1), "*": Adam()}),
            "`members` of `Groups` has the entry 'third', which matches none",
        ),
        (Groups({"*": SGD(lr=0.1), "f*": Adam()}), r"'f\*', but every inner parameter it matches"),
        (Groups({"first": SGD(lr={"second": 0.1}), "*": Adam()}), "`lr` of `SGD` .* none .*inner parameter `first`"),
        (Groups({"first": SGD(lr=Hyper("no")), "*": Adam()}), "`lr` of `SGD` reads the outer variable `no`"),
        (Groups({"first": SGD(lr=[0.1]), "*": Adam()}), "`lr` of `SGD` is a schedule of 1 values"),
    ],
)
def test_members_that_do_not_fit_are_explained(rule: Groups, message: str) -> None:
    problem = net_problem(rule, {}, num_steps=3)
    with pytest.raises(ValueError, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


def test_clashing_variables_are_explained() -> None:
    problem = net_problem(Groups({"first": Owner("a"), "*": Owner("a")}), {}, num_steps=3)
    with pytest.raises(ValueError, match=r"`members\['\*'\]` of `Groups` and a member before .*\['a'\].*another name"):
        problem.init_hparams()


def test_wrong_members_are_explained() -> None:
    with pytest.raises(ValueError, match="`members` of `Groups` is {}: it maps patterns"):
        Groups({})
    with pytest.raises(ValueError, match="`members` of `Groups` is .*SGD"):
        Groups(SGD(lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`members\['\*'\]` of `Groups` is .*WithoutUpdate.*not a `GradientDynamics`"):
        Groups({"*": WithoutUpdate()})  # type: ignore[dict-item]
