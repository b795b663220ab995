"""Functions of a problem that do more than return a value: noticed under every backend, once for each kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import spectral_norm

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError, NonFiniteError, ReplayError
from hypertorch.fewshot import BatchNorm
from hypertorch.hypergradients.guards import side_effects
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal, scalar_problem, scalars, task_problem

F64 = torch.float64
backends = ht.hypergradients
EVERY: dict[str, ht.Hypergradient] = {
    "whole graph": backends.Reverse(),
    "segments": backends.Reverse(checkpoint_every=1),
    "mixed": backends.Reverse(derivative="mixed"),
    "forward": backends.Forward(),
    "forward by duals": backends.Forward(chunk_size=1),
    "truncated": backends.Truncated(window=1),
    "first order": backends.FirstOrder(),
    "one step": backends.OneStep(),
    "implicit": backends.Implicit(stationarity_tolerance=None, residual_tolerance=None),
    "reversible": backends.Reversible(),
    "forward gradient": backends.ForwardGradient(num_samples=2),
    "EvoGrad": backends.EvoGrad(num_copies=2),
    "evolution strategies": backends.EvolutionStrategies(num_pairs=1, sigma=0.1),
}


class Impure(ht.InnerProblem):
    """Minimises `(w - c - shift)^2`, where what is done on the side may change the shift."""

    def __init__(self, place: str, shift: Callable[[], float]) -> None:
        self.place, self.shift = place, shift

    def at(self, place: str) -> float:
        return self.shift() if place == self.place else 0.0

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["c"] * (0.5 + self.at("init"))}

    def batch(self, step: int) -> Batch:
        return torch.tensor(self.at("batch"), dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["c"] - batch - self.at("loss")).square()


class Judged(ht.OuterProblem):
    def __init__(self, inner: Impure) -> None:
        self.inner = inner

    def init_hparams(self) -> TensorDict:
        return scalars(c=1.0)

    def batch(self, outer_step: int) -> Batch:
        return torch.tensor(self.inner.at("outer batch"), dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] + batch + self.inner.at("outer loss")).square() + 0.01 * hparams["c"]


def impure(place: str, shift: Callable[[], float], backend: ht.Hypergradient) -> ht.BilevelProblem:
    reversible = isinstance(backend, backends.Reversible)
    rule = ht.dynamics.ReversibleMomentum(lr=0.1, momentum=0.5) if reversible else ht.dynamics.SGD(lr=0.1)
    inner = Impure(place, shift)
    return ht.BilevelProblem(inner, Judged(inner), dynamics=rule, num_steps=2)


def counter() -> Callable[[], float]:
    calls: Iterator[float] = iter(range(1, 10_000))
    return lambda: float(next(calls))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("place", ["loss", "batch", "outer loss", "outer batch", "init"])
def test_a_counter_is_noticed(backend: str, place: str) -> None:
    made = impure(place, counter(), EVERY[backend])
    with pytest.raises((ReplayError, IncompatibleBackendError), match="no iterator, no counter"):
        ht.hypergradient(made, made.init_hparams(), backend=EVERY[backend])


@pytest.mark.parametrize("source", [random.random, lambda: float(np.random.rand())], ids=["Python", "numpy"])  # noqa: NPY002
def test_noise_of_others_is_noticed_and_torchs_own_is_not(source: Callable[[], float]) -> None:
    made = impure("loss", source, backends.Reverse())
    with pytest.raises(ReplayError, match=r"`InnerProblem.loss` differs .*none of numpy's or Python's"):
        ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse())
    own = impure("loss", lambda: float(torch.rand(())), backends.Reverse())
    ht.hypergradient(own, own.init_hparams(), backend=backends.Reverse())


@pytest.mark.parametrize("place", ["context", "step_loss"])
def test_the_context_and_terms_at_steps_are_looked_at(place: str) -> None:
    shift = counter()

    class Terms(LambdaOuter):
        def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
            return params["w"] * (shift() if place == "step_loss" else 1.0)

    made = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["c"]}, lambda p, h, b: (p["w"] - h["seen"]).square()),
        Terms(scalars(c=1.0), lambda p, h, b: p["w"]),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
        context=lambda h, b: {"seen": h["c"] * (shift() if place == "context" else 1.0)},
    )
    with pytest.raises(ReplayError, match=f"`[A-Za-z.]*{place}` differs"):
        ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse())


def test_rounding_is_no_difference() -> None:
    steps = counter()
    made = impure("loss", lambda: 1e-16 * steps(), backends.Reverse())
    ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse())


def counted() -> tuple[ht.BilevelProblem, list[int]]:
    calls: list[int] = []

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        calls.append(1)
        return (params["w"] - hparams["c"]).square()

    return scalar_problem(inner=loss, num_steps=4), calls


def test_a_kind_is_looked_at_once_and_nothing_of_it_is_counted() -> None:
    made, calls = counted()
    first = ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse())
    looked = len(calls) - 4
    assert 0 < looked <= 8
    for backend in (backends.Reverse(), backends.Reverse(checkpoint_every=4)):
        again, more = counted()
        result = ht.hypergradient(again, again.init_hparams(), backend=backend)
        assert len(more) == 4
        assert result.stats.steps == first.stats.steps == 4


def test_generators_are_left_as_they_were() -> None:
    made, _ = counted()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse())
    assert torch.equal(torch.rand(2), expected)


class Cached(nn.Module):
    """Keeps a running mean as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.mean = torch.zeros(3, dtype=F64)

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return self.layer(inputs - self.mean)


