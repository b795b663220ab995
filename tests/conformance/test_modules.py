"""Modules that break second derivatives elsewhere: each works under every backend, or is refused with advice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot import BatchNorm
from hypertorch.types import Batch, TensorDict
from tests.conformance.test_matrix import assert_equal
from tests.helpers.problems import normal

F64 = torch.float64
backends = ht.hypergradients
NUM_STEPS = 3
WAY = 3


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer
        self.head = nn.Linear(4, WAY)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.layer(inputs)))))


class Frozen(nn.Module):
    """A layer that is not trained below one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(4, 5).requires_grad_(False)
        self.head = nn.Linear(5, WAY)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fixed(inputs)))


class Attention(nn.Module):
    """Scaled-dot-product attention by PyTorch's default kernel, over items as tokens of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 6)
        self.head = nn.Linear(4, WAY)

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = self.project(inputs.view(len(inputs), 1, 2, 2)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(query, key, value).flatten(1))


class Transformer(nn.Module):
    """PyTorch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, WAY)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(inputs[:, None, :])[:, 0])


class Recurrent(nn.Module):
    """An LSTM over the four numbers of an item."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)
        self.head = nn.Linear(3, WAY)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs[:, :, None])[0][:, -1])


class Statistics(nn.Module):
    """The library's batch norm, with running statistics that keep their derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm(4, statistics="running", momentum=0.5)
        self.head = nn.Linear(4, WAY)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(inputs[:, :, None, None])[:, :, 0, 0]))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "shared parameters": Shared,
    "frozen parameters": Frozen,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.Linear(5, WAY)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, WAY)
    ),
    "running statistics": Statistics,
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, WAY)),
    "attention": Attention,
    "transformer": Transformer,
    "lstm": Recurrent,
}
EXACT: dict[str, ht.Hypergradient] = {
    "every step": backends.Reverse(checkpoint_every=1),
    "revolve": backends.Reverse(snapshots=1),
    "budget": backends.Reverse(memory_budget="1GiB"),
    "full window": backends.Truncated(window=NUM_STEPS),
    "forward": backends.Forward(),
    "forward by duals": backends.Forward(chunk_size=1),
    "reversible": backends.Reversible(),
}
ESTIMATES: dict[str, ht.Hypergradient] = {
    "truncated": backends.Truncated(window=1),
    "first order": backends.FirstOrder(),
    "one step": backends.OneStep(),
    "one step by differences": backends.OneStep(finite_difference=True),
    "implicit": backends.Implicit(stationarity_tolerance=None, residual_tolerance=None),
    "implicit of the step": backends.Implicit(
        map="step", solver=ht.linear_solvers.Neumann(num_terms=3), stationarity_tolerance=None, residual_tolerance=None
    ),
    "forward gradient": backends.ForwardGradient(num_samples=2),
    "EvoGrad": backends.EvoGrad(num_copies=4),
    "evolution strategies": backends.EvolutionStrategies(num_pairs=2, sigma=0.01),
}
# Refused, with the reason that the message must give.
REFUSED: dict[tuple[str, str], str] = {
    ("running statistics", "reversible"): "running statistics",
}


class Fit(ht.InnerProblem):
    """Fits a module to weighted examples, from a learnt initialisation."""

    def __init__(self, module: nn.Module) -> None:
        self.net = ht.FunctionalModule(module)
        self.buffers = self.net.buffers
        self.inputs, self.labels = normal(8, 4, seed=1), torch.arange(8) % WAY

    def init_params(self, hparams: TensorDict) -> TensorDict:
        stored = {name: value.clone() for name, value in self.net.module.named_buffers()}
        return {**{name: hparams[f"init.{name}"] for name in self.net.trained_names()}, **stored}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> tuple[Tensor, TensorDict]:
        outputs, buffers = self.net.with_buffers(params, self.inputs)
        losses = F.cross_entropy(outputs, self.labels, reduction="none")
        return (hparams["weights"].sigmoid() * losses).mean(), buffers


