"""Clipped gradients against `torch.nn.utils`, and their hypergradients against central differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import Batch, TensorDict
from tests.dynamics.leaves import F64
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

dynamics, backends, Hyper = ht.dynamics, ht.hypergradients, ht.Hyper
Clipped, SGD, Adam = dynamics.Clipped, dynamics.SGD, dynamics.Adam
Reverse, Forward = backends.Reverse, backends.Forward
START = {"first": normal(4, 5, seed=2), "second": normal(5, 2, seed=3), "unused": normal(3, seed=4)}


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def scalars(**values: float) -> TensorDict:
    return {name: scalar(value) for name, value in values.items()}


def loss_of(params: TensorDict) -> Tensor:
    return (torch.tanh(normal(8, 4, seed=1) @ params["first"]) @ params["second"]).square().mean()


def trained_by_torch(max_norm: float | None, max_value: float | None, num_steps: int = 20) -> tuple[TensorDict, int]:
    """Returns the params, and how often a norm was above the bound."""
    params = {name: value.clone().requires_grad_() for name, value in START.items()}
    optimizer, clipped = torch.optim.Adam(list(params.values()), lr=0.05), 0
    for _ in range(num_steps):
        optimizer.zero_grad()
        (loss_of(params) + 0.0 * params["unused"].sum()).backward()
        if max_value is not None:
            nn.utils.clip_grad_value_(params.values(), max_value)
        if max_norm is not None:
            clipped += bool(nn.utils.clip_grad_norm_(params.values(), max_norm) > max_norm)
        optimizer.step()
    return {name: value.detach() for name, value in params.items()}, clipped


@pytest.mark.parametrize("kind", [float, scalar], ids=["numbers", "tensors"])
@pytest.mark.parametrize(("max_norm", "max_value"), [(0.5, None), (None, 0.1), (0.4, 0.15), (1e-7, None), (0.0, None)])
def test_values_equal_torch_over_20_steps(
    max_norm: float | None, max_value: float | None, kind: Callable[[float], float | Tensor]
) -> None:
    expected, clipped = trained_by_torch(max_norm, max_value)
    if max_norm in (0.5, 0.4):
        assert 0 < clipped < 20
    bounds = {
        name: kind(bound) for name, bound in {"max_norm": max_norm, "max_value": max_value}.items() if bound is not None
    }
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: START, lambda p, h, b: loss_of(p)),
        LambdaOuter(scalars(idle=0.0), lambda p, h, b: p["first"].sum()),
        dynamics=Clipped(Adam(lr=0.05), **bounds),
        num_steps=20,
    )
    params = ht.unroll(problem, problem.init_hparams()).params
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-12, atol=1e-12)


def rules() -> dict[str, tuple[ht.GradientDynamics, TensorDict]]:
    buffers = {
        f"buffers.momentum.{name}": 0.1 * normal(*shape, seed=70)
        for name, shape in {"first": (4, 6), "second": (6, 3)}.items()
    }
    return {
        "SGD": (SGD(lr=Hyper("lr")), scalars(lr=0.4)),
        "momentum": (SGD(lr=Hyper("lr"), momentum=Hyper("m"), weight_decay=0.03), scalars(lr=0.4, m=0.6)),
        "Adam": (Adam(lr=Hyper("lr"), eps=1e-3), scalars(lr=0.05)),
        "AdamW": (dynamics.AdamW(lr=Hyper("lr"), eps=1e-3), scalars(lr=0.05)),
        "RMSprop": (dynamics.RMSprop(lr=Hyper("lr"), eps=1e-2), scalars(lr=0.02)),
        "Adagrad": (dynamics.Adagrad(lr=Hyper("lr"), eps=1e-2), scalars(lr=0.1)),
        "NAdam": (dynamics.NAdam(lr=Hyper("lr"), eps=1e-3), scalars(lr=0.05)),
        "RAdam": (dynamics.RAdam(lr=Hyper("lr"), eps=1e-3), scalars(lr=0.1)),
        "Muon": (dynamics.Muon(lr=Hyper("lr")), scalars(lr=0.05)),
        "Groups": (dynamics.Groups({"first": SGD(lr=Hyper("lr")), "*": Adam(eps=1e-3)}), scalars(lr=0.4)),
        "LearnedBuffers": (dynamics.LearnedBuffers(SGD(lr=Hyper("lr"), momentum=0.6)), {**scalars(lr=0.3), **buffers}),
        "LearnedUpdate": (dynamics.LearnedUpdate(dynamics.CoordinatewiseLSTM(hidden=2).double()), {}),
        "ReversibleMomentum": (dynamics.ReversibleMomentum(lr=Hyper("lr"), momentum=0.7), scalars(lr=0.4)),
        "TorchOptim": (
            dynamics.TorchOptim(torch.optim.Adamax, options={"lr": Hyper("lr"), "eps": 1e-3}), scalars(lr=0.05)
        ),
    }  # fmt: skip


# The norms of the net's gradients are about 0.15 to 0.3, its entries up to 0.1.
BOUNDS: dict[str, tuple[dict, TensorDict]] = {
    "norm": ({"max_norm": Hyper("bound")}, scalars(bound=0.2)),
    "a schedule of norms": (
        {"max_norm": Hyper("bound", torch.exp, per="step")},
        {"bound": torch.tensor([-1.9, -1.6, -2.1, -1.7, -0.5, -2.0], dtype=F64)},
    ),
    "value": ({"max_value": Hyper("bound")}, scalars(bound=0.04)),
    "values for each weight": (
        {"max_value": Hyper("bound", per="parameter")},
        {
            f"bound.{name}": 0.04 * (1.0 + 0.3 * normal(*shape, seed=80).tanh())
            for name, shape in {"first": (4, 6), "second": (6, 3)}.items()
        },
    ),
    "both": ({"max_norm": Hyper("bound"), "max_value": {"first": Hyper("v"), "*": 0.05}}, scalars(bound=0.18, v=0.04)),
    "numbers": ({"max_norm": 0.2, "max_value": 0.06}, {}),
}


def clipped_net(rule: str, bounds: str) -> ht.BilevelProblem:
    inside, extra = rules()[rule]
    options, entries = BOUNDS[bounds]
    return net_problem(Clipped(inside, **options), {**extra, **entries}, num_steps=6)


PAIRS = [*(("momentum", bounds) for bounds in BOUNDS), *((rule, "both") for rule in rules() if rule != "momentum")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("rule", "bounds"), PAIRS)
def test_hypergradients_equal_central_differences_by_either_mode(rule: str, bounds: str) -> None:
    torch.manual_seed(0)
    problem = clipped_net(rule, bounds)
    hparams = problem.init_hparams()
    check = ht.check_hypergradient(problem, hparams, Reverse(), step_size=1e-6, num_directions=1)
    assert check.passed, str(check)
    expected = ht.hypergradient(problem, hparams, backend=Reverse()).grads
    assert all(bool(expected[name].any()) for name in BOUNDS[bounds][1])
    for backend in (Reverse(checkpoint_every=2), Reverse(derivative="mixed"), Forward(chunk_size=16)):
        for name, value in ht.hypergradient(problem, hparams, backend=backend).grads.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_clipping_changes_the_hypergradient() -> None:
    """So that the tests above are of something."""
    rule, extra = rules()["momentum"]
    plain = net_problem(rule, extra, num_steps=6)
    without = ht.hypergradient(plain, plain.init_hparams(), backend=Reverse()).grads
    for bounds in BOUNDS:
        problem = clipped_net("momentum", bounds)
        clipped = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).grads
        assert float((clipped["lr"] - without["lr"]).abs()) > 1e-3 * float(without["lr"].abs())


@pytest.mark.parametrize("options", [{"max_norm": 0.3}, {"max_norm": Hyper("bound")}, {"max_value": Hyper("bound")}])
def test_each_task_has_a_norm_of_its_own(options: dict) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = task_problem(module, item=(3,), num_tasks=3, num_steps=3, way=2)
    problem = replace(problem, dynamics=Clipped(SGD(lr=Hyper("lr"), momentum=0.5), **options))
    hparams = {**problem.init_hparams(), **(scalars(bound=0.3) if "bound" in str(options) else {})}
    looped = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop")).grads
    for backend in (Reverse(), Reverse(derivative="mixed"), Forward(), Forward(chunk_size=1)):
        vectorised = ht.hypergradient(problem, hparams, backend=backend, execution=ht.Execution(tasks="vmap")).grads
        for name in hparams:
            torch.testing.assert_close(vectorised[name], looped[name], rtol=1e-10, atol=1e-13)


class FirstSteps(ht.InnerProblem):
    """A slope that is exactly zero at the first step, for all params, and for one of them always."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["start"], "unused": hparams["start"]}

    def batch(self, step: int) -> Tensor:
        return torch.tensor(float(step > 0), dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        assert isinstance(batch, Tensor)
        return batch * (params["w"] - hparams["target"]).square().sum() + 0.0 * params["unused"].sum()


@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.5), Adam(lr=0.1)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("bounds", [{"max_norm": Hyper("bound")}, {"max_value": Hyper("bound")}], ids=str)
@pytest.mark.parametrize("bound", [0.5, 100.0, 1e-8])
@pytest.mark.parametrize("backend", [Reverse(), Forward(), Forward(chunk_size=1)], ids=repr)
def test_a_gradient_of_zero(rule: ht.GradientDynamics, bounds: dict, bound: float, backend: ht.Hypergradient) -> None:
    hparams = {"start": normal(3, seed=1), "target": 3.0 + normal(3, seed=2), **scalars(bound=bound)}
    problem = ht.BilevelProblem(
        FirstSteps(),
        LambdaOuter(hparams, lambda p, h, b: p["w"].sin().sum() + p["unused"].square().sum() + 0.1 * h["bound"]),
        dynamics=Clipped(rule, **bounds),
        num_steps=4,
    )
    if bound == 1e-8:  # Adam's `eps` is of that size; central differences are not
        grads = ht.hypergradient(problem, hparams, backend=backend).grads
        assert all(torch.isfinite(value).all() for value in grads.values())
        return
    check = ht.check_hypergradient(problem, hparams, backend, step_size=1e-6)
    assert check.passed, str(check)
    if bound == 100.0:
        torch.testing.assert_close(
            ht.hypergradient(problem, hparams, backend=backend).grads["bound"], torch.tensor(0.1, dtype=F64)
        )