class Replacing(nn.Module):
    """Keeps a running mean as a buffer, which it replaces by a new tensor at each pass."""

    def __init__(self, every: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3, dtype=F64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0) * self.layer.weight.sum()
        return self.layer(inputs - self.mean)


class Loss(ht.InnerProblem):
    """Fits a module to weighted targets; declares its buffers or not."""

    def __init__(self, module: nn.Module, *, declared: bool) -> None:
        self.net, self.declared = ht.FunctionalModule(module), declared
        self.buffers = self.net.buffers if declared else ()
        self.inputs, self.targets = normal(6, 3, seed=1), normal(6, seed=2)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        start = self.net.init_params()
        return start if self.declared else {name: start[name] for name in self.net.trained_names()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Any:
        outputs, buffers = self.net.with_buffers(params, self.inputs)
        loss = (hparams["weights"] * (outputs[:, 0] - self.targets).square()).mean()
        return (loss, buffers) if self.declared else loss


class Other(ht.OuterProblem):
    def __init__(self, module: nn.Module) -> None:
        self.net = ht.FunctionalModule(module)

    def init_hparams(self) -> TensorDict:
        return {"weights": torch.ones(6, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return self.net(params, normal(5, 3, seed=3)).square().mean()


def fitted(
    make: Callable[[], nn.Module], *, declared: bool = False, inner_mode: bool = True, outer_mode: bool = False
) -> ht.BilevelProblem:
    torch.manual_seed(0)
    module = make().double()
    judge = make().double()
    judge.load_state_dict(module.state_dict())
    return ht.BilevelProblem(
        Loss(module.train(inner_mode), declared=declared),
        Other(judge.train(outer_mode)),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=3,
    )


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1))


def old_spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def run(made: ht.BilevelProblem, backend: ht.Hypergradient | None = None) -> TensorDict:
    return ht.hypergradient(made, made.init_hparams(), backend=backend or backends.Reverse()).grads


def check(made: ht.BilevelProblem) -> ht.HypergradientCheck:
    return ht.check_hypergradient(made, made.init_hparams(), backends.Reverse())


def test_what_a_module_keeps_outside_of_its_buffers_is_noticed() -> None:
    with pytest.raises(ReplayError, match="must be a buffer: register it"):
        run(fitted(Cached))


def test_a_buffer_that_nobody_carries_along_is_noticed_and_the_advice_works() -> None:
    with pytest.raises(
        IncompatibleBackendError, match=r"moves the buffer `mean` of a Replacing .*`buffers = net.buffers`"
    ):
        run(fitted(Replacing))
    declared = fitted(Replacing, declared=True)
    verdict = check(declared)
    assert verdict.passed, str(verdict)
    assert ht.unroll(declared, declared.init_hparams()).params["mean"].any()


@pytest.mark.parametrize("make", [spectral, old_spectral])
@pytest.mark.parametrize("backend", ["whole graph", "segments", "forward", "one step", "implicit"])
def test_a_spectral_norm_in_training_mode_is_refused(make: Callable[[], nn.Module], backend: str) -> None:
    advice = r"buffer `.*_[uv]`.*Call `.eval\(\)`.*`torch.linalg.matrix_norm\(weight, ord=2\)`"
    for declared in (False, True):
        with pytest.raises(IncompatibleBackendError, match=advice):
            run(fitted(make, declared=declared), EVERY[backend])


@pytest.mark.parametrize("make", [spectral, old_spectral, batch_norm])
@pytest.mark.parametrize("declared", [False, True])
def test_in_evaluation_mode_the_stored_values_are_constants(make: Callable[[], nn.Module], declared: bool) -> None:
    verdict = check(fitted(make, declared=declared, inner_mode=False))
    assert verdict.passed, str(verdict)


class Divided(nn.Module):
    """The parametrisation that the advice speaks of."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.matrix_norm(weight, ord=2)


def test_a_parametrisation_of_ones_own_in_place_of_spectral_norm_is_exact() -> None:
    def make() -> nn.Module:
        layer = nn.Linear(3, 4)
        nn.utils.parametrize.register_parametrization(layer, "weight", Divided())
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 1))

    verdict = check(fitted(make, outer_mode=True))
    assert verdict.passed, str(verdict)


def test_a_spectral_norm_that_only_the_outer_loss_moves_is_refused() -> None:
    with pytest.raises(IncompatibleBackendError, match="the outer loss moves the buffer"):
        run(fitted(spectral, inner_mode=False, outer_mode=True))


def test_statistics_that_nothing_reads_need_no_declaration() -> None:
    verdict = check(fitted(batch_norm, outer_mode=True))
    assert verdict.passed, str(verdict)


def test_statistics_that_are_judged_by_must_be_carried_along() -> None:
    with pytest.raises(
        IncompatibleBackendError, match=r"the inner loss moves the buffer `1\..*Call `.eval\(\)` on the `BatchNorm1d`"
    ):
        run(fitted(batch_norm))

    def own() -> nn.Module:
        norm = BatchNorm(3, statistics="running", momentum=0.5)
        return nn.Sequential(nn.Linear(3, 3), nn.Unflatten(1, (3, 1, 1)), norm, nn.Flatten(), nn.Linear(3, 1))

    with pytest.raises(IncompatibleBackendError, match="buffer `2.running_mean` of a BatchNorm .* not carried along"):
        run(fitted(own))
    verdict = check(fitted(own, declared=True))
    assert verdict.passed, str(verdict)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(0.3, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight * inputs + self.shift


@pytest.mark.parametrize("declared", [False, True])
def test_a_buffer_is_not_trained_as_a_param(declared: bool) -> None:
    net = ht.FunctionalModule(Shifted())
    inner = LambdaInner(
        lambda hparams: net.init_params(),
        lambda params, hparams, batch: (net(params, hparams["c"]) - 1.0).square(),
    )
    inner.buffers = net.buffers if declared else ()
    outer = LambdaOuter(scalars(c=0.7), lambda params, hparams, batch: params["weight"].square())
    made = ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=2)
    if not declared:
        with pytest.raises(IncompatibleBackendError, match=r"buffer `shift` of a Shifted is among.*`buffers = net"):
            ht.hypergradient(made, made.init_hparams(), backend=ht.hypergradients.Reverse())
        return
    inner.loss = lambda params, hparams, batch: (  # type: ignore[method-assign]
        (net(params, hparams["c"]) - 1.0).square(),
        {"shift": params["shift"]},
    )
    found = ht.hypergradient(made, made.init_hparams(), backend=ht.hypergradients.Reverse())
    assert found.params["shift"] == 0.3


def test_a_mode_makes_another_kind() -> None:
    run(fitted(spectral, inner_mode=False))
    with pytest.raises(IncompatibleBackendError, match="without a derivative"):
        run(fitted(spectral))


def test_values_alone_miss_no_derivative() -> None:
    assert run(fitted(spectral), EVERY["evolution strategies"])["weights"].any()


class OfItsOwn(nn.Sequential):
    """A class that no other test uses."""


def test_what_was_found_of_values_says_nothing_of_derivatives() -> None:
    made = fitted(lambda: OfItsOwn(*spectral()))
    run(made, EVERY["evolution strategies"])
    with pytest.raises(IncompatibleBackendError, match="without a derivative"):
        run(made)


class Passes(nn.Module):
    """Scales by the number of its passes so far."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("passes", torch.tensor(1.0, dtype=F64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes.add_(1.0)
        return self.layer(inputs) * self.passes.clone()


def test_a_count_of_passes_has_no_derivative_to_miss() -> None:
    verdict = check(fitted(Passes, declared=True))
    assert verdict.passed, str(verdict)
    with pytest.raises(IncompatibleBackendError, match="buffer `passes` of a Passes .*not carried along"):
        run(fitted(Passes))


class Renamed(Loss):
    """Declares the buffers of its module under names of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, declared=True)
        self.buffers = tuple(f"net.{name}" for name in self.net.buffers)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        start = self.net.init_params()
        return {name if name in self.net.trained_names() else f"net.{name}": value for name, value in start.items()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Any:
        loss, buffers = super().loss({n.removeprefix("net."): v for n, v in params.items()}, hparams, batch)
        return loss, {f"net.{name}": value for name, value in buffers.items()}


def test_buffers_may_be_carried_along_under_other_names() -> None:
    torch.manual_seed(0)
    made = ht.BilevelProblem(
        Renamed(Passes().double()),
        LambdaOuter({"weights": torch.ones(6, dtype=F64)}, lambda p, h, b: p["layer.weight"].sum() * p["net.passes"]),
        dynamics=ht.dynamics.SGD(lr=0.01),
        num_steps=3,
    )
    verdict = check(made)
    assert verdict.passed, str(verdict)


def test_tasks_with_buffers_are_looked_at_by_the_first_of_them() -> None:
    made = task_problem(spectral_classifier(), item=(3,))
    with pytest.raises(IncompatibleBackendError, match="_[uv]` is updated"):
        ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse(), execution=ht.Execution(tasks="vmap"))


def spectral_classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)).double()


# Weights that are read at backward time


class Recomputing(torch.autograd.Function):
    """Runs a module again in its backward pass, with the weights that it finds there."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, inputs: Tensor, *weights: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(inputs)
        return module(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            inputs = ctx.saved_tensors[0].detach().requires_grad_()
            weights = [value.detach().requires_grad_() for value in ctx.module.parameters()]
            names = [name for name, _ in ctx.module.named_parameters()]
            again = torch.func.functional_call(ctx.module, dict(zip(names, weights, strict=True)), inputs)
            return None, *torch.autograd.grad(again, [inputs, *weights], grad)


class Late(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.how == "function":
            hidden: Any = Recomputing.apply(self.body, inputs, *self.body.parameters())
        else:
            hidden = self.body(inputs)
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: grad * self.body[0].weight.sum())
        return self.head(hidden)


@pytest.mark.parametrize("how", ["function", "hook"])
@pytest.mark.parametrize("backend", ["whole graph", "segments", "first order"])
def test_weights_read_at_backward_time_are_noticed(how: str, backend: str) -> None:
    with pytest.raises(IncompatibleBackendError, match="Late.* reads its weights at backward time.*save_for_backward"):
        run(fitted(lambda: Late(how)), EVERY[backend])


@pytest.mark.parametrize("on_param", [True, False])
@pytest.mark.parametrize("backend", ["whole graph", "segments", "mixed"])
def test_a_hook_that_changes_a_gradient_is_refused(on_param: bool, backend: str) -> None:
    def hooked(hook: Any) -> ht.BilevelProblem:
        def loss(params: Any, hparams: Any, batch: Any) -> Tensor:
            w = params["w"] if on_param else params["w"] * 1.0
            if w.requires_grad:
                w.register_hook(hook)
            return (w - hparams["c"]).square().sum()

        hparams = {"c": torch.full((2,), 3.0, dtype=torch.float64)}
        inner = LambdaInner(lambda h: {"w": torch.ones(2, dtype=torch.float64)}, loss)
        outer = LambdaOuter(hparams, lambda p, h, b: 1000 * p["w"].square().sum())
        return ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.05), num_steps=3)

    changing, looking = hooked(lambda grad: grad.clamp(-1.0, 1.0)), hooked(lambda grad: None)
    with pytest.raises(
        IncompatibleBackendError, match="registers a hook on a tensor, which changes the inner gradient"
    ):
        ht.hypergradient(changing, changing.init_hparams(), backend=EVERY[backend])
    if backend != "mixed":
        assert ht.check_hypergradient(looking, looking.init_hparams(), EVERY[backend])


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_of_a_module_that_changes_a_gradient_is_refused(register: str) -> None:
    def hooked(hook: Any) -> ht.BilevelProblem:
        def make() -> nn.Module:
            module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
            getattr(module[1], register)(hook)
            return module

        return fitted(make)

    with pytest.raises(IncompatibleBackendError, match="or a backward hook of a module does"):
        run(hooked(lambda module, *grads: tuple(0.5 * grad for grad in grads[0])), EVERY["whole graph"])
    run(hooked(lambda module, *grads: None), EVERY["whole graph"])


