"""What holds for every solver: closed forms, true residuals, exact numbers of products, tasks that do not mix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hypertorch import linear_solvers
from hypertorch.linear_solvers import (
    ConjugateGradient,
    Dense,
    FixedPoint,
    LinearSolver,
    Neumann,
    Nystrom,
    SymmetricSolver,
)
from tests.helpers.leaves import leaves as leaves_of
from tests.helpers.problems import normal
from tests.linear_solvers.systems import System, definite, rotation, skewed, stacked, symmetric

F64 = torch.float64

# Settings that solve systems with eigenvalues in [0.3, 2] to rounding; the test of all leaves finds one that is new.
THOROUGH: dict[type[LinearSolver], LinearSolver] = {
    ConjugateGradient: ConjugateGradient(max_iterations=60, tolerance=1e-13),
    Neumann: Neumann(num_terms=150, step_size=0.9),
    FixedPoint: FixedPoint(max_iterations=400, tolerance=1e-14, step_size=0.8),
    Nystrom: Nystrom(rank=50, damping=1e-13),
    Dense: Dense(),
}
# Settings that stop early, and how many products they take on 6 entries.
HASTY: dict[type[LinearSolver], tuple[LinearSolver, int]] = {
    ConjugateGradient: (ConjugateGradient(max_iterations=3, tolerance=0.0), 4),
    Neumann: (Neumann(num_terms=3, step_size=0.5), 3),
    FixedPoint: (FixedPoint(max_iterations=3, tolerance=0.0, step_size=0.5), 3),
    Nystrom: (Nystrom(rank=3, damping=0.1), 4),
    Dense: (Dense(damping=0.1), 7),
}
leaves = pytest.mark.parametrize("leaf", THOROUGH, ids=lambda leaf: leaf.__name__)
general_leaves = pytest.mark.parametrize(
    "leaf", [leaf for leaf in THOROUGH if not issubclass(leaf, SymmetricSolver)], ids=lambda leaf: leaf.__name__
)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_every_exported_solver_is_listed() -> None:
    found = set(leaves_of(linear_solvers, LinearSolver).values())
    # A new one is found by the test of all leaves.
    assert found >= set(THOROUGH) == set(HASTY)
    assert {leaf for leaf in found if issubclass(leaf, SymmetricSolver)} >= {ConjugateGradient, Nystrom}


@leaves
def test_a_diagonal_system_is_divided(leaf: type[LinearSolver]) -> None:
    diagonal, rhs = torch.tensor([0.5, 2.0, 1.0, 0.8], dtype=F64), torch.tensor([1.0, -3.0, 0.0, 2.0], dtype=F64)
    solution, found = System(torch.diag(diagonal), rhs).solve(THOROUGH[leaf])
    assert_close(solution, rhs / diagonal)
    assert float(found.residual) < 1e-12


@leaves
def test_a_single_number_is_divided(leaf: type[LinearSolver]) -> None:
    found = THOROUGH[leaf].solve(
        lambda vector: {"x": 0.4 * vector["x"]}, {"x": torch.tensor(3.0, dtype=F64)}, tasks_axis=False
    )
    assert_close(found.solution["x"], torch.tensor(7.5, dtype=F64))
    assert found.solution["x"].shape == found.residual.shape == ()


@leaves
@pytest.mark.parametrize(("size", "seed"), [(2, 1), (6, 2), (9, 3)])
def test_random_definite_systems_are_solved(leaf: type[LinearSolver], size: int, seed: int) -> None:
    system = definite(size, seed)
    solution, found = system.solve(THOROUGH[leaf])
    assert_close(solution, system.exact())
    assert float(found.residual) < 1e-12


@leaves
def test_an_ill_conditioned_system_is_solved_as_far_as_the_residual_says(leaf: type[LinearSolver]) -> None:
    """Condition number 1e4: the residual bounds the error, and what cannot get there in time says so."""
    system = System(symmetric(torch.logspace(-4, 0, 7, dtype=F64), 5), normal(7, seed=6))
    solution, found = system.solve(THOROUGH[leaf])
    error = (solution - system.exact()).norm() / system.exact().norm()
    assert float(error) <= 1.01e4 * float(found.residual) + 1e-11
    if leaf in (Neumann, FixedPoint):  # (1 - 1e-4)^400 is nearly 1
        assert 0.1 < float(found.residual) < 1.0
    else:
        assert float(found.residual) < (1e-8 if leaf is Nystrom else 1e-11)


@general_leaves
@pytest.mark.parametrize("seed", [1, 2])
def test_systems_that_are_not_symmetric_are_solved(leaf: type[LinearSolver], seed: int) -> None:
    system = skewed(6, seed)
    solver = Neumann(num_terms=120) if leaf is Neumann else THOROUGH[leaf]
    solution, found = system.solve(replace(solver, step_size=1.0) if leaf is FixedPoint else solver)
    assert_close(solution, system.exact())
    assert float(found.residual) < 1e-12
    transposed = System(system.matrix.T, system.rhs).exact()
    assert float((solution - transposed).norm()) > 0.1


@leaves
def test_the_residual_is_that_of_the_solution_and_products_are_counted(leaf: type[LinearSolver]) -> None:
    system = definite(6, 4)
    solver, products = HASTY[leaf]
    solution, found = system.solve(solver)
    assert system.products == products
    torch.testing.assert_close(found.residual, system.residual(solution), rtol=1e-12, atol=0)
    assert 1e-3 < float(found.residual) < 2.0
    assert found.iterations == products - (0 if leaf in (Neumann, FixedPoint) else 1)


@leaves
@pytest.mark.parametrize("tasks", [False, True])
def test_a_zero_right_hand_side_has_the_zero_solution(leaf: type[LinearSolver], tasks: bool) -> None:
    system = definite(5, 1)
    zero = System(system.matrix, torch.zeros(5, dtype=F64))
    batch = stacked([zero, system]) if tasks else zero
    for solver in (THOROUGH[leaf], HASTY[leaf][0]):
        solution, found = batch.solve(solver)
        assert not solution[0].any() if tasks else not solution.any()
        assert float(found.residual.reshape(-1)[0]) == 0.0
        assert torch.isfinite(solution).all()


def different_tasks() -> list[System]:
    """Tasks that are done after one iteration, after a few, after many, at once, and not at all in time."""
    eye = torch.eye(6, dtype=F64)
    return [
        System(eye, normal(6, seed=10)),
        System(symmetric(torch.tensor([0.5, 0.5, 0.5, 2.0, 2.0, 2.0], dtype=F64), 11), normal(6, seed=12)),
        definite(6, 13),
        System(symmetric(torch.tensor([0.9, 0.9, 1.0, 1.0, 1.1, 1.1], dtype=F64), 14), torch.zeros(6, dtype=F64)),
        System(symmetric(torch.logspace(-3, 0, 6, dtype=F64), 15), 1e-3 * normal(6, seed=16)),
    ]


@leaves
@pytest.mark.parametrize("settings", ["thorough", "hasty"])
def test_a_batch_of_tasks_gets_what_each_task_gets_alone(leaf: type[LinearSolver], settings: str) -> None:
    solver = THOROUGH[leaf] if settings == "thorough" else HASTY[leaf][0]
    tasks = different_tasks()
    together, found = stacked(tasks).solve(solver)
    alone = [task.solve(solver) for task in tasks]
    assert found.residual.shape == (len(tasks),)
    for row, (solution, own) in enumerate(alone):
        torch.testing.assert_close(together[row], solution, rtol=1e-10, atol=1e-12 * float(solution.abs().max()))
        torch.testing.assert_close(found.residual[row], own.residual, rtol=1e-3, atol=1e-12)
    # A residual at the tolerance passes it or not by its last bit, which differs between processors.
    assert abs(found.iterations - max(own.iterations for _, own in alone)) <= (settings == "thorough")


@leaves
def test_a_task_that_is_not_a_number_leaves_the_others_alone(leaf: type[LinearSolver]) -> None:
    good = definite(5, 3)
    bad = System(good.matrix, torch.full((5,), float("nan"), dtype=F64))
    if leaf is Nystrom:  # the factorisations are of the matrix alone
        assert torch.isnan(stacked([good, bad]).solve(THOROUGH[leaf])[0][1]).all()
        return
    solution, found = stacked([good, bad]).solve(THOROUGH[leaf])
    assert_close(solution[0], good.exact())
    assert torch.isnan(solution[1]).all()
    assert torch.isnan(found.residual[1]) and not torch.isnan(found.residual[0])


@leaves
def test_the_scale_of_the_right_hand_side_does_not_matter(leaf: type[LinearSolver]) -> None:
    system = definite(6, 7)
    for solver in (THOROUGH[leaf], HASTY[leaf][0]):
        first, found = system.solve(solver)
        for scale in (1e-60, 1e60):
            scaled, again = System(system.matrix, scale * system.rhs).solve(solver)
            assert_close(scaled / scale, first)
            torch.testing.assert_close(again.residual, found.residual, rtol=1e-3, atol=1e-12)


@leaves
def test_dtypes_are_kept_and_nothing_has_a_graph(leaf: type[LinearSolver]) -> None:
    matrix = definite(4, 5).matrix
    rhs = {
        "single": torch.ones(2, requires_grad=True),
        "double": torch.ones(2, dtype=F64, requires_grad=True),
    }

    def matvec(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        image = matrix @ torch.cat([vector["single"].double(), vector["double"]])
        return {"single": image[:2].float(), "double": image[2:]}

    solver = Nystrom(rank=4, damping=1e-5) if leaf is Nystrom else THOROUGH[leaf]
    found = solver.solve(matvec, rhs)
    expected = torch.linalg.solve(matrix, torch.ones(4, dtype=F64))
    assert {name: value.dtype for name, value in found.solution.items()} == {"single": torch.float32, "double": F64}
    torch.testing.assert_close(torch.cat([found.solution["single"].double(), found.solution["double"]]), expected,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert not any(value.requires_grad for value in [*found.solution.values(), found.residual])
    assert float(found.residual) < 1e-4


@leaves
def test_the_same_call_gives_the_same_bits_and_settings_are_values(leaf: type[LinearSolver]) -> None:
    solver = HASTY[leaf][0]
    first, _ = definite(6, 8).solve(solver)
    again, _ = definite(6, 8).solve(replace(solver))
    assert torch.equal(first, again)
    assert solver == replace(solver)
    assert hash(solver) == hash(replace(solver))


@leaves
@pytest.mark.parametrize("tasks", [False, True])
def test_everything_is_made_on_the_device_of_the_right_hand_side(leaf: type[LinearSolver], tasks: bool) -> None:
    """What is made without naming a device would land on one that computes nothing."""
    system = stacked([definite(4, 1), definite(4, 2)]) if tasks else definite(4, 1)
    with torch.device("meta"):
        solution, found = system.solve(THOROUGH[leaf])
    assert solution.device.type == found.residual.device.type == "cpu"


@pytest.mark.parametrize("leaf", [ConjugateGradient, FixedPoint, Neumann, Nystrom])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_are_validated(leaf: type[LinearSolver], value: object) -> None:
    name = {Neumann: "num_terms", Nystrom: "rank"}.get(leaf, "max_iterations")
    with pytest.raises(ValueError, match=rf"`{name}` of `{leaf.__name__}` is .* no solution but zero. Pass a whole"):
        leaf(**{name: value})


@pytest.mark.parametrize(
    ("leaf", "name", "values", "advice"),
    [
        (ConjugateGradient, "tolerance", (-1e-3, float("nan"), float("inf")), "pass 0 to take all iterations"),
        (FixedPoint, "tolerance", (-1e-3, float("nan"), float("inf")), "pass 0 to take all iterations"),
        (ConjugateGradient, "damping", (-1e-3, float("nan")), "pass a small number such as 0.01"),
        (Dense, "damping", (-1e-3, float("nan")), "pass a small number such as 0.01"),
        (Nystrom, "damping", (0.0, -1e-3, float("nan")), "pass a small number such as 0.01"),
        (Neumann, "step_size", (0.0, -1.0, float("nan"), float("inf")), "pass 1 for a map"),
        (FixedPoint, "step_size", (0.0, -1.0, float("nan"), float("inf")), "pass 1 for a map"),
    ],
)
def test_numbers_are_validated(leaf: type[LinearSolver], name: str, values: tuple[float, ...], advice: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"`{name}` of `{leaf.__name__}` is .*, not a finite number .*{advice}"):
            leaf(**{name: value})


@leaves
def test_a_symmetric_map_of_rank_one_less_than_full_is_noticed(leaf: type[LinearSolver]) -> None:
    """Where there is no solution the residual says so, or an error does."""
    basis = rotation(5, 21)
    eigenvalues = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0], dtype=F64)
    system = System(basis @ torch.diag(eigenvalues) @ basis.T, basis[:, 0] + basis[:, 3])
    if leaf is Dense:
        # Rounding makes the matrix barely invertible, or not.
        exact = System(torch.diag(eigenvalues), torch.ones(5, dtype=F64))
        with pytest.raises(ValueError, match=r"`matvec` is a singular map of 5 entries: .*Pass `damping` above 0.0"):
            exact.solve(Dense())
        return
    solver = Nystrom(rank=5, damping=1e-3) if leaf is Nystrom else THOROUGH[leaf]
    _, found = system.solve(solver)
    assert float(found.residual) > 0.5
