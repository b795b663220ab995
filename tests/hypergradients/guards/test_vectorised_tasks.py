"""Vectorised tasks are compared with a task alone: what PyTorch gets wrong under `vmap` is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.guards import vectorised_tasks
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaOuter, normal, scalars

backends = ht.hypergradients
START = normal(3, 3, seed=3)
FACTORS = torch.tensor([0.7, 1.3], dtype=torch.float64)


def selected(w: Tensor) -> Tensor:
    return torch.select_scatter(w, w[:, 0].sin(), 1, 0).exp().sum()


def where(w: Tensor) -> Tensor:
    """The same, by an operation that is right under `vmap`."""
    return torch.where(torch.arange(3) == 0, w[:, :1].sin(), w).exp().sum()


class Scaled(ht.InnerProblem):
    """A loss of one matrix, with a factor for each task."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        self.of = loss

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": START}

    def batch(self, step: int) -> Tensor:
        return FACTORS

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        return batch * (hparams["c"].exp() + hparams.get("own", 0.0)) * self.of(params["w"])


class Judge(LambdaOuter):
    """Judges the params."""

    def __init__(self) -> None:
        super().__init__(scalars(c=-1.5), lambda p, h, b: p["w"].square().sum())

    def batch(self, outer_step: int) -> Batch:
        return FACTORS


def problem_of(loss: Callable[[Tensor], Tensor], **options: object) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        Scaled(loss),
        Judge(),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
        num_tasks=2,
        **options,  # type: ignore[arg-type]
    )


def compute(problem: ht.BilevelProblem, route: str, backend: ht.Hypergradient | None = None) -> Tensor:
    return ht.hypergradient(
        problem,
        problem.init_hparams(),
        backend=backend or backends.Reverse(),
        execution=ht.Execution(tasks=route),  # type: ignore[arg-type]
    ).grads["c"]


@pytest.mark.parametrize(
    "backend",
    [
        backends.Reverse(),
        backends.Forward(),
        backends.FirstOrder(),
        backends.EvolutionStrategies(num_pairs=1, sigma=0.1),
    ],
    ids=lambda backend: type(backend).__name__,
)
def test_a_wrong_batching_rule_is_refused(backend: ht.Hypergradient) -> None:
    with pytest.raises(IncompatibleBackendError, match=r"differs between vectorised.*tasks='loop'"):
        compute(problem_of(selected), "vmap", backend)


def test_what_is_recommended_is_right() -> None:
    problem = problem_of(selected)
    loop = ht.Execution(tasks="loop")
    assert ht.check_hypergradient(problem, problem.init_hparams(), backends.Reverse(), execution=loop)
    for other, route in ((problem, "auto"), (problem_of(where), "vmap"), (problem_of(where), "loop")):
        torch.testing.assert_close(compute(other, route), compute(problem, "loop"))


def test_pytorch_is_still_wrong() -> None:
    """Once this fails, `select_scatter` serves to show nothing any more."""
    values, columns = normal(2, 3, 3, seed=3), normal(2, 3, seed=5).requires_grad_()
    weights = normal(2, 3, 3, seed=6)
    placed = torch.func.vmap(lambda value, column: torch.select_scatter(value, column, 1, 0))(values, columns)
    (found,) = torch.autograd.grad((weights * placed).sum(), columns)
    assert not torch.allclose(found, weights[:, :, 0])


def test_a_context_has_a_row_for_each_task() -> None:
    options: dict = {
        "context": lambda hparams, batch: {"own": hparams["c"].square() * batch, "both": hparams["c"].sin()},
        "shared_context": ("both",),
    }
    torch.testing.assert_close(
        compute(problem_of(where, **options), "vmap"), compute(problem_of(where, **options), "loop")
    )
    with pytest.raises(IncompatibleBackendError, match="differs between vectorised"):
        compute(problem_of(selected, **options), "vmap")


