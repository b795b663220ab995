"""Where the inner problem stops a gradient forward mode stops its tangent: every backend has the same derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.autodiff import stopped_gradients
from hypertorch.autodiff.stopped_gradients import stopping_tangents
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal

Forward, Reverse = ht.hypergradients.Forward, ht.hypergradients.Reverse
F64 = torch.float64
INPUTS, TARGETS = normal(6, 4, seed=1), normal(6, seed=2)


def pseudo_labels(weight: Tensor, scale: Tensor) -> Tensor:
    with torch.no_grad():
        labels = torch.tanh(INPUTS @ weight * scale)
    return (INPUTS @ weight - labels).square().mean()


@torch.no_grad()
def size_of(weight: Tensor) -> Tensor:
    return weight.norm() + 1.0


def switched(weight: Tensor, scale: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    size = weight.square().sum() * scale
    torch.set_grad_enabled(True)
    return size * weight.square().sum()


def regained(weight: Tensor, scale: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            tracked = (INPUTS @ weight).sin()
        stopped = weight.exp().sum()
    return (tracked * stopped).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no_grad": pseudo_labels,
    "decorator": lambda weight, scale: (INPUTS @ weight / size_of(weight * scale)).square().mean(),
    "set_grad_enabled": switched,
    "enable_grad inside": regained,
    "data": lambda weight, scale: (weight.data * (weight * scale).data * weight.square()).sum(),
    "mse_loss": lambda weight, scale: F.mse_loss(INPUTS @ weight * scale, TARGETS),
}
BACKENDS = {
    "vectorised": Forward(),
    "one by one": Forward(chunk_size=1),
    "mixed": Reverse(derivative="mixed"),
}


def problem(loss: Callable[[Tensor, Tensor], Tensor], num_tasks: int | None = None) -> ht.BilevelProblem:
    start = torch.linspace(0.5, 1.0, 4, dtype=F64)

    def inner_loss(params: TensorDict, hparams: TensorDict, batch: object) -> Tensor:
        return loss(params["w"], hparams["scale"]) + hparams["scale"] * params["w"].square().sum()

    return ht.BilevelProblem(
        LambdaInner(lambda hparams: {"w": start * hparams["scale"]}, inner_loss),
        LambdaOuter(
            {"scale": torch.tensor(0.7, dtype=F64)}, lambda params, hparams, batch: (params["w"] - 1.0).square().sum()
        ),
        dynamics=ht.dynamics.SGD(lr=0.05),
        num_steps=4,
        num_tasks=num_tasks,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_tasks", [None, 2])
def test_equals_reverse_mode(loss: str, backend: str, num_tasks: int | None) -> None:
    if loss == "data" and num_tasks is not None:
        pytest.skip("PyTorch has no `.data` of vectorised tasks")
    own = problem(LOSSES[loss], num_tasks)
    hparams = own.init_hparams()
    expected = ht.hypergradient(own, hparams, backend=Reverse()).grads
    found = ht.hypergradient(own, hparams, backend=BACKENDS[backend]).grads
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_initialisation_without_gradients_is_a_constant(backend: str) -> None:
    own = problem(lambda weight, scale: weight.sum() * 0.0)
    inner = own.inner

    class Fixed(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            with torch.no_grad():
                return {"w": torch.ones(4, dtype=F64) * hparams["scale"]}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: object) -> Tensor:
            return inner.loss(params, hparams, batch)  # type: ignore[return-value]

    fixed = ht.BilevelProblem(Fixed(), own.outer, dynamics=own.dynamics, num_steps=3)
    hparams = fixed.init_hparams()
    expected = ht.hypergradient(fixed, hparams, backend=Reverse()).grads
    torch.testing.assert_close(ht.hypergradient(fixed, hparams, backend=BACKENDS[backend]).grads, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_is_refused(backend: str) -> None:
    def hooked(weight: Tensor, scale: Tensor) -> Tensor:
        doubled = weight * 1.0
        doubled.register_hook(lambda gradient: 2.0 * gradient)
        return doubled.square().sum()

    own = problem(hooked)
    with pytest.raises(IncompatibleBackendError, match="registers a hook on a tensor"):
        ht.hypergradient(own, own.init_hparams(), backend=BACKENDS[backend])


def test_outside_of_forward_mode_nothing_is_changed() -> None:
    seen: list[bool] = []

    def function(value: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return value.data

    with torch.no_grad():
        assert stopping_tangents(function)(torch.ones(2)).requires_grad is False
    assert seen == [False]


def test_an_error_leaves_tangents_on() -> None:
    def failing(value: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        raise RuntimeError("no")

    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no"):
            stopping_tangents(failing)(torch.ones(2))
        assert torch._C._is_fwd_grad_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [
        ({}, True),
        ({"reduction": "mean"}, True),
        ({"reduction": "sum"}, False),
        ({"weight": torch.ones(3)}, False),
        ({"size_average": False}, False),
        ({"reduce": False}, False),
    ],
)
def test_only_a_plain_mean_is_written_out(options: dict, is_plain: bool) -> None:
    values = torch.zeros(3), torch.ones(3)
    assert stopped_gradients._is_plain_mean(values, options) is is_plain
    assert stopped_gradients._is_plain_mean((*values, False), {}) is False
