"""Learnt first values of an optimiser's buffers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.helpers.problems import net_problem, normal, task_problem

F64 = torch.float64
Hyper = ht.Hyper
LearnedBuffers, Groups = ht.dynamics.LearnedBuffers, ht.dynamics.Groups
SGD, Adam, RMSprop, Adagrad = ht.dynamics.SGD, ht.dynamics.Adam, ht.dynamics.RMSprop, ht.dynamics.Adagrad
Reverse = ht.hypergradients.Reverse
SHAPES = {"first": (4, 6), "second": (6, 3)}
MOMENTUM = LearnedBuffers(SGD(lr=0.1, momentum=0.7))
LR = {"lr": torch.tensor(0.1, dtype=F64)}


def buffers(*names: str, prefix: str = "buffers", positive: bool = False) -> TensorDict:
    values = {
        f"{prefix}.{name}.{parameter}": 0.1 * normal(*shape, seed=len(name))
        for name in names
        for parameter, shape in SHAPES.items()
    }
    return {name: value.square() + 0.01 for name, value in values.items()} if positive else values


CASES: dict[str, tuple[ht.Dynamics, TensorDict]] = {
    "momentum": (LearnedBuffers(SGD(lr=Hyper("lr"), momentum=0.7)), {**LR, **buffers("momentum")}),
    "nesterov": (
        LearnedBuffers(SGD(lr=Hyper("lr"), momentum=0.7, nesterov=True), name="v0"),
        {**LR, **buffers("momentum", prefix="v0")},
    ),
    "dampening": (
        LearnedBuffers(SGD(lr=Hyper("lr"), momentum=0.7, dampening=0.5, dampen_first=True)),
        {**LR, **buffers("momentum")},
    ),
    "one buffer of two": (LearnedBuffers(Adam(lr=Hyper("lr"), eps=1e-2)), {**LR, **buffers("exp_avg")}),
    "all buffers of Adam": (
        LearnedBuffers(Adam(lr=Hyper("lr"), eps=1e-2, beta2=0.9)),
        {**LR, **buffers("exp_avg"), **buffers("exp_avg_sq", positive=True)},
    ),
    "RMSprop": (
        LearnedBuffers(RMSprop(lr=0.02, eps=1e-2, momentum=0.5)),
        {**buffers("momentum_buffer"), **buffers("square_avg", positive=True)},
    ),
    "Adagrad": (LearnedBuffers(Adagrad(lr=Hyper("lr"))), {**LR, **buffers("sum", positive=True)}),
    "one parameter": (
        LearnedBuffers(SGD(lr=Hyper("lr"), momentum=0.7)),
        {**LR, "buffers.momentum.second": normal(6, 3, seed=1)},
    ),
    "members of groups": (
        Groups(
            {
                "first": LearnedBuffers(SGD(lr=Hyper("lr"), momentum=0.7), name="a"),
                "*": LearnedBuffers(SGD(lr=0.2, momentum=0.7), name="b"),
            }
        ),
        {**LR, "a.momentum.first": normal(4, 6, seed=1), "b.momentum.second": normal(6, 3, seed=2)},
    ),
    "groups": (
        LearnedBuffers(Groups({"first": SGD(lr=Hyper("lr"), momentum=0.7), "*": SGD(lr=0.2, momentum=0.7)})),
        {**LR, "buffers.1.momentum.second": normal(6, 3, seed=1)},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("every", [None, 2])
def test_hypergradients_equal_central_differences(case: str, every: int | None) -> None:
    problem = net_problem(*CASES[case], num_steps=4)
    hparams = problem.init_hparams()
    check = ht.check_hypergradient(problem, hparams, Reverse(checkpoint_every=every), step_size=1e-4, num_directions=1)
    assert check.passed, str(check)
    assert {entry.name for entry in check.checks} == set(hparams)


def test_zeros_are_the_rule_itself() -> None:
    rule = SGD(lr=0.1, momentum=0.7)
    zeros = {name: torch.zeros_like(value) for name, value in buffers("momentum").items()}
    learnt, plain = net_problem(LearnedBuffers(rule), zeros), net_problem(rule, {})
    ours = ht.unroll(learnt, learnt.init_hparams()).params
    for name, value in ht.unroll(plain, plain.init_hparams()).params.items():
        assert torch.equal(ours[name], value)


def test_all_tasks_start_from_the_same_buffers() -> None:
    problem = task_problem(nn.Linear(3, 2).double(), item=(3,), num_tasks=2, way=2)
    problem = dataclasses.replace(problem, dynamics=LearnedBuffers(problem.dynamics))  # type: ignore[arg-type]
    hparams = {**problem.init_hparams(), "buffers.momentum.weight": normal(2, 3, seed=1)}
    vectorised = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="vmap"))
    looped = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    for name in hparams:
        torch.testing.assert_close(vectorised.grads[name], looped.grads[name], rtol=1e-10, atol=1e-13)
    check = ht.check_hypergradient(problem, hparams, Reverse(), execution=ht.Execution(tasks="vmap"))
    assert check.passed, str(check)


def test_every_task_has_buffers_of_its_own() -> None:
    entry = normal(2, 3, seed=1)
    (buffer,) = MOMENTUM.init({"w": torch.zeros(4, 2, 3, dtype=F64)}, {"buffers.momentum.w": entry}).values()
    assert torch.equal(buffer, torch.stack([entry] * 4))


def test_the_rule_shows_through() -> None:
    rule = SGD(lr=Hyper("lr"), momentum=Hyper("m", per="step"))
    learnt = LearnedBuffers(rule)
    assert learnt.settings() == rule.settings()
    assert learnt.constraints() == rule.constraints()
    assert learnt.init_hparams() == {}
    problem = net_problem(LearnedBuffers(SGD(lr=Hyper("no"), momentum=0.5)), buffers("momentum"))
    with pytest.raises(ValueError, match="`lr` of `SGD` reads the outer variable `no`"):
        ht.unroll(problem, problem.init_hparams())


@pytest.mark.parametrize(
    ("rule", "extra", "message"),
    [
        (
            MOMENTUM,
            {},
            r"`hparams` has no entry `buffers.{buffer}.{parameter}`.*buffers.momentum.first.*or use the rule",
        ),
        (LearnedBuffers(SGD(lr=0.1)), buffers("momentum"), r"no buffer `momentum.first` \(it has \[\]\)"),
        (
            MOMENTUM,
            {**buffers("momentum"), "buffers.momentum.third": normal(3, seed=0)},
            "`buffers.momentum.third`, but `SGD` has no buffer `momentum.third`.*Rename it",
        ),
        (MOMENTUM, {"buffers.exp_avg.first": normal(4, 6, seed=0)}, "`SGD` has no buffer `exp_avg.first`"),
        (
            MOMENTUM,
            {"buffers.momentum.first": normal(6, seed=0)},
            r"`buffers.momentum.first` has shape \(6,\) and dtype torch.float64, .* shape \(4, 6\).*Start from zeros",
        ),
        (
            MOMENTUM,
            {"buffers.momentum.first": normal(4, 6, seed=0).float()},
            "`buffers.momentum.first` has shape .* dtype torch.float32, .*torch.float64",
        ),
    ],
)
def test_entries_that_do_not_fit_are_explained(rule: ht.Dynamics, extra: TensorDict, message: str) -> None:
    problem = net_problem(rule, extra)
    with pytest.raises(ValueError, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


def test_a_buffer_that_the_first_step_does_not_read_is_detached() -> None:
    problem = net_problem(LearnedBuffers(SGD(lr=0.1, momentum=0.7, dampening=0.3)), buffers("momentum"))
    with pytest.raises(ht.errors.DetachedHyperparameterError, match="buffers.momentum.first"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


def test_a_wrong_rule_is_explained() -> None:
    with pytest.raises(TypeError, match="`rule` of `LearnedBuffers` is 3, not a `GradientDynamics`"):
        LearnedBuffers(3)  # type: ignore[arg-type]