def test_tasks_that_cannot_be_vectorised_are_refused_with_the_same_advice() -> None:
    def looked_at(w: Tensor) -> Tensor:
        return where(w) if w.detach().sum() < 1e9 else w.sum()

    with pytest.raises(
        IncompatibleBackendError, match=r"over tasks. PyTorch says: vmap.*works for a task alone.*tasks='loop'"
    ):
        compute(problem_of(looked_at), "vmap")
    torch.testing.assert_close(compute(problem_of(looked_at), "auto"), compute(problem_of(where), "loop"))


def test_an_error_of_the_user_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied|Expected size") as caught:
        compute(problem_of(lambda w: (w @ w[:2]).sum()), "vmap")
    assert not isinstance(caught.value, IncompatibleBackendError)


@pytest.mark.parametrize("draw", [lambda w: F.dropout(w, 0.5), lambda w: w * normal(3, 3, seed=7)])
def test_noise_is_not_taken_for_a_fault(draw: Callable[[Tensor], Tensor]) -> None:
    assert compute(problem_of(lambda w: where(draw(w))), "vmap").isfinite()


def test_a_problem_without_steps_says_nothing_of_one_with_steps() -> None:
    problem = problem_of(lambda w: selected(w), allow_unused=("c",))
    assert float(compute(replace(problem, num_steps=0), "vmap")) == 0.0
    with pytest.raises(IncompatibleBackendError, match="differs between vectorised"):
        compute(problem, "vmap")


def test_it_is_asked_once() -> None:
    calls = [0]

    def counted(w: Tensor) -> Tensor:
        calls[0] += 1
        return where(w)

    numbers = []
    for _ in range(3):
        calls[0] = 0
        compute(problem_of(counted), "vmap")
        numbers.append(calls[0])
    assert numbers[0] > numbers[1] == numbers[2] == 2


SAME = scalars(c=-1.5)
ENTRIES: dict[str, Callable[..., object]] = {
    "unroll": lambda problem, **how: ht.unroll(problem, SAME, **how),
    "evaluate": lambda problem, **how: ht.evaluate(problem, SAME, num_episodes=2, **how),
    "spectral_radius": lambda problem, **how: ht.spectral_radius(problem, SAME, **how),
    "check_hypergradient": lambda problem, **how: ht.check_hypergradient(problem, SAME, backends.Reverse(), **how),
}


def unrolled(problem: ht.BilevelProblem, route: str) -> Tensor:
    return ht.unroll(problem, SAME, execution=ht.Execution(tasks=route)).outer_loss  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_function_that_vectorises_tasks_refuses_it(entry: str) -> None:
    with pytest.raises(IncompatibleBackendError, match=r"differs between vectorised.*tasks='loop'"):
        ENTRIES[entry](problem_of(selected), execution=ht.Execution(tasks="vmap"))


def test_a_plain_run_by_auto_takes_the_loop() -> None:
    expected = unrolled(problem_of(selected), "loop")
    torch.testing.assert_close(unrolled(problem_of(selected), "auto"), expected)
    torch.testing.assert_close(unrolled(problem_of(where), "vmap"), expected)


@dataclass(frozen=True)
class Part:
    """A place in a problem other than the inner loss."""

    inner: type[Scaled] = Scaled
    outer: type[Judge] = Judge
    num_steps: int = 2


class SelectingJudge(Judge):
    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return selected(params["w"]) * hparams["c"].exp()


class DirectJudge(Judge):
    """Has a direct term, which first-order methods follow."""

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"].square().sum() * hparams["c"].exp()


class StepJudge(DirectJudge):
    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return selected(params["w"])


class SelectingStart(Scaled):
    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.select_scatter(START * hparams["own"], (START[:, 0] * hparams["own"]).sin(), 1, 0)}