# Functions without a second derivative


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


class Twice(torch.autograd.Function):
    """The same as the advice has it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


class Leaky(torch.autograd.Function):
    """Keeps a value without its history, which PyTorch cannot tell from a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.kept = value * value
        return value**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.kept


def cubed(function: Any) -> ht.BilevelProblem:
    inputs, targets = normal(8, 3, seed=1), normal(8, seed=2)

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        fit = hparams["weights"] * (function.apply(inputs @ params["w"]) - targets).square()
        return fit.mean() + (hparams["weights"] * params["w"].sum()).sum() * 0.01  # another path, which has them all

    return ht.BilevelProblem(
        LambdaInner(lambda _: {"w": torch.ones(3, dtype=F64)}, loss),
        LambdaOuter(
            {"weights": torch.full((8,), 0.02, dtype=F64)},
            lambda p, h, b: (normal(8, 3, seed=3) @ p["w"]).square().mean(),
        ),
        dynamics=ht.dynamics.SGD(lr=0.05),
        num_steps=3,
    )


@pytest.mark.parametrize("backend", ["whole graph", "segments", "truncated", "implicit", "one step"])
def test_a_function_without_a_second_derivative_is_named(backend: str) -> None:
    made = cubed(Once)
    with pytest.raises(
        IncompatibleBackendError, match=r"marked `once_differentiable`.*drop the mark, or use `FirstOrder\(\)`"
    ):
        run(made, EVERY[backend])


