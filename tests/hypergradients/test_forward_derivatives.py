"""Operations of which PyTorch's shorter formulas cannot be differentiated forwards: right numbers on every route.

The oracle is the same loss written out of operations with plain derivatives, unrolled and differentiated by autograd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.guards import cross_check
from hypertorch.types import Batch
from tests.helpers.memo import set_aside
from tests.helpers.problems import LambdaInner, LambdaOuter, normal

Forward, ForwardGradient, Reverse = (
    ht.hypergradients.Forward,
    ht.hypergradients.ForwardGradient,
    ht.hypergradients.Reverse,
)
F64 = torch.float64
NOISE = normal(3, 3, seed=1)
BASE = NOISE @ NOISE.T + 3.0 * torch.eye(3, dtype=F64)
ALONG = torch.tensor([0.7, -1.1, 0.4], dtype=F64)
SCALES = torch.tensor([1.3, 0.8, 1.1], dtype=F64)
GROUPS = torch.tensor([0, 0, 1])
STEPS, LR = 3, 0.05

# What PyTorch says of its own insides where it vectorises these operations.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning"),
]

Loss = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """A loss by an operation of PyTorch, and the same written out, of a symmetric positive definite `(3, 3)` tensor."""

    torch: Loss
    by_hand: Loss
    start: tuple[float, float, float] = (0.3, 0.5, -0.4)
    hyper: float = 0.4


def det_by_hand(k: Tensor) -> Tensor:
    first = k[1, 1] * k[2, 2] - k[1, 2] * k[2, 1]
    second = k[1, 0] * k[2, 2] - k[1, 2] * k[2, 0]
    return k[0, 0] * first - k[0, 1] * second + k[0, 2] * (k[1, 0] * k[2, 1] - k[1, 1] * k[2, 0])


def solved_by_hand(k: Tensor) -> Tensor:
    """By Cramer's rule."""
    columns = torch.eye(3, dtype=torch.bool)
    replaced = [torch.where(columns[entry], ALONG[:, None], k) for entry in range(3)]
    return torch.stack([det_by_hand(each) for each in replaced]) / det_by_hand(k)


def normed_by_hand(k: Tensor) -> Tensor:
    centred = k - k.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * SCALES[:, None]


CASES: dict[str, Case] = {
    "det": Case(lambda k: 0.1 * torch.det(k), lambda k: 0.1 * det_by_hand(k)),
    "logdet": Case(torch.logdet, lambda k: det_by_hand(k).log()),
    "slogdet": Case(lambda k: torch.linalg.slogdet(k)[1], lambda k: det_by_hand(k).log()),
    "solve": Case(lambda k: ALONG @ torch.linalg.solve(k, ALONG), lambda k: ALONG @ solved_by_hand(k)),
    "solve_ex": Case(lambda k: ALONG @ torch.linalg.solve_ex(k, ALONG)[0], lambda k: ALONG @ solved_by_hand(k)),
    "tensorsolve": Case(lambda k: ALONG @ torch.linalg.tensorsolve(k, ALONG), lambda k: ALONG @ solved_by_hand(k)),
    "eigvalsh": Case(
        lambda k: 0.01 * torch.linalg.eigvalsh(k).pow(3).sum(), lambda k: 0.01 * (k @ k @ k).diagonal().sum()
    ),
    # The diagonal less that of the base is zero in two places where the second derivative of a product is not.
    "prod with zeros": Case(
        lambda k: (k - BASE).diagonal().prod(),
        lambda k: (k - BASE)[0, 0] * (k - BASE)[1, 1] * (k - BASE)[2, 2],
        start=(1.5, 0.0, 0.0),
        hyper=0.0,
    ),
    "scatter_reduce with prod": Case(
        lambda k: ALONG[:2] @ torch.zeros(2, dtype=F64).scatter_reduce(0, GROUPS, k[0], "prod", include_self=False),
        lambda k: ALONG[0] * k[0, 0] * k[0, 1] + ALONG[1] * k[0, 2],
    ),
    "silu": Case(lambda k: F.silu(k).sum(), lambda k: (k * k.sigmoid()).sum()),
    "mish": Case(lambda k: F.mish(k).sum(), lambda k: (k * (1.0 + k.exp()).log().tanh()).sum()),
    "group_norm": Case(
        lambda k: (F.group_norm(k[None], 1, SCALES, None) * NOISE).square().sum(),
        lambda k: (normed_by_hand(k) * NOISE).square().sum(),
    ),
    "logit": Case(
        lambda k: torch.logit(k.sigmoid() * 0.9, eps=1e-6).sum(),
        lambda k: (k.sigmoid() * 0.9 / (1.0 - k.sigmoid() * 0.9)).log().sum(),
    ),
    "summed mse_loss": Case(
        lambda k: 0.1 * F.mse_loss(k, NOISE, reduction="sum"), lambda k: 0.1 * (k - NOISE).square().sum()
    ),
    "layers around it": Case(
        lambda k: torch.logdet(F.softplus(k.tanh()) + BASE).sin().exp(),
        lambda k: det_by_hand(k.tanh().exp().add(1.0).log() + BASE).log().sin().exp(),
    ),
}


