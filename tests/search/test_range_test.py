"""The learning-rate range test: against a loss that is known in closed form, and on digits against constant rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hypertorch as ht
from hypertorch.dynamics import SGD
from hypertorch.search import NoSuggestionError, lr_range_test, with_lr
from hypertorch.search.range_test import _lines, _lowest
from hypertorch.types import Batch, TensorDict

F64 = torch.float64
CURVATURE, FLOOR, NUM_STEPS = 0.5, 0.2, 100


class Curve(ht.InnerProblem):
    """A loss of one weight, `shape(curvature w^2 / 2 + floor)`, with noise that depends on the step alone."""

    def __init__(self, *, noise: float = 0.0, shape: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        self.noise, self.shape, self.calls = noise, shape, 0

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.ones((), dtype=F64)}

    def batch(self, step: int) -> Tensor:
        return self.noise * torch.randn((), generator=torch.Generator().manual_seed(step), dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        self.calls += 1
        return self.shape(CURVATURE * params["w"].square() / 2 + FLOOR) + batch


class Weight(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {"unused": torch.zeros((), dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"].square()


def problem(inner: ht.InnerProblem | None = None, dynamics: ht.Dynamics | None = None) -> ht.BilevelProblem:
    dynamics = dynamics or SGD(lr=ht.Hyper("lr"))
    return ht.BilevelProblem(inner or Curve(), Weight(), dynamics=dynamics, num_steps=3)


def known_losses() -> tuple[Tensor, Tensor]:
    """Returns rates and losses of the noiseless curve: `w_t = prod_s (1 - lr_s curvature)`."""
    rates = 1e-5 * (1e2 / 1e-5) ** (torch.arange(NUM_STEPS, dtype=F64) / (NUM_STEPS - 1))
    weights = torch.cat([torch.ones(1, dtype=F64), (1.0 - CURVATURE * rates).cumprod(0)[:-1]])
    return rates, CURVATURE * weights.square() / 2 + FLOOR


def test_the_curve_is_the_known_one() -> None:
    figures, suggestion = lr_range_test(problem())
    rates, losses = known_losses()
    torch.testing.assert_close(figures.rates, rates, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(figures.losses, losses, rtol=1e-10, atol=0.0)
    assert suggestion in figures.rates
    # The steepest point of the known curve, by differences over twice the window.
    slopes = (losses[10:].log() - losses[:-10].log())[: int(losses.argmin())]
    steepest = float(rates[5 + int(slopes.argmin())])
    assert suggestion == pytest.approx(steepest, rel=0.2)
    assert figures.lowest == pytest.approx(float(rates[losses.argmin()]), rel=0.6)
    # At rates of 2 / curvature and more the weight grows; the loss has to come back from its lowest first.
    assert suggestion < figures.lowest < float(figures.blow_up or 0.0)
    assert 2 / CURVATURE < float(figures.blow_up or 0.0) < 40.0


def test_lines_are_fitted_exactly_to_a_line() -> None:
    places = torch.linspace(-3.0, 2.0, 40, dtype=F64)
    heights, slopes = _lines(places, 7.0 - 0.25 * places, half_window=4)
    torch.testing.assert_close(slopes, torch.full_like(places, -0.25))
    torch.testing.assert_close(heights, 7.0 - 0.25 * places)
    # In between, a parabola has the slope of its derivative.
    _, slopes = _lines(places, places.square(), half_window=4)
    torch.testing.assert_close(slopes[4:-4], 2.0 * places[4:-4])


@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_units_of_the_loss_do_not_matter(noise: float) -> None:
    _, suggestion = lr_range_test(problem(Curve(noise=noise)))
    # A loss a hundred times as large falls as fast at a rate that is a hundred times smaller.
    scaled = Curve(noise=100.0 * noise, shape=lambda value: 100.0 * value)
    _, smaller = lr_range_test(problem(scaled), min_lr=1e-7, max_lr=1.0)
    assert smaller == pytest.approx(suggestion / 100.0, rel=1e-6)
    _, linear = lr_range_test(problem(Curve(noise=noise)), scale="linear")
    shifted = Curve(noise=noise, shape=lambda value: value - 7.0)
    assert lr_range_test(problem(shifted), scale="linear")[1] == pytest.approx(linear, rel=1e-6)


def test_losses_that_leave_the_numbers_are_the_blow_up() -> None:
    def cliff(value: Tensor) -> Tensor:
        return torch.where(value > 1.0, math.inf, value)

    figures, suggestion = lr_range_test(problem(Curve(shape=cliff)))
    lost = int((~figures.losses.isfinite()).nonzero()[0])
    assert len(figures.smoothed) == len(figures.slopes) == lost < NUM_STEPS
    assert figures.smoothed.isfinite().all()
    assert figures.blow_up is not None and figures.blow_up <= float(figures.rates[lost])
    assert suggestion == pytest.approx(lr_range_test(problem())[1], rel=1e-6)


@pytest.mark.parametrize(
    ("inner", "how", "message"),
    [
        (Curve(), {"min_lr": 1e-14, "max_lr": 1e-12}, "the curve is flat"),
        (Curve(), {"max_lr": 1e-3}, "is lowest at the largest rates, up to 0.001, .* Pass a larger `max_lr`"),
        (Curve(noise=0.01), {"max_lr": 1e-3}, "within its noise: the curve is flat"),
        (Curve(), {"min_lr": 8.0}, "rises from the start. Pass a smaller `min_lr`"),
        (Curve(), {"min_lr": 4.01, "max_lr": 4.02}, "rises from the start. Pass a smaller `min_lr`"),
        (Curve(), {"max_lr": 0.7}, "is lowest at the largest rates, up to 0.7, .* Pass a larger `max_lr`"),
        (Curve(), {"min_lr": 0.2}, "falls fastest at the smallest rates, from 0.2"),
        (Curve(shape=lambda value: value - 1.0), {}, "is -0.55 at the rate 1e-05: it has no logarithm"),
        (Curve(shape=lambda value: value * math.nan), {}, "is nan at step 0, at the rate 1e-05: too few"),
    ],
)
def test_what_cannot_be_suggested_is_refused(inner: Curve, how: dict[str, float], message: str) -> None:
    with pytest.raises(NoSuggestionError, match=message) as caught:
        lr_range_test(problem(inner), **how)  # type: ignore[arg-type]
    assert caught.value.figures.losses.shape == (NUM_STEPS,)


@pytest.mark.parametrize("last", [1.0, 0.1])
def test_the_steepest_point_comes_before_the_lowest(last: float) -> None:
    """A run that blows up and comes back, even lower: what comes after the blow-up counts for nothing."""
    steps, levels = (0, 20, 50, 60, 70, 80, 84, 99), (2.0, 2.0, 0.5, 1.5, 40.0, 40.0, last, last)

    class Table(Curve):
        def batch(self, step: int) -> Tensor:
            return torch.tensor(float(np.interp(step, steps, levels)), dtype=F64)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
            return 0.0 * params["w"] + batch

    figures, suggestion = lr_range_test(problem(Table()))
    rates = figures.rates.tolist()
    assert rates[20] < suggestion < rates[50]
    assert rates[46] < figures.lowest < rates[54]
    # Where it is back at the first value, not where it starts to rise.
    assert figures.blow_up is not None and rates[56] < figures.blow_up < rates[64]


class ThreeCurvatures(ht.InnerProblem):
    """A quadratic, on which Adam oscillates at large rates, without a loss above its first one for long."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.full((3,), 2.0, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (torch.tensor([1.0, 3.0, 9.0], dtype=F64) * params["w"].square()).sum() + 0.5


