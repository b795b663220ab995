"""The run backwards: equal to reverse mode and to oracles, exact to the bit, and noticed where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import hypertorch as ht
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError, NonFiniteError, ReplayError
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, scalars, task_problem

Reverse, Reversible = ht.hypergradients.Reverse, ht.hypergradients.Reversible
ReversibleMomentum, LearnedBuffers = ht.dynamics.ReversibleMomentum, ht.dynamics.LearnedBuffers
Hyper = ht.Hyper
F64 = torch.float64
NUM_STEPS = 60
SHAPES = {"first": (4, 6), "second": (6, 3)}


def wobbling(value: float, *shape: int, seed: int) -> Tensor:
    return value * (1.0 + 0.2 * normal(*shape, seed=seed).tanh())


def per_parameter(name: str, value: float, *lead: int) -> TensorDict:
    return {f"{name}.{key}": wobbling(value, *lead, *shape, seed=len(key)) for key, shape in SHAPES.items()}


RULES: dict[str, tuple[ht.Dynamics, TensorDict]] = {
    "fixed": (ReversibleMomentum(lr=0.4, momentum=0.9), {}),
    "learnt": (ReversibleMomentum(lr=Hyper("lr"), momentum=Hyper("m")), scalars(lr=0.4, m=0.8731)),
    "through transforms": (
        ReversibleMomentum(lr=Hyper("log_lr", torch.exp), momentum=Hyper("logit", torch.sigmoid)),
        scalars(log_lr=-1.0, logit=3.9),
    ),
    "number schedules": (
        ReversibleMomentum(
            lr=[0.3 + 0.002 * step for step in range(NUM_STEPS)], momentum=[0.3 + 0.011 * step for step in range(60)]
        ),
        {},
    ),
    "learnt schedules": (
        ReversibleMomentum(lr=Hyper("lr", per="step"), momentum=Hyper("m", per="step")),
        {"lr": wobbling(0.4, NUM_STEPS, seed=1), "m": wobbling(0.8, NUM_STEPS, seed=2)},
    ),
    "per parameter": (
        ReversibleMomentum(lr=Hyper("lr", per="parameter"), momentum=Hyper("m", per="parameter")),
        {**per_parameter("lr", 0.4), **per_parameter("m", 0.8)},
    ),
    "per step and parameter": (
        ReversibleMomentum(lr=Hyper("lr", per="step,parameter"), momentum=Hyper("m", per="step,parameter")),
        {**per_parameter("lr", 0.4, NUM_STEPS), **per_parameter("m", 0.8, NUM_STEPS)},
    ),
    "groups": (
        ReversibleMomentum(lr={"first": Hyper("lr"), "*": 0.2}, momentum={"second": Hyper("m"), "*": 0.95}),
        scalars(lr=0.4, m=0.6),
    ),
    "learnt first velocity": (
        LearnedBuffers(ReversibleMomentum(lr=Hyper("lr"), momentum=0.9)),
        {**scalars(lr=0.4), **{f"buffers.velocity.{key}": normal(*shape, seed=7) for key, shape in SHAPES.items()}},
    ),
}


def assert_equal(actual: TensorDict, expected: TensorDict, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = float((actual[name] - value).norm() / value.norm().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: relative error {error:.2g}"


def assert_equals_reverse(
    problem: ht.BilevelProblem, hparams: TensorDict | None = None, **options: Any
) -> ht.hypergradients.HypergradientResult:
    hparams = hparams or problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=Reverse(), **options)
    actual = ht.hypergradient(problem, hparams, backend=Reversible(), **options)
    assert_equal(actual.grads, expected.grads)
    assert_equal(actual.params, expected.params)
    torch.testing.assert_close(actual.outer_loss, expected.outer_loss, rtol=1e-10, atol=0.0)
    assert all(float(value.norm()) > 0.0 for value in expected.grads.values())
    return actual


# The same number as other ways to it


@pytest.mark.parametrize("num_steps", [1, 2, 60])
def test_a_quadratic_equals_the_power_of_its_matrix(num_steps: int) -> None:
    """One weight on `a (w - 3)^2 / 2`: `(w - 3, v)` is multiplied by the same matrix at every step."""
    hparams = scalars(a=0.7, w=0.2, lr=0.3, m=0.83)
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["w"]}, lambda p, h, b: h["a"] * (p["w"] - 3.0).square() / 2.0),
        LambdaOuter(hparams, lambda p, h, b: (p["w"] - 1.0).square()),
        dynamics=ReversibleMomentum(lr=Hyper("lr"), momentum=Hyper("m")),
        num_steps=num_steps,
    )
    a, w, lr, m = (value.clone().requires_grad_() for value in hparams.values())
    kick = -(1.0 - m) * a
    matrix = torch.stack([torch.stack([1.0 + lr * kick, lr * m]), torch.stack([kick, m])])
    last = torch.linalg.matrix_power(matrix, num_steps)[0, 0] * (w - 3.0) + 3.0
    expected = torch.autograd.grad((last - 1.0).square(), [a, w, lr, m])
    actual = ht.hypergradient(problem, hparams, backend=Reversible())
    assert_equal(actual.grads, dict(zip(hparams, expected, strict=True)), 1e-11)
    assert_equal(actual.params, {"w": last.detach()}, 1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_equals_reverse_with_minibatches(rule: str) -> None:
    dynamics, extra = RULES[rule]
    assert_equals_reverse(net_problem(dynamics, extra, num_steps=NUM_STEPS))


@pytest.mark.parametrize("rule", ["learnt", "per step and parameter"])
@pytest.mark.parametrize("step_terms", [False, True])
def test_equals_reverse_with_dropout_and_terms_at_inner_steps(rule: str, step_terms: bool) -> None:
    dynamics, extra = RULES[rule]
    assert_equals_reverse(net_problem(dynamics, extra, num_steps=NUM_STEPS, dropout=0.3, step_terms=step_terms))


@pytest.mark.parametrize("rule", ["learnt", "per step and parameter", "learnt first velocity"])
def test_equals_central_differences(rule: str) -> None:
    dynamics, extra = RULES[rule]
    problem = net_problem(dynamics, extra, num_steps=NUM_STEPS, step_terms=True)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reversible(), num_directions=1, tolerance=1e-6)
    assert check.passed, str(check)
    assert {entry.name for entry in check.checks} == set(problem.init_hparams())


def small_tasks() -> ht.BilevelProblem:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 3)).double()
    plain = task_problem(module, item=(2,))
    dynamics = ReversibleMomentum(lr=Hyper("lr"), momentum=Hyper("m"))
    plain.outer.init_hparams = lambda: {**plain_hparams, "m": torch.tensor(0.8, dtype=F64)}  # type: ignore[method-assign]
    plain_hparams = {**type(plain.outer).init_hparams(plain.outer), "lr": torch.tensor(0.5, dtype=F64)}
    return ht.BilevelProblem(plain.inner, plain.outer, dynamics=dynamics, num_steps=50, num_tasks=3)


@pytest.mark.parametrize(("route", "chunk"), [("vmap", None), ("vmap", 2), ("loop", None)])
def test_equals_reverse_on_tasks(route: str, chunk: int | None) -> None:
    result = assert_equals_reverse(small_tasks(), execution=ht.Execution(tasks=route, chunk=chunk))  # type: ignore[arg-type]
    information = result.figures["information_bits"]
    assert information.shape == (3,)
    torch.testing.assert_close(information, torch.full((3,), -50.0 * math.log2(0.8), dtype=F64), rtol=0.2, atol=0.0)


def test_every_task_has_information_of_its_own() -> None:
    execution = ht.Execution(tasks="vmap")
    whole = ht.hypergradient(small_tasks(), small_tasks().init_hparams(), backend=Reversible(), execution=execution)
    information = whole.figures["information_bits"]
    assert len(set(information.tolist())) == 3


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_equals_reverse_with_a_context_with_tasks_shared_and_integer_entries(route: str) -> None:
    class Judge(LambdaOuter):
        def batch(self, outer_step: int) -> Batch:
            return {"x": torch.arange(12, dtype=F64).reshape(4, 3) / 10.0 + outer_step}

    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": h["centre"] + h["shift"]},
            lambda p, h, b: (p["w"] - h["centre"] * h["scale"] * h["label"]).square().sum(),
        ),
        Judge(scalars(theta=0.7, scale=1.3), lambda p, h, b: (p["w"] * b["x"]).mean().square()),
        dynamics=ReversibleMomentum(lr=0.1, momentum=0.8),
        num_steps=5,
        num_tasks=4,
        context=lambda h, b: {
            "centre": b["x"] * h["theta"],
            "shift": h["theta"].exp(),
            "label": 1 + b["x"][:, 0].long(),
        },
        shared_context=("shift",),
    )
    assert_equals_reverse(problem, outer_step=1, execution=ht.Execution(tasks=route))  # type: ignore[arg-type]


def test_a_warm_started_run_goes_on_and_back_to_where_it_was() -> None:
    dynamics, extra = RULES["learnt"]
    fresh = net_problem(dynamics, extra, num_steps=10)
    names = ("init.first", "init.second")
    problem = ht.BilevelProblem(
        fresh.inner, fresh.outer, dynamics=dynamics, num_steps=10, warm_start=True, allow_unused=names
    )
    hparams = problem.init_hparams()
    first = ht.hypergradient(problem, hparams, backend=Reversible())
    assert set(first.carry) >= {"params.first", "dynamics.velocity.first", "index"}
    expected = ht.hypergradient(problem, hparams, backend=Reverse(), carry=first.carry, outer_step=1)
    actual = ht.hypergradient(problem, hparams, backend=Reversible(), carry=first.carry, outer_step=1)
    assert_equal(actual.grads, expected.grads)
    assert_equal(actual.params, expected.params)
    assert int(actual.carry["index"]) == 20
    together = ht.hypergradient(net_problem(dynamics, extra, num_steps=20), hparams, backend=Reversible())
    assert_equal(actual.params, together.params)


def test_a_closed_form_without_a_step_is_differentiated_through() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["c"].exp()}, lambda p, h, b: p["w"]),
        LambdaOuter(scalars(c=0.5), lambda p, h, b: p["w"].square()),
        dynamics=ReversibleMomentum(lr=0.1),
        num_steps=0,
    )
    result = ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())
    torch.testing.assert_close(result.grads["c"], torch.tensor(2.0 * math.e, dtype=F64))
    assert result.figures == {}


def test_params_that_are_one_tensor_keep_their_own_paths() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"a": h["c"], "b": h["c"]},
            lambda p, h, b: (p["a"] * h["c"]).sin().sum() + (p["b"] + p["a"]).square().sum(),
        ),
        LambdaOuter({"c": normal(3, seed=0)}, lambda p, h, b: (p["a"] * p["b"] * h["c"]).sum()),
        dynamics=ReversibleMomentum(lr=0.1, momentum=0.5),
        num_steps=5,
    )
    assert_equals_reverse(problem)


class Regression(ht.InnerProblem):
    """A small convolutional net in any dtype, on any device."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
        self.net = ht.FunctionalModule(module.to(dtype).to(device))
        self.data = normal(6, 1, 4, 4, seed=1).to(dtype).to(device)
        self.targets = normal(6, 2, seed=2).to(dtype).to(device)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {name: value.detach() * hparams["scale"] for name, value in self.net.init_params().items()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        penalty = sum(value.square().sum() for value in params.values())
        return (self.net(params, self.data) - self.targets).square().mean() + hparams["log_l2"].exp() * penalty


def regression(dtype: torch.dtype, device: str = "cpu", num_steps: int = 50) -> ht.BilevelProblem:
    inner = Regression(dtype, device)
    values = {"scale": 1.1, "log_l2": -4.0, "lr": 0.3, "m": 0.9}
    return ht.BilevelProblem(
        inner,
        LambdaOuter(
            {name: torch.tensor(value, dtype=dtype, device=device) for name, value in values.items()},
            lambda p, h, b: (inner.net(p, inner.data.flip(0)) - inner.targets).square().mean(),
        ),
        dynamics=ReversibleMomentum(lr=Hyper("lr"), momentum=Hyper("m")),
        num_steps=num_steps,
    )


def test_float32_comes_back_and_is_near_float64() -> None:
    single, double = regression(torch.float32), regression(torch.float64)
    expected = ht.hypergradient(double, double.init_hparams(), backend=Reverse())
    actual = ht.hypergradient(single, single.init_hparams(), backend=Reversible())
    assert {value.dtype for value in [*actual.grads.values(), *actual.params.values()]} == {torch.float32}
    assert_equal({name: value.double() for name, value in actual.grads.items()}, expected.grads, 1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_reverse_on_a_gpu(dtype: torch.dtype) -> None:
    problem = regression(dtype, "cuda")
    expected = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    actual = ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())
    assert_equal(actual.grads, expected.grads, 1e-10 if dtype == F64 else 1e-3)


# Information, cost and memory


@pytest.mark.parametrize("momentum", [0.9])
def test_a_thousand_steps_come_back_for_the_information_that_theory_asks(momentum: float) -> None:
    hparams = scalars(c=0.3)
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": normal(20, seed=0)},
            lambda p, h, b: (3.0 * p["w"]).sin().sum() + h["c"] * p["w"].square().sum() + p["w"].sum().square(),
        ),
        LambdaOuter(hparams, lambda p, h, b: p["w"].square().sum()),
        dynamics=ReversibleMomentum(lr=0.1, momentum=momentum),
        num_steps=1000,
    )
    result = ht.hypergradient(problem, hparams, backend=Reversible())
    assert float(result.figures["information_bits"]) / 1000 == pytest.approx(-math.log2(momentum), rel=0.1)


