"""The largest eigenvalue of the inner map: closed forms, dense Jacobians, tasks, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.diagnostics import spectral
from hypertorch.errors import NonFiniteError
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

F64 = torch.float64
CURVATURES = torch.tensor([0.1, 0.4, 1.0, 2.5], dtype=F64)
SGD = ht.dynamics.SGD


def quadratic(dynamics: ht.Dynamics, num_steps: int = 10, **options: object) -> ht.BilevelProblem:
    """Descends `w' diag(CURVATURES) w / 2 - c w` in a turned basis."""
    rotation = torch.linalg.qr(normal(4, 4, seed=1)).Q
    matrix = (rotation * CURVATURES) @ rotation.T

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"] @ matrix @ params["w"] / 2 - hparams["c"] @ params["w"]

    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones(4, dtype=F64)}, loss),
        LambdaOuter({"c": normal(4, seed=2)}, lambda p, h, b: p["w"].square().sum()),
        dynamics=dynamics,
        num_steps=num_steps,
        **options,  # type: ignore[arg-type]
    )


def measured(problem: ht.BilevelProblem, **options: object) -> ht.SpectralRadius:
    return ht.spectral_radius(problem, problem.init_hparams(), **options)  # type: ignore[arg-type]


def dense_eigenvalues(problem: ht.BilevelProblem, step: int) -> Tensor:
    """The eigenvalues of the Jacobian of one step, largest first, by autograd one row at a time."""
    hparams = problem.init_hparams()
    bound = BoundProblem(problem, hparams, 0, None)
    with bound.running():
        loop = bound.loop(None, {})
        state = loop.initial(hparams)
        for earlier in range(step):
            state = loop.advance(state, hparams, earlier)
        state = state.detached()
        tensors = state.tensors()
        sizes = [tensor.numel() for tensor in tensors]

        def mapped(flat: Tensor) -> Tensor:
            parts = [part.reshape(old.shape) for part, old in zip(flat.split(sizes), tensors, strict=True)]
            moved = loop.advance(state.replace_tensors(parts), hparams, step)
            by_name = dict(zip(moved.names(), moved.tensors(), strict=True))
            return torch.cat([by_name[name].flatten() for name in state.names()])

        jacobian = torch.autograd.functional.jacobian(mapped, torch.cat([tensor.flatten() for tensor in tensors]))
    values = torch.linalg.eigvals(jacobian)
    return values[values.abs().argsort(descending=True)]


@pytest.mark.parametrize("lr", [0.1, 0.5, 0.9])
def test_gradient_descent_on_a_quadratic(lr: float) -> None:
    result = measured(quadratic(SGD(lr=lr)))
    expected = 1 - lr * CURVATURES
    leading = expected[expected.abs().argmax()]
    torch.testing.assert_close(result.eigenvalues, leading.to(torch.complex128))
    torch.testing.assert_close(result.ritz_values.real.sort().values, expected.sort().values)
    # Every step has the same map, so the product grows by its eigenvalue.
    torch.testing.assert_close(result.step_growths, leading.abs().expand(10))
    assert result.growth == pytest.approx(result.radius, rel=1e-12)
    assert result.step == 9


def test_growth_of_maps_that_change() -> None:
    # The last step's slowest direction is the first curvature's; the earlier maps share their directions.
    schedule = [0.9, 0.1, 0.7, 0.3]
    result = measured(quadratic(SGD(lr=schedule), num_steps=4))
    torch.testing.assert_close(result.step_growths, 1 - torch.tensor(schedule, dtype=F64) * 0.1)
    assert result.growth == pytest.approx(math.prod(1 - 0.1 * lr for lr in schedule) ** 0.25, rel=1e-12)
    assert measured(quadratic(SGD(lr=schedule), num_steps=4), step=0).radius == pytest.approx(1.25, rel=1e-10)


@pytest.mark.parametrize(("lr", "momentum"), [(0.1, 0.9), (1.2, 0.5), (0.05, 0.1), (1.3, 0.99)])
def test_momentum_on_a_quadratic_has_the_companion_matrix(lr: float, momentum: float) -> None:
    result = measured(quadratic(SGD(lr=lr, momentum=momentum), num_steps=30))
    companions = torch.stack(
        [torch.tensor([[1 + momentum - lr * h, -momentum], [1.0, 0.0]], dtype=F64) for h in CURVATURES]
    )
    roots = torch.linalg.eigvals(companions).flatten()
    assert result.radius == pytest.approx(float(roots.abs().max()), rel=1e-8)
    torch.testing.assert_close(result.ritz_values.abs().sort().values, roots.abs().sort().values, rtol=1e-8, atol=1e-10)
    if lr == 1.3:  # every pair is complex, with modulus sqrt(momentum)
        assert result.radius == pytest.approx(math.sqrt(momentum), rel=1e-8)
        assert abs(complex(result.eigenvalues).imag) > 0.1


LEAVES: dict[str, Callable[[], ht.Dynamics]] = {
    "gradient descent": lambda: SGD(lr=0.3),
    "momentum": lambda: SGD(lr=0.2, momentum=0.9, weight_decay=0.05),
    "Nesterov": lambda: SGD(lr=0.2, momentum=0.9, nesterov=True),
    "Adam": lambda: ht.dynamics.Adam(lr=0.02),
    "RMSprop": lambda: ht.dynamics.RMSprop(lr=0.02),
    "Adagrad": lambda: ht.dynamics.Adagrad(lr=0.1),
}


@pytest.mark.parametrize("step", [0, 5, 11])
@pytest.mark.parametrize("leaf", LEAVES)
def test_a_net_against_its_dense_jacobian(leaf: str, step: int) -> None:
    problem = net_problem(LEAVES[leaf](), {}, num_steps=12)
    result = measured(problem, step=step)
    expected = dense_eigenvalues(problem, step)
    assert result.radius == pytest.approx(float(expected[0].abs()), rel=1e-6)
    assert float(result.residuals) <= 1e-8
    assert result.step_growths.shape == (step + 1,)


def test_noise_belongs_to_the_step() -> None:
    problem = net_problem(SGD(lr=0.3), {}, num_steps=4, dropout=0.5)
    before = torch.random.get_rng_state()
    assert measured(problem, step=2).radius == pytest.approx(float(dense_eigenvalues(problem, 2)[0].abs()), rel=1e-6)
    assert torch.equal(torch.random.get_rng_state(), before)


def module(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *extra, nn.Linear(5, 3)).double()


def test_tasks_by_either_route_and_each_on_its_own() -> None:
    together, one_by_one = (
        measured(task_problem(module(), item=(4,)), execution=ht.Execution(tasks=route)) for route in ("vmap", "loop")
    )
    for name in ("eigenvalues", "step_growths"):
        torch.testing.assert_close(getattr(together, name).abs(), getattr(one_by_one, name).abs(), rtol=1e-6, atol=0)
    assert together.eigenvalues.shape == (3,)
    assert together.step_growths.shape == (3, 3)
    assert together.radius == pytest.approx(float(together.eigenvalues.abs().max()))
    assert together.eigenvalues.abs().unique().numel() == 3
    assert together.growth == pytest.approx(max(math.prod(row) ** (1 / 3) for row in together.step_growths.tolist()))
    worst = int(together.eigenvalues.abs().argmax())
    assert f"of task {worst}, the largest of 3" in str(together)


def test_tasks_are_run_the_way_that_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    problem = task_problem(module(), item=(4,))
    original = problem.inner.loss

    def loss(params: TensorDict, hparams: TensorDict, batch: Batch) -> Any:
        seen.append(any(torch._C._functorch.is_batchedtensor(value) for value in params.values()))
        return original(params, hparams, batch)

    monkeypatch.setattr(problem.inner, "loss", loss)
    for route in ("loop", "vmap"):
        monkeypatch.setattr(spectral, "measured_execution", lambda *_, r=route, **__: ht.Execution(tasks=r))
        seen.clear()
        measured(problem, execution=ht.Execution(tasks="auto"))
        assert seen and any(seen) == (route == "vmap")


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_what_the_context_computes_is_part_of_the_map(route: str) -> None:
    curvatures = torch.tensor([0.5, 1.5, 4.0], dtype=F64)
    outer = LambdaOuter({"scale": torch.tensor(2.0, dtype=F64)}, lambda p, h, b: p["w"].square().sum())
    outer.batch = lambda outer_step: curvatures  # type: ignore[method-assign]
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.ones(2, dtype=F64)}, lambda p, h, b: h["curvature"] * p["w"].square().sum() / 2
        ),
        outer,
        dynamics=SGD(lr=0.1),
        num_steps=5,
        num_tasks=3,
        context=lambda hparams, batch: {"curvature": hparams["scale"] * batch},
    )
    found = measured(problem, execution=ht.Execution(tasks=route))
    torch.testing.assert_close(found.eigenvalues.real, 1 - 0.1 * 2.0 * curvatures)


def test_running_statistics_are_part_of_the_state() -> None:
    problem = task_problem(module(nn.BatchNorm1d(5)), item=(4,))
    result = measured(problem, execution=ht.Execution(tasks="loop"))
    assert float(result.residuals.max()) < 1e-6
    assert bool(torch.isfinite(result.step_growths).all())


@pytest.mark.parametrize(
    ("logarithm", "verdict"),
    [(-1.1, "contracts"), (-0.9, "is marginal"), (0.0, "is marginal"), (0.9, "is marginal"), (1.1, "explodes")],
)
def test_what_changes_less_than_by_a_factor_of_e_is_marginal(logarithm: float, verdict: str) -> None:
    radius = torch.tensor(math.exp(logarithm / 8), dtype=F64)
    ones = torch.ones(8, dtype=F64)
    result = ht.SpectralRadius(
        step=7, num_steps=8, eigenvalues=radius, residuals=ones[0], ritz_values=ones, step_growths=ones
    )
    assert result.verdict == verdict
    assert " (of task " not in str(result)


VERDICTS = {0.3: "contracts", 0.012: "is marginal", 0.9: "explodes"}


@pytest.mark.parametrize("lr", VERDICTS)
def test_it_says_in_words_what_unrolling_does(lr: float) -> None:
    result = measured(quadratic(SGD(lr=lr), num_steps=200 if lr == 0.3 else 20))
    assert result.verdict == VERDICTS[lr]
    text = str(result)
    assert f"the inner map at step {result.step} {VERDICTS[lr]}: " in text
    assert f"{result.radius:.6g}" in text
    assert f"growth along the trajectory {result.growth:.6g} per step" in text


def test_the_numbers_of_the_text() -> None:
    # The same map in every step: the least curvature's, 0.97.
    lines = str(measured(quadratic(SGD(lr=0.3), num_steps=20), step=9)).splitlines()
    power = f"{0.97**20:.3g}"
    assert lines[0].startswith("the inner map at step 9 is marginal: over this horizon ")
    assert lines[1].startswith(f"  largest |eigenvalue| 0.97: {power} over 20 steps (eigenvalue 0.97+0j, residual ")
    assert lines[2] == f"  growth along the trajectory 0.97 per step: {0.97**10:.3g} over 10 steps"


def test_the_text_is_about_the_task_of_the_largest_modulus() -> None:
    # The largest eigenvalues: one positive and small, one negative, one of a complex pair, as momentum makes them.
    eigenvalues = torch.tensor([0.5 + 0.0j, -0.9 + 0.0j, 0.1 + 0.7j], dtype=torch.complex128)
    result = ht.SpectralRadius(
        step=1,
        num_steps=4,
        eigenvalues=eigenvalues,
        residuals=torch.tensor([1e-9, 3e-3, 1e-9], dtype=F64),
        ritz_values=eigenvalues[:, None],
        step_growths=torch.tensor([[0.5, 0.5], [0.9, 0.4], [0.2, 0.7]], dtype=F64),
    )
    assert result.radius == pytest.approx(0.9)
    assert result.growth == pytest.approx(0.6)
    lines = str(result).splitlines()
    assert lines[1] == (
        f"  largest |eigenvalue| (of task 1, the largest of 3) 0.9: {0.9**4:.3g} over 4 steps "
        "(eigenvalue -0.9+0j, residual 0.003)"
    )
    assert lines[2] == f"  growth along the trajectory 0.6 per step: {0.6**2:.3g} over 2 steps"
    complex_one = ht.SpectralRadius(
        step=1,
        num_steps=4,
        eigenvalues=torch.tensor([0.5 + 0.0j, 0.1 + 0.7j], dtype=torch.complex128),
        residuals=result.residuals[::2],
        ritz_values=eigenvalues[::2, None],
        step_growths=result.step_growths[::2],
    )
    assert "(of task 1, the largest of 2) 0.707107: " in str(complex_one)
    assert "(eigenvalue 0.1+0.7j, " in str(complex_one)


def test_it_says_that_the_eigenvalue_is_not_settled() -> None:
    problem = net_problem(SGD(lr=0.2, momentum=0.9), {}, num_steps=12)
    assert "not settled: a larger `dimension` helps" in str(measured(problem, dimension=4, max_restarts=0))
    assert "not settled" not in str(measured(problem))


def test_large_powers_are_printed() -> None:
    text = str(measured(quadratic(SGD(lr=4.0), num_steps=300), step=2))
    assert "9: 1e+286 over 300 steps" in text


def test_a_map_that_forgets_everything() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["c"] * 0}, lambda p, h, b: (p["w"] - h["c"]).square().sum() / 2),
        LambdaOuter({"c": normal(3, seed=2)}, lambda p, h, b: p["w"].square().sum()),
        dynamics=SGD(lr=1.0),
        num_steps=3,
    )
    result = measured(problem)
    assert (result.radius, result.growth, result.verdict) == (0.0, 0.0, "contracts")
    assert "0 over 3 steps" in str(result)


def test_leaves_hparams_alone() -> None:
    problem = quadratic(SGD(lr=0.1))
    hparams = problem.init_hparams()
    before = hparams["c"].clone()
    ht.spectral_radius(problem, hparams)
    assert torch.equal(hparams["c"], before)
    assert not hparams["c"].requires_grad


@pytest.mark.parametrize("step", [-1, 10, 1.5, True])
def test_refuses_a_step_that_is_not_there(step: object) -> None:
    with pytest.raises(ValueError, match=rf"`step` is {step!r} in a problem with `num_steps` = 10.*0 to `num_steps"):
        measured(quadratic(SGD(lr=0.1)), step=step)


def test_refuses_a_problem_without_steps() -> None:
    with pytest.raises(ValueError, match="`step` is None in a problem with `num_steps` = 0"):
        measured(quadratic(SGD(lr=0.1), num_steps=0))


@pytest.mark.parametrize(("name", "value"), [("dimension", 3), ("dimension", 5.5), ("max_restarts", -1)])
def test_refuses_numbers_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is {value}: "):
        measured(quadratic(SGD(lr=0.1)), **{name: value})


def test_names_where_a_run_blows_up() -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinity.*inner step"):
        measured(quadratic(SGD(lr=1e200), num_steps=5))


def test_says_that_a_derivative_is_infinite() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["c"] * 0}, lambda p, h, b: p["w"].abs().pow(1.5).sum() + (h["c"] * 0).sum()),
        LambdaOuter({"c": normal(3, seed=2)}, lambda p, h, b: p["w"].square().sum()),
        dynamics=SGD(lr=1.0),
        num_steps=1,
    )
    with pytest.raises(NonFiniteError, match="derivative of inner step 0 in its state is not finite"):
        measured(problem)
