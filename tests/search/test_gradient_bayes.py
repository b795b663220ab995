"""Asking and telling: what is chosen, what is remembered, and evaluations that fail."""

from __future__ import annotations

import math

import pytest
import torch
from botorch.test_functions import Branin
from torch import Tensor

import hypertorch as ht
from hypertorch.search import GradientBayes

F64 = torch.float64
BOUNDS = [(0.0, 4.0), (1e-3, 1e1)]
LOG = [False, True]
OPTIMUM = (3.0, 0.02)


def bowl(points: Tensor) -> Tensor:
    """Least at (3, 0.02)."""
    return (points[:, 0] - OPTIMUM[0]).square() + 0.3 * (points[:, 1] / OPTIMUM[1]).log().square()


def slopes(function, points: Tensor) -> Tensor:
    leaves = points.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaves).sum(), leaves)
    return found


def run(search: GradientBayes, function, count: int, *, factor: float | None = 1.0) -> Tensor:
    """Asks and tells; returns the values."""
    values = []
    for _ in range(count):
        point = search.ask()
        values.append(function(point))
        search.tell(point, values[-1], None if factor is None else factor * slopes(function, point))
    return torch.cat(values)


def test_gradients_find_the_minimum_in_few_evaluations() -> None:
    informed = GradientBayes(BOUNDS, log=LOG, num_initial=3)
    run(informed, bowl, 9)
    assert informed.best.value < 1e-5 and informed.uses_gradients
    assert informed.best.point.tolist() == pytest.approx(OPTIMUM, rel=0.02)
    plain = GradientBayes(BOUNDS, log=LOG, num_initial=3)
    run(plain, bowl, 9, factor=None)
    assert plain.best.value > 10 * informed.best.value and not plain.uses_gradients


def test_the_first_points_are_those_of_a_sobol_sequence() -> None:
    points = GradientBayes([(0.0, 1.0)] * 3, num_initial=4, seed=7).ask(4)
    expected = torch.quasirandom.SobolEngine(3, scramble=True, seed=7).draw(4, dtype=F64)
    assert torch.equal(points, expected)
    other = GradientBayes([(0.0, 1.0)] * 3, num_initial=4, seed=8).ask(4)
    assert not torch.equal(points, other)


def test_a_search_is_taken_up_by_telling_all_again() -> None:
    state = torch.random.get_rng_state()
    straight = GradientBayes(BOUNDS, log=LOG, num_initial=3, seed=1)
    points = []
    for _ in range(6):
        points.append(straight.ask())
        straight.tell(points[-1], bowl(points[-1]), slopes(bowl, points[-1]))
    taken_up = GradientBayes(BOUNDS, log=LOG, num_initial=3, seed=1)
    told = torch.cat(points[:4])
    taken_up.tell(told, bowl(told), slopes(bowl, told))
    for point in points[4:]:
        own = taken_up.ask()
        assert torch.equal(own, point)
        taken_up.tell(own, bowl(own), slopes(bowl, own))
    assert torch.equal(state, torch.random.get_rng_state())


def test_points_of_a_batch_differ_and_are_pending_until_told() -> None:
    search = GradientBayes(BOUNDS, log=LOG, num_initial=3)
    run(search, bowl, 5)
    batch = search.ask(3)
    unit = torch.stack([batch[:, 0] / 4.0, (batch[:, 1] / 1e-3).log() / math.log(1e4)], dim=1)
    assert float(torch.pdist(unit).min()) > 1e-3
    # Told out of order; the one that stays counts as under way, as if it had been marked so.
    search.tell(batch[[2, 0]], bowl(batch[[2, 0]]), slopes(bowl, batch[[2, 0]]))
    again = GradientBayes(BOUNDS, log=LOG, num_initial=3)
    told = torch.cat([search._points[:5], batch[[2, 0]]])
    again.tell(told, bowl(told), slopes(bowl, told))
    again.pend(batch[[1]])
    assert torch.equal(search.ask(), again.ask())
    without = GradientBayes(BOUNDS, log=LOG, num_initial=3)
    without.tell(told, bowl(told), slopes(bowl, told))
    assert not torch.equal(without.ask(), again._pending[-1:])


