"""The tasks axis: routes agree with each other and with a loop over plain problems, for every norm layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.fewshot.backbones import BatchNorm
from hypertorch.inner.tasks import measured, task_slices
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaOuter, one_by_one, task_problem

Reverse = ht.hypergradients.Reverse
F64 = torch.float64


class SplitLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 4, 4)), nn.Parameter(torch.zeros(4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[1:]) * self.weight + self.bias


NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "batch": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "batch with running statistics": lambda: nn.BatchNorm2d(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm([4, 4, 4]),
    "layer without scale": lambda: nn.LayerNorm([4, 4, 4], elementwise_affine=False),
    "layer, split scale": SplitLayerNorm,
    "group": lambda: nn.GroupNorm(2, 4),
    "root mean square": lambda: nn.RMSNorm([4, 4, 4]),
    "ours, episode": lambda: BatchNorm(4, statistics="episode"),
    "ours, running": lambda: BatchNorm(4, statistics="running", momentum=0.7),
}


def net(norm: str) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), NORMS[norm](), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    with torch.no_grad():
        for parameter in module.parameters():  # scales away from 1, where the known errors would hide
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=F64))
    return module


@pytest.mark.parametrize("norm", NORMS)
def test_no_norm_layer_gives_a_wrong_hypergradient_in_batched_maml(norm: str) -> None:
    problem = task_problem(net(norm), item=(1, 4, 4))
    hparams = problem.init_hparams()
    expected = one_by_one(problem, hparams)
    for route in ("vmap", "loop"):
        actual = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks=route)).grads
        for name in hparams:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-13)
    check = ht.check_hypergradient(problem, hparams, Reverse(), num_directions=1, execution=ht.Execution(tasks="vmap"))
    assert check.passed, str(check)


def test_the_trap_that_the_route_avoids_is_still_there() -> None:
    """Documents why: the derivative over a vmap of an inner `func.grad` is wrong. A torch that mends it fails here."""
    module = net("layer")
    names = [name for name, _ in module.named_parameters()]
    theta = {name: value.detach() for name, value in module.named_parameters()}
    problem = task_problem(module, item=(1, 4, 4))
    inputs, labels = problem.inner.data  # type: ignore[attr-defined]

    def loss(params: TensorDict, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(module, params, (x,)), y)

    def task(params: TensorDict, x: Tensor, y: Tensor) -> Tensor:
        grads = torch.func.grad(loss)(params, x, y)
        return loss({name: params[name] - 0.1 * grads[name] for name in names}, x, y)

    def over(params: TensorDict) -> Tensor:
        return torch.func.vmap(task, in_dims=(None, 0, 0))(params, inputs, labels).mean()

    wrong = torch.func.grad(over)(theta)
    each = [torch.func.grad(task)(theta, x, y) for x, y in zip(inputs, labels, strict=True)]
    right = {name: torch.stack([grads[name] for grads in each]).mean(0) for name in names}
    gap = max(float((wrong[name] - right[name]).abs().max()) for name in names)
    assert gap > 1e-4, "mended upstream: the compiled route may differentiate over vmap"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_chunks_equal_the_loop(chunk: int | None, dtype: torch.dtype) -> None:
    problem = task_problem(net("ours, episode"), item=(1, 4, 4), num_tasks=5)
    hparams = {name: value.to(dtype) for name, value in problem.init_hparams().items()}
    for part in (problem.inner, problem.outer):
        part.data = (part.data[0].to(dtype), part.data[1])  # type: ignore[attr-defined]
    tolerance = 1e-12 if dtype == F64 else 1e-6  # relative to the largest entry
    loop = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    chunked = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="vmap", chunk=chunk))
    for actual, expected in (
        ({"": chunked.outer_loss}, {"": loop.outer_loss}),
        (chunked.grads, loop.grads),
        (chunked.params, loop.params),
    ):
        largest = max(float(value.abs().max()) for value in expected.values())
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0.0, atol=tolerance * largest)


def test_unroll_gives_a_figure_per_task_on_every_route() -> None:
    problem = task_problem(net("ours, running"), item=(1, 4, 4), num_tasks=4)
    hparams = problem.init_hparams()
    vectorised = ht.unroll(problem, hparams, execution=ht.Execution(tasks="vmap"))
    looped = ht.unroll(problem, hparams, execution=ht.Execution(tasks="loop"))
    assert vectorised.outer_loss.shape == (4,)
    assert vectorised.inner_losses.shape == (4, 3)
    torch.testing.assert_close(vectorised.outer_loss, looped.outer_loss)
    torch.testing.assert_close(vectorised.inner_losses, looped.inner_losses)
    torch.testing.assert_close(vectorised.metrics["accuracy"], looped.metrics["accuracy"])
    result = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="vmap"))
    torch.testing.assert_close(result.outer_loss, vectorised.outer_loss.mean())


class Prototype(ht.InnerProblem):
    """Reads a context with a tasks axis and one without."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["centre"] + hparams["shift"]}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["centre"] * hparams["scale"]).square().sum()