def kernel(w: Tensor, a: Tensor) -> Tensor:
    """A symmetric positive definite matrix that both params and hyperparameters move."""
    a = a.reshape(-1)
    return BASE + torch.diag((w + a[0]) * (1.0 + a.sum())) + 0.1 * a.sum() * torch.outer(w, w)


def inner_loss(loss: Loss, w: Tensor, a: Tensor) -> Tensor:
    return loss(kernel(w, a)) + 0.2 * w.square().sum() + (a.reshape(-1)[-1] * w * ALONG).sum()


def outer_loss(w: Tensor) -> Tensor:
    return (w * ALONG).sum() + 0.3 * w.square().sum()


def start_of(case: Case) -> Tensor:
    return torch.tensor(case.start, dtype=F64)


def hyper_of(case: Case, entries: int) -> Tensor:
    return torch.full((entries,) if entries > 1 else (), case.hyper, dtype=F64)


def expected(case: Case, entries: int, start: Tensor | None = None) -> Tensor:
    """The hypergradient by autograd through gradient descent written out, on the loss written out."""
    a = hyper_of(case, entries).requires_grad_()
    w = (start_of(case) if start is None else start).requires_grad_()
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(inner_loss(case.by_hand, w, a), w, create_graph=True)
        w = w - LR * gradient
    return torch.autograd.grad(outer_loss(w), a)[0]


def problem(case: Case, entries: int, **options: object) -> ht.BilevelProblem:
    settings: dict = {"dynamics": ht.dynamics.SGD(lr=LR), "num_steps": STEPS, **options}
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": start_of(case)}, lambda p, h, b: inner_loss(case.torch, p["w"], h["a"])),
        LambdaOuter({"a": hyper_of(case, entries)}, lambda p, h, b: outer_loss(p["w"])),
        **settings,
    )


def grads(own: ht.BilevelProblem, backend: ht.Hypergradient, **options: Any) -> Tensor:
    return ht.hypergradient(own, own.init_hparams(), backend=backend, **options).grads["a"]


WRONG_IN_PYTORCH = ("scatter_reduce with prod",)  # forwards, on every route


def assert_right(
    own: ht.BilevelProblem, backend: ht.Hypergradient, right: Tensor, *, refused: bool, **options: Any
) -> None:
    """Asserts the hypergradient; or a refusal by name, and that following its advice gives it."""
    if refused:
        with pytest.raises(IncompatibleBackendError, match=r"cannot serve this problem.*differs by.*`Reverse\(\)`"):
            grads(own, backend, **options)
        backend = Reverse()
    torch.testing.assert_close(grads(own, backend, **options), right, rtol=1e-9, atol=1e-12)