class Weights(Weight):
    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"].square().sum()


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_how_far_it_goes_beyond_the_blow_up_does_not_matter(scale: Any) -> None:
    adam = ht.BilevelProblem(ThreeCurvatures(), Weights(), dynamics=ht.dynamics.Adam(lr=0.1), num_steps=3)
    found = {rate: lr_range_test(adam, max_lr=rate, scale=scale) for rate in (10.0, 100.0, 1e4)}
    suggestions = [suggestion for _, suggestion in found.values()]
    # A step of the coarsest test is a factor of 1.23.
    assert max(suggestions) < 1.23**2 * min(suggestions)
    for figures, suggestion in found.values():
        before_one = figures.losses[figures.rates < 1.0]
        assert figures.lowest == pytest.approx(float(figures.rates[before_one.argmin()]), rel=0.25)
        assert suggestion < figures.lowest


def test_a_scattered_end_is_not_the_lowest() -> None:
    """The line at an end is extrapolated: it falls below all losses where the last ones happen to fall."""
    values = torch.cat([torch.linspace(3.0, 1.0, 60, dtype=F64), torch.full((30,), 1.5, dtype=F64)])
    values = torch.cat([values, torch.linspace(1.95, 0.99, 10, dtype=F64)])
    heights, _ = _lines(torch.arange(100.0, dtype=F64), values, half_window=5)
    assert int(heights[5:].argmin()) == 94
    assert 55 <= _lowest(heights, torch.full_like(heights, 1e-3), half_window=5) <= 62