def test_costs_are_as_documented() -> None:
    dynamics, extra = RULES["learnt"]
    problem = net_problem(dynamics, extra, num_steps=5)
    stats = ht.hypergradient(problem, problem.init_hparams(), backend=Reversible()).stats
    assert (stats.steps, stats.vjps, stats.jvps, stats.stored_states, stats.graph_steps) == (10, 5, 0, 2, 1)


@pytest.mark.parametrize("rule", ["fixed", "per step and parameter"])
def test_params_with_the_same_settings_are_one_tensor(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a step costs as many operations for a net of many layers as for one."""
    dynamics, extra = RULES[rule]
    problem = net_problem(dynamics, extra, num_steps=NUM_STEPS)
    made: list[int] = []
    original = ReversibleMomentum.start_exact

    def start_exact(*args: Any, **named: Any) -> Any:
        exact = original(*args, **named)
        made.append(len(exact.params))
        return exact

    monkeypatch.setattr(ReversibleMomentum, "start_exact", start_exact)
    hparams = problem.init_hparams()
    ht.hypergradient(problem, hparams, backend=Reversible())
    num_params = len(problem.inner.init_params(hparams))
    assert made == [1 if rule == "fixed" else num_params] and num_params > 1


class _LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that any operation has made and that are still alive, looked at when asked."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            # A loss of each step is kept by the loop: numbers do not count.
            if isinstance(value, Tensor) and value.numel() > 1:
                storage = value.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = (reference, storage.nbytes())
        return result

    def look(self) -> int:
        self._storages = {key: item for key, item in self._storages.items() if not item[0].expired()}
        return sum(size for _, size in self._storages.values())


def most_alive(backend: ht.Hypergradient, num_steps: int, momentum: float) -> int:
    """The most bytes alive whenever the inner loss is evaluated; parameters of 500 weights."""
    weights = 500
    live = _LiveBytes()
    most = 0

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        nonlocal most
        most = max(most, live.look())
        return (params["w"] * hparams["c"]).sin().sum()

    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.linspace(-1.0, 1.0, weights, dtype=F64) * h["c"]}, loss),
        LambdaOuter(scalars(c=1.3), lambda p, h, b: p["w"].square().sum()),
        dynamics=ReversibleMomentum(lr=0.1, momentum=momentum),
        num_steps=num_steps,
    )
    hparams = problem.init_hparams()
    with live:
        ht.hypergradient(problem, hparams, backend=backend)
    return most // weights


def test_memory_grows_by_the_information_alone() -> None:
    # Up to 380 steps at 0.9 the head of 64 bits holds everything.
    assert most_alive(Reversible(), 150, 0.9) == most_alive(Reversible(), 20, 0.9) < 150
    # One bit for each step at 0.5: 150 steps need 3 words of 4 bytes beside the head.
    assert most_alive(Reversible(), 150, 0.5) == most_alive(Reversible(), 20, 0.5) + 4 * 3
    # What is not reversed grows by 8 bytes and more for each step.
    assert most_alive(Reverse(), 150, 0.9) > 150 * 8


def test_no_graph_is_left_and_no_grad_is_written() -> None:
    dynamics, extra = RULES["learnt first velocity"]
    problem = net_problem(dynamics, extra, num_steps=3, step_terms=True)
    hparams = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
    result = ht.hypergradient(problem, hparams, backend=Reversible())
    assert all(value.grad is None for value in hparams.values())
    values = [result.outer_loss, *result.grads.values(), *result.params.values(), *result.figures.values()]
    assert not any(value.requires_grad for value in values)
    again = ht.hypergradient(problem, hparams, backend=Reversible())
    for name, value in result.grads.items():
        assert torch.equal(again.grads[name], value)


# What cannot be run backwards


def replayed(
    loss: Callable[[TensorDict, int], Tensor],
    init: Callable[[], Tensor] = lambda: torch.linspace(0.5, 1.0, 4, dtype=F64),
    num_steps: int = 8,
) -> ht.BilevelProblem:
    """A problem whose loss also sees how often it was called; its batch is the index of the step."""

    class Inner(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": init() * hparams["c"]}

        def batch(self, step: int) -> int:
            return step

        def loss(self, params: TensorDict, hparams: TensorDict, batch: int) -> Tensor:
            return loss(params, batch)

    return ht.BilevelProblem(
        Inner(),
        LambdaOuter(scalars(c=1.0), lambda p, h, b: p["w"].square().sum()),
        dynamics=ReversibleMomentum(lr=0.1),
        num_steps=num_steps,
    )


def test_a_loss_that_counts_its_calls_is_noticed() -> None:
    calls = 0

    def loss(params: TensorDict, step: int) -> Tensor:
        nonlocal calls
        calls += step > 0  # the first step, which is looked at beforehand, is the same every time
        return params["w"].square().sum() * (1.0 + 1e-13 * calls * (step > 0))

    problem = replayed(loss)
    message = (
        r"did not end at its initial state: `w` came back with other bits.*Going back, inner step 7 is the first whose "
        r"loss was not the same.*Let `InnerProblem.batch`, `loss` and `init_params` depend on their arguments only"
    )
    with pytest.raises(ReplayError, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


def test_the_step_that_was_replayed_differently_is_named() -> None:
    seen: set[int] = set()

    def loss(params: TensorDict, step: int) -> Tensor:
        again = step in seen
        seen.add(step)
        return params["w"].square().sum() * (1.0 + (1e-12 if again and step == 3 else 0.0))

    problem = replayed(loss)
    with pytest.raises(ReplayError, match="Going back, inner step 3 is the first"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


class _Careless(torch.autograd.Function):
    """The square, with a gradient that the last bits of `factor()` multiply."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Callable[[], float]) -> Tensor:
        ctx.save_for_backward(value)
        ctx.factor = factor
        return value.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return 2.0 * value * grad * ctx.factor(), None


def test_a_gradient_that_is_not_deterministic_is_noticed() -> None:
    calls = 0

    def factor() -> float:
        nonlocal calls
        calls += 1
        return 1.0 + 2.0**-48 * (calls % 3)

    problem = replayed(lambda params, step: _Careless.apply(params["w"], factor).sum())
    with pytest.raises(
        ReplayError, match=r"a gradient \(of a kernel that is not deterministic\)|Going back, inner ste"
    ):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


def test_a_gradient_that_depends_on_whether_it_has_a_graph_is_computed_alike() -> None:
    """As some kernels do, in the last bit."""
    problem = replayed(
        lambda params, step: _Careless.apply(
            params["w"], lambda: 1.0 + (2.0**-48 if torch.is_grad_enabled() else 0.0)
        ).sum()
    )
    result = ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())
    assert float(result.grads["c"]) > 0.0


