"""The front door: what it refuses, what it names, and that it is pure."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError, NonFiniteError
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, Ridge, net_problem, normal, scalar_problem

Reverse = ht.hypergradients.Reverse
SGD = ht.dynamics.SGD
F64 = torch.float64


def compute(
    problem: ht.BilevelProblem, backend: ht.Hypergradient | None = None, **options: Any
) -> ht.HypergradientResult:
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend or Reverse(), **options)


def test_direct_term_is_included() -> None:
    # w_3 = c (1 - 0.8^3) = 0.488 c; f = w^2 + c; df/dc = 2 * 0.488^2 c + 1.
    assert float(compute(scalar_problem()).grads["c"]) == pytest.approx(2 * 0.488**2 * 2 + 1, rel=1e-14)


def test_a_hyperparameter_with_a_direct_term_alone_is_no_false_alarm() -> None:
    problem = scalar_problem(inner=lambda p, h, b: (p["w"] - 1.0).square())
    assert compute(problem).grads["c"] == 1.0


@pytest.mark.parametrize("backend", [Reverse(), Reverse(checkpoint_every=1), Reverse(checkpoint_every=2)])
def test_a_hyperparameter_that_does_nothing_is_named(backend: ht.Hypergradient) -> None:
    extra = {"idle": torch.zeros(3, dtype=F64), "lazy": torch.zeros((), dtype=F64)}
    problem = net_problem(SGD(lr=0.1), extra)
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach .*lazy.*allow_unused"):
        compute(problem, backend)


def test_a_detached_hyperparameter_is_named() -> None:
    problem = scalar_problem(
        inner=lambda p, h, b: (p["w"] - h["c"].detach()).square(), outer=lambda p, h, b: p["w"].square()
    )
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['c'\]`.*silent zero.*without `.detach\(\)`"):
        compute(problem)


def test_allow_unused_gives_zeros() -> None:
    idle = {"c": torch.tensor(2.0, dtype=F64), "idle": torch.ones(3, dtype=F64)}
    result = compute(scalar_problem(hparams=idle, allow_unused=("idle",)))
    torch.testing.assert_close(result.grads["idle"], torch.zeros(3, dtype=F64))


def test_a_non_finite_inner_loss_names_the_inner_step() -> None:
    problem = scalar_problem(dynamics=SGD(lr=1e200), num_steps=5)
    with pytest.raises(NonFiniteError, match="the inner loss holds NaN or infinity at inner step 1: .*A smaller inner"):
        compute(problem)


def test_a_diverging_inner_run_names_step_and_entry() -> None:
    problem = scalar_problem(inner=lambda p, h, b: p["w"] * h["c"], dynamics=SGD(lr=1.7e308), num_steps=5)
    with pytest.raises(NonFiniteError, match="`w` holds NaN or infinity after inner step 0.*step size"):
        compute(problem)


def test_a_non_finite_outer_loss_is_named() -> None:
    with pytest.raises(NonFiniteError, match="the outer loss holds NaN or infinity after 3 inner steps"):
        compute(scalar_problem(outer=lambda p, h, b: p["w"].log() * 0 + (p["w"] - p["w"]).log()))


def test_a_loss_that_is_nan_at_once_is_no_matter_of_step_sizes() -> None:
    with pytest.raises(NonFiniteError, match="at inner step 0: .*Nothing was stepped yet: look at the loss and"):
        compute(scalar_problem(inner=lambda p, h, b: (p["w"] * h["c"]).log() * 0.0 + (p["w"] - h["c"]).log()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_blamed(bad: float) -> None:
    class Inner(LambdaInner):
        def batch(self, step: int) -> Batch:
            return {"x": [torch.tensor(bad if step == 1 else 1.0, dtype=F64)]}

    class Outer(LambdaOuter):
        def batch(self, outer_step: int) -> Batch:
            return torch.tensor(bad, dtype=F64)

    plain = scalar_problem()
    init, outer_loss = plain.inner._init, plain.outer._loss  # type: ignore[attr-defined]
    inner = Inner(init, lambda p, h, b: (p["w"] - h["c"] * b["x"][0]).square())
    with pytest.raises(NonFiniteError, match=r"at inner step 1: .*So does its data.*`InnerProblem.batch`"):
        compute(dataclasses.replace(plain, inner=inner))
    outer = Outer(plain.outer.init_hparams(), lambda p, h, b: outer_loss(p, h, None) * b)
    with pytest.raises(NonFiniteError, match=r"the outer loss .* after 3 inner steps: .*`OuterProblem.batch`"):
        compute(dataclasses.replace(plain, outer=outer))


def test_an_infinite_derivative_of_finite_values_is_named() -> None:
    problem = scalar_problem(outer=lambda p, h, b: p["w"] + (h["c"] - 2.0).abs().sqrt())
    with pytest.raises(NonFiniteError, match="hypergradient of `c` is not finite, although every inner state"):
        compute(problem)


def test_non_finite_hparams_are_named() -> None:
    problem = scalar_problem(hparams={"c": torch.tensor(float("nan"), dtype=F64)})
    with pytest.raises(NonFiniteError, match="`c` holds NaN or infinity before the first inner step"):
        compute(problem)


def test_tasks_name_the_step_too() -> None:
    class Inner(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": hparams["c"]}

        def batch(self, step: int) -> Batch:
            return torch.tensor([1.0, float("inf") if step == 2 else 1.0], dtype=F64)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
            return params["w"].square() * batch

    problem = ht.BilevelProblem(
        Inner(), LambdaOuter({"c": torch.tensor(1.0, dtype=F64)}, lambda p, h, b: p["w"]), dynamics=SGD(lr=0.1),
        num_steps=4, num_tasks=2,
    )  # fmt: skip
    for route in ("vmap", "loop"):
        with pytest.raises(NonFiniteError, match="at inner step 2"):
            compute(problem, execution=ht.Execution(tasks=route))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inner": lambda p, h, b: p["w"][None]},
            r"`InnerProblem.loss` returned a tensor of shape \(1,\).*scalar.*`.mean\(\)`; with tasks, write it for one",
        ),
        (
            {"outer": lambda p, h, b: 3.0},
            r"`OuterProblem.loss` returned a float: a loss is a scalar tensor.*with `.mean\(\)`\.$",
        ),
        ({"inner": lambda p, h, b: h["c"]}, "`InnerProblem.loss` returned a value that depends on none of the params"),
        ({"inner": lambda p, h, b: (p["w"], {"mean": p["w"]})}, r"new values for the buffers \['mean'\]"),
        ({"init": lambda h: {}}, "no trained variable and `num_steps` is 3"),
        ({"dynamics": SGD(lr=ht.Hyper("eta"))}, r"`lr` of `SGD` reads the outer variable `eta`, .*not among \['c'\]"),
        ({"dynamics": SGD(lr=ht.Hyper("c", per="step"))}, r"`c` has shape \(\).*`num_steps` = 3"),
        ({"dynamics": SGD(lr=[0.1, 0.2])}, "`lr` of `SGD` is a schedule of 2 values, .*`num_steps` = 3"),
        ({"hparams": {}}, "`hparams` is empty"),
        ({"context": lambda h, b: {"c": h["c"]}}, r"`context` returned \['c'\], which are names of hyperparameters"),
    ],
)
def test_wrong_returns_are_explained(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute(scalar_problem(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": lambda h: torch.zeros(3)}, "`InnerProblem.init_params` returned a tensor of shape .*flat dict"),
        ({"init": lambda h: {"w": torch.zeros(3, dtype=torch.int64)}}, "returned `w` with dtype torch.int64"),
        ({"hparams": {"c": torch.tensor(2)}}, r"`hparams\['c'\]` has dtype torch.int64, which has no derivative"),
        ({"hparams": {"c": 2.0}}, "`hparams` is a dict holding .*float.*flat dict"),
        (
            {"inner": lambda p, h, b: p["w"].sum().long()},
            r"`InnerProblem.loss` returned a scalar of torch.int64: .*real",
        ),
        (
            {"inner": lambda p, h, b: p["w"].sum() * 1j},
            r"`InnerProblem.loss` returned a scalar of torch.complex128.*real",
        ),
        (
            {"outer": lambda p, h, b: p["w"].sum() * 1j},
            r"`OuterProblem.loss` returned a scalar of torch.complex128.*abs",
        ),
        (
            {"outer": lambda p, h, b: p["w"].sum() > 0},
            r"`OuterProblem.loss` returned a scalar of torch.bool.*`metrics`",
        ),
        ({"outer": lambda p, h, b: (p["w"] > 0).sum()}, r"`OuterProblem.loss` .*torch.int64.*`EvolutionStrategies`"),
    ],
)
def test_wrong_kinds_are_explained(change: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        compute(scalar_problem(**change))


def test_wrong_arguments_are_explained() -> None:
    problem = scalar_problem()
    with pytest.raises(TypeError, match="`backend` is 'reverse', not a `Hypergradient`"):
        ht.hypergradient(problem, problem.init_hparams(), backend="reverse")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`problem` is a LambdaInner, not a `BilevelProblem`"):
        ht.hypergradient(problem.inner, problem.init_hparams(), backend=Reverse())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`carry` holds .* `warm_start=False`"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(), carry={"index": torch.tensor(3)})


def test_an_operation_without_second_derivative_is_named() -> None:
    points = normal(4, 2, seed=0)
    problem = scalar_problem(
        init=lambda h: {"w": h["c"] * normal(4, 2, seed=1)}, inner=lambda p, h, b: torch.cdist(p["w"], points).sum(),
        outer=lambda p, h, b: p["w"].sum(),
    )  # fmt: skip
    with pytest.raises(IncompatibleBackendError, match="`_?cdist.*cannot differentiate twice"):
        compute(problem)


def test_attention_has_a_second_derivative() -> None:
    x = normal(1, 2, 5, 4, seed=0)

    def inner(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return F.scaled_dot_product_attention(x @ p["w"], x, x).square().mean() * h["c"]

    problem = scalar_problem(
        init=lambda h: {"w": normal(4, 4, seed=1)}, inner=inner, outer=lambda p, h, b: p["w"].square().sum()
    )
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse())
    assert check.passed, str(check)


def test_the_same_arguments_give_the_same_bits_and_generators_are_left_alone() -> None:
    problem = net_problem(SGD(lr=0.3, momentum=0.9), {}, dropout=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = compute(problem)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = compute(problem)
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in first.grads)


def test_works_inside_no_grad_and_with_hparams_that_require_grad() -> None:
    problem = net_problem(SGD(lr=0.3), {})
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=Reverse()).grads
    asked = {name: value.clone().requires_grad_() for name, value in hparams.items()}
    with torch.no_grad():
        actual = ht.hypergradient(problem, asked, backend=Reverse()).grads
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_context_is_chained_into_the_hyperparameters() -> None:
    """Two losses read features computed once; the same problem without a context recomputes them."""
    inputs, queries = normal(6, 3, seed=0), normal(5, 3, seed=1)

    def features(h: TensorDict, x: Tensor) -> Tensor:
        return torch.tanh(x @ h["theta"])

    def problem(with_context: bool) -> ht.BilevelProblem:
        def support(h: TensorDict) -> Tensor:
            return h["support"] if with_context else features(h, inputs)

        def query(h: TensorDict) -> Tensor:
            return h["query"] if with_context else features(h, queries)

        calls: list[int] = []
        inner = LambdaInner(
            lambda h: {"head": support(h).new_zeros(4)},
            lambda p, h, b: (support(h) @ p["head"] - h["target"]).square().mean(),
        )
        outer = LambdaOuter(
            {"theta": normal(3, 4, seed=2), "target": torch.tensor(1.5, dtype=F64)},
            lambda p, h, b: (query(h) @ p["head"] - 1.0).square().mean() + h["theta"].square().sum(),
        )

        def context(h: TensorDict, b: Batch) -> TensorDict:
            calls.append(1)
            return {"support": features(h, inputs), "query": features(h, queries), "label": torch.arange(3)}

        made = ht.BilevelProblem(
            inner, outer, dynamics=SGD(lr=0.3, momentum=0.5), num_steps=5, context=context if with_context else None
        )
        object.__setattr__(made, "calls", calls)
        return made

    plain, contextual = problem(False), problem(True)
    expected = compute(plain).grads
    compute(contextual)  # the first of its kind is looked at for side effects
    contextual.calls.clear()  # type: ignore[attr-defined]
    for backend in (Reverse(), Reverse(checkpoint_every=2)):
        actual = compute(contextual, backend).grads
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-13, atol=1e-15)
    assert len(contextual.calls) == 2  # type: ignore[attr-defined]  # once per call, not once per step


def test_warm_start_continues_where_the_last_run_ended() -> None:
    ridge = Ridge()
    cold = ridge.problem(6)
    hparams = cold.init_hparams()
    warm = ht.BilevelProblem(
        cold.inner, cold.outer, dynamics=SGD(lr=ht.Hyper("eta"), momentum=0.9), num_steps=3, warm_start=True
    )
    long = ht.BilevelProblem(cold.inner, cold.outer, dynamics=SGD(lr=ht.Hyper("eta"), momentum=0.9), num_steps=6)
    first = ht.hypergradient(warm, hparams, backend=Reverse())
    second = ht.hypergradient(warm, hparams, backend=Reverse(checkpoint_every=2), carry=first.carry, outer_step=1)
    expected = ht.hypergradient(long, hparams, backend=Reverse())
    torch.testing.assert_close(second.params["w"], expected.params["w"], rtol=1e-13, atol=0)
    assert int(second.carry["index"]) == 6
    assert not expected.carry


@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("case", ["read by the loss too", "twice the same", "twice the same computed"])
def test_params_that_are_hyperparameters_or_each_other(every: int | None, case: str) -> None:
    """The inner gradient is that of the param alone, though its tensor also enters the loss by another name."""
    a, y = normal(6, 3, seed=1), normal(6, seed=2)

    def init(h: TensorDict) -> TensorDict:
        if case == "read by the loss too":
            return {"w": h["w"]}
        same = h["w"] if case == "twice the same" else h["w"].exp()
        return {"w": same, "v": same}

    def inner(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return (a @ p["w"] - y).square().mean() + (p["w"] * h["w"].sin()).sum() + p.get("v", p["w"]).pow(4).sum()

    def outer(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return (p["w"] * p.get("v", p["w"])).sum()

    problem = scalar_problem(
        init=init, inner=inner, outer=outer, hparams={"w": 0.3 * normal(3, seed=0)}, dynamics=SGD(lr=0.05), num_steps=4
    )
    result = compute(problem, Reverse(checkpoint_every=every))
    torch.testing.assert_close(result.outer_loss, ht.unroll(problem, problem.init_hparams()).outer_loss)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(checkpoint_every=every))
    assert check.passed, str(check)


def test_a_non_finite_inner_loss_with_finite_gradients_is_noticed() -> None:
    class Inner(LambdaInner):
        def batch(self, step: int) -> Batch:
            return torch.tensor(float("inf") if step == 2 else 0.0, dtype=F64)

    problem = scalar_problem()
    inner = Inner(problem.inner._init, lambda p, h, b: (p["w"] - h["c"]).square() + b)  # type: ignore[attr-defined]
    bad = ht.BilevelProblem(inner, problem.outer, dynamics=SGD(lr=0.1), num_steps=5)
    for backend in (Reverse(), Reverse(checkpoint_every=2)):
        with pytest.raises(NonFiniteError, match="the inner loss holds NaN or infinity at inner step 2"):
            compute(bad, backend)


def test_unknown_names_in_allow_unused_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`allow_unused` names \['typo'\].*Correct it"):
        compute(scalar_problem(allow_unused=("typo",)))


def test_a_backend_names_every_variable() -> None:
    class Forgetful(ht.hypergradients.Reverse):
        def compute(self, loop, variables):
            result = super().compute(loop, variables)
            return dataclasses.replace(result, grads={})

    problem = scalar_problem()
    with pytest.raises(
        ValueError, match=r"`Forgetful.compute` returned grads without \['c'\].*None where it follows no"
    ):
        ht.hypergradient(problem, problem.init_hparams(), backend=Forgetful())