def test_the_first_values_are_not_the_lowest() -> None:
    with pytest.raises(NoSuggestionError) as caught:
        lr_range_test(problem(), min_lr=8.0)
    assert caught.value.figures.lowest == float(caught.value.figures.rates[5])


def test_noise_alone_suggests_nothing() -> None:
    class Noise(Curve):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.seed = seed

        def batch(self, step: int) -> Tensor:
            generator = torch.Generator().manual_seed(1000 * self.seed + step)
            return 2.3 + 0.2 * torch.randn((), generator=generator, dtype=F64) - self.shape(torch.tensor(0.0))

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
            return 0.0 * params["w"] + batch

    for seed in range(20):
        with pytest.raises(NoSuggestionError):
            lr_range_test(problem(Noise(seed)))


@pytest.mark.parametrize(
    "dynamics",
    [
        SGD(lr=0.3),
        SGD(lr=[0.1, 0.2, 0.3]),
        SGD(lr=ht.Hyper("lr", per="step,parameter")),
        ht.dynamics.Clipped(SGD(lr=0.3), max_norm=1e9),
    ],
)
def test_the_rate_replaces_whatever_was_there(dynamics: ht.Dynamics) -> None:
    assert lr_range_test(problem(dynamics=dynamics))[1] == lr_range_test(problem())[1]


def test_a_warm_started_problem_starts_afresh() -> None:
    warm = replace(problem(), warm_start=True)
    assert lr_range_test(warm)[1] == lr_range_test(problem())[1]


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        (SGD(lr={"w": 0.1, "*": 0.2}), "`lr` of `SGD` is a group with a rate for each part"),
        (ht.dynamics.Groups({"*": SGD(lr=0.1)}), "`dynamics` is a `Groups`, which has no `lr` of its own"),
    ],
)
def test_dynamics_without_one_rate_are_refused(dynamics: ht.Dynamics, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lr_range_test(problem(dynamics=dynamics))


def test_another_schedule_must_fit_the_test() -> None:
    with pytest.raises(ValueError, match="`momentum` of `SGD` is a schedule of 3 values"):
        lr_range_test(problem(dynamics=SGD(lr=0.1, momentum=[0.1, 0.2, 0.3])))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"min_lr": 0.0}, "`min_lr` and `max_lr` are 0.0 and 100.0"),
        ({"min_lr": math.nan}, "`min_lr` and `max_lr` are nan"),
        ({"max_lr": 1e-5}, "the smaller first"),
        ({"max_lr": math.inf}, "and inf"),
        ({"num_steps": 39}, "`num_steps` is 39, .* eight times `half_window` = 5"),
        ({"num_steps": 100.0}, "`num_steps` is 100.0"),
        ({"half_window": 0}, "`half_window` is 0"),
        ({"scale": "loglog"}, "`scale` is 'loglog'"),
    ],
)
def test_arguments_out_of_range_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lr_range_test(problem(), **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"problem": 3}, "`problem` is a `int`, which has no inner loss .* Pass a `BilevelProblem`"),
        ({"problem": Curve()}, "`problem` is a `Curve`"),
        ({"min_lr": "a"}, "`min_lr` is 'a', a `str`: .* Pass a number above 0"),
        ({"max_lr": None}, "`max_lr` is None, a `NoneType`"),
        ({"max_lr": True}, "`max_lr` is True, a `bool`"),
        ({"hparams": 3}, "`hparams` is "),
    ],
)
def test_another_kind_of_argument_is_refused(how: dict[str, Any], message: str) -> None:
    arguments = {"problem": problem(), **how}
    with pytest.raises(TypeError, match=message):
        lr_range_test(arguments.pop("problem"), **arguments)


