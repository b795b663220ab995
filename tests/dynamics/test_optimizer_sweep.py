"""38 configurations of optimiser, net and groups: values of `torch.optim`, derivatives of central differences.

The configurations are those that this field compares its differentiable optimisers on. Every seed must pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.types import Batch, TensorDict
from tests.dynamics.leaves import F64, SGD, Adagrad, Adam, AdamW, RMSprop, in_torch
from tests.helpers.problems import normal

SEEDS = (0, 1, 2)
NUM_STEPS = 3
Reverse = ht.hypergradients.Reverse


class SharedLayer(nn.Module):
    """One weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class SharedSequence(nn.Module):
    """The same two layers, applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.body(x))))


class Plain(nn.Module):
    """Two layers, with a scale that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.full((5,), 1.3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * torch.tanh(self.body(x)))


class PartlyUsed(Plain):
    """The same with a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 2)


NETS: dict[str, type[nn.Module]] = {
    "plain": Plain,
    "shared layer": SharedLayer,
    "shared sequence": SharedSequence,
    "partly used": PartlyUsed,
}
# The rule, torch's, and settings. Epsilons are large enough for a central difference to stay on one side of a bend.
OPTIMIZERS: dict[str, tuple[type[ht.Dynamics], type[torch.optim.Optimizer], dict]] = {
    "SGD": (SGD, torch.optim.SGD, {}),
    "momentum": (SGD, torch.optim.SGD, {"momentum": 0.9}),
    "Nesterov": (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "weight decay": (SGD, torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum, dampening, weight decay": (
        SGD,
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    ),
    "Adam": (Adam, torch.optim.Adam, {"eps": 1e-3}),
    "AdamW": (AdamW, torch.optim.AdamW, {"eps": 1e-3, "weight_decay": 0.1}),
    "Adagrad": (Adagrad, torch.optim.Adagrad, {"eps": 1e-3}),
    "Adagrad, lr decay": (Adagrad, torch.optim.Adagrad, {"eps": 1e-3, "lr_decay": 0.5}),
    "RMSprop": (RMSprop, torch.optim.RMSprop, {"eps": 1e-3, "alpha": 0.9}),
    "RMSprop, centred": (RMSprop, torch.optim.RMSprop, {"eps": 1e-3, "alpha": 0.9, "centered": True}),
    "RMSprop, momentum": (RMSprop, torch.optim.RMSprop, {"eps": 1e-3, "alpha": 0.9, "momentum": 0.5}),
}
CONFIGURATIONS = [
    *((optimizer, "plain", groups) for optimizer in OPTIMIZERS for groups in (1, 2)),
    *(
        (optimizer, net, groups)
        for optimizer in ("momentum, dampening, weight decay", "Adam")
        for net in ("shared layer", "shared sequence", "partly used")
        for groups in (1, 2)
    ),
    ("Adagrad, lr decay", "partly used", 2),
    ("RMSprop, centred", "partly used", 2),
]


@dataclass(frozen=True)
class Trial:
    """A net, its data and first weights, drawn from a seed."""

    net: str
    seed: int

    @property
    def module(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return NETS[self.net]().double()

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return normal(6, 4, seed=10 + self.seed), normal(6, 2, seed=20 + self.seed)


class Fit(ht.InnerProblem):
    """A module fitted to data by least squares, from a learnt initialisation."""

    def __init__(self, trial: Trial) -> None:
        self.net, self.data = ht.FunctionalModule(trial.module), trial.data

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {name: hparams[f"init.{name}"] for name in self.net.trained_names()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (self.net(params, self.data[0]) - self.data[1]).square().mean()


class Judge(ht.OuterProblem):
    """The squared error on other data, and a term in every weight, used or not."""

    def __init__(self, trial: Trial, extra: TensorDict) -> None:
        self.net, self.extra = ht.FunctionalModule(trial.module), extra
        self.data = normal(5, 4, seed=30 + trial.seed), normal(5, 2, seed=40 + trial.seed)

    def init_hparams(self) -> TensorDict:
        return {**{f"init.{name}": value for name, value in self.net.init_params().items()}, **self.extra}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        error = (self.net(params, self.data[0]) - self.data[1]).square().mean()
        return error + 0.1 * sum(value.sin().sum() for value in params.values())


def trained_by_torch(
    trial: Trial, optimizer: type[torch.optim.Optimizer], settings: dict, rates: dict[str, list[float]]
) -> TensorDict:
    """Returns the weights after training; `rates` are the step sizes of the parameters that start with a name."""
    module = trial.module
    params = {name: value for name, value in module.named_parameters() if value.requires_grad}
    parts = [[value for name, value in params.items() if name.startswith(start)] for start in rates]
    optim = optimizer([{"params": part, "lr": 1.0} for part in parts], **in_torch(settings))
    inputs, targets = trial.data
    for step in range(NUM_STEPS):
        for group, schedule in zip(optim.param_groups, rates.values(), strict=True):
            group["lr"] = schedule[step]
        for value in params.values():
            value.grad = torch.zeros_like(value)  # what is not used has a zero gradient, and still decays
        (module(inputs) - targets).square().mean().backward()
        optim.step()
    return {name: value.detach() for name, value in params.items()}


def check_values(problem: ht.BilevelProblem, expected: TensorDict) -> None:
    params = ht.unroll(problem, problem.init_hparams()).params
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-12, atol=1e-12)


def test_there_are_38_different_configurations() -> None:
    assert len(set(CONFIGURATIONS)) == len(CONFIGURATIONS) == 38
    assert {optimizer for optimizer, *_ in CONFIGURATIONS} == set(OPTIMIZERS)
    assert {(net, groups) for _, net, groups in CONFIGURATIONS} == {(net, groups) for net in NETS for groups in (1, 2)}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("optimizer", "net", "groups"), CONFIGURATIONS, ids=str)
def test_every_trial_passes(optimizer: str, net: str, groups: int) -> None:
    leaf, theirs, settings = OPTIMIZERS[optimizer]
    rates = {"": 0.05} if groups == 1 else {"head": 0.08, ("body", "idle"): 0.03}
    lr: object = ht.Hyper("lr") if groups == 1 else {"head.*": ht.Hyper("head_lr"), "*": ht.Hyper("lr")}
    extra = dict(zip(("lr",) if groups == 1 else ("head_lr", "lr"), rates.values(), strict=True))
    for seed in SEEDS:
        trial = Trial(net, seed)
        outer = Judge(trial, {name: torch.tensor(value, dtype=F64) for name, value in extra.items()})
        problem = ht.BilevelProblem(Fit(trial), outer, dynamics=leaf(lr=lr, **settings), num_steps=NUM_STEPS)
        schedules = {start: [rate] * NUM_STEPS for start, rate in rates.items()}
        check_values(problem, trained_by_torch(trial, theirs, settings, schedules))  # type: ignore[arg-type]
        check = ht.check_hypergradient(
            problem, problem.init_hparams(), Reverse(), step_size=1e-5, num_directions=1, seed=seed
        )
        assert check.passed, f"seed {seed}\n{check}"
        frozen = [(name, value) for name, value in trial.module.named_parameters() if not value.requires_grad]
        for name, value in frozen:
            module = problem.inner.net.module  # type: ignore[attr-defined]
            assert torch.equal(dict(module.named_parameters())[name], value)
        assert bool(frozen) == (net in ("plain", "partly used"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_sizes_can_be_set_at_every_step(optimizer: str) -> None:
    leaf, theirs, settings = OPTIMIZERS[optimizer]
    head, rest = [0.05, 0.02, 0.08], [0.03, 0.06, 0.01]
    trial = Trial("plain", 0)
    expected = trained_by_torch(trial, theirs, settings, {"head": head, "body": rest})
    fixed = ht.BilevelProblem(
        Fit(trial), Judge(trial, {}), dynamics=leaf(lr={"head.*": head, "*": rest}, **settings), num_steps=NUM_STEPS
    )
    check_values(fixed, expected)
    extra = {"head_lr": torch.tensor(head, dtype=F64), "lr": torch.tensor(rest, dtype=F64)}
    lr = {"head.*": ht.Hyper("head_lr", per="step"), "*": ht.Hyper("lr", per="step")}
    learnt = ht.BilevelProblem(Fit(trial), Judge(trial, extra), dynamics=leaf(lr=lr, **settings), num_steps=NUM_STEPS)
    check_values(learnt, expected)
    check = ht.check_hypergradient(learnt, learnt.init_hparams(), Reverse(), step_size=1e-5)
    assert check.passed, str(check)
