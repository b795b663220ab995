"""Modules that run parts of themselves again at backward time: with the weights they were called with, or refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot import BatchNorm
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal, task_problem

F64 = torch.float64
backends = ht.hypergradients
NUM_STEPS = 3


def keep_products(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE


class WeightsByName(saved_tensors_hooks):
    """Saves weights by their names, and looks them up in the module when they are needed."""

    def __init__(self, module: nn.Module) -> None:
        def pack(value: Tensor) -> Tensor | tuple[str, bool]:
            for name, weight in module.named_parameters():
                if value.data_ptr() == weight.data_ptr():
                    return name, value.stride() != weight.stride()
            return value.detach()

        def unpack(packed: Tensor | tuple[str, bool]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            weight = dict(module.named_parameters())[packed[0]].detach()
            return weight.T if packed[1] else weight

        super().__init__(pack, unpack)


def by_name(body: nn.Sequential, inputs: Tensor) -> Tensor:
    with WeightsByName(body):
        return body(inputs)


class Kept:
    """Enters one and the same pair of hooks at every call."""

    def __init__(self) -> None:
        self.hooks: WeightsByName | None = None

    def __call__(self, body: nn.Sequential, inputs: Tensor) -> Tensor:
        self.hooks = self.hooks or WeightsByName(body)
        with self.hooks:
            return body(inputs)


def on_the_host(body: nn.Sequential, inputs: Tensor) -> Tensor:
    with save_on_cpu():
        return body(inputs)


def nested(body: nn.Sequential, inputs: Tensor) -> Tensor:
    def outside(values: Tensor) -> Tensor:
        return body[2:](checkpoint(body[:2], values, use_reentrant=False))

    return checkpoint(outside, inputs, use_reentrant=False)


ROUTES: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "module": partial(checkpoint, use_reentrant=False),
    "function": lambda body, inputs: checkpoint(lambda values: body(values), inputs, use_reentrant=False),
    "sequential": lambda body, inputs: checkpoint_sequential(body, 3, inputs, use_reentrant=False),
    "without early stop": partial(checkpoint, use_reentrant=False, early_stop=False),
    "nested": nested,
    "hooks of the user's": by_name,
    "hooks that recompute nothing": on_the_host,
    "hooks entered again": lambda body, inputs: body.__dict__.setdefault("kept", Kept())(body, inputs),
}


class Net(nn.Module):
    """Layers of which the middle ones go by a route."""

    def __init__(self, route: Callable[[nn.Sequential, Tensor], Tensor] | None, *layers: nn.Module) -> None:
        super().__init__()
        self.route = route
        self.body = nn.Sequential(*(layers or (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())))
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs) if self.route is None else self.route(self.body, inputs)
        return self.head(hidden)


Layers = Callable[[], tuple[nn.Module, ...]]


def net(route: Callable[[nn.Sequential, Tensor], Tensor] | None, layers: Layers = tuple) -> Net:
    torch.manual_seed(5)
    return Net(route, *layers()).double()


class Fit(ht.InnerProblem):
    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        self.net, self.inputs, self.targets = ht.FunctionalModule(module), inputs, normal(len(inputs), 3, seed=2)
        self.buffers = self.net.buffers

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return self.net.init_params()

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
        outputs, buffers = self.net.with_buffers(params, self.inputs)
        return (hparams["weights"].exp() * (outputs - self.targets).square().mean(1)).mean(), buffers


class Judge(ht.OuterProblem):
    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        self.net, self.inputs, self.targets = ht.FunctionalModule(module), inputs, normal(len(inputs), 3, seed=4)

    def init_hparams(self) -> TensorDict:
        return {"weights": 0.1 * normal(len(self.inputs), seed=6)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (self.net(params, self.inputs) - self.targets).square().mean()


def problem(module: nn.Module, shape: tuple[int, ...] = (6, 3)) -> ht.BilevelProblem:
    """Returns: fit the module to weighted examples; the same module, called with other weights, is judged."""
    return ht.BilevelProblem(
        Fit(module, normal(*shape, seed=1)),
        Judge(module, normal(*shape, seed=3)),
        dynamics=ht.dynamics.SGD(lr=0.3, momentum=0.5),
        num_steps=NUM_STEPS,
    )


def grads(made: ht.BilevelProblem, backend: ht.Hypergradient) -> Tensor:
    return ht.hypergradient(made, made.init_hparams(), backend=backend).grads["weights"]


def by_hand() -> tuple[Tensor, Tensor]:
    """Returns the hypergradient and the outer loss by plain autograd, the network written out."""
    state = net(None).state_dict()
    params = [value.clone().requires_grad_() for value in state.values()]
    made = problem(net(None))
    weights = made.init_hparams()["weights"].requires_grad_()

    def outputs(w: list[Tensor], inputs: Tensor) -> Tensor:
        hidden = torch.tanh(torch.tanh(inputs @ w[0].T + w[1]) @ w[2].T + w[3])
        return hidden @ w[4].T + w[5]

    momentum = [torch.zeros_like(value) for value in params]
    fit, judge = made.inner, made.outer
    assert isinstance(fit, Fit) and isinstance(judge, Judge)
    for _ in range(NUM_STEPS):
        loss = (weights.exp() * (outputs(params, fit.inputs) - fit.targets).square().mean(1)).mean()
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        momentum = [0.5 * kept + new for kept, new in zip(momentum, gradient, strict=True)]
        params = [value - 0.3 * step for value, step in zip(params, momentum, strict=True)]
    loss = (outputs(params, judge.inputs) - judge.targets).square().mean()
    return torch.autograd.grad(loss, weights)[0], loss.detach()


EXACT: dict[str, ht.Hypergradient] = {
    "whole graph": backends.Reverse(),
    "segments": backends.Reverse(checkpoint_every=2),
    "snapshots": backends.Reverse(snapshots=2),
    "budget": backends.Reverse(memory_budget="1GiB"),
    "full window": backends.Truncated(window=NUM_STEPS),
    "forward by duals": backends.Forward(chunk_size=1),
    "whichever wins": backends.Reverse(derivative="auto"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("backend", EXACT)
def test_equals_the_network_written_out(route: str, backend: str) -> None:
    expected, loss = by_hand()
    made = problem(net(ROUTES[route]))
    if (route, backend) == ("nested", "forward by duals"):
        with pytest.raises(
            IncompatibleBackendError, match=r"loses its tangents.*inner ones off, or use.*`Reverse\(\)`"
        ):
            grads(made, EXACT[backend])
        return
    torch.testing.assert_close(grads(made, EXACT[backend]), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ht.unroll(made, made.init_hparams()).outer_loss, loss, rtol=1e-12, atol=0.0)


ESTIMATES: dict[str, ht.Hypergradient] = {
    "short window": backends.Truncated(window=2),
    "one step": backends.OneStep(),
    "one step by differences": backends.OneStep(finite_difference=True),
    "implicit": backends.Implicit(stationarity_tolerance=None, residual_tolerance=None),
    "implicit of the step": backends.Implicit(
        map="step", solver=ht.linear_solvers.Neumann(num_terms=3), stationarity_tolerance=None, residual_tolerance=None
    ),
    "EvoGrad": backends.EvoGrad(num_copies=3),
    "evolution strategies": backends.EvolutionStrategies(num_pairs=2, sigma=0.01),
    "forward gradient": backends.ForwardGradient(num_samples=2, chunk_size=1),
}


@pytest.mark.parametrize("backend", ESTIMATES)
def test_estimates_are_those_of_the_plain_network(backend: str) -> None:
    found, expected = (grads(problem(net(route)), ESTIMATES[backend]) for route in (ROUTES["module"], None))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


LAYERS: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "dropout": (lambda: (nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4)), (6, 3)),
    "layer norm": (lambda: (nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh()), (6, 3)),
    "convolution": (lambda: (nn.Conv2d(1, 4, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (6, 1, 4, 4)),
    "attention": (
        lambda: (
            nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.2, batch_first=True),
            nn.Flatten(),
            nn.Linear(8, 4),
        ),
        (6, 2, 4),
    ),
    "running statistics": (
        lambda: (
            nn.Unflatten(1, (3, 1, 1)),
            BatchNorm(3, statistics="running", momentum=0.4),
            nn.Flatten(),
            nn.Linear(3, 4),
        ),
        (6, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("backend", ["whole graph", "segments"])
def test_layers_inside_what_is_recomputed(layers: str, backend: str) -> None:
    make, shape = LAYERS[layers]
    found, expected = (grads(problem(net(route, make), shape), EXACT[backend]) for route in (ROUTES["module"], None))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_tasks_go_one_by_one(chunk: int | None) -> None:
    found, expected = (
        ht.hypergradient(
            made, made.init_hparams(), backend=backends.Reverse(), execution=ht.Execution(tasks="loop", chunk=chunk)
        ).grads
        for made in (task_problem(net(route), item=(3,)) for route in (ROUTES["module"], None))
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_tasks_at_once_are_refused_and_a_measured_route_avoids_them() -> None:
    made = task_problem(net(ROUTES["module"]), item=(3,))
    with pytest.raises(IncompatibleBackendError, match="recomputes a part of itself .*tasks='loop'"):
        ht.hypergradient(made, made.init_hparams(), backend=backends.Reverse(), execution=ht.Execution(tasks="vmap"))
    plain, measured = (task_problem(net(route), item=(3,)) for route in (None, ROUTES["module"]))
    for each in (plain, measured):
        ht.hypergradient(each, each.init_hparams(), backend=backends.Reverse())


def test_mixed_mode_knows_no_hooks_and_is_refused() -> None:
    with pytest.raises(IncompatibleBackendError, match="saved tensor hooks.*Use `derivative='reverse'` or 'auto'"):
        grads(problem(net(ROUTES["module"])), backends.Reverse(derivative="mixed"))


def test_vectorised_tangents_know_no_hooks_and_are_pushed_one_by_one() -> None:
    found, expected = (grads(problem(net(route)), backends.Forward()) for route in (ROUTES["module"], None))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", [*EXACT.values(), *ESTIMATES.values()], ids=[*EXACT, *ESTIMATES])
def test_the_reentrant_kind_is_refused(backend: ht.Hypergradient) -> None:
    made = problem(net(partial(checkpoint, use_reentrant=True)))
    with pytest.raises(IncompatibleBackendError, match="`use_reentrant=True`.*Pass `use_reentrant=False`"):
        grads(made, backend)


def test_the_reentrant_kind_is_refused_in_a_plain_run_and_in_a_loss_without_a_module() -> None:
    made = problem(net(partial(checkpoint, use_reentrant=True)))
    with pytest.raises(IncompatibleBackendError, match="use_reentrant=False"):
        ht.unroll(made, made.init_hparams())

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        hidden: Any = checkpoint(
            lambda values: (values * params["w"]).tanh(), torch.ones(2, dtype=F64), use_reentrant=True
        )
        return (hidden - hparams["c"]).square().sum() + params["w"].square()

    start = {"w": torch.ones((), dtype=F64)}
    functional = ht.BilevelProblem(
        LambdaInner(lambda _: start, loss),
        LambdaOuter({"c": torch.ones((), dtype=F64)}, lambda p, h, b: p["w"]),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=2,
    )
    with pytest.raises(IncompatibleBackendError, match="use_reentrant=False"):
        ht.hypergradient(functional, functional.init_hparams(), backend=backends.Reverse())


def test_outside_of_the_library_both_kinds_work_as_before() -> None:
    layer = nn.Linear(2, 2).double()
    inputs = normal(3, 2, seed=0).requires_grad_()
    for reentrant in (True, False):
        layer.zero_grad()
        outputs: Any = checkpoint(layer, inputs, use_reentrant=reentrant)
        outputs.square().sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.any()


def weight_gradient(module: ht.FunctionalModule, scale: float) -> tuple[Tensor, Callable[[], Tensor]]:
    """Returns a call's weight, and what gives its gradient later."""
    params = {name: (scale * value).requires_grad_() for name, value in module.init_params().items()}
    loss = module(params, normal(5, 3, seed=1)).square().sum()
    return params["body.0.weight"], lambda: torch.autograd.grad(loss, params["body.0.weight"], retain_graph=True)[0]


