"""The field of hypergradients: each point is what the problem gives with these two values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from experiments import hyperfield
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.diagnostics.settings_grid import Axis, field, grid_problem
from hypertorch.types import Batch, TensorDict
from tests.experiments.diagnosis_commands import Commands

F64 = torch.float64
LR = Axis(name="dynamics.lr", start=0.05, stop=0.4, scale="log")
TRUST = Axis(name="trust[1]", start=-1.0, stop=1.0, scale="linear")
L2 = Axis(name="l2", start=0.01, stop=0.5, scale="log")
L2_START = 0.1  # of `Outer`
REVERSE = ht.hypergradients.Reverse()


class Inner(ht.InnerProblem):
    """Draws its first params, and has data of its own at each step."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"weight": torch.randn(3, dtype=F64) * hparams["trust"][0]}

    def batch(self, step: int) -> Batch:
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        assert isinstance(batch, Tensor)
        fit = (torch.tanh(batch @ params["weight"]) - hparams["trust"][1]).square().mean()
        return fit + hparams["l2"] * params["weight"].square().sum()


class Outer(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {"trust": torch.tensor([0.7, 0.2], dtype=F64), "l2": torch.tensor(0.1, dtype=F64)}

    def batch(self, outer_step: int) -> Batch:
        return torch.ones(3, dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["weight"] - batch).square().sum() + hparams["trust"][1] * params["weight"].sum()


def problem(**changed: object) -> ht.BilevelProblem:
    options: dict = {"dynamics": ht.dynamics.SGD(lr=0.1, momentum=0.5), "num_steps": 5, "seed": 3, **changed}
    return ht.BilevelProblem(Inner(), Outer(), **options)


def at(x: float, y: float, trust: float | None) -> ht.HypergradientResult:
    """Returns the hypergradient of the problem itself, with the learnt rate `x` and `l2` or `trust[1]` set to `y`."""
    own = problem(dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.5))
    hparams = {**own.init_hparams(), "lr": torch.tensor(x, dtype=F64)}
    if trust is None:
        hparams["l2"] = torch.tensor(y, dtype=F64)
    else:
        hparams["trust"] = torch.tensor([0.7, y], dtype=F64)
    return ht.hypergradient(own, hparams, backend=REVERSE)


@pytest.mark.parametrize("second", [TRUST, L2])
def test_every_point_is_the_problem_with_these_values(second: Axis) -> None:
    found = field(problem(), (LR, second), 3, REVERSE)
    points = zip(*found.coordinates, found.losses, *found.hypergradients, strict=True)
    seen = []
    for x, y, loss, right, up in points:
        lr, value = float(LR.values(x)), float(second.values(y))
        seen.append((lr, value))
        alone = at(lr, value, trust=None if second is L2 else value)
        torch.testing.assert_close(loss, alone.outer_loss)
        # The derivative in a logarithm is the value times the derivative in the value.
        torch.testing.assert_close(right, lr * alone.grads["lr"])
        expected = value * alone.grads["l2"] if second is L2 else alone.grads["trust"][1]
        torch.testing.assert_close(up, expected)
    assert len(set(seen)) == 9
    assert seen[0] == pytest.approx((LR.start, second.start)) and seen[-1] == pytest.approx((LR.stop, second.stop))