BACKENDS = {
    "vectorised": (Forward(), 3),
    "in chunks": (Forward(chunk_size=2), 3),
    "one by one": (Forward(chunk_size=1), 3),
    "a single hyperparameter": (Forward(), 1),
    # A square of a sign is 1: along one of them the estimate for one entry is exact.
    "forward gradient, one": (ForwardGradient(distribution="rademacher"), 1),
    "forward gradient, vectorised": (ForwardGradient(distribution="rademacher", num_samples=2), 1),
    "auto": (Reverse(derivative="auto"), 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loss_written_out(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_aside(monkeypatch, cross_check.FAULTS)
    how, entries = BACKENDS[backend]
    refused = name in WRONG_IN_PYTORCH and not isinstance(how, Reverse)
    with caplog.at_level(logging.INFO, logger="hypertorch"):
        assert_right(problem(CASES[name], entries), how, expected(CASES[name], entries), refused=refused)
    if not refused and not isinstance(how, Reverse):
        assert not caplog.records  # the route that is asked for serves


@pytest.mark.parametrize("name", CASES)
def test_mixed_mode_is_right_or_says_what_to_do(name: str) -> None:
    own, right = problem(CASES[name], 3), expected(CASES[name], 3)
    refused = name not in ("eigvalsh", "prod with zeros", "summed mse_loss")
    with (
        pytest.raises(IncompatibleBackendError, match="Use `derivative='reverse'` or 'auto'")
        if refused
        else nullcontext()
    ):
        torch.testing.assert_close(grads(own, Reverse(derivative="mixed")), right, rtol=1e-9, atol=1e-12)
    if refused:
        torch.testing.assert_close(grads(own, Reverse(derivative="reverse")), right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_real_time(name: str) -> None:
    """With an outer learning rate of 0 it has the exact hypergradient of the run so far."""
    for entries in (1, 3):
        log = ht.MemoryLogger()
        real_time = ht.RealTime(
            problem(CASES[name], entries),
            optimizer=partial(torch.optim.SGD, lr=0.0),
            every=1,
            loggers=[log],
            log_every=1,
        )
        if name in WRONG_IN_PYTORCH:
            with pytest.raises(IncompatibleBackendError, match="differs by"):
                real_time.run(STEPS)
            continue
        real_time.run(STEPS)
        norm = float(expected(CASES[name], entries).norm())
        assert log.records[-1]["hypergradient_norm"] == pytest.approx(norm, rel=1e-6)


TASKS = {"vectorised": Forward(), "one by one": Forward(chunk_size=1), "auto": Reverse(derivative="auto")}


@pytest.mark.parametrize("backend", TASKS)
@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_with_tasks(name: str, route: str, backend: str) -> None:
    case = CASES[name]
    starts = torch.stack([start_of(case), start_of(case) * 1.2])

    class Judge(LambdaOuter):
        def batch(self, outer_step: int) -> Batch:
            return {"start": starts}

    own = problem(case, 2, num_tasks=2, context=lambda h, b: {"start": b["start"]})
    own = replace(
        own,
        inner=LambdaInner(lambda h: {"w": h["start"]}, lambda p, h, b: inner_loss(case.torch, p["w"], h["a"])),
        outer=Judge({"a": hyper_of(case, 2)}, lambda p, h, b: outer_loss(p["w"])),
    )
    right = torch.stack([expected(case, 2, start.clone()) for start in starts]).mean(0)
    refused = name in WRONG_IN_PYTORCH and backend != "auto"
    execution = ht.Execution(tasks=route)  # type: ignore[arg-type]
    assert_right(own, TASKS[backend], right, refused=refused, execution=execution)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", ["det", "slogdet", "solve", "group_norm"])
def test_adam_equals_central_differences(name: str, chunk_size: int | None) -> None:
    own = problem(CASES[name], 2, dynamics=ht.dynamics.Adam(lr=0.05), num_steps=4)
    hparams = own.init_hparams()
    found = ht.hypergradient(own, hparams, backend=Forward(chunk_size=chunk_size)).grads["a"]

    def loss(a: Tensor) -> float:
        return float(ht.unroll(own, {"a": a}).outer_loss)

    for entry in range(2):
        move = torch.zeros(2, dtype=F64)
        move[entry] = 1e-5
        slope = (loss(hparams["a"] + move) - loss(hparams["a"] - move)) / 2e-5
        assert float(found[entry]) == pytest.approx(slope, rel=1e-6, abs=1e-9)