def test_it_costs_one_run() -> None:
    inner = Curve()
    lr_range_test(problem(inner))
    # The first run of a kind of problem examines it too.
    inner.calls = 0
    lr_range_test(problem(inner))
    assert inner.calls == NUM_STEPS


def test_tasks_share_the_rate() -> None:
    class FirstWeights(Curve):
        def init_params(self, hparams: TensorDict) -> TensorDict:
            return {"w": hparams["first"]}

        def batch(self, step: int) -> Tensor:
            return torch.zeros(2, dtype=F64)

    class Tasks(Weight):
        def batch(self, outer_step: int) -> Tensor:
            return torch.tensor([1.0, 3.0], dtype=F64)

    both = ht.BilevelProblem(
        FirstWeights(), Tasks(), dynamics=SGD(lr=0.1), num_steps=1, num_tasks=2,
        context=lambda hparams, batch: {"first": batch},
    )  # fmt: skip
    figures, _ = lr_range_test(both, execution=ht.Execution(tasks="loop"))
    of_one = known_losses()[1] - FLOOR
    torch.testing.assert_close(figures.losses, FLOOR + (1.0 + 9.0) / 2.0 * of_one, rtol=1e-10, atol=0.0)


class Digits(ht.InnerProblem):
    def __init__(self, data: TensorDataset) -> None:
        self.batches = ht.Minibatches(data, 50)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {
            "hidden": torch.randn(64, 32, dtype=F64) / 8.0, "bias": torch.zeros(32, dtype=F64),
            "output": torch.randn(32, 10, dtype=F64) / 32**0.5,
        }  # fmt: skip

    def batch(self, step: int) -> Batch:
        return self.batches(step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        penalty = sum(value.square().sum() for value in params.values())
        return classify(params, batch) + hparams["l2"] * penalty / 2


class HeldOutDigits(ht.OuterProblem):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def init_hparams(self) -> TensorDict:
        return {"l2": torch.tensor(1e-3, dtype=F64)}

    def batch(self, outer_step: int) -> Batch:
        return self.data.tensors

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return classify(params, batch)


def classify(params: TensorDict, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(torch.tanh(images @ params["hidden"] + params["bias"]) @ params["output"], labels)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_digits_it_is_as_good_as_the_best_constant_rate(momentum: float) -> None:
    pixels, labels = (torch.as_tensor(value) for value in load_digits(return_X_y=True))
    data = [TensorDataset(pixels[part].to(F64) / 16.0, labels[part]) for part in (slice(800), slice(800, 1300))]
    reached: dict[str, list[float]] = {"best constant": [], "suggested": [], "lowest": []}
    for seed in range(2):
        digits = ht.BilevelProblem(
            Digits(data[0]), HeldOutDigits(data[1]), dynamics=SGD(lr=0.1, momentum=momentum), num_steps=300, seed=seed
        )

        def validation_loss(rate: float, of: ht.BilevelProblem = digits) -> float:
            trained = replace(of, dynamics=with_lr(of.dynamics, rate))
            loss = float(ht.unroll(trained, of.init_hparams()).outer_loss)
            return loss if math.isfinite(loss) else math.inf

        figures, suggestion = lr_range_test(digits)
        reached["best constant"].append(min(validation_loss(10.0 ** (power / 4.0)) for power in range(-5, 3)))
        reached["suggested"].append(validation_loss(suggestion))
        reached["lowest"].append(validation_loss(figures.lowest))
    means = {name: sum(losses) / len(losses) for name, losses in reached.items()}
    assert means["suggested"] < 1.1 * means["best constant"]
    if momentum:
        assert means["lowest"] > 1.5 * means["best constant"]