def test_calls_with_different_weights_that_live_at_once_do_not_mix() -> None:
    module, plain = ht.FunctionalModule(net(ROUTES["module"])), ht.FunctionalModule(net(None))
    later = [weight_gradient(module, scale)[1] for scale in (0.5, 1.0, 2.0)]
    expected = [weight_gradient(plain, scale)[1]() for scale in (0.5, 1.0, 2.0)]
    for position in (1, 0, 2, 1):
        torch.testing.assert_close(later[position](), expected[position])


def test_a_mode_switched_after_the_call_is_not_the_one_that_counts() -> None:
    found, expected = (
        ht.FunctionalModule(net(route, lambda: (nn.Linear(3, 4), nn.Dropout(0.5))))
        for route in (ROUTES["module"], None)
    )
    for module in (found, expected):
        torch.manual_seed(3)
        module.later = weight_gradient(module, 1.0)[1]  # type: ignore[attr-defined]
        module.module.eval()
    torch.testing.assert_close(found.later(), expected.later())  # type: ignore[attr-defined]
    assert not found.module.training


def test_a_module_called_by_another_keeps_its_weights_too() -> None:
    class Outside(nn.Module):
        """Calls another module with weights that it makes of its own."""

        def __init__(self, route: Callable[[nn.Sequential, Tensor], Tensor] | None) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=F64))
            object.__setattr__(self, "inside", ht.FunctionalModule(net(route)))

        def forward(self, inputs: Tensor) -> Tensor:
            start = self.inside.init_params()
            weights = {name: value * self.scale for name, value in start.items()}
            return self.inside(weights, inputs) * self.scale

    found, expected = (ht.FunctionalModule(Outside(route)) for route in (ROUTES["module"], None))
    both = []
    for module in (found, expected):
        scale = torch.tensor(1.3, dtype=F64, requires_grad=True)
        loss = module({"scale": scale}, normal(5, 3, seed=1)).square().sum()
        (first,) = torch.autograd.grad(loss, scale, create_graph=True)
        both.append((first.detach(), torch.autograd.grad(first, scale)[0]))
    torch.testing.assert_close(both[0], both[1])


