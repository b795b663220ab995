"""Forward mode against closed forms, reverse mode and central differences, in chunks and by dual numbers."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.errors import (
    DetachedHyperparameterError,
    IncompatibleBackendError,
    NonFiniteError,
    ReplayError,
)
from hypertorch.hypergradients.forward_mode import tangents
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import Batch, TensorDict
from tests.helpers.agreement import assert_equal, assert_equals_reverse
from tests.helpers.problems import (
    LambdaInner,
    LambdaOuter,
    Ridge,
    net_problem,
    normal,
    scalar_problem,
    scalars,
    task_problem,
)
from tests.inner.test_tasks import NORMS, net

Forward, Reverse = ht.hypergradients.Forward, ht.hypergradients.Reverse
SGD = ht.dynamics.SGD
F64 = torch.float64
CHUNKS = [None, 3, 1]

LEARNT = scalars(lr=0.3, momentum=0.6, dampening=0.2, weight_decay=0.01)
LEARNT_SGD = SGD(**{name: ht.Hyper(name) for name in LEARNT})
SCHEDULED = {
    "log_lr": torch.linspace(-2.0, -1.0, 5, dtype=F64),
    "momentum.first": 0.5 + 0.1 * normal(5, 4, 6, seed=5).tanh(),
    "momentum.second": torch.full((5,), 0.4, dtype=F64),
    "decay.first": 0.01 + 0.01 * normal(4, 6, seed=6).square(),
    "decay.second": torch.tensor(0.02, dtype=F64),
}
SCHEDULED_SGD = SGD(
    lr=ht.Hyper("log_lr", torch.exp, per="step"),
    momentum=ht.Hyper("momentum", per="step,parameter"),
    weight_decay=ht.Hyper("decay", per="parameter"),
)
NESTEROV = SGD(lr=ht.Hyper("lr"), momentum=ht.Hyper("momentum"), nesterov=True)
RULES: dict[str, tuple[ht.Dynamics, TensorDict]] = {
    "fixed": (SGD(lr=0.3), {}),
    "settings": (LEARNT_SGD, LEARNT),
    "nesterov": (NESTEROV, scalars(lr=0.2, momentum=0.7)),
    "schedules and settings per parameter": (SCHEDULED_SGD, SCHEDULED),
}


# The number


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_gradient_descent_on_ridge_equals_the_formula(chunk_size: int | None, num_steps: int) -> None:
    ridge = Ridge()
    problem = ridge.problem(num_steps)
    hparams = problem.init_hparams()
    in_lam, in_eta = ridge.hypergradient_after(num_steps, hparams["lam"], hparams["eta"])
    result = ht.hypergradient(problem, hparams, backend=Forward(chunk_size=chunk_size))
    torch.testing.assert_close(result.grads["lam"], in_lam, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(result.grads["eta"], in_eta, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(
        result.params["w"], ridge.params_after(num_steps, hparams["lam"], hparams["eta"]), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_closed_form_in_init_params_is_differentiated_through(chunk_size: int | None) -> None:
    ridge = Ridge()
    problem = ridge.closed_form_problem()
    hparams = problem.init_hparams()
    result = ht.hypergradient(problem, hparams, backend=Forward(chunk_size=chunk_size))
    exact = ridge.exact_hypergradient(hparams["lam"])
    torch.testing.assert_close(result.grads["lam"], exact, rtol=1e-10, atol=1e-13)
    assert result.grads["eta"] == 0 and result.stats.steps == 0


# One by one, many entries take long; a chunk of 40 leaves a smaller last one.
@pytest.mark.parametrize(
    ("rule", "chunk_size"), [*((rule, size) for rule in RULES for size in (None, 40)), ("nesterov", 1)]
)
def test_equals_reverse_with_minibatches_dropout_and_terms_at_inner_steps(rule: str, chunk_size: int | None) -> None:
    dynamics, extra = RULES[rule]
    problem = net_problem(dynamics, extra, num_steps=5, dropout=0.4, step_terms=True)
    assert_equals_reverse(problem, Forward(chunk_size=chunk_size), outer_step=4)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_equals_central_differences(chunk_size: int | None) -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, num_steps=3, dropout=0.4, step_terms=True)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Forward(chunk_size=chunk_size), num_directions=1)
    assert check.passed, str(check)
    assert {entry.name for entry in check.checks} == set(problem.init_hparams())


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("case", ["read by the loss too", "twice the same", "twice the same computed"])
def test_params_that_are_hyperparameters_or_each_other(chunk_size: int | None, case: str) -> None:
    a, y = normal(6, 3, seed=1), normal(6, seed=2)

    def init(h: TensorDict) -> TensorDict:
        if case == "read by the loss too":
            return {"w": h["w"]}
        same = h["w"] if case == "twice the same" else h["w"].exp()
        return {"w": same, "v": same}

    def inner(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        return (a @ p["w"] - y).square().mean() + (p["w"] * h["w"].sin()).sum() + p.get("v", p["w"]).pow(4).sum()

    problem = ht.BilevelProblem(
        LambdaInner(init, inner),
        LambdaOuter({"w": 0.3 * normal(3, seed=0)}, lambda p, h, b: (p["w"] * p.get("v", p["w"])).sum()),
        dynamics=SGD(lr=0.05, momentum=0.5),
        num_steps=4,
    )
    assert_equals_reverse(problem, Forward(chunk_size=chunk_size))


# Tasks, buffers, context


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_no_norm_layer_gives_a_wrong_hypergradient(norm: str, route: str) -> None:
    problem = task_problem(net(norm), item=(1, 4, 4), num_tasks=2, num_steps=2)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    execution = ht.Execution(tasks=route)  # type: ignore[arg-type]
    assert_equal(problem, Forward(), expected, hparams, execution=execution)
    some = {name: hparams[name] for name in ("0.bias", "lr")}
    by_duals = _with_constants(problem, hparams, set(hparams) - set(some))
    expected = ht.hypergradient(by_duals, some, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    assert_equal(by_duals, Forward(chunk_size=1), expected, some, execution=execution)


def _with_constants(problem: ht.BilevelProblem, hparams: TensorDict, names: set[str]) -> ht.BilevelProblem:
    """The same problem with some outer variables held constant, so that there are few tangents."""
    constants = {name: hparams[name] for name in names}

    class Inner(ht.InnerProblem):
        buffers = problem.inner.buffers

        def init_params(self, hparams: TensorDict) -> TensorDict:
            return problem.inner.init_params({**constants, **hparams})

        def batch(self, step: int) -> Batch:
            return problem.inner.batch(step)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor | tuple[Tensor, TensorDict]:
            return problem.inner.loss(params, {**constants, **hparams}, batch)

    return dataclasses.replace(problem, inner=Inner())


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_dropout_is_that_of_reverse_on_every_route(route: str, chunk_size: int | None) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 3)).double()
    problem = task_problem(module, item=(4,), num_tasks=3, num_steps=2)
    assert_equals_reverse(problem, Forward(chunk_size=chunk_size), execution=ht.Execution(tasks=route))  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_size", [None, 5, 1])
@pytest.mark.parametrize("reads_them", [False, True])
def test_statistics_that_pytorch_does_not_track(chunk_size: int | None, reads_them: bool) -> None:
    """A norm layer's running statistics: refused if the outer loss reads them, in evaluation mode; counted anyway."""
    norm = nn.BatchNorm1d(3).double()
    x, y = normal(6, 3, seed=1), torch.arange(6) % 3

    class Inner(ht.InnerProblem):
        buffers = ("running_mean", "running_var", "num_batches_tracked")

        def init_params(self, hparams: TensorDict) -> TensorDict:
            stored = {name: value.clone() for name, value in norm.named_buffers()}
            return {"w": hparams["w"], "weight": hparams["w"][0], "bias": hparams["w"][1], **stored}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
            module = ht.FunctionalModule(norm)
            rest = {name: value for name, value in params.items() if name != "w"}
            outputs, buffers = module.with_buffers(rest, x @ params["w"])
            return hparams["scale"] * F.cross_entropy(outputs, y), buffers

    def outer(p: TensorDict, h: TensorDict, b: Batch) -> Tensor:
        stored = (p["running_mean"], p["running_var"]) if reads_them else (None, None)
        outputs = F.batch_norm(x @ p["w"], *stored, p["weight"], p["bias"], training=not reads_them)
        return F.cross_entropy(outputs, y) * (1.0 + p["num_batches_tracked"])

    hparams = {"w": normal(3, 3, seed=2), **scalars(scale=1.3)}
    problem = ht.BilevelProblem(Inner(), LambdaOuter(hparams, outer), dynamics=SGD(lr=0.3), num_steps=3)
    if reads_them:
        with pytest.raises(IncompatibleBackendError, match="the buffer `running_mean` is updated"):
            ht.hypergradient(problem, hparams, backend=Forward(chunk_size=chunk_size))
        return
    assert_equals_reverse(problem, Forward(chunk_size=chunk_size))