class Judge(LambdaOuter):
    def batch(self, outer_step: int) -> Batch:
        return {"x": torch.arange(12, dtype=F64).reshape(4, 3) + outer_step}


def test_context_with_tasks_and_shared_entries() -> None:
    hparams = {"theta": torch.tensor(0.7, dtype=F64), "scale": torch.tensor(1.3, dtype=F64)}

    def context(h: TensorDict, batch: Batch) -> TensorDict:
        return {"centre": batch["x"] * h["theta"], "shift": h["theta"].exp()}

    problem = ht.BilevelProblem(
        Prototype(),
        Judge(hparams, lambda p, h, b: (p["w"] * b["x"]).mean().square()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
        num_tasks=4,
        context=context,
        shared_context=("shift",),
    )
    results = {
        "vmap": ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="vmap")),
        "loop": ht.hypergradient(
            problem, hparams, backend=Reverse(checkpoint_every=1), execution=ht.Execution(tasks="loop")
        ),
    }
    for name in hparams:
        torch.testing.assert_close(results["vmap"].grads[name], results["loop"].grads[name], rtol=1e-13, atol=0)
    for route in ("vmap", "loop"):
        check = ht.check_hypergradient(problem, hparams, Reverse(), execution=ht.Execution(tasks=route))
        assert check.passed, str(check)


def test_a_missing_tasks_axis_is_explained() -> None:
    problem = task_problem(net("none"), item=(1, 4, 4), num_tasks=3)
    problem.inner.data = tuple(part[:2] for part in problem.inner.data)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"`InnerProblem.batch` has a tensor of shape \(2, .*`num_tasks` = 3"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(), execution=ht.Execution(tasks="vmap"))


def test_dropout_noise_differs_between_tasks_and_is_repeatable() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    problem = task_problem(module, item=(1, 4, 4), num_tasks=3)
    same = tuple(part[:1].expand_as(part) for part in problem.inner.data)  # type: ignore[attr-defined]
    problem.inner.data = problem.outer.data = same  # type: ignore[attr-defined]
    for route in ("vmap", "loop"):
        first = ht.unroll(problem, problem.init_hparams(), execution=ht.Execution(tasks=route)).outer_loss
        again = ht.unroll(problem, problem.init_hparams(), execution=ht.Execution(tasks=route)).outer_loss
        assert torch.equal(first, again)
        assert len(set(first.tolist())) == 3


def test_slices_cover_the_tasks_in_order() -> None:
    together = task_slices(5, ht.Execution(tasks="vmap", chunk=2))
    assert [(item.start, item.stop) for item in together if item is not None] == [(0, 2), (2, 4), (4, 5)]
    one_by_one = task_slices(5, ht.Execution(tasks="loop"))
    assert [item.squeeze for item in one_by_one if item is not None] == [True] * 5


def test_batches_may_hold_what_is_no_tensor() -> None:
    problem = task_problem(net("none"), item=(1, 4, 4), num_tasks=2)
    expected = ht.hypergradient(
        problem, problem.init_hparams(), backend=Reverse(), execution=ht.Execution(tasks="loop")
    ).grads
    problem.inner.data = (*problem.inner.data, "a word", 3)  # type: ignore[attr-defined]
    actual = ht.hypergradient(
        problem, problem.init_hparams(), backend=Reverse(), execution=ht.Execution(tasks="vmap")
    ).grads
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-13)


