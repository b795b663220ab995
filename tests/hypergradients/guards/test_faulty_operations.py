"""What PyTorch differentiates wrongly is refused by name, and what the refusal recommends is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaOuter, normal, scalar_problem, scalars

backends = ht.hypergradients
LABELS = torch.tensor([0, 2, 1, 0])
INPUTS, OTHER = normal(4, 3, seed=1), normal(3, 2, seed=2)


def in_chunks(w: Tensor) -> Tensor:
    return F.linear_cross_entropy(INPUTS, w, LABELS, options=torch.nn.LinearCrossEntropyOptions())


def as_a_whole(w: Tensor) -> Tensor:
    return F.linear_cross_entropy(INPUTS, w, LABELS, options=None)


def scattered(w: Tensor) -> Tensor:
    return torch.as_strided_scatter(w, w[:, 0].sin(), (3,), (1,), 0).exp().sum()


def sliced(w: Tensor) -> Tensor:
    return torch.slice_scatter(w.flatten(), w[:, 0].sin(), 0, 0, 3).exp().sum()


def normalised(w: Tensor) -> Tensor:
    return (torch._weight_norm(w, w[:, :1].exp(), 0) @ OTHER).sin().sum()


def normalised_by_hand(w: Tensor) -> Tensor:
    return (w[:, :1].exp() * w / w.norm(dim=1, keepdim=True) @ OTHER).sin().sum()


def shifted(w: Tensor) -> Tensor:
    return (F.layer_norm(w, [3], None, w[0]) @ OTHER).sin().sum()


def shifted_afterwards(w: Tensor) -> Tensor:
    return ((F.layer_norm(w, [3]) + w[0]) @ OTHER).sin().sum()


FAULTY = {
    "linear_cross_entropy": (in_chunks, as_a_whole, "`linear_cross_entropy` in chunks, whose second .*options=None"),
    "as_strided_scatter": (scattered, sliced, "`as_strided_scatter`, whose second derivative.*`slice_scatter`"),
    "weight_norm": (normalised, normalised_by_hand, r"weight normalisation, whose second derivative.*g \* v / v.norm"),
    "layer_norm": (shifted, shifted_afterwards, "a layer norm with a learnt bias and no weight.*add it afterwards"),
}


def problem_of(loss: Callable[[Tensor], Tensor], num_steps: int = 3) -> ht.BilevelProblem:
    return scalar_problem(
        init=lambda h: {"w": normal(3, 3, seed=3)},
        inner=lambda p, h, b: h["c"].exp() * loss(p["w"]),
        outer=lambda p, h, b: p["w"].square().sum(),
        hparams=scalars(c=0.5),
        num_steps=num_steps,
    )


def compute(loss: Callable[[Tensor], Tensor], backend: ht.Hypergradient, num_steps: int = 3) -> TensorDict:
    problem = problem_of(loss, num_steps)
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend).grads


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize(
    "backend",
    [backends.Reverse(), backends.Reverse(checkpoint_every=1), backends.Forward(), backends.Implicit()],
    ids=repr,
)
def test_faulty_operations_are_refused_by_name(name: str, backend: ht.Hypergradient) -> None:
    loss, _, message = FAULTY[name]
    for num_steps in (1, 3):
        with pytest.raises(IncompatibleBackendError, match=message):
            compute(loss, backend, num_steps)


@pytest.mark.parametrize("name", FAULTY)
def test_what_is_recommended_is_right(name: str) -> None:
    loss, instead, _ = FAULTY[name]
    w = normal(3, 3, seed=3)
    torch.testing.assert_close(instead(w), loss(w))
    problem = problem_of(instead)
    assert ht.check_hypergradient(problem, problem.init_hparams(), backends.Reverse())


@pytest.mark.parametrize("name", FAULTY)
def test_pytorch_is_still_wrong(name: str) -> None:
    """Once this fails, the operation need not be refused any more."""
    loss, _, _ = FAULTY[name]
    w = normal(3, 3, seed=3).requires_grad_()
    if name == "layer_norm":
        with pytest.raises(RuntimeError, match="Expected a proper Tensor"):
            torch.autograd.gradgradcheck(loss, (w,))
    else:
        assert not torch.autograd.gradgradcheck(loss, (w,), raise_exception=False)


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tasks_are_refused_by_either_route(name: str, route: str) -> None:
    loss, _, message = FAULTY[name]
    problem = task_problem_of(loss)
    execution = ht.Execution(tasks=route)  # type: ignore[arg-type]
    with pytest.raises(IncompatibleBackendError, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=backends.Reverse(), execution=execution)


def test_a_constant_bias_is_served() -> None:
    problem = problem_of(lambda w: (F.layer_norm(w, [3], None, OTHER[:, 0]) @ OTHER).sin().sum())
    assert ht.check_hypergradient(problem, problem.init_hparams(), backends.Reverse())


def test_backends_without_second_derivatives_take_them() -> None:
    dropped = backends.EvolutionStrategies(num_pairs=2, sigma=0.01)
    assert torch.isfinite(compute(in_chunks, dropped)["c"])


class TaskInner(ht.InnerProblem):
    """A loss of one matrix for each of two tasks."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        self.of = loss

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": normal(3, 3, seed=3)}

    def batch(self, step: int) -> Tensor:
        return scalars(factor=0.7)["factor"].expand(2)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        return batch * hparams["c"].exp() * self.of(params["w"])


def task_problem_of(loss: Callable[[Tensor], Tensor]) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        TaskInner(loss),
        LambdaOuter(scalars(c=0.5), lambda p, h, b: p["w"].square().sum()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
        num_tasks=2,
    )


def test_it_costs_one_loss_once() -> None:
    calls: list[int] = []

    def loss(w: Tensor) -> Tensor:
        calls.append(1)
        return w.square().sum()

    # The first time the problem is looked at for side effects too.
    for expected in (3 + 6 + 1, 3, 3):
        calls.clear()
        compute(loss, backends.Reverse())
        assert len(calls) == expected