def test_an_initialisation_of_its_own_noise_is_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    scale: list[float] = [0.0]
    problem = replayed(
        lambda params, step: params["w"].square().sum(),
        lambda: 1.0 + scale[0] * torch.rand(4, generator=generator, dtype=F64),
    )
    # The first of its kind is looked at for side effects, and has none yet.
    ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())
    scale[0] = 1.0
    with pytest.raises(ReplayError, match=r"`w` came back with other bits.*Every loss was the same, .* `init_params`"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


@pytest.mark.parametrize(
    ("dynamics", "name"),
    [
        (ht.dynamics.SGD(lr=0.1, momentum=0.9), "SGD"),
        (ht.dynamics.Adam(), "Adam"),
        (LearnedBuffers(ht.dynamics.SGD(lr=0.1, momentum=0.9)), "LearnedBuffers"),
    ],
)
def test_other_dynamics_are_refused(dynamics: ht.Dynamics, name: str) -> None:
    problem = net_problem(dynamics, {"buffers.momentum.first": torch.zeros(4, 6, dtype=F64)}, num_steps=2)
    message = rf"`Reversible\(\)` got a problem with the dynamics `{name}`.*Use `ht.dynamics.ReversibleMomentum\(lr"
    with pytest.raises(IncompatibleBackendError, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


def test_running_statistics_are_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    plain = task_problem(module, item=(2,))
    problem = ht.BilevelProblem(
        plain.inner, plain.outer, dynamics=ReversibleMomentum(lr=Hyper("lr")), num_steps=2, num_tasks=3
    )
    with pytest.raises(IncompatibleBackendError, match=r"untrained buffers.*`track_running_stats=False`"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


def test_a_learnt_momentum_out_of_range_is_refused() -> None:
    problem = net_problem(ReversibleMomentum(lr=0.1, momentum=Hyper("m")), scalars(m=1.0), num_steps=2)
    with pytest.raises(ValueError, match=r"`momentum` of `ReversibleMomentum` is 1.0 for `first`.*can be reversed"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


def test_a_run_that_leaves_the_range_of_the_integers_says_where() -> None:
    problem = replayed(lambda params, step: -4.0 * params["w"].square().sum(), num_steps=60)
    with pytest.raises(
        NonFiniteError, match=r"`w` \(or its .*\) reached 1.*e\+03 at inner step \d+: .*below 1024\. Lo"
    ):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())
    assert torch.isfinite(ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).outer_loss)


def test_params_that_start_out_of_range_are_refused() -> None:
    problem = replayed(lambda params, step: params["w"].square().sum(), lambda: torch.full((2,), 1024.0, dtype=F64))
    with pytest.raises(NonFiniteError, match="reached 1.02e.03 before the first inner step"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


def test_a_gradient_that_is_not_finite_is_named_although_the_loss_is() -> None:
    problem = replayed(lambda params, step: (params["w"] - params["w"].detach()).sqrt().sum())
    with pytest.raises(NonFiniteError, match=r"`(w|dynamics.velocity.w)` holds NaN or infinity after inner step 0"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


def test_numbers_beyond_the_range_that_do_not_come_again_are_reported_too() -> None:
    calls: list[int] = []

    def loss(params: TensorDict, step: int) -> Tensor:
        calls.append(step)
        return params["w"].sum() * (1e5 if calls.count(1) == 1 and step == 1 else 1.0)

    problem = replayed(loss)
    with pytest.raises(NonFiniteError, match="but not when the run was repeated"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())


def test_a_hyperparameter_that_does_nothing_is_named() -> None:
    dynamics, extra = RULES["fixed"]
    problem = net_problem(dynamics, {**extra, **scalars(idle=1.0)}, num_steps=2)
    with pytest.raises(DetachedHyperparameterError, match="idle"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reversible())
