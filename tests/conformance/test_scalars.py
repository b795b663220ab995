"""Parameters without an axis in single precision, where PyTorch is at its most irregular."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal

dynamics, backends = ht.dynamics, ht.hypergradients
LR = ht.Hyper("lr")
RULES: dict[str, ht.Dynamics] = {
    "SGD": dynamics.SGD(lr=LR, momentum=0.9),
    "Adam": dynamics.Adam(lr=LR),
    "AdamW": dynamics.AdamW(lr=LR),
    "RMSprop": dynamics.RMSprop(lr=LR, momentum=0.5, centered=True),
    "Adagrad": dynamics.Adagrad(lr=LR),
    "NAdam": dynamics.NAdam(lr=LR),
    "RAdam": dynamics.RAdam(lr=LR),
    "Clipped": dynamics.Clipped(dynamics.SGD(lr=LR, momentum=0.9), max_norm=1.0),
    "ReversibleMomentum": dynamics.ReversibleMomentum(lr=LR),
    "TorchOptim": dynamics.TorchOptim(torch.optim.Adamax, options={"lr": LR}),
    "LearnedUpdate": dynamics.LearnedUpdate(dynamics.CoordinatewiseLSTM(hidden=2), scale=LR),
    "LearnedUpdate, MLP": dynamics.LearnedUpdate(dynamics.CoordinatewiseMLP(hidden=3), scale=LR),
}
INPUTS, TARGETS = normal(6, 2, seed=1).float(), normal(6, seed=2).float()


def residuals(params: TensorDict) -> Tensor:
    return (INPUTS @ params["w"] + params["b"] - TARGETS).square().mean()


def problem(rule: ht.Dynamics, **options: object) -> ht.BilevelProblem:
    """Least squares with an offset that has no axis."""
    return ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.ones(2), "b": h["b"]},
            lambda p, h, b: residuals(p) + h["l2"] * (p["w"].square().sum() + p["b"].square()),
        ),
        LambdaOuter(
            {"l2": torch.tensor(0.1), "lr": torch.tensor(0.1), "b": torch.tensor(0.3)}, lambda p, h, b: residuals(p)
        ),
        dynamics=rule,
        num_steps=4,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", [backends.Forward(), backends.Forward(chunk_size=1)], ids=repr)
def test_forward_mode_equals_reverse_mode(rule: str, backend: ht.Hypergradient) -> None:
    torch.manual_seed(0)
    made = problem(RULES[rule])
    hparams = made.init_hparams()
    expected = ht.hypergradient(made, hparams, backend=backends.Reverse()).grads
    for name, value in ht.hypergradient(made, hparams, backend=backend).grads.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize(
    "backend",
    [backends.Reverse(), backends.Reversible(), backends.Forward()],
    ids=lambda backend: type(backend).__name__,
)
def test_tasks_without_any_other_axis(route: str, backend: ht.Hypergradient) -> None:
    class Inner(ht.InnerProblem):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"x": hparams["start"]}

        def batch(self, step: int) -> Tensor:
            return torch.linspace(0.0, 1.0, 4, dtype=torch.float64)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
            return (params["x"] - batch).square() / 2

    made = ht.BilevelProblem(
        Inner(),
        LambdaOuter({"start": torch.tensor(0.5, dtype=torch.float64)}, lambda p, h, b: (p["x"] - 1.0).square()),
        dynamics=dynamics.ReversibleMomentum(lr=0.1, momentum=0.5),
        num_steps=3,
        num_tasks=4,  # type: ignore[arg-type]
    )
    expected = ht.hypergradient(
        made, made.init_hparams(), backend=backends.Reverse(), execution=ht.Execution(tasks="loop")
    ).grads
    actual = ht.hypergradient(made, made.init_hparams(), backend=backend, execution=ht.Execution(tasks=route)).grads
    torch.testing.assert_close(actual["start"], expected["start"], rtol=1e-10, atol=0)