def test_names_that_only_pytorch_knows_are_held_too() -> None:
    layer = nn.Linear(3, 3, bias=False)

    def both(module: ht.FunctionalModule, name: str) -> Tensor:
        weight = (2.0 * torch.eye(3, dtype=F64)).requires_grad_()
        loss = module({name: weight}, normal(5, 3, seed=1)).square().sum()
        return torch.autograd.grad(loss, weight)[0]

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = layer.double()

        def forward(self, inputs: Tensor) -> Tensor:
            return checkpoint(lambda values: self.second(self.first(values).tanh()), inputs, use_reentrant=False)  # type: ignore[return-value]

    module = ht.FunctionalModule(Tied())
    # The second name of a tied weight has no place of its own.
    torch.testing.assert_close(both(module, "second.weight"), both(module, "first.weight"))


def test_what_is_recomputed_starts_from_the_buffers_that_it_started_from() -> None:
    class Moving(nn.Module):
        """Scales by a number that every pass moves, before it is used."""

        def __init__(self, again: bool) -> None:
            super().__init__()
            self.again = again
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=F64))
            self.register_buffer("speed", torch.tensor(1.0, dtype=F64))

        def part(self, inputs: Tensor) -> Tensor:
            self.speed.mul_(1.5)
            return (inputs * self.weight * self.speed.clone()).tanh()

        def forward(self, inputs: Tensor) -> Tensor:
            for _ in range(2):
                inputs = checkpoint(self.part, inputs, use_reentrant=False) if self.again else self.part(inputs)  # type: ignore[assignment]
            return inputs

    values = []
    for again in (True, False):
        weight = torch.tensor(0.8, dtype=F64, requires_grad=True)
        outputs, buffers = ht.FunctionalModule(Moving(again)).with_buffers({"weight": weight}, normal(4, seed=1))
        (first,) = torch.autograd.grad(outputs.sum(), weight, create_graph=True)  # run again for either derivative
        values.append((buffers["speed"], first.detach(), torch.autograd.grad(first, weight)[0]))
    torch.testing.assert_close(values[0], values[1])
    assert values[0][0] == 1.5**2


