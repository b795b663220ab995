"""Metasmoothness: 1 for training that is linear in the outer variables, less where it bends, little in chaos."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, normal, task_problem

F64 = torch.float64
SGD = ht.dynamics.SGD


def linear() -> ht.BilevelProblem:
    """The last params are linear in `z`: `w_T = (1 - 0.9^T) z` per entry, and the outer loss is `|w - 1|^2 / 2`."""
    return ht.BilevelProblem(
        LambdaInner(lambda _: {"w": torch.zeros(3, dtype=F64)}, lambda p, h, _: 0.5 * (p["w"] - h["z"]).square().sum()),
        LambdaOuter(
            {"z": torch.tensor([0.5, -1.0, 2.0], dtype=F64)}, lambda p, h, _: 0.5 * (p["w"] - 1.0).square().sum()
        ),
        dynamics=SGD(lr=0.1),
        num_steps=7,
    )


def test_linear_training_is_smooth_and_the_error_is_that_of_the_quadratic() -> None:
    own = linear()
    found = ht.metasmoothness(own, own.init_hparams(), step_size=0.3)
    assert found.smoothness == pytest.approx(1.0, abs=1e-12)
    # Downhill by the unit vector of c (c z - 1), with c = 1 - 0.9^7.
    c = 1.0 - 0.9**7
    slope = c * (c * own.init_hparams()["z"] - 1.0)
    assert found.predicted == pytest.approx(-0.3 * float(slope.norm()), rel=1e-12)
    assert found.actual == pytest.approx(found.predicted + 0.5 * (0.3 * c) ** 2, rel=1e-9)
    assert found.error == pytest.approx(abs(found.actual - found.predicted) / abs(found.predicted), rel=1e-12)
    assert "metasmoothness 1.000 over moves of length 0.3" in str(found)


def test_a_param_that_turns_back_counts_by_how_far_it_went() -> None:
    """`w_1 = 0.1 * 2 sin(z) / 2` and `u_1 = 0.1 z`: over moves of 2 from 0 the first goes up, then down."""
    own = ht.BilevelProblem(
        LambdaInner(
            lambda _: {"w": torch.zeros((), dtype=F64), "u": torch.zeros((), dtype=F64)},
            lambda p, h, _: -p["w"] * h["z"].sin() - p["u"] * h["z"],
        ),
        LambdaOuter({"z": torch.tensor(0.0, dtype=F64)}, lambda p, h, _: p["w"] + p["u"]),
        dynamics=SGD(lr=0.1),
        num_steps=1,
    )
    up = {"z": torch.tensor(5.0, dtype=F64)}  # of any length
    found = ht.metasmoothness(own, own.init_hparams(), step_size=2.0, direction=up)
    first, second = torch.tensor(2.0, dtype=F64).sin(), torch.tensor(4.0, dtype=F64).sin()
    assert second < first
    assert found.smoothness == pytest.approx(float((2.0 - first) / (2.0 + first)), rel=1e-12)
    assert found.predicted == pytest.approx(0.1 * 2.0 * 2.0, rel=1e-12)
    assert found.actual == pytest.approx(0.1 * float(first + 2.0), rel=1e-12)


class Net(ht.InnerProblem):
    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"first": normal(6, 8, seed=1), "second": normal(8, 3, seed=2)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        inputs, labels = normal(30, 6, seed=3), torch.arange(30) % 3
        outputs = torch.relu(inputs @ params["first"]) @ params["second"]
        losses = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
        return (hparams["logits"].sigmoid() * losses).mean()


def net(dynamics: ht.Dynamics) -> ht.BilevelProblem:
    def judged(params: TensorDict, _: TensorDict, __: Batch) -> Tensor:
        outputs = torch.relu(normal(30, 6, seed=4) @ params["first"]) @ params["second"]
        return torch.nn.functional.cross_entropy(outputs, torch.arange(30) % 3)

    start = {"logits": torch.zeros(30, dtype=F64)}
    return ht.BilevelProblem(Net(), LambdaOuter(start, judged), dynamics=dynamics, num_steps=40)


@pytest.mark.parametrize(
    ("rough", "smooth"),
    [
        (ht.dynamics.Adam(lr=0.03, eps=1e-8), ht.dynamics.Adam(lr=0.03, eps=1e-1)),
        (SGD(lr=4.0), SGD(lr=0.2)),
    ],
)
def test_a_larger_eps_and_a_smaller_rate_make_training_smoother(rough: ht.Dynamics, smooth: ht.Dynamics) -> None:
    figures = [ht.metasmoothness(own, own.init_hparams(), step_size=0.3) for own in (net(rough), net(smooth))]
    assert figures[0].smoothness < figures[1].smoothness - 0.1
    assert figures[1].smoothness > 0.9 and figures[1].error < 0.2


def test_tasks_are_judged_together() -> None:
    together = task_problem(torch.nn.Linear(4, 3).double(), item=(4,))
    hparams = together.init_hparams()
    found = [
        ht.metasmoothness(together, hparams, step_size=0.5, execution=ht.Execution(tasks=route))
        for route in ("vmap", "loop")
    ]
    assert found[0].actual == pytest.approx(found[1].actual, rel=1e-12)
    assert found[0].smoothness == pytest.approx(found[1].smoothness, rel=1e-9)
    # By hand: the mean over tasks at two places, downhill.
    grads = ht.hypergradient(together, hparams, backend=ht.hypergradients.Reverse()).grads
    length = ht.tree.norm(grads)
    moved = {name: value - 0.5 * grads[name] / length for name, value in hparams.items()}
    near, start = (ht.unroll(together, own).outer_loss.mean() for own in (moved, hparams))
    assert found[0].actual == pytest.approx(float(near - start), rel=1e-9)
    assert found[0].predicted == pytest.approx(-0.5 * float(length), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "`step_size` is 0.0: a move has a length"),
        ({"step_size": float("nan")}, "`step_size` is nan"),
        ({"step_size": True}, "`step_size` is True"),
        ({"step_size": 0.1, "direction": {"y": torch.ones(3, dtype=F64)}}, "`direction` has an entry 'y'"),
        ({"step_size": 0.1, "direction": {"z": torch.ones(2, dtype=F64)}}, r"shape \(2,\), but the outer variables"),
        ({"step_size": 0.1, "direction": {"z": torch.zeros(3, dtype=F64)}}, "has the length 0: it points nowhere"),
        ({"step_size": 0.1, "direction": {}}, "has the length 0"),
    ],
)
def test_what_says_nothing_is_refused(options: dict, message: str) -> None:
    own = linear()
    with pytest.raises(ValueError, match=message):
        ht.metasmoothness(own, own.init_hparams(), **options)


def test_moves_out_of_training_are_refused() -> None:
    own = linear()
    with pytest.raises(
        ht.errors.NonFiniteError, match="after 1 moves of `step_size` = 1e\\+308 ends in NaN or infinity"
    ):
        ht.metasmoothness(own, own.init_hparams(), step_size=1e308, direction={"z": torch.ones(3, dtype=F64)})
    direct = replace(
        own,
        outer=LambdaOuter(
            {"z": torch.ones(3, dtype=F64), "c": torch.ones((), dtype=F64)}, lambda p, h, _: h["c"] * p["w"].sum()
        ),
    )
    with pytest.raises(ValueError, match="no inner param changes along `direction`"):
        ht.metasmoothness(direct, direct.init_hparams(), step_size=0.1, direction={"c": torch.ones((), dtype=F64)})
