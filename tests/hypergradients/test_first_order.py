"""First-order differentiation: closed forms of the update rule at constant gradients, and what has no path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, scalars, task_problem

FirstOrder, Reverse = ht.hypergradients.FirstOrder, ht.hypergradients.Reverse
SGD, Hyper = ht.dynamics.SGD, ht.Hyper
F64 = torch.float64


class CubicInner(ht.InnerProblem):
    """Descends `sum(|w|^3 / 3 - b_t w)`, whose curvature is nowhere constant, from a learnt point."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["start"]}

    def batch(self, step: int) -> Batch:
        return normal(4, seed=step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        return (params["w"].abs() ** 3 / 3 - batch * params["w"]).sum()

    def gradient(self, w: Tensor, step: int) -> Tensor:
        return w * w.abs() - self.batch(step)


TARGET = normal(4, seed=100)


def cubic(dynamics: ht.Dynamics, num_steps: int, **settings: Tensor) -> ht.BilevelProblem:
    outer = LambdaOuter(
        {"start": 0.5 * normal(4, seed=101), **settings},
        lambda p, h, b: ((p["w"] - TARGET) ** 4).sum() / 4 + h["start"].sum(),
    )
    return ht.BilevelProblem(CubicInner(), outer, dynamics=dynamics, num_steps=num_steps)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_every_setting_of_sgd_equals_the_recursion_at_constant_gradients(
    num_steps: int, momentum: float, weight_decay: float
) -> None:
    """With g constant, `v = m v + g + d w`, `w = w - lr v` is linear, so each derivative obeys a recursion by hand."""
    hparams = scalars(lr=0.1, momentum=momentum, weight_decay=weight_decay)
    problem = cubic(SGD(**{name: Hyper(name) for name in hparams}), num_steps, **hparams)
    inner = problem.inner
    assert isinstance(inner, CubicInner)
    w, v = problem.init_hparams()["start"], torch.zeros(4, dtype=F64)
    lr, m, d = hparams["lr"], hparams["momentum"], hparams["weight_decay"]
    # Derivatives of w and of v in the start (the same number for every entry), lr, momentum and weight decay.
    in_w = {"start": torch.ones(4, dtype=F64), **{name: torch.zeros(4, dtype=F64) for name in hparams}}
    in_v = {name: torch.zeros(4, dtype=F64) for name in in_w}
    for step in range(num_steps):
        kept = 0.0 if step == 0 else m  # the buffer of the first step is the gradient, whatever the momentum
        in_v = {name: kept * value + d * in_w[name] for name, value in in_v.items()}
        in_v["momentum"] = in_v["momentum"] + (0.0 if step == 0 else v)
        in_v["weight_decay"] = in_v["weight_decay"] + w
        v = kept * v + inner.gradient(w, step) + d * w
        in_w = {name: value - lr * in_v[name] for name, value in in_w.items()}
        in_w["lr"] = in_w["lr"] - v
        w = w - lr * v
    outward = (w - TARGET) ** 3
    # Too few steps have no use for a setting.
    result = ht.hypergradient(without(problem, *hparams), problem.init_hparams(), backend=FirstOrder())
    torch.testing.assert_close(result.params["w"], w, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.grads["start"], outward * in_w["start"] + 1.0, rtol=1e-12, atol=1e-14)
    for name in hparams:
        torch.testing.assert_close(result.grads[name], outward @ in_w[name], rtol=1e-12, atol=1e-14)


def without(problem: ht.BilevelProblem, *names: str) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        problem.inner, problem.outer, dynamics=problem.dynamics, num_steps=problem.num_steps, allow_unused=names
    )


def test_an_initialisation_gets_the_outer_gradient_at_the_last_params() -> None:
    problem = without(net_problem(SGD(lr=0.3), {}, dropout=0.3), "weights")
    hparams = problem.init_hparams()
    result = ht.hypergradient(problem, hparams, backend=FirstOrder())
    params = {name: value.clone().requires_grad_() for name, value in result.params.items()}
    outward = torch.autograd.grad(problem.outer.loss(params, hparams, None), list(params.values()))
    for name, expected in zip(params, outward, strict=True):
        torch.testing.assert_close(result.grads[f"init.{name}"], expected, rtol=1e-13, atol=0)
    # The penalty's strength acts directly alone.
    torch.testing.assert_close(result.grads["log_l2"], torch.tensor(-0.06, dtype=F64), rtol=1e-13, atol=0)
    assert torch.equal(result.grads["weights"], torch.zeros(12, dtype=F64))


def test_the_forward_run_is_that_of_reverse_mode() -> None:
    settings = scalars(lr=0.3, momentum=0.6)
    problem = without(net_problem(SGD(lr=Hyper("lr"), momentum=Hyper("momentum")), settings, dropout=0.5), "weights")
    hparams = problem.init_hparams()
    first, exact = (ht.hypergradient(problem, hparams, backend=backend) for backend in (FirstOrder(), Reverse()))
    torch.testing.assert_close(first.outer_loss, exact.outer_loss, rtol=1e-12, atol=0)
    gap = (first.grads["init.first"] - exact.grads["init.first"]).norm() / exact.grads["init.first"].norm()
    assert float(gap) > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("step_terms", [False, True])