class Judge(ht.OuterProblem):
    """Cross-entropy on other examples, by the module in evaluation mode."""

    def __init__(self, module: nn.Module, judge: nn.Module) -> None:
        self.net, self.first = ht.FunctionalModule(judge.eval()), ht.FunctionalModule(module)
        self.inputs, self.labels = normal(6, 4, seed=2), torch.arange(6) % WAY

    def init_hparams(self) -> TensorDict:
        params = self.first.init_params()
        return {
            **{f"init.{name}": params[name] for name in self.first.trained_names()},
            "weights": 0.1 * normal(8, seed=3),
            "lr": torch.tensor(0.2, dtype=F64),
        }

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return F.cross_entropy(self.net(params, self.inputs), self.labels)


def problem_of(name: str, backend: ht.Hypergradient | None = None) -> ht.BilevelProblem:
    torch.manual_seed(0)
    module = MODULES[name]().double()
    judge = MODULES[name]().double()
    judge.load_state_dict(module.state_dict())
    lr = ht.Hyper("lr")
    rule: ht.Dynamics = ht.dynamics.SGD(lr=lr, momentum=0.5)
    if isinstance(backend, backends.Reversible):
        rule = ht.dynamics.ReversibleMomentum(lr=lr, momentum=0.5)
    # What an approximation drops (an initialisation, a step size) is said elsewhere; here it may be dropped.
    dropped = () if backend is None else tuple(Judge(module, judge).init_hparams())
    return ht.BilevelProblem(
        Fit(module), Judge(module, judge), dynamics=rule, num_steps=NUM_STEPS, allow_unused=dropped
    )


LONG = {("transformer", "forward by duals"), ("lstm", "forward by duals")}


@pytest.mark.parametrize("name", MODULES)
def test_reverse_equals_central_differences(name: str) -> None:
    problem = problem_of(name)
    check = ht.check_hypergradient(problem, problem.init_hparams(), backends.Reverse(), num_directions=1)
    assert check.passed, str(check)


@pytest.mark.sampled(4, among="forward")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        # Their many weights one by one take half a minute.
        pytest.param(name, backend, marks=pytest.mark.slow if (name, backend) in LONG else ())
        for name in MODULES
        for backend in EXACT
    ],
)
def test_exact_backends_equal_reverse_or_refuse(name: str, backend: str) -> None:
    problem = problem_of(name, EXACT[backend])
    hparams = problem.init_hparams()
    if (name, backend) in REFUSED:
        with pytest.raises(IncompatibleBackendError, match=REFUSED[name, backend]):
            ht.hypergradient(problem, hparams, backend=EXACT[backend])
        return
    expected = ht.hypergradient(problem, hparams, backend=backends.Reverse()).grads
    assert_equal(ht.hypergradient(problem, hparams, backend=EXACT[backend]).grads, expected, 1e-9)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("backend", ESTIMATES)
def test_estimates_run_or_refuse(name: str, backend: str) -> None:
    problem = problem_of(name, ESTIMATES[backend])
    hparams = problem.init_hparams()
    if (name, backend) in REFUSED:
        with pytest.raises(IncompatibleBackendError, match=REFUSED[name, backend]):
            ht.hypergradient(problem, hparams, backend=ESTIMATES[backend])
        return
    grads = ht.hypergradient(problem, hparams, backend=ESTIMATES[backend]).grads
    assert all(torch.isfinite(value).all() for value in grads.values())
    assert any(value.any() for value in grads.values())


def test_weight_norm_is_refused_for_every_backend() -> None:
    """PyTorch's second derivative of it is silently wrong, so it does not become an inner problem at all."""
    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, WAY))
    with pytest.raises(IncompatibleBackendError, match="weight"):
        ht.FunctionalModule(module)


def test_a_frozen_parameter_is_untouched() -> None:
    module = Frozen().double()
    before = module.fixed.weight.clone()
    problem = problem_of("frozen parameters")
    params = ht.unroll(problem, problem.init_hparams()).params
    assert not any(name.startswith("fixed") for name in params)
    assert torch.equal(module.fixed.weight, before)