class Prototype(ht.InnerProblem):
    """Reads a context with a tasks axis, one without, and labels."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["centre"] + hparams["shift"]}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["centre"] * hparams["scale"] * hparams["label"]).square().sum()


class Judge(LambdaOuter):
    def batch(self, outer_step: int) -> Batch:
        return {"x": torch.arange(12, dtype=F64).reshape(4, 3) + outer_step}


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_context_with_tasks_shared_and_integer_entries(route: str, chunk_size: int | None) -> None:
    problem = ht.BilevelProblem(
        Prototype(),
        Judge(scalars(theta=0.7, scale=1.3), lambda p, h, b: (p["w"] * b["x"]).mean().square()),
        dynamics=SGD(lr=0.1, momentum=0.5),
        num_steps=2,
        num_tasks=4,
        context=lambda h, b: {
            "centre": b["x"] * h["theta"],
            "shift": h["theta"].exp(),
            "label": b["x"][:, 0].long(),
        },
        shared_context=("shift",),
    )
    assert_equals_reverse(problem, Forward(chunk_size=chunk_size), execution=ht.Execution(tasks=route))  # type: ignore[arg-type]


def test_a_complex_context_is_refused() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["c"]}, lambda p, h, b: (p["w"] * h["wave"]).abs().square()),
        LambdaOuter(scalars(c=1.0), lambda p, h, b: p["w"]),
        dynamics=SGD(lr=0.1),
        num_steps=1,
        context=lambda h, b: {"wave": torch.complex(h["c"], h["c"])},
    )
    with pytest.raises(IncompatibleBackendError, match=r"context's `wave` has dtype torch.complex128.*view_as_real"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Forward())


# The parts, cost and memory


def loop_of(problem: ht.BilevelProblem, carry: TensorDict | None = None) -> tuple[InnerLoop, TensorDict]:
    variables = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
    return BoundProblem(problem, variables, 0, carry).loop(None, {}), variables


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_the_hypergradient_can_be_read_after_every_step(chunk_size: int | None) -> None:
    ridge, backend = Ridge(), Forward(chunk_size=chunk_size)
    loop, variables = loop_of(ridge.problem(6))
    run = backend.start(loop, variables)
    for step in range(6):
        run = backend.advance(loop, variables, run, step)
        result = backend.read(loop, variables, run)
        in_lam, in_eta = ridge.hypergradient_after(step + 1, variables["lam"].detach(), variables["eta"].detach())
        torch.testing.assert_close(result.grads["lam"], in_lam, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result.grads["eta"], in_eta, rtol=1e-10, atol=1e-13)
        assert not any(value.requires_grad for value in [*result.grads.values(), *result.state.tensors()])
    assert (loop.record.cost.steps, loop.record.cost.jvps, loop.record.cost.stored_states) == (
        6 if chunk_size is None else 12,
        12,
        3,
    )


@pytest.mark.parametrize(("chunk_size", "steps", "states"), [(None, 2, 60), (59, 2, 60), (20, 6, 21), (1, 118, 2)])
def test_costs_are_as_documented(chunk_size: int | None, steps: int, states: int) -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, num_steps=2)
    stats = ht.hypergradient(problem, problem.init_hparams(), backend=Forward(chunk_size=chunk_size)).stats
    assert (stats.steps, stats.jvps, stats.stored_states) == (steps, 2 * 59, states)
    assert (stats.vjps, stats.graph_steps) == (0, 0)


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_memory_does_not_grow_with_the_horizon(chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def most_alive(num_steps: int) -> int:
        """Most bytes of states and tangents that are alive before a step."""
        refs: list[weakref.ref] = []
        most = 0

        def watched(*args: object, **named: object) -> object:
            nonlocal most
            alive = [ref() for ref in refs]
            most = max(most, sum(value.nbytes for value in alive if value is not None))
            pushed = original(*args, **named)
            refs.extend(weakref.ref(value) for part in (*pushed.outputs, *pushed.tangents) for value in part.values())
            return pushed

        original = tangents.jvps
        monkeypatch.setattr(tangents, "jvps", watched)
        problem = net_problem(LEARNT_SGD, LEARNT, num_steps=num_steps)
        ht.hypergradient(problem, problem.init_hparams(), backend=Forward(chunk_size=chunk_size))
        monkeypatch.setattr(tangents, "jvps", original)
        return most

    params = (4 * 6 + 6 * 3) * 8
    tangents_at_once = chunk_size or 59
    # Params, their momentum and the tangents of both; the directions in the initialisation; two states to compare.
    bound = 2 * params * (1 + tangents_at_once) + params * tangents_at_once + 2 * 2 * params
    assert most_alive(2) == most_alive(8) <= bound


def test_one_tangent_keeps_no_graph_of_the_gradient() -> None:
    """Of 24 layers a graph of the gradient would hold as much again as the gradient's own graph and its tangents."""
    inputs, weights = normal(256, 8, seed=1), {f"w{layer}": 0.4 * normal(8, 8, seed=layer) for layer in range(24)}

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        hidden = inputs
        for layer in range(24):
            hidden = torch.tanh(hidden @ params[f"w{layer}"])
        return hparams["c"] * hidden.square().sum(1).mean()

    problem = scalar_problem(
        init=lambda h: dict(weights), inner=loss, outer=lambda p, h, b: p["w0"].square().sum() + h["c"]
    )
    peaks = []
    for backend in (Forward(), Reverse(checkpoint_every=1)):
        compute(problem, backend)
        with PeakMemory() as memory:
            compute(problem, backend)
        peaks.append(memory.peak)
    assert peaks[0] < 2.0 * peaks[1], peaks