PARTS = {
    "outer loss": Part(outer=SelectingJudge),
    "outer loss without steps": Part(inner=SelectingStart, outer=Judge, num_steps=0),
    "term of the outer loss": Part(outer=StepJudge),
    "first state": Part(inner=SelectingStart),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("backend", [backends.Reverse(), backends.FirstOrder()], ids=repr)
def test_every_vectorised_function_of_a_problem_is_compared(name: str, backend: ht.Hypergradient) -> None:
    part = PARTS[name]

    problem = replace(
        problem_of(where, context=lambda hparams, batch: {"own": hparams["c"] * batch}),
        inner=part.inner(where),
        outer=part.outer(),
        num_steps=part.num_steps,
    )
    with pytest.raises(IncompatibleBackendError, match=r"the derivative of the .* differs between vectorised"):
        compute(problem, "vmap", backend)
    torch.testing.assert_close(compute(problem, "auto", backend), compute(problem, "loop", backend))
    assert unrolled(problem, "vmap").isfinite().all()  # its values are right


def in_channels_last(w: Tensor) -> Tensor:
    images = w[None, :, :, None] * torch.ones(2, 3, 3, 2, dtype=torch.float64)
    return images.to(memory_format=torch.channels_last).sin().sum()


@pytest.mark.parametrize("entry", [compute, unrolled])
def test_an_operation_that_cannot_be_vectorised_is_named(entry: Callable[[ht.BilevelProblem, str], Tensor]) -> None:
    with pytest.raises(
        IncompatibleBackendError, match=r"`torch.Tensor.to`, which works for a task alone.*tasks='loop'"
    ):
        entry(problem_of(in_channels_last), "vmap")
    torch.testing.assert_close(entry(problem_of(in_channels_last), "auto"), entry(problem_of(in_channels_last), "loop"))


class ChannelsJudge(Judge):
    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        return {"figure": in_channels_last(params["w"])}


def test_a_metric_that_cannot_be_vectorised_is_named() -> None:
    problem = replace(problem_of(where), outer=ChannelsJudge())

    def figure(route: Any) -> Tensor:
        return ht.unroll(problem, SAME, execution=ht.Execution(tasks=route)).metrics["figure"]

    with pytest.raises(IncompatibleBackendError, match=r"`torch.Tensor.to`, which works for a task alone"):
        figure("vmap")
    torch.testing.assert_close(figure("auto"), figure("loop"))


def fails_backwards(w: Tensor) -> Tensor:
    """Works for one matrix only, in its backward pass."""

    class Doubled(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(value: Tensor) -> Tensor:
            return 2 * value

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        def vmap(info: object, in_dims: tuple[int, ...], value: Tensor) -> tuple[Tensor, int]:
            return Doubled.apply(value), in_dims[0]  # type: ignore[return-value]

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return 2 * torch.eye(3, dtype=grad.dtype) @ grad.reshape(3, 3)

    return Doubled.apply(w).sin().sum()  # type: ignore[union-attr]


def test_a_gradient_that_cannot_be_vectorised_is_explained() -> None:
    with pytest.raises(IncompatibleBackendError, match=r"the gradient of a loss, which works for a task alone"):
        compute(problem_of(fails_backwards), "vmap")
    torch.testing.assert_close(
        compute(problem_of(fails_backwards), "auto"), compute(problem_of(fails_backwards), "loop")
    )


def test_first_derivatives_need_no_second_to_be_compared() -> None:
    def once(w: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        targets = torch.tensor([0, 2, 1])
        return F.linear_cross_entropy(START, w, targets, reduction="none", options=options).sum()

    direct = replace(problem_of(once), outer=DirectJudge())
    together, one_by_one = (compute(direct, route, backends.FirstOrder()) for route in ("vmap", "loop"))
    torch.testing.assert_close(together, one_by_one)
    with pytest.raises(IncompatibleBackendError, match="`linear_cross_entropy` in chunks"):
        compute(problem_of(once), "vmap")


@pytest.mark.parametrize("share", [1.0, 0.01, 1e-6])
def test_an_entry_that_is_small_beside_the_others_is_compared_too(share: float) -> None:
    of_one = {"large": torch.ones(3, dtype=torch.float64), "small": share * torch.ones(3, dtype=torch.float64)}
    of_all = {name: torch.stack([value, value]) for name, value in of_one.items()}
    assert vectorised_tasks._different_entry(of_all, of_one, 0.0) is None
    assert vectorised_tasks._different_entry({**of_all, "small": 1.2 * of_all["small"]}, of_one, 0.0) == "small"