def test_the_advice_for_it_works() -> None:
    verdict = check(cubed(Twice))
    assert verdict.passed, str(verdict)
    once, twice = (
        run(
            scalar_problem(
                init=lambda h: {"w": h["c"]},
                inner=lambda p, h, b, function=function: function.apply(p["w"]) + p["w"].square(),
            ),
            EVERY["first order"],
        )["c"]
        for function in (Once, Twice)
    )
    torch.testing.assert_close(once, twice)
    assert ht.unroll(cubed(Once), cubed(Once).init_hparams()).params["w"].isfinite().all()


def test_outside_of_a_run_it_is_pytorchs_to_judge() -> None:
    value = torch.ones(2, dtype=F64, requires_grad=True)
    output: Any = Once.apply(value)
    (gradient,) = torch.autograd.grad((value * output).sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_value_without_its_history_is_what_the_check_is_for() -> None:
    """No graph tells it from a constant; central differences do."""
    assert not check(cubed(Leaky)).passed


def set_entry(entries: TensorDict, name: str) -> None:
    entries[name] = 2.0 * entries[name]


CHANGES: dict[str, Callable[[TensorDict, str], Any]] = {
    "entry": set_entry,
    "in place": lambda entries, name: entries[name].mul_(2.0),
    "without a gradient": lambda entries, name: entries[name].data.clamp_(max=0.25),
}


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["init_params", "loss", "outer loss", "step_loss", "context"])
def test_a_function_that_changes_its_hparams_is_refused(place: str, change: str, backend: str) -> None:
    def at(here: str, entries: TensorDict, name: str) -> None:
        if here == place:
            CHANGES[change](entries, name)

    class Changing(Impure):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            at("init_params", hparams, "c")
            return {"w": 0.5 * hparams["c"]}

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            at("loss", hparams, "c")
            return (params["w"] - hparams["c"]).square()

    class Terms(LambdaOuter):
        def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
            at("step_loss", hparams, "c")
            return 0.0 * params["w"]

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        at("outer loss", hparams, "c")
        return params["w"].square() + hparams["c"]

    def context(hparams: TensorDict, batch: Batch) -> TensorDict:
        at("context", hparams, "c")
        return {"seen": torch.zeros(1, dtype=F64)}

    rule = impure("", counter(), EVERY[backend]).dynamics
    made = ht.BilevelProblem(
        Changing("", counter()),
        (Terms if place == "step_loss" else LambdaOuter)(scalars(c=1.0), loss),
        dynamics=rule,
        num_steps=2,
        context=context if place == "context" else None,
    )
    function = "OuterProblem.loss" if place == "outer loss" else rf"[A-Za-z.]*{place}"
    refusal = pytest.raises(ReplayError, match=rf"`{function}` changes its argument `hparams\['c'\]`")
    with refusal:
        ht.hypergradient(made, made.init_hparams(), backend=EVERY[backend])
    hparams = made.init_hparams()
    with refusal:
        ht.unroll(made, hparams)
    assert float(hparams["c"]) == 1.0