def test_no_graph_is_left_and_no_grad_is_written() -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, num_steps=2)
    for chunk_size in (None, 1):
        hparams = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
        result = ht.hypergradient(problem, hparams, backend=Forward(chunk_size=chunk_size))
        assert all(value.grad is None for value in hparams.values())
        values = [result.outer_loss, *result.grads.values(), *result.params.values()]
        assert not any(value.requires_grad for value in values)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_constant_that_asks_for_its_gradient_starts_no_graph(chunk_size: int | None) -> None:
    constant = nn.Parameter(normal(2, seed=0))
    problem = scalar_problem(
        init=lambda h: {"w": h["c"] * constant},
        inner=lambda p, h, b: (p["w"] - h["d"] * constant).square().sum(),
        outer=lambda p, h, b: p["w"].square().sum(),
        hparams=scalars(c=2.0, d=1.0),
    )
    loop, variables = loop_of(problem)
    backend = Forward(chunk_size=chunk_size)
    run = backend.advance(loop, variables, backend.start(loop, variables), 0)
    assert not any(value.requires_grad for value in [*run.state.tensors(), *run.tangents.tensors(), run.derivative])
    assert_equals_reverse(problem, backend)


# Hyperparameters that do nothing


def compute(problem: ht.BilevelProblem, backend: ht.Hypergradient | None = None) -> ht.HypergradientResult:
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend or Forward())


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_hyperparameter_that_does_nothing_is_named(chunk_size: int | None) -> None:
    idle = scalars(c=2.0, idle=1.0)
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach"):
        compute(scalar_problem(hparams=idle), Forward(chunk_size=chunk_size))
    allowed = compute(scalar_problem(hparams=idle, allow_unused=("idle",)), Forward(chunk_size=chunk_size))
    assert allowed.grads["idle"] == 0.0
    detached = scalar_problem(
        inner=lambda p, h, b: (p["w"] - h["c"].detach()).square(), outer=lambda p, h, b: p["w"].square()
    )
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['c'\]`"):
        compute(detached, Forward(chunk_size=chunk_size))


def test_a_direct_term_or_a_zero_is_no_false_alarm() -> None:
    assert compute(scalar_problem(inner=lambda p, h, b: (p["w"] - 1.0).square())).grads["c"] == 1.0
    assert compute(scalar_problem(outer=lambda p, h, b: p["w"].square(), hparams=scalars(c=0.0))).grads["c"] == 0.0


def test_params_without_an_entry_are_legal_where_nothing_is_stepped() -> None:
    problem = scalar_problem(init=lambda h: {}, outer=lambda p, h, b: h["c"].square(), num_steps=0)
    for chunk_size in (None, 1):
        assert compute(problem, Forward(chunk_size=chunk_size)).grads["c"] == 4.0
    pair = dataclasses.replace(problem, outer=LambdaOuter({"c": normal(2, seed=0)}, lambda p, h, b: h["c"].sum()))
    assert compute(pair).grads["c"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_an_infinite_derivative_names_its_hyperparameter(chunk_size: int | None) -> None:
    problem = scalar_problem(
        hparams=scalars(c=2.0, d=1.0), outer=lambda p, h, b: p["w"] * h["c"] + (h["d"] - 1.0).abs().sqrt()
    )
    with pytest.raises(NonFiniteError, match="hypergradient of `d` is not finite"):
        compute(problem, Forward(chunk_size=chunk_size))


# Replays


def test_data_that_change_between_chunks_are_noticed() -> None:
    class Forgetful(LambdaInner):
        calls = 0

        def batch(self, step: int) -> Batch:
            self.calls += 1
            return float(self.calls)

    options = {"hparams": {"c": normal(3, seed=0)}, "outer": lambda p, h, b: p["w"]}
    plain = scalar_problem(**options)
    inner = Forgetful(lambda h: {"w": h["c"].sum()}, lambda p, h, b: (p["w"] - h["c"].sum() * b).square())
    problem = dataclasses.replace(plain, inner=inner)
    for chunk_size in (None, 2):
        with pytest.raises(ReplayError, match=r"`InnerProblem.loss.* differs .*no iterator, no counter"):
            compute(problem, Forward(chunk_size=chunk_size))


def test_data_that_change_later_are_noticed_between_chunks() -> None:
    class Forgetful(LambdaInner):
        calls = 0

        def batch(self, step: int) -> Batch:
            self.calls += step == 2
            return float(self.calls) if step == 2 else 1.0

    inner = Forgetful(lambda h: {"w": h["c"].sum()}, lambda p, h, b: (p["w"] - h["c"].sum() * b).square())
    plain = scalar_problem(hparams={"c": normal(3, seed=0)}, outer=lambda p, h, b: p["w"], num_steps=3)
    problem = dataclasses.replace(plain, inner=inner)
    compute(problem)
    with pytest.raises(ReplayError, match=r"`w` after inner step 2 differs .*no iterator, no counter"):
        compute(problem, Forward(chunk_size=2))


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True])
def test_settings_are_validated(chunk_size: object) -> None:
    with pytest.raises(ValueError, match="`chunk_size` is .*number of entries .* whole number of at least 1"):
        Forward(chunk_size=chunk_size)  # type: ignore[arg-type]