def test_a_gradient_on_the_bound_is_not_clipped() -> None:
    """There is no derivative there; the one that is taken is that of the side without clipping."""
    loss_scale = 0.5 * (1.0 - 1e-6)  # so that the norm of the gradient at 1 is the bound, less its 1e-6

    def grads(**options: object) -> TensorDict:
        problem = ht.BilevelProblem(
            LambdaInner(lambda h: {"w": h["start"]}, lambda p, h, b: loss_scale * p["w"].square().sum()),
            LambdaOuter(scalars(start=1.0, bound=1.0), lambda p, h, b: p["w"].sum() + 0.0 * h["bound"]),
            dynamics=Clipped(SGD(lr=0.1), **options),  # type: ignore[arg-type]
            num_steps=1,
        )
        return ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).grads

    for options in ({"max_norm": Hyper("bound")}, {"max_value": 2.0 * loss_scale}):
        result = grads(**options)
        torch.testing.assert_close(result["start"], torch.tensor(1.0 - 0.2 * loss_scale, dtype=F64))
        assert float(result["bound"]) == 0.0


def test_an_infinite_bound_changes_nothing() -> None:
    rule, extra = rules()["momentum"]
    results = []
    for chosen in (rule, Clipped(rule, max_norm=float("inf"), max_value=float("inf"))):
        problem = net_problem(chosen, extra, num_steps=6)
        results.append(ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).grads)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-12, atol=1e-14)


