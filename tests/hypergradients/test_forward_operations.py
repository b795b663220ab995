"""Operations that PyTorch cannot push tangents through, or not many at once: forward mode explains or finds a way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import Batch, TensorDict
from tests.helpers.agreement import assert_equal, assert_equals_reverse
from tests.helpers.problems import LambdaInner, normal, scalar_problem, scalars, task_problem

Forward, Reverse = ht.hypergradients.Forward, ht.hypergradients.Reverse
SGD = ht.dynamics.SGD


def compute(problem: ht.BilevelProblem, backend: ht.Hypergradient | None = None) -> ht.HypergradientResult:
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend or Forward())


X, Y = normal(5, 3, seed=1), normal(5, 4, seed=2)


class Doubled(torch.autograd.Function):
    """Has a backward only."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return 2.0 * value

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2.0 * grad


def operation_problem(loss: Callable[[Tensor], Tensor]) -> ht.BilevelProblem:
    return scalar_problem(
        init=lambda h: {"w": normal(3, 4, seed=3)},
        inner=lambda p, h, b: h["c"] * loss(X @ p["w"]),
        outer=lambda p, h, b: p["w"].square().sum(),
        hparams=scalars(c=0.5, lr=0.1),
        dynamics=SGD(lr=ht.Hyper("lr")),
    )


def grid_sampled(z: Tensor) -> Tensor:
    return F.grid_sample(Y[None, None], z[:4].reshape(1, 2, 4, 2), align_corners=False).square().mean()


def checkpointed(z: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(torch.tanh, z, use_reentrant=False).square().mean()


def nested(z: Tensor) -> Tensor:
    return torch.func.jvp(lambda v: v.square().mean(), (z,), (Y,))[1].square()


def through_numpy(z: Tensor) -> Tensor:
    return z.square().mean() + float(z.detach().numpy().sum() * 0.0)


NO_FORWARD = {
    "huber_loss": (lambda z: F.huber_loss(z, Y), "`huber_loss_backward`, which has no forward derivative.*Write it"),
    "grid_sample": (grid_sampled, "`grid_sampler_2d_backward`, which has no forward derivative"),
}


@pytest.mark.parametrize("name", NO_FORWARD)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_operations_without_forward_derivative_are_explained(name: str, chunk_size: int | None) -> None:
    loss, message = NO_FORWARD[name]
    with pytest.raises(IncompatibleBackendError, match=message + r".*`Reverse\(\)`"):
        compute(operation_problem(loss), Forward(chunk_size=chunk_size))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_the_mean_squared_error_has_one_all_the_same(chunk_size: int | None) -> None:
    for loss in (F.mse_loss, torch.nn.MSELoss()):
        assert_equals_reverse(operation_problem(lambda z, loss=loss: loss(z, Y)), Forward(chunk_size=chunk_size))


NOT_VECTORISED = {
    "checkpoint": checkpointed,
    "numpy": through_numpy,
    "noise": lambda z: F.rrelu(z, training=True).sum(),
}


@pytest.mark.parametrize("name", NOT_VECTORISED)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_operations_that_cannot_be_vectorised_are_pushed_one_by_one(name: str, chunk_size: int | None) -> None:
    assert_equals_reverse(operation_problem(NOT_VECTORISED[name]), Forward(chunk_size=chunk_size))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_other_limits(chunk_size: int | None) -> None:
    with pytest.raises(IncompatibleBackendError, match=r"uses `autograd.Function`, which has no forward derivative"):
        compute(operation_problem(lambda z: Doubled.apply(z).square().mean()), Forward(chunk_size=chunk_size))
    assert_equals_reverse(operation_problem(nested), Forward(chunk_size=chunk_size))


def huber_by_hand(z: Tensor) -> Tensor:
    gap = (z - Y).abs()
    return torch.where(gap < 1.0, 0.5 * gap.square(), gap - 0.5).mean()


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(
    ("refused", "advised", "advice"),
    [
        (NO_FORWARD["huber_loss"][0], huber_by_hand, "Write it out of simpler operations, or use reverse mode"),
        (
            lambda z: torch.ops.aten.mse_loss(z, Y),
            lambda z: (z - Y).square().mean(),
            r"past a constant argument.*`\(outputs - targets\).square\(\).mean\(\)` for a mean. Or use reverse mode",
        ),
    ],
)
def test_advice_to_write_an_operation_out_works(
    chunk_size: int | None, refused: Callable[[Tensor], Tensor], advised: Callable[[Tensor], Tensor], advice: str
) -> None:
    with pytest.raises(IncompatibleBackendError, match=advice):
        compute(operation_problem(refused), Forward(chunk_size=chunk_size))
    found = compute(operation_problem(advised), Forward(chunk_size=chunk_size)).grads
    expected = compute(operation_problem(refused), Reverse()).grads
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("loss", "backend", "message", "advised"),
    [
        (through_numpy, Forward(), r"cannot be vectorised.*`Forward\(chunk_size=1\)`", Forward(chunk_size=1)),
        (nested, Forward(chunk_size=1), r"derivatives of its own.*a `chunk_size` above 1", Forward(chunk_size=2)),
    ],
)
def test_what_comes_up_after_the_comparison_is_explained(
    loss: Callable[[Tensor], Tensor], backend: Forward, message: str, advised: Forward
) -> None:
    """Two steps are looked at before a run; an operation of the third is met on the way."""

    class Later(LambdaInner):
        def batch(self, step: int) -> Batch:
            return step > 1

    plain = operation_problem(loss)
    inner = Later(plain.inner.init_params, lambda p, h, b: h["c"] * (loss if b else torch.sum)(X @ p["w"]))
    problem = dataclasses.replace(plain, inner=inner)
    with pytest.raises(IncompatibleBackendError, match=message):
        compute(problem, backend)
    assert_equals_reverse(problem, advised)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_an_lstm_in_single_precision_is_explained() -> None:
    lstm = nn.LSTM(4, 2, batch_first=True)
    problem = operation_problem(lambda z: lstm(z.float()[None])[0].square().mean())
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN in this PyTorch")
    with pytest.raises(IncompatibleBackendError, match="`mkldnn_rnn_layer`.*switch oneDNN off"):
        compute(problem)
    with torch.backends.mkldnn.flags(enabled=False):
        compute(problem)


