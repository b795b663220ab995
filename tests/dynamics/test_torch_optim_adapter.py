"""PyTorch's optimisers through `higher`: values, hypergradients of every setting that is accepted, and refusals."""

from __future__ import annotations

import inspect
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import higher
import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import tree
from hypertorch.dynamics import TorchOptim
from hypertorch.errors import DetachedHyperparameterError, NonFiniteError
from hypertorch.types import TensorDict
from tests.dynamics.leaves import double_counters
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

F64 = torch.float64
Hyper = ht.Hyper
optim = torch.optim
Reverse, Forward = ht.hypergradients.Reverse, ht.hypergradients.Forward
NUM_STEPS = 6
SHAPES = {"first": (4, 6), "second": (6, 3)}

# (class, fixed options, learnt options with their first values); an option of a class that is in no row is refused.
LEARNT: dict[str, tuple[type[optim.Optimizer], dict[str, Any], dict[str, float]]] = {
    "SGD": (optim.SGD, {"momentum": 0.6}, {"lr": 0.2, "dampening": 0.2, "weight_decay": 0.03}),
    "Nesterov": (optim.SGD, {"momentum": 0.6, "nesterov": True}, {"lr": 0.2, "weight_decay": 0.03}),
    "Adam": (optim.Adam, {}, {"lr": 0.05, "betas[0]": 0.8, "eps": 0.1, "weight_decay": 0.03}),
    "AMSGrad": (
        optim.Adam,
        {"amsgrad": True, "betas[1]": 0.95},
        {"lr": 0.05, "betas[0]": 0.8, "eps": 0.1, "weight_decay": 0.03},
    ),
    "Adagrad": (
        optim.Adagrad,
        {"initial_accumulator_value": 0.1},
        {"lr": 0.1, "lr_decay": 0.1, "eps": 0.1, "weight_decay": 0.03},
    ),
    "Adadelta": (optim.Adadelta, {}, {"lr": 0.5, "rho": 0.8, "eps": 0.1, "weight_decay": 0.03}),
    "Adamax": (optim.Adamax, {}, {"lr": 0.05, "betas[0]": 0.8, "betas[1]": 0.9, "eps": 0.1, "weight_decay": 0.03}),
    "ASGD": (optim.ASGD, {"lr": 0.2, "lambd": 0.1, "alpha": 0.8, "t0": 2}, {"weight_decay": 0.03}),
    "RMSprop": (optim.RMSprop, {}, {"lr": 0.02, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.03}),
    "centred RMSprop": (
        optim.RMSprop,
        {"centered": True, "momentum": 0.5},
        {"lr": 0.02, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.03},
    ),
}
SUPPORTED = {row[0] for row in LEARNT.values()}