def test_a_linear_inner_loss_makes_it_exact(nesterov: bool, step_terms: bool) -> None:
    class Linear(CubicInner):
        def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
            return batch @ params["w"]

    class Outer(ht.OuterProblem):
        def init_hparams(self) -> TensorDict:
            return {"start": normal(4, seed=3), **scalars(lr=0.2, momentum=0.5, weight_decay=0.1)}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return params["w"].pow(3).sum() + hparams["lr"].exp()

    class OuterWithSteps(Outer):
        def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
            return (index + 1) * params["w"].square().sum() * hparams["momentum"]

    dynamics = SGD(lr=Hyper("lr"), momentum=Hyper("momentum"), weight_decay=Hyper("weight_decay"), nesterov=nesterov)
    outer = OuterWithSteps() if step_terms else Outer()
    problem = ht.BilevelProblem(Linear(), outer, dynamics=dynamics, num_steps=6)
    hparams = problem.init_hparams()
    first, exact = (ht.hypergradient(problem, hparams, backend=backend) for backend in (FirstOrder(), Reverse()))
    torch.testing.assert_close(first.outer_loss, exact.outer_loss, rtol=1e-14, atol=0)
    for name, expected in exact.grads.items():
        torch.testing.assert_close(first.grads[name], expected, rtol=1e-12, atol=1e-14)


def test_a_schedule_gets_a_term_for_every_step() -> None:
    schedule = torch.linspace(0.05, 0.2, 5, dtype=F64)
    problem = cubic(SGD(lr=Hyper("lr", per="step")), 5, lr=schedule)
    inner = problem.inner
    assert isinstance(inner, CubicInner)
    w, gradients = problem.init_hparams()["start"], []
    for step in range(5):
        gradients.append(inner.gradient(w, step))
        w = w - schedule[step] * gradients[-1]
    lr = ht.hypergradient(problem, problem.init_hparams(), backend=FirstOrder()).grads["lr"]
    torch.testing.assert_close(lr, -torch.stack(gradients) @ (w - TARGET) ** 3, rtol=1e-12, atol=0)


def test_a_hyperparameter_of_the_inner_loss_alone_is_refused() -> None:
    problem = net_problem(SGD(lr=0.3), {})
    message = r"`hparams\['weights'\]` reaches the outer loss, but by no path that `FirstOrder\(\)` follows.*Reverse"
    with pytest.raises(IncompatibleBackendError, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=FirstOrder())


def test_maml_is_the_mean_of_the_outer_gradients_by_either_route_with_running_statistics() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    problem = task_problem(module, item=(4,), allow_unused=("lr",))
    problem = ht.BilevelProblem(
        problem.inner, problem.outer, dynamics=SGD(lr=0.1), num_steps=3, num_tasks=3, allow_unused=("lr",)
    )
    hparams = problem.init_hparams()
    vmap, loop = (
        ht.hypergradient(problem, hparams, backend=FirstOrder(), execution=ht.Execution(tasks=route))
        for route in ("vmap", "loop")
    )
    inputs, labels = problem.outer.batch(0)
    expected = {name: torch.zeros_like(value) for name, value in hparams.items()}
    for task in range(3):
        params = {name: value[task].clone() for name, value in vmap.params.items()}
        trained = {name: params[name].requires_grad_() for name in hparams if name != "lr"}
        loss = problem.outer.loss(params, {}, (inputs[task], labels[task]))
        for name, value in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
            expected[name] += value / 3
    for name, value in expected.items():
        torch.testing.assert_close(vmap.grads[name], value, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(loop.grads[name], value, rtol=1e-10, atol=1e-14)


def test_the_context_is_chained() -> None:
    """A start that is computed from a hyperparameter gets the outer gradient through that computation."""
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["start"]}, lambda p, h, b: p["w"].pow(4).sum()),
        LambdaOuter({"raw": normal(3, seed=1)}, lambda p, h, b: p["w"].square().sum() / 2),
        dynamics=SGD(lr=0.05),
        num_steps=4,
        context=lambda hparams, batch: {"start": hparams["raw"].exp()},
    )
    hparams = problem.init_hparams()
    result = ht.hypergradient(problem, hparams, backend=FirstOrder())
    torch.testing.assert_close(result.grads["raw"], result.params["w"] * hparams["raw"].exp(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("num_steps", [3, 8])
def test_costs_are_as_documented(num_steps: int) -> None:
    problem = without(net_problem(SGD(lr=0.3), {}, num_steps=num_steps), "weights")
    stats = ht.hypergradient(problem, problem.init_hparams(), backend=FirstOrder()).stats
    assert (stats.steps, stats.vjps, stats.graph_steps, stats.stored_states) == (num_steps, num_steps, num_steps, 0)


def saved_tensors(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> int:
    """How many tensors the graph still holds when the outer loss is differentiated."""
    alive = peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            # Detached: an output that a node saves would otherwise keep the node, and the node it.
            self.tensor = tensor.detach()
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        ht.hypergradient(problem, problem.init_hparams(), backend=backend)
    return peak


def test_the_graph_of_gradient_descent_holds_nothing_and_of_a_learnt_step_size_a_gradient_per_step() -> None:
    def peak(num_steps: int, lr: float | Hyper, backend: ht.Hypergradient) -> int:
        extra = scalars(lr=0.1) if isinstance(lr, Hyper) else {}
        return saved_tensors(without(net_problem(SGD(lr=lr), extra, num_steps=num_steps), "weights"), backend)

    for lr in (0.1, Hyper("lr")):
        peak(4, lr, FirstOrder())  # the first of its kind is looked at for side effects
    assert peak(40, 0.1, FirstOrder()) == peak(4, 0.1, FirstOrder())
    # The gradients of two params.
    assert peak(40, Hyper("lr"), FirstOrder()) - peak(20, Hyper("lr"), FirstOrder()) == 20 * 2
    assert peak(40, 0.1, Reverse()) > 20 * peak(40, 0.1, FirstOrder())