def test_values_may_be_looked_at() -> None:
    """Only tangents are vectorised, so that checks of values work."""

    def loss(z: Tensor) -> Tensor:
        return z.square().mean() * (1.0 if z.sum() < 1e9 and float(z.sum().item()) < 1e9 else 2.0)

    assert_equals_reverse(operation_problem(loss), Forward())


def test_an_error_of_the_user_is_left_alone() -> None:
    for chunk_size in (None, 1):
        with pytest.raises(RuntimeError, match="shape") as caught:
            compute(operation_problem(lambda z: (z @ z).sum()), Forward(chunk_size=chunk_size))
        assert not isinstance(caught.value, IncompatibleBackendError)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_auto_takes_the_loop_where_tasks_cannot_be_vectorised(chunk_size: int | None) -> None:
    problem = task_problem(nn.Linear(2, 3).double(), item=(2,), num_tasks=3, num_steps=2)
    inner = problem.inner

    class DataDependent(type(inner)):  # type: ignore[misc]
        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
            assert batch[0].sum() < 1e9
            return super().loss(params, hparams, batch)

    rerouted = dataclasses.replace(problem, inner=DataDependent(inner.net.module, *inner.data))
    hparams = problem.init_hparams()
    expected = ht.hypergradient(rerouted, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    assert_equal(rerouted, Forward(chunk_size=chunk_size), expected, hparams)
    with pytest.raises(IncompatibleBackendError, match=r"vmap.*over tasks.*tasks='loop'") as caught:
        ht.hypergradient(
            rerouted, hparams, backend=Forward(chunk_size=chunk_size), execution=ht.Execution(tasks="vmap")
        )
    # It is the tasks that cannot be vectorised: pushing one tangent at a time would not help.
    assert "chunk_size" not in str(caught.value)