def test_points_that_diverge_cost_no_other_point() -> None:
    wild = Axis(name="dynamics.lr", start=0.05, stop=1e200, scale="log")
    found = field(problem(), (wild, L2), 3, REVERSE)
    lost = ~found.losses.isfinite() | found.hypergradients[0].isnan()
    assert lost.reshape(3, 3).tolist() == [[False, True, True]] * 3
    torch.testing.assert_close(found.losses[0], at(0.05, L2.start, None).outer_loss)
    assert bool(torch.stack(found.hypergradients)[:, ~lost].isfinite().all())


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (replace(LR, name="dynamics.rate"), "the dynamics has the settings"),
        (replace(LR, name="rate"), r"none of the outer variables \['l2', 'trust'\]"),
        (replace(LR, name="trust"), "`trust` has 2 numbers, and an axis is one of them"),
        (replace(LR, name="trust[2]"), "`trust` has 2 numbers"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(axis: Axis, message: str) -> None:
    ones = torch.ones(1, dtype=F64)
    with pytest.raises(ExpectedFailure, match=message):
        grid_problem(problem(), (axis, L2), {"grid.x": ones, "grid.y": ones})


class OuterWithRate(Outer):
    def init_hparams(self) -> TensorDict:
        return {**super().init_hparams(), "lr": torch.tensor(0.1, dtype=F64)}


def test_settings_that_are_outer_variables_are_read_as_ever() -> None:
    own = replace(problem(dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.5)), outer=OuterWithRate())
    momentum = Axis(name="dynamics.momentum", start=0.5, stop=0.6, scale="linear")
    rate = replace(LR, name="lr")
    for axes, places in (((TRUST, momentum), [0]), ((rate, momentum), [0, 1])):
        found = field(own, axes, 2, REVERSE)
        for place in places:
            x = float(axes[0].values(found.coordinates[0][place]))
            alone = at(x, L2_START, None) if axes[0] is rate else at(0.1, x, trust=x)
            torch.testing.assert_close(found.losses[place], alone.outer_loss)
            slope = x * alone.grads["lr"] if axes[0] is rate else alone.grads["trust"][1]
            torch.testing.assert_close(found.hypergradients[0][place], slope)


class OuterWithTerms(Outer):
    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, step: int) -> Tensor:
        return params["weight"].sum()


def test_what_the_field_would_leave_out_is_refused() -> None:
    ones = {"grid.x": torch.ones(1, dtype=F64), "grid.y": torch.ones(1, dtype=F64)}
    with pytest.raises(ExpectedFailure, match="terms at inner steps, which the field leaves out"):
        grid_problem(replace(problem(), outer=OuterWithTerms()), (LR, L2), ones)
    with pytest.raises(ExpectedFailure, match=r"are 'l2' and 'l2\[0\]', which is one number"):
        grid_problem(problem(), (L2, replace(L2, name="l2[0]")), ones)


def test_the_command_leaves_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Commands(tmp_path, monkeypatch, capsys)
    small = ("points=3", "num_steps=4")
    code, out, error = command(hyperfield, *small, "y='trust[1]'", "y_range=[-2,2]")
    assert code == 0, error
    assert "9 points in" in out and "0 of them diverged" in out
    rows = command.table("field.csv")
    assert list(rows[0]) == [
        "dynamics.lr",
        "trust[1]",
        "outer_loss",
        "hypergradient dynamics.lr",
        "hypergradient trust[1]",
    ]
    assert [row["trust[1]"] for row in rows[::3]] == ["-2.0", "0.0", "2.0"]
    assert command.results()["rows"][0]["outer_loss"] == float(rows[0]["outer_loss"])
    assert command.is_picture("field.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("y=dynamics.lr",), "`x` and `y` are 'dynamics.lr' and 'dynamics.lr', which is one number"),
        (("y_range=[0.5,1.5]",), "reaches 1.5, but `momentum` of `ReversibleMomentum` is 1.5"),
        (("x_range=[0,1]",), "`x_range` starts at 0.0, which has no logarithm"),
        (("x_range=[2,1]",), "two ascending numbers are needed"),
        (("x_range=3",), "two ascending numbers are needed"),
        (("y_scale=cubic",), "which is not among the choices"),
        (("points=1",), "an axis has two ends"),
        (("experiment=sinusoid",), "`experiment` has tasks"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tests.experiments.diagnosis_commands.TINY", ())
    code, _, error = Commands(tmp_path, monkeypatch, capsys)(hyperfield, *arguments)
    assert code == 1 and message in error
    assert not (tmp_path / "run" / "results.json").exists()
