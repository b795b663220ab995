"""The bias of shorter windows and runs, on ridge regression with its closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.diagnostics.geometric_fit import fit_geometric
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients import BackendResult
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict
from tests.diagnostics.task_routes import noisy_module, routes_by_turns
from tests.helpers.problems import Ridge, net_problem, task_problem

ETA = 0.2
RIDGE = Ridge()
LAM = torch.tensor(0.3, dtype=torch.float64)


def problem(num_steps: int) -> ht.BilevelProblem:
    """Ridge regression with `lam` alone to learn."""
    whole = RIDGE.problem(num_steps, dynamics=ht.dynamics.SGD(lr=ETA))
    return ht.BilevelProblem(whole.inner, _OneHparam(RIDGE), dynamics=whole.dynamics, num_steps=num_steps)


class _OneHparam(ht.OuterProblem):
    def __init__(self, ridge: Ridge) -> None:
        self.ridge = ridge

    def init_hparams(self) -> TensorDict:
        return {"lam": LAM}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: object) -> Tensor:
        return self.ridge.outer_loss(params["w"])


@dataclass(frozen=True, kw_only=True)
class SolutionOf(ht.Hypergradient):
    """Stands for implicit differentiation with an exact linear solve: the formula at the state that it is given."""

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        result = ht.hypergradients.Reverse().compute(loop, variables)
        w = RIDGE.rotation.T @ result.state.params["w"].detach()
        outward = RIDGE.rotation.T @ RIDGE.outer_gradient(result.state.params["w"].detach())
        return BackendResult(
            grads={"lam": -(outward / (RIDGE.eigenvalues + LAM)) @ w}, outer_loss=result.outer_loss, state=result.state
        )


def exact(num_steps: int) -> Tensor:
    return RIDGE.hypergradient_after(num_steps, LAM, torch.tensor(ETA, dtype=torch.float64))[0]


def truncated(num_steps: int, window: int) -> Tensor:
    """The formula: the last terms of `dw_T/dlam = -eta sum_t (1 - eta c)^(T-t) w_{t-1}`."""
    decay = 1 - ETA * (RIDGE.eigenvalues + LAM)
    eta = torch.tensor(ETA, dtype=torch.float64)
    steps = range(num_steps - window + 1, num_steps + 1)
    terms = [decay ** (num_steps - t) * (RIDGE.rotation.T @ RIDGE.params_after(t - 1, LAM, eta)) for t in steps]
    outward = RIDGE.rotation.T @ RIDGE.outer_gradient(RIDGE.params_after(num_steps, LAM, eta))
    return -ETA * outward @ sum(terms)


def relative(estimate: Tensor, reference: Tensor) -> float:
    return float((estimate - reference).abs() / reference.abs())


RATE = float((1 - ETA * (RIDGE.eigenvalues + LAM)).abs().max())


def test_truncation_has_the_bias_of_the_formula_and_its_rate() -> None:
    windows = [1, 3, 10, 20, 40, 60, 80, 100, 120, 240]
    bias = ht.horizon_bias(problem(240), {"lam": LAM}, windows=windows)
    points = bias.series["truncated"]
    assert [point.length for point in points] == windows
    for point in points[:-2]:
        expected = relative(truncated(240, point.length), exact(240))
        assert point.accuracy.error == pytest.approx(expected, rel=1e-4, abs=1e-13)
    assert points[-1].accuracy.error < 1e-13
    fit = bias.fits["truncated"]
    assert fit is not None
    assert fit.rate == pytest.approx(RATE, rel=1e-3)


def test_windows_beyond_half_of_the_run_tell_no_rate() -> None:
    bias = ht.horizon_bias(problem(120), {"lam": LAM}, windows=range(2, 120, 4))
    fit = bias.fits["truncated"]
    assert fit is not None
    # Windows up to 58, those up to 42 are well above the smallest error of these, and half of them are fitted.
    assert fit.num_points == 6
    assert fit.rate == pytest.approx(RATE, rel=0.005)


def test_implicit_and_unrolled_runs_close_in_on_the_solution() -> None:
    lengths = list(range(10, 300, 20))
    bias = ht.horizon_bias(problem(1), {"lam": LAM}, num_steps=lengths, implicit=SolutionOf())
    unrolled = {length: exact(length) for length in lengths}
    implied = {}
    for length in lengths:
        w = RIDGE.params_after(length, LAM, torch.tensor(ETA, dtype=torch.float64))
        curvature = RIDGE.eigenvalues + LAM
        implied[length] = -(RIDGE.rotation.T @ RIDGE.outer_gradient(w) / curvature) @ (RIDGE.rotation.T @ w)
    for name, estimates, references in (
        ("implicit", implied, unrolled),
        ("implicit to longest", implied, dict.fromkeys(lengths, unrolled[290])),
        ("unrolled to longest", unrolled, dict.fromkeys(lengths, unrolled[290])),
    ):
        for point in bias.series[name]:
            expected = relative(estimates[point.length], references[point.length])
            assert point.accuracy.error == pytest.approx(expected, rel=1e-4, abs=1e-12)
        fit = bias.fits[name]
        assert fit is not None
        fitted = [point for point in bias.series[name] if name == "implicit" or point.length <= 145]
        assert f"{name}: {fit}\n" in str(bias)
        assert fit == fit_geometric([point.length for point in fitted], [point.accuracy.error for point in fitted])
        # The unrolled one has a factor of T.
        assert fit.rate == pytest.approx(RATE, rel=1e-3 if name == "implicit to longest" else 0.03)


def test_the_library_s_implicit_backend_serves() -> None:
    solver = ht.linear_solvers.ConjugateGradient(max_iterations=20, tolerance=1e-12)
    implicit = ht.hypergradients.Implicit(solver=solver)
    bias = ht.horizon_bias(problem(1), {"lam": LAM}, num_steps=[20, 60, 200], implicit=implicit)
    errors = [point.accuracy.error for point in bias.series["implicit"]]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_rows_and_text_hold_every_point() -> None:
    bias = ht.horizon_bias(problem(20), {"lam": LAM}, windows=[4, 2, 4], num_steps=[6, 3])
    rows = bias.rows()
    assert [(row["series"], row["length"]) for row in rows] == [
        ("truncated", 2), ("truncated", 4), ("unrolled to longest", 3), ("unrolled to longest", 6),
    ]  # fmt: skip
    assert rows[0]["error"] == rows[0]["error.lam"] == bias.series["truncated"][0].accuracy.error
    assert rows[-1]["error"] == 0.0
    text = str(bias)
    assert "truncated: no geometric rate was found" in text
    assert f"2      {rows[0]['error']:.3e}" in text


def test_what_truncation_drops_is_refused_unless_allowed() -> None:
    whole = net_problem(ht.dynamics.SGD(lr=0.1), {}, num_steps=5)
    with pytest.raises(IncompatibleBackendError, match=r"`hparams\['init.first'\]`"):
        ht.horizon_bias(whole, whole.init_hparams(), windows=[2])


def test_tasks_are_run_by_one_route(monkeypatch: pytest.MonkeyPatch) -> None:
    routes_by_turns(monkeypatch)
    learner = task_problem(
        noisy_module(), item=(4,), num_steps=4, allow_unused=("0.weight", "0.bias", "2.weight", "2.bias")
    )
    bias = ht.horizon_bias(learner, learner.init_hparams(), windows=[1, 2, 4])
    errors = [point.accuracy.error for point in bias.series["truncated"]]
    assert min(errors[:2]) > 1e-3
    assert errors[2] < 1e-14


@pytest.mark.parametrize("name", ["windows", "num_steps"])
@pytest.mark.parametrize("wrong", [0, 2.0, True])
def test_refuses_lengths_that_are_no_steps(name: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=f"`{name}` holds {wrong!r}: "):
        ht.horizon_bias(problem(5), {"lam": LAM}, **{name: [3, wrong]})


def test_refuses_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="`windows` and `num_steps` are both empty"):
        ht.horizon_bias(problem(5), {"lam": LAM})