@pytest.mark.parametrize("change", [*CHANGES][1:])
@pytest.mark.parametrize("argument", ["params", "batch"])
@pytest.mark.parametrize("place", ["InnerProblem", "OuterProblem"])
def test_a_loss_that_changes_its_params_or_its_data_is_refused(place: str, argument: str, change: str) -> None:
    def loss(here: str) -> Callable[[TensorDict, TensorDict, Batch], Tensor]:
        def value(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            if here == place:
                CHANGES[change](params if argument == "params" else {"w": batch[0]}, "w")
            return (params["w"] - hparams["c"] + batch[0]).square().sum()

        return value

    data = torch.ones(3, dtype=F64)

    class Inner(LambdaInner):
        def batch(self, step: int) -> Batch:
            return (data, [3])

    class Outer(LambdaOuter):
        def batch(self, outer_step: int) -> Batch:
            return (data, [3])

    made = ht.BilevelProblem(
        Inner(lambda h: {"w": torch.ones(3, dtype=F64)}, loss("InnerProblem")),
        Outer(scalars(c=1.0), loss("OuterProblem")),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
    )
    for run in (
        lambda hparams: ht.hypergradient(made, hparams, backend=backends.Reverse()),
        lambda hparams: ht.unroll(made, hparams),
        lambda hparams: ht.evaluate(made, hparams, num_episodes=1),
    ):
        data.fill_(1.0)
        with pytest.raises(ReplayError, match=rf"`{place}.loss` changes its argument `{argument}\["):
            run(made.init_hparams())


def test_a_rule_that_changes_its_state_is_refused() -> None:
    class Heavy(ht.GradientDynamics):
        def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
            return {"m": torch.zeros((), dtype=F64)}

        def update(
            self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
        ) -> tuple[TensorDict, TensorDict]:
            state["m"].mul_(0.9).add_(grads["w"])
            return {"w": params["w"] - 0.1 * state["m"]}, state

    problem = scalar_problem(inner=lambda p, h, b: (p["w"] - h["c"]).square(), num_steps=2)
    made = ht.BilevelProblem(problem.inner, problem.outer, dynamics=Heavy(), num_steps=2)
    with pytest.raises(ReplayError, match=r"`dynamics.step` changes its argument `state\['m'\]`"):
        ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse(checkpoint_every=1))


