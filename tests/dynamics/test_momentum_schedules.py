"""Schedules of step sizes and momenta, learnt with the first weights, the first velocity and the loss itself.

The setting that reversible learning was first tested in: 5 weights, 12 rows of data in batches of 4, 3 epochs, random
schedules, and the rule `v <- beta v - (1 - beta) g; w <- w + alpha v`. The rule is run as each dynamics that has it,
and written out here once more; derivatives are compared with central differences and with autograd through that loop.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import normal

F64 = torch.float64
Hyper, SGD, LearnedBuffers = ht.Hyper, ht.dynamics.SGD, ht.dynamics.LearnedBuffers
ReversibleMomentum = ht.dynamics.ReversibleMomentum
NUM_STEPS = 9
SEEDS = (0, 1, 2)
Reverse, Forward, Reversible = ht.hypergradients.Reverse, ht.hypergradients.Forward, ht.hypergradients.Reversible


def quadratic(w: Tensor, rows: Tensor) -> Tensor:
    return (w @ (rows.T @ rows) @ w) / (2 * len(rows))


def quartic(w: Tensor, rows: Tensor) -> Tensor:
    return (rows @ w).pow(4).mean() / 4 + quadratic(w, rows)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"quadratic": quadratic, "quartic": quartic}


class Rows(ht.InnerProblem):
    """A polynomial loss of `rows @ w` with a learnt weight for every row and a learnt penalty on every weight."""

    def __init__(self, loss: str, seed: int) -> None:
        self.rows = normal(12, 5, seed=100 + seed)
        self.minibatches = ht.Minibatches(range(12), batch_size=4, seed=seed)
        self.of_rows = LOSSES[loss]

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["w_0"]}

    def batch(self, step: int) -> Tensor:
        return torch.as_tensor(self.minibatches.indices(step))

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        rows = hparams["row_weights"][batch, None] * self.rows[batch]
        return self.of_rows(params["w"], rows) + (hparams["log_penalty"].exp() * params["w"].square()).sum()


class Target(ht.OuterProblem):
    def __init__(self, hparams: TensorDict, seed: int) -> None:
        self.hparams, self.rows = hparams, normal(7, 5, seed=200 + seed)

    def init_hparams(self) -> TensorDict:
        return self.hparams

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (self.rows @ params["w"] - 1.0).square().mean() + params["w"].sin().sum()


def first_hparams(seed: int) -> TensorDict:
    generator = torch.Generator().manual_seed(300 + seed)

    def uniform() -> Tensor:
        return torch.rand(NUM_STEPS, generator=generator, dtype=F64)

    return {
        "w_0": 0.5 * normal(5, seed=400 + seed),
        "v_0": 0.5 * normal(5, seed=500 + seed),
        "alpha": 0.1 * uniform(),
        "beta": 0.5 + 0.2 * uniform(),
        "row_weights": 1.0 + 0.1 * normal(12, seed=600 + seed),
        "log_penalty": -2.0 + 0.3 * normal(5, seed=700 + seed),
    }


ALPHA, BETA = Hyper("alpha", per="step"), Hyper("beta", per="step")
# Dynamics that are this rule, the name of their velocity among the outer variables, and its sign.
RULES: dict[str, tuple[ht.Dynamics, str, float]] = {
    "SGD": (
        LearnedBuffers(SGD(lr=ALPHA, momentum=BETA, dampening=BETA, dampen_first=True)),
        "buffers.momentum.w",
        -1.0,
    ),
    "ReversibleMomentum": (LearnedBuffers(ReversibleMomentum(lr=ALPHA, momentum=BETA)), "buffers.velocity.w", 1.0),
}


def problem_of(rule: str, loss: str, seed: int) -> ht.BilevelProblem:
    dynamics, velocity, sign = RULES[rule]
    hparams = first_hparams(seed)
    hparams[velocity] = sign * hparams.pop("v_0")
    return ht.BilevelProblem(Rows(loss, seed), Target(hparams, seed), dynamics=dynamics, num_steps=NUM_STEPS)


def written_out(problem: ht.BilevelProblem, hparams: TensorDict) -> tuple[Tensor, TensorDict]:
    """Returns the outer loss and its hypergradient by autograd through the rule as a plain loop."""
    leaves = {name: value.clone().requires_grad_() for name, value in hparams.items()}
    w, v = leaves["w_0"], leaves["v_0"]
    for step in range(NUM_STEPS):
        loss = problem.inner.loss({"w": w}, leaves, problem.inner.batch(step))
        (g,) = torch.autograd.grad(loss, w, create_graph=True)  # type: ignore[arg-type]
        v = leaves["beta"][step] * v - (1 - leaves["beta"][step]) * g
        w = w + leaves["alpha"][step] * v
    outer_loss = problem.outer.loss({"w": w}, leaves, None)
    grads = torch.autograd.grad(outer_loss, list(leaves.values()))
    return outer_loss.detach(), dict(zip(leaves, grads, strict=True))


each_case = pytest.mark.parametrize(
    ("rule", "loss", "seed"), [(rule, loss, seed) for rule in RULES for loss in LOSSES for seed in SEEDS]
)


PAIRS = [
    *((rule, backend) for rule in RULES for backend in (Reverse(), Reverse(checkpoint_every=2), Forward())),
    ("ReversibleMomentum", Reversible()),
]


@each_case
def test_derivatives_equal_central_differences(rule: str, loss: str, seed: int) -> None:
    problem = problem_of(rule, loss, seed)
    check = ht.check_hypergradient(
        problem, problem.init_hparams(), Reverse(), tolerance=1e-7, step_size=1e-4, seed=seed
    )
    assert check.passed, str(check)
    assert len({entry.name for entry in check.checks}) == 6


@pytest.mark.parametrize(("rule", "backend"), PAIRS, ids=str)
@pytest.mark.parametrize(("loss", "seed"), [(loss, seed) for loss in LOSSES for seed in SEEDS])
def test_derivatives_equal_those_of_the_rule_written_out(
    rule: str, loss: str, seed: int, backend: ht.Hypergradient
) -> None:
    problem = problem_of(rule, loss, seed)
    outer_loss, expected = written_out(problem, first_hparams(seed))
    result = ht.hypergradient(problem, problem.init_hparams(), backend=backend)
    torch.testing.assert_close(result.outer_loss, outer_loss, rtol=1e-12, atol=0)
    _, velocity, sign = RULES[rule]
    expected[velocity] = sign * expected.pop("v_0")
    for name, value in expected.items():
        error = float((result.grads[name] - value).norm() / value.norm())
        assert error <= 1e-11, f"{name}: relative error {error:.2g}"


@each_case
def test_every_entry_of_the_schedules_counts(rule: str, loss: str, seed: int) -> None:
    problem = problem_of(rule, loss, seed)
    grads = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).grads
    assert bool((grads["alpha"] != 0.0).all())
    assert bool((grads["beta"] != 0.0).all())
    rows_seen = {int(row) for step in range(NUM_STEPS) for row in problem.inner.batch(step)}
    assert rows_seen == set(range(12))
    assert bool((grads["row_weights"] != 0.0).all())