def with_pairs(optimizer: type[optim.Optimizer], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which `betas[0]` and `betas[1]` are put into `betas`."""
    whole = {name: value for name, value in options.items() if "[" not in name}
    if any("[" in name for name in options):
        default = inspect.signature(optimizer).parameters["betas"].default
        whole["betas"] = tuple(options.get(f"betas[{position}]", default[position]) for position in (0, 1))
    return whole


def learnt_problem(row: str, per: ht.dynamics.settings.Per = "one") -> ht.BilevelProblem:
    """The two-layer net trained by an optimiser all of whose accepted settings are learnt."""
    optimizer, fixed, values = LEARNT[row]
    options = with_pairs(optimizer, {**fixed, **{name: Hyper(name, per=per) for name in values}})
    entries: TensorDict = {}
    for position, (name, value) in enumerate(values.items()):
        if per == "one":
            entries[name] = torch.tensor(value, dtype=F64)
        elif per == "step":
            entries[name] = value * (1.0 + 0.2 * normal(NUM_STEPS, seed=50 + position).tanh())
        else:
            for parameter, shape in SHAPES.items():
                entries[f"{name}.{parameter}"] = value * (1.0 + 0.1 * normal(*shape, seed=60 + position).tanh())
    return net_problem(TorchOptim(optimizer, options=options), entries, num_steps=NUM_STEPS)


# Values


def loss_of(params: TensorDict) -> Tensor:
    hidden = torch.tanh(normal(8, 4, seed=1) @ params["first"])
    return (hidden @ params["second"]).square().mean() + params["second"].sum().sin()


def start_params() -> TensorDict:
    return {"first": normal(4, 5, seed=2), "second": normal(5, 2, seed=3), "unused": normal(3, seed=4)}


VALUES: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    (optim.Adam, {}),
    (optim.Adam, {"lr": 0.05, "eps": 0.1}),
    (optim.Adam, {"lr": 0.05, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.05}),
    (optim.Adam, {"lr": 0.05, "betas": (0.5, 0.9), "amsgrad": True}),
    (optim.Adagrad, {"lr": 0.1}),
    (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 0.1, "weight_decay": 0.05}),
    (optim.Adadelta, {}),
    (optim.Adadelta, {"lr": 0.7, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.05}),
    (optim.Adamax, {}),
    (optim.Adamax, {"lr": 0.05, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.05}),
    (optim.ASGD, {"lr": 0.1}),
    (optim.ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 3, "weight_decay": 0.05}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.05, "momentum": 0.5}),
    (optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "centered": True, "momentum": 0.5}),
]


@pytest.mark.parametrize(("optimizer", "options"), VALUES, ids=str)
def test_values_equal_torch_optim_over_20_steps(optimizer: type[optim.Optimizer], options: dict) -> None:
    theirs = {name: value.clone().requires_grad_() for name, value in start_params().items()}
    reference = optimizer(list(theirs.values()), **options)
    with double_counters():
        for _ in range(20):
            reference.zero_grad()
            (loss_of(theirs) + 0.0 * theirs["unused"].sum()).backward()
            reference.step()
    ours = run_20_steps(TorchOptim(optimizer, options=options))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-12, atol=1e-12)


def run_20_steps(dynamics: ht.Dynamics) -> TensorDict:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: start_params(), lambda p, h, b: loss_of(p)),
        LambdaOuter({"idle": torch.zeros((), dtype=F64)}, lambda p, h, b: p["first"].sum()),
        dynamics=dynamics,
        num_steps=20,
    )
    return ht.unroll(problem, problem.init_hparams()).params


def test_a_schedule_is_that_of_a_group_changed_at_every_step() -> None:
    rates, betas = tuple(torch.linspace(0.1, 0.01, 20).tolist()), tuple(torch.linspace(0.5, 0.9, 20).tolist())
    theirs = {name: value.clone().requires_grad_() for name, value in start_params().items()}
    reference = optim.Adamax(list(theirs.values()))
    for lr, beta in zip(rates, betas, strict=True):
        reference.param_groups[0].update(lr=lr, betas=(beta, 0.99))
        reference.zero_grad()
        (loss_of(theirs) + 0.0 * theirs["unused"].sum()).backward()
        reference.step()
    ours = run_20_steps(TorchOptim(optim.Adamax, options={"lr": rates, "betas": (betas, 0.99)}))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-12, atol=1e-12)


def test_each_part_of_the_params_has_its_own_setting() -> None:
    theirs = {name: value.clone().requires_grad_() for name, value in start_params().items()}
    groups = [{"params": [theirs["first"]], "lr": 0.1}, {"params": [theirs["second"], theirs["unused"]], "lr": 0.01}]
    reference = optim.Adamax(groups)
    for _ in range(20):
        reference.zero_grad()
        (loss_of(theirs) + 0.0 * theirs["unused"].sum()).backward()
        reference.step()
    ours = run_20_steps(TorchOptim(optim.Adamax, options={"lr": {"first": 0.1, "*": 0.01}}))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-12, atol=1e-12)


def test_single_precision_stays_single() -> None:
    single = {name: value.float() for name, value in start_params().items()}
    for optimizer in SUPPORTED:
        dynamics = TorchOptim(optimizer)
        grads = {name: value * 0.1 for name, value in single.items()}
        state = dynamics.init(single, {})
        for index in range(3):
            single, state = dynamics.update(grads, single, state, {}, index)
        assert all(value.dtype == torch.float32 for value in [*single.values(), *state.values()])


# Hypergradients


@pytest.mark.sampled(3)
@pytest.mark.parametrize("per", ["one", "step", "parameter"])
@pytest.mark.parametrize("row", LEARNT)
def test_hypergradient_of_every_accepted_setting(row: str, per: ht.dynamics.settings.Per) -> None:
    problem = learnt_problem(row, per)
    hparams = problem.init_hparams()
    check = ht.check_hypergradient(problem, hparams, Reverse(), num_directions=1, step_size=1e-5)
    assert check.passed, str(check)
    exact = ht.hypergradient(problem, hparams, backend=Reverse()).grads
    for backend in (Reverse(checkpoint_every=1), Reverse(checkpoint_every=4), Forward()):
        grads = ht.hypergradient(problem, hparams, backend=backend).grads
        for name, value in exact.items():
            torch.testing.assert_close(grads[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row", LEARNT)
def test_dual_numbers_agree_with_reverse_mode(row: str) -> None:
    optimizer, fixed, values = LEARNT[row]
    ridge_like = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["w0"]}, lambda p, h, b: (p["w"] * normal(3, seed=5)).square().sum() * h["c"]),
        LambdaOuter(
            {"w0": normal(3, seed=6), "c": torch.tensor(0.7, dtype=F64), **hyper_tensors(values)},
            lambda p, h, b: p["w"].sin().sum(),
        ),
        dynamics=TorchOptim(optimizer, options=with_pairs(optimizer, {**fixed, **{n: Hyper(n) for n in values}})),
        num_steps=4,
    )
    hparams = ridge_like.init_hparams()
    exact = ht.hypergradient(ridge_like, hparams, backend=Reverse()).grads
    duals = ht.hypergradient(ridge_like, hparams, backend=Forward(chunk_size=1)).grads
    for name, value in exact.items():
        torch.testing.assert_close(duals[name], value, rtol=1e-10, atol=1e-13)


def hyper_tensors(values: dict[str, float]) -> TensorDict:
    return {name: torch.tensor(value, dtype=F64) for name, value in values.items()}


@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [
        (optim.SGD, {"lr": Hyper("lr"), "momentum": 0.6, "dampening": 0.2}, partial(ht.dynamics.SGD)),
        (optim.SGD, {"lr": Hyper("lr"), "momentum": 0.6, "nesterov": True}, partial(ht.dynamics.SGD)),
        (optim.Adam, {"lr": Hyper("lr"), "eps": 1e-3}, partial(ht.dynamics.Adam)),
        (optim.Adam, {"lr": Hyper("lr"), "eps": 0.1, "amsgrad": True}, partial(ht.dynamics.Adam)),
        (optim.Adagrad, {"lr": Hyper("lr"), "lr_decay": 0.1, "eps": 1e-3}, partial(ht.dynamics.Adagrad)),
        (optim.RMSprop, {"lr": Hyper("lr"), "alpha": 0.8, "centered": True}, partial(ht.dynamics.RMSprop)),
        (optim.RMSprop, {"lr": Hyper("lr"), "momentum": 0.5, "weight_decay": 0.1}, partial(ht.dynamics.RMSprop)),
    ],
    ids=str,
)
def test_agrees_with_our_own_dynamics(theirs: type[optim.Optimizer], options: dict, ours: Any) -> None:
    entries = hyper_tensors({"lr": 0.05})
    a, b = (
        net_problem(dynamics, entries, num_steps=NUM_STEPS)
        for dynamics in (TorchOptim(theirs, options=options), ours(**options))
    )
    first = ht.hypergradient(a, a.init_hparams(), backend=Reverse())
    second = ht.hypergradient(b, b.init_hparams(), backend=Reverse())
    torch.testing.assert_close(first.outer_loss, second.outer_loss, rtol=1e-12, atol=0)
    for name, value in second.grads.items():
        torch.testing.assert_close(first.grads[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", sorted(SUPPORTED, key=str), ids=str)
def test_a_weight_decay_that_is_exactly_zero_is_still_learnt(optimizer: type[optim.Optimizer]) -> None:
    dynamics = TorchOptim(optimizer, options={"lr": 0.1, "weight_decay": Hyper("decay")})
    problem = net_problem(dynamics, hyper_tensors({"decay": 0.0}), num_steps=4)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(), num_directions=1, step_size=1e-6)
    decay = next(entry for entry in check.checks if entry.name == "decay")
    assert abs(decay.actual) > 1e-3
    assert decay.error < 1e-6


def test_tasks_vectorised_equal_a_loop() -> None:
    dynamics = TorchOptim(optim.Adamax, options={"lr": Hyper("lr")})
    results = {}
    for route in ("vmap", "loop"):
        module = torch.nn.Linear(4, 3, dtype=F64)
        torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(module.bias)
        problem = task_problem(module, item=(4,))
        problem = ht.BilevelProblem(problem.inner, problem.outer, dynamics=dynamics, num_steps=4, num_tasks=3)
        results[route] = ht.hypergradient(
            problem, problem.init_hparams(), backend=Reverse(checkpoint_every=2), execution=ht.Execution(tasks=route)
        )
    for name, value in results["loop"].grads.items():
        torch.testing.assert_close(results["vmap"].grads[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("row", LEARNT)
def test_a_warm_start_goes_on_where_the_run_ended(row: str) -> None:
    optimizer, fixed, values = LEARNT[row]
    dynamics = TorchOptim(optimizer, options=with_pairs(optimizer, {**fixed, **values}))

    def problem(num_steps: int, warm_start: bool) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LambdaInner(lambda h: start_params(), lambda p, h, b: loss_of(p) * h["c"]),
            LambdaOuter(hyper_tensors({"c": 0.5}), lambda p, h, b: loss_of(p)),
            dynamics=dynamics,
            num_steps=num_steps,
            warm_start=warm_start,
        )

    hparams = hyper_tensors({"c": 0.5})
    whole = ht.unroll(problem(7, False), hparams).params
    first = ht.hypergradient(problem(3, True), hparams, backend=Reverse())
    second = ht.hypergradient(problem(4, True), hparams, backend=Reverse(checkpoint_every=1), carry=first.carry)
    for name, value in whole.items():
        torch.testing.assert_close(second.params[name], value, rtol=1e-13, atol=1e-15)


def test_learnt_first_buffers() -> None:
    entries = {f"buffers.exp_avg.{name}": 0.1 * normal(*shape, seed=70) for name, shape in SHAPES.items()}
    dynamics = ht.dynamics.LearnedBuffers(TorchOptim(optim.Adamax, options={"lr": 0.05}))
    problem = net_problem(dynamics, entries, num_steps=4)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(), num_directions=1, step_size=1e-5)
    assert check.passed, str(check)


def test_a_learnt_first_momentum_that_dampening_overwrites_is_refused() -> None:
    entries = {f"buffers.momentum_buffer.{name}": 0.1 * normal(*shape, seed=70) for name, shape in SHAPES.items()}
    options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}
    problem = net_problem(ht.dynamics.LearnedBuffers(TorchOptim(optim.SGD, options=options)), entries)
    with pytest.raises(DetachedHyperparameterError, match="buffers.momentum_buffer"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


def test_takes_part_in_groups() -> None:
    dynamics = ht.dynamics.Groups(
        {"first": TorchOptim(optim.Adadelta, options={"lr": Hyper("lr")}), "*": ht.dynamics.SGD(lr=Hyper("lr"))}
    )
    problem = net_problem(dynamics, hyper_tensors({"lr": 0.3}), num_steps=4)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(), num_directions=1)
    assert check.passed, str(check)


# Coordinates without a gradient


def problem_without_gradients(dynamics: ht.Dynamics) -> ht.BilevelProblem:
    """Of two weights, the loss reads the first alone: `dw_T / dw_0` of the second is 1."""
    return ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": h["w0"]}, lambda p, h, b: (p["w"] * torch.tensor([1.0, 0.0], dtype=F64)).square().sum()
        ),
        LambdaOuter({"w0": torch.tensor([1.0, 2.0], dtype=F64)}, lambda p, h, b: p["w"].square().sum()),
        dynamics=dynamics,
        num_steps=4,
    )


EVERYWHERE: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.Adadelta, {}),
    (optim.Adamax, {}),
]
IN_REVERSE_MODE: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.Adam, {}),
    (optim.Adam, {"amsgrad": True}),
    (optim.Adagrad, {}),
    (optim.RMSprop, {"lr": 1e-3}),
    (optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
]


@pytest.mark.parametrize(("optimizer", "options"), EVERYWHERE + IN_REVERSE_MODE, ids=str)
@pytest.mark.parametrize("every", [None, 1])
def test_a_weight_without_a_gradient_in_reverse_mode(optimizer: Any, options: dict, every: int | None) -> None:
    problem = problem_without_gradients(TorchOptim(optimizer, options=options))
    grads = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=every)).grads
    assert float(grads["w0"][1]) == pytest.approx(4.0, rel=1e-12)
    assert torch.isfinite(grads["w0"][0])


@pytest.mark.parametrize(("optimizer", "options"), EVERYWHERE, ids=str)
def test_a_weight_without_a_gradient_in_forward_mode(optimizer: Any, options: dict) -> None:
    problem = problem_without_gradients(TorchOptim(optimizer, options=options))
    grads = ht.hypergradient(problem, problem.init_hparams(), backend=Forward()).grads
    assert float(grads["w0"][1]) == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "options", "backend"),
    [
        *((optimizer, options, Forward()) for optimizer, options in IN_REVERSE_MODE),
        (optim.RMSprop, {"centered": True}, Reverse()),
    ],
    ids=str,
)
def test_an_infinite_derivative_is_an_error(optimizer: Any, options: dict, backend: ht.Hypergradient) -> None:
    problem = problem_without_gradients(TorchOptim(optimizer, options=options))
    with pytest.raises(NonFiniteError, match="square root at 0"):
        ht.hypergradient(problem, problem.init_hparams(), backend=backend)


def test_a_partial_of_a_class_is_the_class_with_options() -> None:
    rule = TorchOptim(partial(optim.Adamax, lr=0.3, eps=1e-3), options={"lr": Hyper("lr")})
    assert rule.optimizer is optim.Adamax
    assert rule.options == {"lr": Hyper("lr"), "eps": 1e-3}


# Refusals


def test_every_setting_is_either_proven_or_refused() -> None:
    for optimizer in SUPPORTED:
        proven = {name for row in LEARNT.values() if row[0] is optimizer for name in row[2]}
        numbers: dict[str, Any] = {}
        for parameter in list(inspect.signature(optimizer).parameters.values())[1:]:
            if isinstance(parameter.default, tuple):
                numbers.update({f"{parameter.name}[{i}]": value for i, value in enumerate(parameter.default)})
            elif isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
                numbers[parameter.name] = parameter.default
        assert proven <= set(numbers)
        for name in numbers:
            options = with_pairs(optimizer, {name: Hyper("learnt")})
            if name in proven:
                TorchOptim(optimizer, options=options)
            else:
                with pytest.raises(ValueError, match=r"gets its derivative wrong, or drops it.*plain number"):
                    TorchOptim(optimizer, options=options)


@pytest.mark.parametrize("optimizer", [optim.Adam, optim.SGD, optim.ASGD], ids=str)
def test_what_is_refused_is_wrong_in_higher(optimizer: type[optim.Optimizer]) -> None:
    """Should a later `higher` mend these, the refusals can go."""
    start = torch.tensor(1.5, dtype=F64)
    options: dict[str, Any]
    options, name, pick = {
        optim.Adam: ({"lr": 0.1, "betas": (0.9, 0.9)}, "betas", lambda value: (0.9, value)),
        optim.SGD: ({"lr": 0.1, "momentum": 0.0}, "momentum", lambda value: value),
        optim.ASGD: ({"lr": 0.1, "lambd": 0.5}, "lambd", lambda value: value),
    }[optimizer]
    at = {optim.Adam: 0.9, optim.SGD: 0.0, optim.ASGD: 0.5}[optimizer]

    def after(value: Any) -> Tensor:
        run = higher.optim.create_diff_optim(optimizer, options, params=[start], override={name: [pick(value)]})
        w = start.clone().requires_grad_()
        for _ in range(5):
            [w] = run.step(w.cos(), [w])
        return w

    variable = torch.tensor(at, dtype=F64, requires_grad=True)
    with warnings.catch_warnings():
        # PyTorch says once in a process that a number is taken out of a graph.
        warnings.simplefilter("ignore", UserWarning)
        [wrong] = torch.autograd.grad(after(variable), variable, allow_unused=True)
    right = float((after(at + 1e-6) - after(at - 1e-6)).detach()) / 2e-6
    assert abs((0.0 if wrong is None else float(wrong)) - right) > 0.01 * abs(right)


class Doubled(optim.SGD):
    """A class that `higher` does not know, although it knows its parent."""


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "message"),
    [
        (optim.Adam([torch.zeros(1)]), {}, TypeError, "an instance of Adam: the tensors it holds.*Pass the class"),
        (partial(optim.Adam, ()), {}, TypeError, "`optimizer` is a partial of .*by place.*and its options by name"),
        ("Adam", {}, TypeError, "`optimizer` is 'Adam', not a class of `torch.optim`"),
        (torch.nn.Linear, {}, TypeError, "`optimizer` is .*Linear.*, not a class of `torch.optim`"),
        (optim.Rprop, {}, ValueError, r"`optimizer` is Rprop.*sign of the gradient.*`ht.dynamics.RMSprop`"),
        (optim.AdamW, {"lr": 0.1}, ValueError, "`optimizer` is AdamW.*no differentiable form. Use `ht.dynamics.AdamW`"),
        (optim.LBFGS, {}, ValueError, "`optimizer` is LBFGS.*Use one of ASGD, Adadelta, Adagrad, Adam"),
        (Doubled, {"lr": 0.1}, ValueError, "`optimizer` is Doubled, of which"),
        (optim.Adamax, [("lr", 0.1)], TypeError, r"`options` of `TorchOptim\(Adamax\)` is \[.*not a mapping"),
        (optim.Adamax, {"rate": 0.1}, ValueError, "has 'rate', which the class does not take. It takes: lr, betas"),
        (optim.Adamax, {"params": []}, ValueError, "has 'params', which the class does not take"),
        (optim.Adamax, {"betas": 0.9}, TypeError, r"`betas` of `TorchOptim\(Adamax\)` is 0.9: it takes 2 settings"),
        (optim.Adamax, {"betas": (0.9,)}, TypeError, "it takes 2 settings"),
        (optim.Adamax, {"lr": "0.1"}, TypeError, r"`lr` of `TorchOptim\(Adamax\)` is '0.1', which is neither a number"),
        (optim.Adamax, {"lr": float("nan")}, ValueError, r"`lr` of `TorchOptim\(Adamax\)` is nan"),
        (optim.Adamax, {"lr": -0.1}, ValueError, "which PyTorch refuses: Invalid learning rate: -0.1"),
        (optim.Adamax, {"lr": [0.1, -0.2, 0.3]}, ValueError, "which PyTorch refuses: Invalid learning rate: -0.2"),
        (optim.Adamax, {"betas": (0.9, [0.5, 1.5])}, ValueError, "PyTorch refuses: Invalid beta parameter at index 1"),
        (optim.Adamax, {"lr": {"a": 0.1, "*": -0.3}}, ValueError, "PyTorch refuses: Invalid learning rate: -0.3"),
        (optim.SGD, {"lr": 0.1, "nesterov": True}, ValueError, "PyTorch refuses: Nesterov momentum requires"),
        (
            optim.SGD,
            {"lr": 0.1, "nesterov": True, "momentum": 0.9, "dampening": Hyper("d")},
            ValueError,
            "PyTorch refuses: Nesterov momentum requires a momentum and zero dampening",
        ),
        (
            optim.Adam,
            {"maximize": True},
            ValueError,
            r"`maximize` of `TorchOptim\(Adam\)`.*would descend. Negate the inner loss, or use "
            r"`ht.dynamics.Adam\(maximize=True\)`",
        ),
        (optim.Adamax, {"maximize": True}, ValueError, r"would descend. Negate the inner loss\.$"),
        (optim.Adamax, {"foreach": True}, ValueError, "`foreach` of .*has no effect on a differentiable step"),
        (optim.Adam, {"fused": True}, ValueError, "`fused` of .*has no effect"),
        (optim.Adam, {"capturable": True}, ValueError, "`capturable` of .*has no effect"),
        (optim.Adam, {"differentiable": True}, ValueError, "`differentiable` of .*has no effect"),
        (
            optim.Adam,
            {"betas": (0.9, Hyper("beta2"))},
            ValueError,
            r"`betas\[1\]` of `TorchOptim\(Adam\)` is Hyper.*derivative wrong.*or use `ht.dynamics.Adam`",
        ),
        (optim.SGD, {"momentum": [0.0, 0.9]}, ValueError, r"`momentum` of .* is \[0.0, 0.9\].*`ht.dynamics.SGD`"),
        (optim.ASGD, {"lr": Hyper("lr")}, ValueError, r"`lr` of `TorchOptim\(ASGD\)` .*plain number\.$"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_would_go_wrong_is_refused(optimizer: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TorchOptim(optimizer, options=options)


@pytest.mark.skipif(
    "decoupled_weight_decay" not in inspect.signature(optim.Adam).parameters, reason="this PyTorch has no such flag"
)
def test_decoupled_weight_decay_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`decoupled_weight_decay` .*would enter the moments. Use `ht.dynamics.AdamW`"
    ):
        TorchOptim(optim.Adam, options={"decoupled_weight_decay": True})


def test_flags_that_are_off_are_taken_and_change_nothing() -> None:
    off = {"foreach": None, "fused": False, "maximize": False, "amsgrad": False}
    params = [
        ht.unroll(problem, problem.init_hparams()).params
        for options in ({"lr": 0.1}, {"lr": 0.1, **off})
        for problem in [net_problem(TorchOptim(optim.Adam, options=options), {})]
    ]
    for name, value in params[0].items():
        assert torch.equal(value, params[1][name])


def test_a_learnt_setting_without_its_entry_is_explained() -> None:
    problem = net_problem(TorchOptim(optim.Adamax, options={"betas": (Hyper("b"), 0.9)}), {})
    with pytest.raises(ValueError, match=r"`betas\[0\]` of `TorchOptim` reads the outer variable `b`"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


def test_natural_constraints() -> None:
    options = {"lr": Hyper("lr"), "betas": (Hyper("b0", per="parameter"), 0.9), "eps": Hyper("e", torch.exp)}
    constraints = TorchOptim(optim.Adamax, options=options).constraints()
    assert set(constraints) == {"lr", "b0.*"}
    assert constraints["lr"].project(torch.tensor(-1.0)) > 0.0
    assert constraints["b0.*"].project(torch.tensor(2.0)) < 1.0


NATURAL = {
    (optim.SGD, "lr"): (0.0, math.inf, False),
    (optim.SGD, "dampening"): (0.0, 1.0, True),
    (optim.SGD, "weight_decay"): (0.0, math.inf, True),
    (optim.Adagrad, "lr_decay"): (0.0, math.inf, True),
    (optim.Adadelta, "eps"): (0.0, math.inf, False),
    (optim.Adadelta, "rho"): (0.0, 1.0, True),
    (optim.RMSprop, "alpha"): (0.0, 1.0, True),
    (optim.Adamax, "betas[0]"): (0.0, 1.0, True),
    (optim.Adamax, "betas[1]"): (0.0, 1.0, True),
}


@pytest.mark.parametrize(("optimizer", "name"), NATURAL)
def test_every_natural_range(optimizer: type[optim.Optimizer], name: str) -> None:
    lower, upper, closed_below = NATURAL[optimizer, name]
    learnt: Any = Hyper("x")
    pair = {"betas[0]": (learnt, 0.999), "betas[1]": (0.9, learnt)}
    option = {"betas": pair[name]} if name in pair else {name: learnt}
    constraint = TorchOptim(optimizer, options={"lr": 0.1, **option}).constraints()["x"]
    low, high = (float(constraint.project(torch.tensor(value, dtype=torch.float64))) for value in (-1e3, 1e3))
    assert low == lower if closed_below else lower < low < 1e-3
    assert high == 1e3 if upper == math.inf else 0.99 < high <= upper


# Classes of the user's own


class Heavy(optim.Optimizer):
    """Heavy-ball descent, for `higher` to know."""

    def __init__(self, params: Any, lr: float = 0.1, friction: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "friction": friction})


class DifferentiableHeavy(higher.optim.DifferentiableOptimizer):
    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for group, grads, state in zip(self.param_groups, grouped_grads, self.state, strict=True):
            for position, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
                own = state[position]
                own["velocity"] = (1.0 - group["friction"]) * own.get("velocity", 0.0) + grad
                self.remember(own)
                group["params"][position] = param - group["lr"] * own["velocity"]

    def remember(self, own: dict[str, Any]) -> None:
        own["step"] = own.get("step", 0) + 1


class Counting(Heavy):
    """Keeps a number that is not a function of the step."""


class DifferentiableCounting(DifferentiableHeavy):
    def remember(self, own: dict[str, Any]) -> None:
        own["total"] = 0.5


higher.optim.register_optim(Heavy, DifferentiableHeavy)  # type: ignore[arg-type]
higher.optim.register_optim(Counting, DifferentiableCounting)  # type: ignore[arg-type]


def test_a_registered_class_equals_our_rule() -> None:
    theirs = TorchOptim(Heavy, options={"lr": Hyper("lr"), "friction": Hyper("friction")})
    a = net_problem(theirs, hyper_tensors({"lr": 0.2, "friction": 0.3}))
    ours = ht.dynamics.SGD(lr=Hyper("lr"), momentum=Hyper("friction", lambda value: 1.0 - value))
    b = net_problem(ours, hyper_tensors({"lr": 0.2, "friction": 0.3}))
    for backend in (Reverse(), Reverse(checkpoint_every=3), Forward()):
        first = ht.hypergradient(a, a.init_hparams(), backend=backend).grads
        second = ht.hypergradient(b, b.init_hparams(), backend=Reverse()).grads
        for name, value in second.items():
            torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-13)


def test_a_state_that_cannot_be_carried_is_refused() -> None:
    problem = net_problem(TorchOptim(Counting), {})
    with pytest.raises(ValueError, match="`Counting` keeps `total` = 0.5 in its state"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


# The library `higher` itself


def test_imports_where_warnings_are_errors(tmp_path: Path) -> None:
    """Python warns of the source of `higher` when it compiles it, as it does where nothing was compiled before."""
    assert higher.__file__ is not None
    shutil.copytree(Path(higher.__file__).parent, tmp_path / "higher", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import hypertorch, higher; print(higher.__file__)"
    command = [sys.executable, "-B", "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(ht.__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout


def test_steps_leave_no_trace_in_the_dynamics() -> None:
    dynamics = TorchOptim(optim.Adagrad, options={"lr": Hyper("lr")})
    problem = net_problem(dynamics, hyper_tensors({"lr": 0.1}))
    first = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    second = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    for name, value in first.grads.items():
        torch.testing.assert_close(second.grads[name], value, rtol=0, atol=0)
    assert dynamics._template.param_groups[0]["params"] == [None]
    assert not dynamics._template.state[0][0]["sum"].requires_grad


def test_the_state_is_named_by_buffer_and_parameter() -> None:
    params = {"a.b": torch.zeros(2)}
    assert set(TorchOptim(optim.Adamax).init(params, {})) == {"exp_avg.a.b", "exp_inf.a.b"}
    assert TorchOptim(optim.SGD, options={"lr": 0.1}).init(params, {}) == {}
    assert TorchOptim(optim.ASGD).init(params, {}) == {}
    first = TorchOptim(optim.Adagrad, options={"initial_accumulator_value": 0.5}).init(params, {})
    assert first["sum.a.b"].tolist() == [0.5, 0.5]


def test_parameters_with_dots_in_their_names() -> None:
    plain = net_problem(TorchOptim(optim.Adamax), {}, num_steps=4)
    renamed = ht.BilevelProblem(
        LambdaInner(
            lambda h: {f"net.{name}": value for name, value in plain.inner.init_params(h).items()},
            lambda p, h, b: plain.inner.loss(tree.without_prefix("net", p), h, torch.arange(12)),
        ),
        LambdaOuter(plain.outer.init_hparams(), lambda p, h, b: plain.outer.loss(tree.without_prefix("net", p), h, b)),
        dynamics=ht.dynamics.Groups({"net.first": TorchOptim(optim.Adamax), "*": TorchOptim(optim.Adamax)}),
        num_steps=4,
    )
    whole = ht.BilevelProblem(
        LambdaInner(plain.inner.init_params, lambda p, h, b: plain.inner.loss(p, h, torch.arange(12))),
        plain.outer,
        dynamics=plain.dynamics,
        num_steps=4,
    )
    expected = ht.hypergradient(whole, whole.init_hparams(), backend=Reverse()).grads
    grads = ht.hypergradient(renamed, renamed.init_hparams(), backend=Reverse()).grads
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("row", LEARNT)
def test_buffers_follow_the_device_of_the_params(row: str) -> None:
    """On a device without values, which also shows that no step looks at one."""
    optimizer, fixed, values = LEARNT[row]
    dynamics = TorchOptim(optimizer, options=with_pairs(optimizer, {**fixed, **{name: Hyper(name) for name in values}}))
    hparams = {name: torch.empty((), device="meta") for name in values}
    params = {"w": torch.empty(3, device="meta")}
    state = dynamics.init(params, hparams)
    for index in range(3):
        params, state = dynamics.update(params, params, state, hparams, index)
    assert all(value.device.type == "meta" for value in [*params.values(), *state.values()])
