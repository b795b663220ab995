"""The plain run of the inner loop: figures after chosen steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import TensorDict

F64 = torch.float64


class Decay(ht.InnerProblem):
    """`w` shrinks by `1 - lr` at each step, from where each task starts."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["start"]}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: None) -> Tensor:
        return 0.5 * params["w"].square().sum()


class Size(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {"start": torch.tensor([1.0, -2.0], dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor | None) -> Tensor:
        return params["w"].sum()

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Tensor | None) -> TensorDict:
        return {"first": params["w"][0]}


class PerTask(Size):
    """The same for three tasks, whose figure is scaled by the task's own factor."""

    def batch(self, outer_step: int) -> Tensor:
        return torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Tensor | None) -> TensorDict:
        assert batch is not None
        return {"first": batch * params["w"][0]}


SGD = ht.dynamics.SGD(lr=0.5)


def test_figures_are_taken_after_the_steps_asked_for() -> None:
    problem = ht.BilevelProblem(Decay(), Size(), dynamics=SGD, num_steps=4)
    result = ht.unroll(problem, problem.init_hparams(), metrics_after=(0, 1, 4))
    torch.testing.assert_close(result.metrics_after["first"], torch.tensor([1.0, 0.5, 0.0625], dtype=F64))
    torch.testing.assert_close(result.metrics["first"], torch.tensor(0.0625, dtype=F64))
    assert ht.unroll(problem, problem.init_hparams()).metrics_after == {}


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_figures_of_tasks_have_the_tasks_first(route: str) -> None:
    problem = ht.BilevelProblem(
        Decay(),
        PerTask(),
        dynamics=SGD,
        num_steps=2,
        num_tasks=3,  # type: ignore[arg-type]
    )
    result = ht.unroll(problem, problem.init_hparams(), metrics_after=range(3), execution=ht.Execution(tasks=route))
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=F64)[:, None] * torch.tensor([1.0, 0.5, 0.25], dtype=F64)
    torch.testing.assert_close(result.metrics_after["first"], expected)


@pytest.mark.parametrize("asked", [(3,), (-1,), (1, 0), (1, 1)])
def test_steps_that_there_are_not_are_refused(asked: tuple[int, ...]) -> None:
    problem = ht.BilevelProblem(Decay(), Size(), dynamics=SGD, num_steps=2)
    with pytest.raises(ValueError, match=r"`metrics_after` is .* after 0 to 2 steps.*ascending"):
        ht.unroll(problem, problem.init_hparams(), metrics_after=asked)


def test_figures_that_change_their_arguments_change_no_run() -> None:
    class Changing(ht.OuterProblem):
        def init_hparams(self) -> TensorDict:
            return {"start": torch.ones(2, dtype=F64)}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: None) -> Tensor:
            return params["w"].square().sum() + hparams["start"].sum()

        def metrics(self, params: TensorDict, hparams: TensorDict, batch: None) -> TensorDict:
            size = params["w"].mul_(2.0).sum() + hparams["start"].clamp_(max=0.5).sum()
            params["w"] = hparams["start"] = torch.zeros(3)
            return {"size": size}

    problem = ht.BilevelProblem(Decay(), Changing(), dynamics=ht.dynamics.SGD(lr=0.5), num_steps=2)
    hparams = problem.init_hparams()
    result = ht.unroll(problem, hparams, metrics_after=(0, 1))
    torch.testing.assert_close(result.params["w"], torch.full((2,), 0.25, dtype=F64))
    torch.testing.assert_close(result.outer_loss, torch.tensor(2.125, dtype=F64))
    torch.testing.assert_close(result.metrics_after["size"], torch.tensor([5.0, 3.0], dtype=F64))
    assert torch.equal(hparams["start"], torch.ones(2, dtype=F64))

    def sgd(variables: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(variables, lr=0.0)

    loop = ht.OuterLoop(problem, optimizer=sgd, backend=ht.hypergradients.Reverse(), log_every=1)
    assert torch.equal(loop.run(2).hparams["start"], torch.ones(2, dtype=F64))