def test_the_check_takes_one_route_for_a_model_with_noise() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    problem = task_problem(module, item=(1, 4, 4), num_tasks=3)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(), num_directions=1)
    assert check.passed, str(check)


def test_warm_starts_give_every_task_its_own_state() -> None:
    problem = task_problem(net("ours, running"), item=(1, 4, 4), num_tasks=4, num_steps=2, warm_start=True)
    hparams = problem.init_hparams()
    results = {}
    names = [name for name in hparams if name != "lr"]
    allowed = dataclasses.replace(problem, allow_unused=tuple(names))
    for route, chunk in (("vmap", None), ("vmap", 3), ("loop", None)):
        routed = dataclasses.replace(allowed)
        first = ht.hypergradient(routed, hparams, backend=Reverse(), execution=ht.Execution(tasks=route, chunk=chunk))
        results[route, chunk] = ht.hypergradient(
            routed,
            hparams,
            backend=Reverse(),
            carry=first.carry,
            outer_step=1,
            execution=ht.Execution(tasks=route, chunk=chunk),
        )
    expected = results["vmap", None]
    assert int(expected.carry["index"]) == 4
    for other in results.values():
        torch.testing.assert_close(other.grads["lr"], expected.grads["lr"], rtol=1e-10, atol=1e-13)
        for name, value in expected.carry.items():
            torch.testing.assert_close(other.carry[name], value, rtol=1e-10, atol=1e-13)


class _Near(ht.InnerProblem):
    """The weight of each task is drawn to the mean of a long vector, times the task's number."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"weight": torch.zeros(1)}

    def batch(self, step: int) -> torch.Tensor:
        return torch.arange(8.0)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: torch.Tensor) -> torch.Tensor:
        return (params["weight"] - batch * hparams["long"].mean()).square().sum()


class _Weight(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {"long": torch.ones(10_000)}

    def batch(self, outer_step: int) -> torch.Tensor:
        return torch.arange(8.0)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: torch.Tensor) -> torch.Tensor:
        return params["weight"].sum()


def test_the_hypergradients_of_tasks_one_by_one_are_not_kept_side_by_side() -> None:
    problem = ht.BilevelProblem(_Near(), _Weight(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=1, num_tasks=8)
    hparams = problem.init_hparams()
    with ht.live_memory.PeakMemory() as memory:
        result = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    # dE/dlong_i = mean over tasks of 0.2 task / 10,000 = 0.7 / 10,000
    torch.testing.assert_close(result.grads["long"], torch.full((10_000,), 0.7e-4))
    of_one = 10_000 * 4
    assert memory.peak < 6 * of_one  # the sum, one task's, and what makes it


def test_a_route_measured_in_one_precision_serves_no_other() -> None:
    problem = task_problem(net("none"), item=(1, 4, 4))
    runs: list[object] = []

    def count(dtype: torch.dtype) -> int:
        before, hparams = len(runs), {"c": torch.ones((), dtype=dtype)}
        measured(ht.Execution(), problem, "a kind of its own", hparams, lambda _: None, runs.append)
        return len(runs) - before

    assert count(torch.float32) > 0
    assert count(torch.float32) == 0
    assert count(F64) > 0


def test_noise_in_the_context_is_each_tasks_own() -> None:
    """Tasks that are run one after the other, or in chunks, draw other numbers than the first."""
    hparams = {"theta": torch.tensor(0.7, dtype=F64), "scale": torch.tensor(1.3, dtype=F64)}

    def context(h: TensorDict, batch: Batch) -> TensorDict:
        return {"centre": torch.randn(len(batch["x"]), 3, dtype=F64), "shift": h["theta"].exp()}

    problem = ht.BilevelProblem(
        Prototype(),
        Judge(hparams, lambda p, h, b: h["centre"].sum()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=1,
        num_tasks=4,
        context=context,
        shared_context=("shift",),
        allow_unused=("theta", "scale"),
    )
    for execution in (ht.Execution(tasks="loop"), ht.Execution(tasks="vmap", chunk=2)):
        losses = ht.unroll(problem, hparams, execution=execution).outer_loss
        assert losses.unique().numel() == 4
