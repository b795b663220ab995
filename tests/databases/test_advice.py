"""What a refusal says to do, done: each piece of advice leads to the right number."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot import BatchNorm
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal, scalar_problem, scalars

Forward, Reverse = ht.hypergradients.Forward, ht.hypergradients.Reverse
Loss = Callable[[Tensor], Tensor]
TARGETS = normal(4, 3, seed=2)
ONE_BY_ONE, TOGETHER, MIXED = Forward(chunk_size=1), Forward(), Reverse(derivative="mixed")


class Case(NamedTuple):
    """A loss that a backend refuses, and what the refusal recommends.

    Attributes:
        loss: of a matrix.
        backend: refuses it.
        advice: in the message.
        instead: a loss that is the same and is not refused; None where the advice is another backend.
        backends: what the advice names.
    """

    loss: Loss
    backend: ht.Hypergradient
    advice: str
    instead: Loss | None = None
    backends: tuple[ht.Hypergradient, ...] = ()


def hooked(w: Tensor) -> Tensor:
    product = w * 1.5
    if product.requires_grad:
        product.register_hook(lambda slope: slope * 1.0)
    return product.square().mean()


def nested(w: Tensor) -> Tensor:
    return torch.func.jvp(lambda v: v.sin().mean(), (w,), (TARGETS,))[1].square()


def huber_by_hand(w: Tensor) -> Tensor:
    gap = (w - TARGETS).abs()
    return torch.where(gap < 1.0, 0.5 * gap.square(), gap - 0.5).mean()


def distances_by_hand(w: Tensor) -> Tensor:
    return (w[:, None] - TARGETS[None]).square().sum(-1).sqrt().sin().sum()


def smooth_noise(w: Tensor) -> Tensor:
    return F.rrelu(w, training=True).square().sum()


CASES = {
    "write it out: an activation": Case(
        lambda w: F.silu(w).square().mean(),
        ONE_BY_ONE,
        "[Ww]rite it out of simpler operations",
        instead=lambda w: (w * w.sigmoid()).square().mean(),
    ),
    "write it out: a loss": Case(
        lambda w: F.huber_loss(w, TARGETS), TOGETHER, "[Ww]rite it out of simpler operations", instead=huber_by_hand
    ),
    "write it out: no second derivative": Case(
        lambda w: torch.cdist(w, TARGETS).sin().sum(),
        Reverse(),
        "[Ww]rite the operation out of simpler ones",
        instead=distances_by_hand,
    ),
    "no forward derivative, reverse mode": Case(
        lambda w: F.huber_loss(w, TARGETS), ONE_BY_ONE, r"use reverse mode, for example `Reverse\(\)`",
        backends=(Reverse(),),
    ),
    "one tangent at a time": Case(
        smooth_noise, TOGETHER, r"`Forward\(chunk_size=1\)`, or use reverse mode, for example `Reverse\(\)`",
        backends=(ONE_BY_ONE, Reverse()),
    ),
    "several tangents at once": Case(
        nested, ONE_BY_ONE, r"several tangents at once.*`Reverse\(\)`", backends=(Forward(chunk_size=2), Reverse())
    ),
    "mixed mode": Case(
        lambda w: torch.linalg.slogdet(w[:3] @ w[:3].T + torch.eye(3, dtype=w.dtype))[1],
        MIXED,
        "`derivative='reverse'` or 'auto'",
        backends=(Reverse(derivative="reverse"), Reverse(derivative="auto")),
    ),
    "a hook": Case(hooked, Reverse(), "Leave the hook out", instead=lambda w: (w * 1.5).square().mean()),
}  # fmt: skip


def problem_of(loss: Loss) -> ht.BilevelProblem:
    return scalar_problem(
        init=lambda h: {"w": h["start"] * START},
        inner=lambda p, h, b: h["weight"].exp() * loss(p["w"]),
        outer=lambda p, h, b: (p["w"] * OTHER).sum() + p["w"].square().sum(),
        hparams=scalars(start=1.1, weight=-0.5),
        dynamics=ht.dynamics.SGD(lr=0.2),
    )


def refusal_of(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> str | None:
    """Returns what a backend says against a problem; None if it serves it."""
    try:
        ht.hypergradient(problem, problem.init_hparams(), backend=backend)
    except IncompatibleBackendError as error:
        return str(error)
    return None


START, OTHER = normal(4, 3, seed=3), normal(4, 3, seed=4)


@pytest.mark.parametrize("name", CASES)
def test_the_refusal_says_what_to_do(name: str) -> None:
    case = CASES[name]
    problem = problem_of(case.loss)
    refusal = refusal_of(problem, case.backend)
    if refusal is None:  # a backend that finds another way need not refuse
        assert ht.check_hypergradient(problem, problem.init_hparams(), case.backend)
    else:
        assert re.search(case.advice, refusal), refusal


@pytest.mark.parametrize("name", CASES)
def test_doing_it_gives_the_right_number(name: str) -> None:
    case = CASES[name]
    problem = problem_of(case.instead or case.loss)
    if case.instead is not None:
        torch.testing.assert_close(case.instead(START), case.loss(START))
    for backend in case.backends or (case.backend,):
        check = ht.check_hypergradient(problem, problem.init_hparams(), backend)
        assert check, str(check)


def statistics_problem(norm: nn.Module, judge_mode: bool) -> ht.BilevelProblem:
    """Fits a norm with running statistics in training mode and judges it in training or evaluation mode."""
    net = ht.FunctionalModule(norm.double().train())
    judge = ht.FunctionalModule(norm if judge_mode else type(norm).eval(_copy(norm)))
    data = normal(6, 3, 2, 2, seed=5)

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
        outputs, buffers = net.with_buffers(params, data * hparams["scale"])
        return (outputs - data.sin()).square().mean(), buffers

    inner = LambdaInner(lambda h: net.init_params(), loss)
    inner.buffers = net.buffers
    outer = LambdaOuter(scalars(scale=1.3), lambda p, h, b: judge(p, data).sin().square().mean())
    return ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.2), num_steps=3)


def _copy(module: nn.Module) -> nn.Module:
    copied = BatchNorm(3, statistics="running") if isinstance(module, BatchNorm) else type(module)(3)
    copied.load_state_dict(module.state_dict())
    return copied.double()


def test_running_statistics_are_refused_with_remedies_that_work() -> None:
    problem = statistics_problem(nn.BatchNorm2d(3), judge_mode=False)
    with pytest.raises(IncompatibleBackendError, match=r"BatchNorm\(features, statistics='running'\).*training mode"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    for other in (
        statistics_problem(BatchNorm(3, statistics="running"), judge_mode=False),
        statistics_problem(nn.BatchNorm2d(3, track_running_stats=False), judge_mode=True),
        statistics_problem(nn.BatchNorm2d(3), judge_mode=True),
    ):
        check = ht.check_hypergradient(other, other.init_hparams(), Reverse())
        assert check, str(check)
