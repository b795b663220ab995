"""Settings of a dynamics with a value for every task: tasks together give what tasks one by one give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.dynamics import SGD, Adagrad, Adam, AdamW, Groups, Lion, NAdam, RAdam, ReversibleMomentum, RMSprop
from hypertorch.errors import ForwardModeError
from hypertorch.types import Batch, TensorDict

Hyper, Loop, Together = ht.Hyper, ht.Execution(tasks="loop"), ht.Execution(tasks="vmap")
F64 = torch.float64
TASKS, STEPS = 5, 4


class Fit(ht.InnerProblem):
    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"weight": hparams["start"] * 1.0, "bias": hparams["start"].sum()}

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(TASKS, 6, 3, generator=generator, dtype=F64)
        return inputs, torch.randn(TASKS, 6, generator=generator, dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        inputs, targets = batch
        outputs = torch.tanh(inputs @ params["weight"]) + params["bias"]
        return (outputs - targets).square().mean() + 0.1 * params["weight"].square().sum()


class Judge(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {
            "log_lr": torch.linspace(-3.0, -1.0, TASKS, dtype=F64),
            "logit": torch.linspace(-1.0, 1.0, TASKS, dtype=F64),
            "schedule": torch.linspace(0.02, 0.2, TASKS * STEPS, dtype=F64).reshape(TASKS, STEPS),
            "start": torch.tensor([0.3, -0.2, 0.4], dtype=F64),
        }

    def batch(self, outer_step: int) -> Batch:
        return torch.arange(TASKS)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["weight"].square().sum() + params["bias"].sin()

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        return {"bias": params["bias"]}


def own_settings(hparams: TensorDict, batch: Batch) -> TensorDict:
    # The rows of the tasks that are run, which may be a chunk.
    return {
        "lr": hparams["log_lr"][batch].exp(),
        "momentum": hparams["logit"][batch].sigmoid(),
        "lr_at_step": hparams["schedule"][batch],
        "lr_of.weight": hparams["log_lr"][batch, None].exp() * torch.tensor([1.0, 0.5, 0.2], dtype=F64),
        "lr_of.bias": hparams["log_lr"][batch].exp(),
    }


def problem(dynamics: ht.Dynamics) -> ht.BilevelProblem:
    unused = ("log_lr", "logit", "schedule")
    return ht.BilevelProblem(
        Fit(), Judge(), dynamics=dynamics, num_steps=STEPS, num_tasks=TASKS, context=own_settings, allow_unused=unused
    )


LR = Hyper("lr")
RULES: dict[str, ht.Dynamics] = {
    "sgd": SGD(lr=LR),
    "momentum": SGD(lr=LR, momentum=Hyper("momentum")),
    "schedule": SGD(lr=Hyper("lr_at_step", per="step"), momentum=0.5),
    "transform": SGD(lr=Hyper("lr", torch.sqrt)),
    "parameter": SGD(lr=Hyper("lr_of", per="parameter")),
    "group": SGD(lr={"weight": LR, "*": 0.1}),
    "adam": Adam(lr=LR, beta1=Hyper("momentum"), eps=1e-3),
    "adamw": AdamW(lr=LR, eps=1e-3, weight_decay=Hyper("momentum")),
    "nadam": NAdam(lr=LR, beta1=Hyper("momentum"), eps=1e-3),
    "radam": RAdam(lr=LR, beta2=Hyper("momentum"), eps=1e-3),
    "adagrad": Adagrad(lr=LR, initial_accumulator_value=Hyper("momentum")),
    "rmsprop": RMSprop(lr=LR, alpha=Hyper("momentum"), eps=1e-3),
    "lion": Lion(lr=LR),
    "reversible": ReversibleMomentum(lr=LR, momentum=Hyper("momentum")),
    "groups": Groups({"weight": SGD(lr=LR, momentum=0.5), "*": Adam(lr=0.1, eps=1e-3)}),
}


def assert_same(own: ht.BilevelProblem, backend: ht.Hypergradient, execution: ht.Execution) -> None:
    hparams = own.init_hparams()
    expected = ht.hypergradient(own, hparams, backend=ht.hypergradients.Reverse(), execution=Loop)
    found = ht.hypergradient(own, hparams, backend=backend, execution=execution)
    torch.testing.assert_close(found.params, expected.params)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-12)
    # Each task has a derivative of its own.
    assert bool((expected.grads["log_lr"] != 0).all()) or bool((expected.grads["schedule"] != 0).all())


@pytest.mark.parametrize("name", RULES)
def test_tasks_together_are_tasks_one_by_one(name: str) -> None:
    assert_same(problem(RULES[name]), ht.hypergradients.Reverse(), Together)


@pytest.mark.parametrize(
    "backend",
    [
        ht.hypergradients.Reverse(checkpoint_every=2),
        ht.hypergradients.Reverse(derivative="mixed"),
        ht.hypergradients.Forward(),
        ht.hypergradients.Reverse(checkpoint_every=1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_every_exact_backend_serves_them(backend: ht.Hypergradient, name: str) -> None:
    assert_same(problem(RULES[name]), backend, Together)


def test_tasks_in_chunks_have_their_own_settings() -> None:
    assert_same(problem(RULES["momentum"]), ht.hypergradients.Reverse(), ht.Execution(tasks="vmap", chunk=2))
    assert_same(problem(RULES["momentum"]), ht.hypergradients.Reverse(), ht.Execution(tasks="auto"))


def test_each_task_is_the_problem_with_its_setting_as_a_number() -> None:
    own = problem(RULES["momentum"])
    hparams = own.init_hparams()
    together = ht.unroll(own, hparams, execution=Together)
    for task in range(TASKS):
        rule = SGD(lr=float(hparams["log_lr"][task].exp()), momentum=float(hparams["logit"][task].sigmoid()))
        alone = ht.unroll(problem(rule), hparams, execution=Loop)
        for name, value in alone.params.items():
            torch.testing.assert_close(together.params[name][task], value[task])


@pytest.mark.parametrize(
    ("rule", "backend"),
    [
        (ht.dynamics.Clipped(SGD(lr=LR), max_norm=1.0), ht.hypergradients.Reverse()),
        (RULES["reversible"], ht.hypergradients.Reversible()),
    ],
)
def test_what_is_more_than_an_update_runs_task_by_task(rule: ht.Dynamics, backend: ht.Hypergradient) -> None:
    own = problem(rule)
    with pytest.raises(ForwardModeError, match=r"tasks='loop'"):
        ht.hypergradient(own, own.init_hparams(), backend=backend, execution=Together)
    assert_same(own, backend, Loop)
    assert_same(own, backend, ht.Execution(tasks="auto"))


def test_a_setting_of_the_wrong_shape_is_refused_in_the_words_of_one_task() -> None:
    own = problem(SGD(lr=Hyper("lr_at_step")))
    with pytest.raises(ValueError, match=r"`lr_at_step` has shape \(4,\), but `lr` of `SGD` reads it as one value"):
        ht.hypergradient(own, own.init_hparams(), backend=ht.hypergradients.Reverse(), execution=Together)


def test_a_schedule_of_another_length_is_refused() -> None:
    own = replace(problem(SGD(lr=Hyper("lr_at_step", per="step"))), num_steps=STEPS + 1)
    with pytest.raises(ValueError, match=r"`lr_at_step` has shape \(4,\), but `lr` of `SGD` reads it as a schedule"):
        ht.hypergradient(own, own.init_hparams(), backend=ht.hypergradients.Reverse(), execution=Together)


@pytest.mark.parametrize("execution", [Loop, ht.Execution(tasks="vmap", chunk=2)])
def test_a_context_that_has_all_tasks_where_some_are_run_is_explained(execution: ht.Execution) -> None:
    own = replace(problem(SGD(lr=LR)), context=lambda hparams, _: {"lr": hparams["log_lr"].exp()})
    with pytest.raises(
        ValueError, match=r"`context` returned 'lr' of shape \(5,\).*Return the rows that belong to `batch`"
    ):
        ht.hypergradient(own, own.init_hparams(), backend=ht.hypergradients.Reverse(), execution=execution)
    torch.testing.assert_close(
        ht.unroll(own, own.init_hparams(), execution=Together).params,
        ht.unroll(problem(SGD(lr=LR)), own.init_hparams(), execution=Together).params,
    )
