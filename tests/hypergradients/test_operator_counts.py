"""What a run asks of PyTorch, counted: no operation more than the same arithmetic written by hand."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hypertorch as ht
from hypertorch.hypergradients import EvoGrad, Reverse
from tests.helpers.problems import LambdaInner, LambdaOuter, normal

LR = 0.1
INPUTS, TARGETS = normal(5, 3, seed=1), torch.tensor([0, 1, 2, 0, 1])
START = normal(5, seed=2)


class Count(TorchDispatchMode):
    """Counts the operations of PyTorch that run, those of the backward pass among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def inner_loss(predict: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    return (weight.sigmoid() * F.cross_entropy(predict(INPUTS), TARGETS, reduction="none")).mean()


def outer_loss(predict: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(predict(INPUTS), TARGETS)


def by_library(backend: ht.Hypergradient, num_steps: int) -> Tensor:
    net = ht.FunctionalModule(network())
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: net.init_params(), lambda p, h, b: inner_loss(lambda x: net(p, x), h["weight"])),
        LambdaOuter({"weight": START}, lambda p, h, b: outer_loss(lambda x: net(p, x))),
        dynamics=ht.dynamics.SGD(lr=LR),
        num_steps=num_steps,
    )
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend).grads["weight"]


def by_hand(num_steps: int) -> Tensor:
    module = network()
    names = [name for name, _ in module.named_parameters()]
    params = [value.detach().requires_grad_() for value in module.parameters()]
    weight = START.clone().requires_grad_()

    def predict(inputs: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, params, strict=True)), inputs)

    for _ in range(num_steps):
        grads = torch.autograd.grad(inner_loss(predict, weight), params, create_graph=True)
        params = [param.add(grad, alpha=-LR) for param, grad in zip(params, grads, strict=True)]
    return torch.autograd.grad(outer_loss(predict), weight)[0]


def per_step(run: Callable[[int], Tensor], shortest: int = 4) -> Counter[str]:
    """Returns the operations of one more step, which are the same for every step."""
    counts: list[Counter[str]] = []
    run(shortest)  # the first of its kind is looked at for side effects
    for num_steps in (shortest, shortest + 1, shortest + 2):
        with Count() as count:
            run(num_steps)
        counts.append(count.calls)
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert first == second
    return first


def test_the_whole_graph_runs_no_operation_more_than_a_loop_by_hand() -> None:
    torch.testing.assert_close(by_library(Reverse(), 5), by_hand(5))
    extra = per_step(lambda steps: by_library(Reverse(), steps)) - per_step(by_hand)
    # `detach` makes no tensor of its own memory; the loss of each step is kept for the result.
    assert not extra - Counter({"aten.detach.default": 1}), extra


def test_step_wise_runs_each_step_once_more_and_no_graph_twice() -> None:
    whole = per_step(lambda steps: by_library(Reverse(), steps))
    step_wise = per_step(lambda steps: by_library(Reverse(checkpoint_every=1), steps))
    forward = "aten._log_softmax.default"
    assert whole[forward] == 1
    assert step_wise[forward] == 2
    backward = "aten._log_softmax_backward_data.default"
    assert whole[backward] == 1 + 1
    assert step_wise[backward] == 1 + whole[backward]


def python_calls(num_steps: int) -> int:
    """Returns the calls of Python functions of the library in a run."""
    calls = 0
    own = str(Path(ht.__file__).parent)

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(own)

    sys.setprofile(watch)
    try:
        by_library(Reverse(), num_steps)
    finally:
        sys.setprofile(None)
    return calls


def test_a_step_takes_few_calls_of_python() -> None:
    by_library(Reverse(), 2)
    assert python_calls(21) - python_calls(20) == python_calls(31) - python_calls(30)
    assert python_calls(21) - python_calls(20) <= 60, python_calls(21) - python_calls(20)


@pytest.mark.parametrize("num_steps", [3, 10])
def test_the_inner_loop_is_run_once(num_steps: int) -> None:
    by_library(Reverse(), num_steps)  # what is looked at once for a kind of problem
    with Count() as count:
        by_library(Reverse(), num_steps)
    assert count.calls["aten._log_softmax.default"] == num_steps + 1


def test_a_further_copy_of_evo_grad_runs_one_forward_pass_and_no_backward_pass_of_the_net() -> None:
    def counted(num_copies: int) -> Counter[str]:
        by_library(EvoGrad(num_copies=num_copies), 1)  # the first of its kind is looked at for side effects
        with Count() as count:
            by_library(EvoGrad(num_copies=num_copies), 1)
        return count.calls

    module, weight = network(), START.clone().requires_grad_()
    theta = {name: value.detach() for name, value in module.named_parameters()}
    noise = {name: torch.randn_like(value).flatten() for name, value in theta.items()}
    with Count() as by_hand:
        copy = {name: value.add(noise[name].view(value.shape), alpha=0.1) for name, value in theta.items()}
        loss = inner_loss(lambda inputs: torch.func.functional_call(module, copy, inputs), weight)
        torch.autograd.grad(loss, weight)
    extra = counted(5) - counted(4) - by_hand.calls
    # A row of each param's noise, and the copy's part in the hypergradient: a product and a sum.
    allowed = {"select.int": len(theta), "mul.Tensor": 1, "add.Tensor": 1, "detach.default": 8}
    assert not extra - Counter({f"aten.{name}": number for name, number in allowed.items()}), extra
    assert counted(5) - counted(4) == counted(4) - counted(3)