def test_it_says_of_the_rule_what_the_rule_says() -> None:
    inside = dynamics.LearnedUpdate(dynamics.CoordinatewiseMLP(hidden=2).double(), scale=Hyper("scale"))
    rule = Clipped(inside, max_norm=Hyper("bound"), max_value=0.1)
    assert set(rule.settings()) == {"scale", "max_norm", "max_value"}
    assert set(rule.constraints()) == {"scale", "bound"}
    assert rule.init_hparams().keys() == inside.init_hparams().keys()
    assert float(rule.constraints()["bound"].project(torch.tensor(-1.0))) > 0.0
    assert Clipped(SGD(lr=0.1), max_norm=1.0).separate_params
    assert not Clipped(dynamics.Groups({"*": SGD(lr=0.1)}), max_norm=1.0).separate_params
    assert not Clipped.separate_params


@pytest.mark.parametrize(
    ("rule", "options", "error", "message"),
    [
        ("sgd", {"max_norm": 1.0}, TypeError, "`rule` of `Clipped` is 'sgd', not a `GradientDynamics`"),
        (Clipped(SGD(lr=0.1), max_norm=1.0), {"max_value": 1.0}, TypeError, "`rule` of `Clipped` is Clipped.*give one"),
        (SGD(lr=0.1), {}, ValueError, "neither `max_norm` nor `max_value`"),
        (SGD, {"max_norm": 1.0}, TypeError, "`rule` of `Clipped` is the class `SGD`, not a `GradientDynamics`"),
        (SGD(lr=0.1), {"max_norm": -1.0}, ValueError, "`max_norm` of `Clipped` is -1.0"),
        (SGD(lr=0.1), {"max_value": [0.1, -1.0]}, ValueError, "`max_value` of `Clipped` is -1.0"),
        (SGD(lr=0.1), {"max_norm": "1"}, TypeError, "`max_norm` of `Clipped` is '1', which is neither"),
        (SGD(lr=0.1), {"max_norm": {"*": 1.0}}, ValueError, "`max_norm` of `Clipped` .*differs between params"),
        (SGD(lr=0.1), {"max_norm": Hyper("b", per="parameter")}, ValueError, "differs between params.*one norm"),
        (SGD(lr=0.1), {"max_norm": torch.ones(2)}, ValueError, "differs between params"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_refused(rule: object, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Clipped(rule, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Clipped(SGD(lr=0.1), max_norm=Hyper("bound")), "`max_norm` of `Clipped` reads the outer variable `bound`"),
        (Clipped(SGD(lr=Hyper("rate")), max_norm=1.0), "`lr` of `SGD` reads the outer variable `rate`"),
        (Clipped(SGD(lr=0.1), max_norm=[1.0, 2.0]), "`max_norm` of `Clipped` is a schedule of 2 values.*6"),
        (Clipped(SGD(lr=0.1), max_value={"third": 1.0, "*": 2.0}), "`max_value` of `Clipped` has the entry 'third'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_does_not_fit_the_problem_is_refused(rule: ht.Dynamics, message: str) -> None:
    problem = net_problem(rule, {}, num_steps=6)
    with pytest.raises(ValueError, match=message):
        ht.unroll(problem, problem.init_hparams())


def test_it_cannot_be_a_part_of_groups_and_cannot_be_reversed() -> None:
    clipped = Clipped(dynamics.ReversibleMomentum(lr=0.1), max_norm=1.0)
    with pytest.raises(TypeError, match=r"`members\['\*'\]` of `Groups` is Clipped.*not a `GradientDynamics`"):
        dynamics.Groups({"*": clipped})  # type: ignore[dict-item]
    problem = net_problem(clipped, {}, num_steps=6)
    with pytest.raises(IncompatibleBackendError, match="`Clipped`, whose steps cannot be undone"):
        ht.hypergradient(problem, problem.init_hparams(), backend=backends.Reversible())