def cliff(points: Tensor) -> Tensor:
    """Diverges above a rate, right beside the minimum."""
    return torch.where(points[:, 1] > 0.05, torch.nan, bowl(points))


def test_failed_evaluations_neither_end_the_search_nor_poison_the_fit() -> None:
    search = GradientBayes(BOUNDS, log=LOG, num_initial=4)
    failed = run(search, cliff, 11).isnan()
    assert bool(failed.any())
    assert search.best.value < 1e-2
    # It keeps away from where it failed.
    assert int(failed[6:].sum()) <= 3
    # They take no part in the fit.
    clean = GradientBayes(BOUNDS, log=LOG, num_initial=4)
    done = ~search._values.isnan()
    clean.tell(search._points[done], search._values[done], search._gradients[done])
    assert torch.equal(search._model().fitted.lengthscales, clean._model().fitted.lengthscales)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_failure(value: float) -> None:
    search = GradientBayes(BOUNDS, log=LOG)
    points = search.ask(3)
    values, grads = bowl(points), slopes(bowl, points)
    values[0] = value
    grads[1, 1] = value
    values[1] = -100.0
    search.tell(points, values, grads)
    assert search.best.value == float(values[2])
    search.tell(points[:1], torch.tensor([value]))
    assert search.best.value == float(values[2])


def test_a_search_whose_evaluations_all_fail_goes_on_with_new_points() -> None:
    search = GradientBayes([(0.0, 1.0)] * 2, num_initial=2)
    points = [search.ask() for _ in range(5)]
    search.tell(torch.cat(points), torch.full((5,), torch.nan))
    expected = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(6, dtype=F64)
    torch.testing.assert_close(torch.cat([*points, search.ask()]), expected)
    with pytest.raises(ValueError, match="none of the 5 evaluations told so far has succeeded"):
        _ = search.best
    assert not search.uses_gradients


def test_gradients_that_mislead_are_left_aside() -> None:
    search = GradientBayes(BOUNDS, log=LOG, num_initial=5)
    run(search, bowl, 8, factor=-1.0)
    assert not search.uses_gradients and search.best.value < 1.0
    trusting = GradientBayes(BOUNDS, log=LOG, num_initial=5, guarded=False)
    run(trusting, bowl, 6, factor=-1.0)
    assert trusting.uses_gradients


def test_the_process_is_fitted_to_no_more_than_it_is_allowed() -> None:
    search = GradientBayes(BOUNDS, log=LOG, num_initial=4, max_observed=11, guarded=False)
    run(search, bowl, 6)
    observed = search._model().observations
    assert observed.has_gradient.tolist() == [False] * 4 + [True] * 2
    assert len(observed) == 6


@pytest.mark.slow
def test_one_and_twenty_numbers_can_be_searched() -> None:
    one = GradientBayes([(-1.0, 3.0)], num_initial=2)
    run(one, lambda points: (points[:, 0] - 1.5).square(), 6)
    assert one.best.value < 1e-4
    twenty = GradientBayes([(-1.0, 2.0)] * 20, num_initial=2)
    values = run(twenty, lambda points: points.square().sum(dim=1), 7)
    assert twenty.best.value < 0.3 * float(values[:2].min())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bounds": [(0.0, 1.0)] * 21}, ValueError, "`bounds` has 21 numbers.*at most 20.*ht.OuterLoop"),
        ({"num_initial": 0}, ValueError, "`num_initial` is 0, which is no count"),
        ({"max_observed": 1.5}, ValueError, "`max_observed` is 1.5"),
        ({"kernel": "rbf"}, TypeError, "`kernel` is a str"),
        ({"guarded": 1}, TypeError, "`guarded` is 1, which is neither"),
        ({"seed": -1}, ValueError, "`seed` is -1"),
    ],
)
def test_settings_that_make_no_search_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        GradientBayes(**{"bounds": BOUNDS, **options})