def test_a_loss_may_change_copies_and_its_own_dict_and_keep_nan() -> None:
    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        hparams = {**hparams, "c": hparams["c"].exp()}
        return (params["w"].clone().mul_(2.0) - hparams["c"]).square()

    made = scalar_problem(inner=loss, num_steps=2)
    assert ht.check_hypergradient(made, made.init_hparams(), backends.Reverse()).passed


class Rooted(nn.Module):
    """Reads its weights at once; one of them is empty, and the derivative in the other is NaN where it is zero."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight, self.empty = nn.Parameter(torch.full((1,), weight)), nn.Parameter(torch.zeros(0))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :1] * (self.weight.square().sum().sqrt() + self.weight) + self.empty.sum()


def test_a_derivative_that_is_nan_or_empty_is_no_late_read() -> None:
    with pytest.raises(NonFiniteError):
        run(fitted(lambda: Rooted(0.0)))
    assert bool(run(fitted(lambda: Rooted(0.5)))["weights"].isfinite().all())


# What counts as a difference


def gap(again: Tensor, first: Tensor) -> float:
    return side_effects._gap([again], [first], inner_eps=0.0)


def test_another_shape_or_type_is_a_difference_of_equal_numbers() -> None:
    assert gap(torch.zeros(1, 2), torch.zeros(2)) == gap(torch.zeros(2, dtype=F64), torch.zeros(2)) == float("inf")
    assert side_effects._gap([], [torch.zeros(2)], inner_eps=0.0) == float("inf")


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_difference_is_measured_by_the_size_of_the_numbers(size: float) -> None:
    first = size * torch.tensor([1.0, -0.3], dtype=F64)
    assert gap(first * (1.0 + 1e-15), first) == 0.0
    assert gap(first * (1.0 + 1e-6), first) == pytest.approx(1e-6 * size)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_gradients_of_the_same_graph_may_differ_by_rounding(size: float) -> None:
    first = size * torch.tensor([1.0, -0.3, 0.0], dtype=F64)
    assert side_effects._same(first * (1.0 + 1e-9), first)
    assert not side_effects._same(first * (1.0 + 1e-6), first)
    assert not side_effects._same(first + 1e-6 * size, first)