def test_a_part_that_fails_when_it_is_run_again_leaves_the_module_its_own_weights() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            self.runs = 0

        def part(self, inputs: Tensor) -> Tensor:
            self.runs += 1
            if self.runs > 1:
                raise KeyError("again")
            return self.layer(inputs).tanh()

        def forward(self, inputs: Tensor) -> Tensor:
            return checkpoint(self.part, inputs, use_reentrant=False)  # type: ignore[return-value]

    own = Failing()
    before = own.layer.weight
    module = ht.FunctionalModule(own)
    params = {name: value.requires_grad_() for name, value in module.init_params().items()}
    loss = module(params, normal(2, 3, seed=0)).sum()
    with pytest.raises(KeyError, match="again"):
        torch.autograd.grad(loss, list(params.values()))
    assert own.layer.weight is before


class Evaluations:
    """A function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, body: nn.Sequential, inputs: Tensor) -> Tensor:
        def counted(values: Tensor) -> Tensor:
            self.calls += 1
            return body(values)

        return checkpoint(counted, inputs, use_reentrant=False)  # type: ignore[return-value]


def test_nothing_is_kept_alive_by_what_could_be_recomputed() -> None:
    module = ht.FunctionalModule(net(ROUTES["module"], LAYERS["running statistics"][0]))
    params = {
        name: value.requires_grad_() if value.is_floating_point() else value
        for name, value in module.init_params().items()
    }
    outputs, buffers = module.with_buffers(params, normal(5, 3, seed=1))
    mark = Evaluations()
    outputs.grad_fn.metadata["mark"] = mark
    alive = weakref.ref(params["head.weight"]), weakref.ref(mark)
    del params, outputs, buffers, mark
    gc.collect()
    assert not any(reference() for reference in alive)


def test_checkpointing_does_what_it_is_for() -> None:
    """The part is run again when a derivative is taken: its activations were not kept."""
    route = Evaluations()
    module = ht.FunctionalModule(net(route))
    weight_gradient(module, 1.0)[1]()
    assert route.calls == 2


def test_a_policy_for_what_is_kept_is_refused() -> None:
    policy = partial(create_selective_checkpoint_contexts, keep_products)
    made = problem(net(partial(checkpoint, use_reentrant=False, context_fn=policy)))
    with pytest.raises(IncompatibleBackendError, match="selective activation checkpointing.*without `context_fn`"):
        grads(made, backends.Reverse())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.compile=True.:UserWarning")
def test_compiled_steps_are_exact_or_run_without_compilation() -> None:
    expected, _ = by_hand()
    found = grads(problem(net(ROUTES["module"])), backends.Reverse(compile=True))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_loss_of_a_classifier_is_exact_through_the_outer_loop_too() -> None:
    """Two outer steps, so that the first hypergradient has moved what the second starts from."""
    ends = []
    for route in (ROUTES["module"], None):
        made = problem(net(route))
        hparams = made.init_hparams()
        for _ in range(2):
            step = grads(made, backends.Reverse())
            hparams = {"weights": hparams["weights"] - 0.5 * step}
        ends.append(F.softmax(hparams["weights"], 0))
    torch.testing.assert_close(ends[0], ends[1])