def test_points_that_do_not_fit_are_refused() -> None:
    search = GradientBayes(BOUNDS, log=LOG)
    with pytest.raises(ValueError, match="`batch` is 0"):
        search.ask(0)
    point = search.ask()
    with pytest.raises(ValueError, match=r"the shapes \(1, 2\), \(2,\) and \(1, 2\)"):
        search.tell(point, torch.ones(2))
    with pytest.raises(ValueError, match="each of the 2 numbers"):
        search.tell(point, torch.ones(1), torch.ones(1, 3))
    with pytest.raises(ValueError, match="along axis 0"):
        search.tell(point + 5.0, torch.ones(1))
    with pytest.raises(ValueError, match="along axis 0"):
        search.pend(point + 5.0)


def branin_regret(seed: int, count: int, factor: float | None) -> float:
    function = Branin().double()
    low, high = function.bounds.double()
    search = ht.search.GradientBayes(list(zip(low.tolist(), high.tolist(), strict=True)), seed=seed)
    run(search, function, count, factor=factor)
    return search.best.value - function.optimal_value


@pytest.mark.slow
def test_regret_on_branin() -> None:
    def median(factor: float | None) -> float:
        return sorted(branin_regret(seed, 20, factor) for seed in range(3))[1]

    assert median(1.0) < 1e-4
    plain = median(None)
    assert plain > 1e-3
    assert median(-1.0) <= 2.0 * plain and median(0.1) <= 2.0 * plain


def test_points_that_went_through_float32_are_no_longer_pending() -> None:
    search = GradientBayes(BOUNDS, log=LOG, num_initial=6)
    points = search.ask(3).to(torch.float32)
    search.tell(points, bowl(points.double()).to(torch.float32))
    assert len(search._pending) == 0
    # One that was not asked for takes none of them away.
    own = search.ask(2)
    other = own[:1] + torch.tensor([[1e-3, 0.0]], dtype=F64)
    search.tell(other, bowl(other))
    assert len(search._pending) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0.0, 1.0]], torch.ones(1)), "`points` is a list, not a tensor"),
        ((torch.ones(1, 2), 1.0), "`values` is a float, not a tensor"),
        ((torch.ones(1, 2), torch.ones(1), [[1.0, 1.0]]), "`gradients` is a list, not a tensor"),
    ],
)
def test_what_is_told_are_tensors(arguments: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        GradientBayes(BOUNDS).tell(*arguments)


def test_a_scalar_is_no_batch() -> None:
    with pytest.raises(ValueError, match="Pass a batch, even of one"):
        GradientBayes(BOUNDS).tell(torch.ones(1, 2), torch.tensor(1.0))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), [(0.0,)], [(0.0, True)], [("a", "b")], torch.ones(2, 2)])
def test_bounds_are_pairs(bounds: object) -> None:
    with pytest.raises(TypeError, match="`bounds"):
        GradientBayes(bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize("log", [[1], ["no"], "y", True])
def test_the_logarithm_is_a_switch_for_each_axis(log: object) -> None:
    with pytest.raises(TypeError, match="`log"):
        GradientBayes([(0.1, 1.0)], log=log)  # type: ignore[arg-type]


@pytest.mark.parametrize("huge", [1e101, 1e200, -1e200])
def test_huge_values_and_slopes_are_failed(huge: float) -> None:
    search = GradientBayes(BOUNDS, log=LOG, num_initial=3)
    run(search, bowl, 3)
    point = search.ask()
    search.tell(point, torch.tensor([huge], dtype=F64))
    search.tell(search.ask(), torch.tensor([1.0], dtype=F64), torch.tensor([[huge, 0.0]], dtype=F64))
    assert int(search._succeeded.sum()) == 3 and abs(search.best.value) < 1e3
    run(search, bowl, 2)


@pytest.mark.slow
def test_pending_points_may_coincide() -> None:
    search = GradientBayes(BOUNDS, log=LOG, num_initial=3)
    run(search, bowl, 9)
    search.pend(search.best.point.expand(4, 2))
    assert search.ask(2).isfinite().all()
