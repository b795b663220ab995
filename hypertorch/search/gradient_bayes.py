"""Bayesian optimisation that conditions on gradients, by asking for points and being told what they gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from hypertorch.checks.values import check_switch, is_count
from hypertorch.search.acquisition import next_point
from hypertorch.search.evidence import fit_gradient_gp
from hypertorch.search.gradient_gp import GradientGP
from hypertorch.search.guard import gradients_help
from hypertorch.search.kernels import Kernel, Matern52
from hypertorch.search.observations import Observations
from hypertorch.search.scale import Scale
from hypertorch.search.trusted_box import trusted_box, trusted_length

MAX_DIMENSION = 20
LARGEST = 1e100
"""Values and slopes from which an evaluation counts as failed: their squares would overflow."""

# How far from a pending point, as part of its size and range, a point that is told is still the same one.
_ROUNDING = 1e-6
# The least number of evaluations that must have succeeded before a process is fitted.
_LEAST = 2
# Variance of what is assumed of a failed evaluation, whose value is not known.
_DOUBT_OF_FAILURE = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Best:
    """The best evaluation so far.

    Attributes:
        point: shape `(dimension,)`, float64.
        value: what it gave.
    """

    point: Tensor
    value: float


class GradientBayes:
    """Minimises a function of 1 to 20 numbers from values and gradients at the points that it asks for.

        search = ht.search.GradientBayes([(0.0, 1.0), (1e-4, 1e-1)], log=[False, True])
        points = search.ask(4)  # four trainings beside each other
        search.tell(points, values, gradients)

    The first points are those of a Sobol sequence. Then a Gaussian process is fitted to values and gradients, and
    each point is that of the greatest expected improvement. A point that was asked for and not told yet counts as
    one with the process's own prediction there, so that the points of a batch differ (kriging believer).

    **Gradients that mislead.** A second process is fitted to the values alone. Where it predicts left-out values
    better, it chooses the point: gradients may be truncated, noisy, of the wrong length or of the wrong sign.

    **Failures.** An evaluation that told NaN, infinity or more than 1e100, in its value or in its gradient, is failed.
    It takes no part in the fit; the search keeps away from it as from a point as bad as the worst that succeeded.

    **Taking up.** The next point depends on the arguments here, on what was told, in this order, and on which points
    are pending. Telling all of it to a new object is a resumed search.

    Cost: of `ask`, two fits and a search of the expected improvement: about 0.3 CPU seconds up to 200 numbers told,
    some tens of factorisations of order `max_observed` beyond.

    Args:
        bounds: least and greatest value of each number.
        log: whether each is searched by its logarithm; None for none.
        num_initial: points of the Sobol sequence.
        kernel: of the process, variance 1.
        guarded: whether the process of the values alone is compared; False trusts the gradients always.
        max_observed: most values and entries of gradients that a process is fitted to; the oldest gradients are
            dropped, and no value.
        trusted_move: how far the next point may be from the best one at first, as part of the range of each number,
            above 0 and at most 1; it grows with successes and shrinks with failures. The search then observes: it
            trusts its process near what was seen. None searches everywhere.
        seed: of the Sobol sequence, and of the starts of each search.

    Raises:
        ValueError: if a number is out of range.
        TypeError: if an argument is of the wrong kind.

    References:
        Wu et al. (2017), Bayesian optimization with gradients. Ginsbourger et al. (2010), Kriging is well-suited to
        parallelize optimization (the batch). Ament et al. (2023), Unexpected improvements to expected improvement.
    """

    def __init__(
        self,
        bounds: Sequence[tuple[float, float]],
        *,
        log: Sequence[bool] | None = None,
        num_initial: int = 5,
        kernel: Kernel = Matern52(),  # noqa: B008 (frozen)
        guarded: bool = True,
        max_observed: int = 1500,
        trusted_move: float | None = None,
        seed: int = 0,
    ) -> None:
        self._scale = Scale(bounds, log)
        dimension = self._scale.dimension
        if dimension > MAX_DIMENSION:
            raise ValueError(
                f"`bounds` has {dimension} numbers, but Bayesian optimisation finds its way among at most "
                f"{MAX_DIMENSION}. Bound fewer of them, or follow the hypergradient alone with `ht.OuterLoop`."
            )
        for name, value in (("num_initial", num_initial), ("max_observed", max_observed)):
            if not is_count(value):
                raise ValueError(f"`{name}` is {value!r}, which is no count. Pass a whole number of at least 1.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(
                f"`seed` is {seed!r}: it starts PyTorch's generators. Pass a whole number from 0 to 2 ** 32."
            )
        if not isinstance(kernel, Kernel):
            raise TypeError(
                f"`kernel` is a {type(kernel).__name__}, not a `Kernel`: the process needs its derivatives. Pass "
                "`ht.search.Matern52()` or `ht.search.RBF()`."
            )
        check_switch("guarded", guarded)
        is_number = isinstance(trusted_move, (int, float)) and not isinstance(trusted_move, bool)
        if trusted_move is not None and not (is_number and 0.0 < trusted_move <= 1.0):
            raise ValueError(
                f"`trusted_move` is {trusted_move!r}: it is a part of the range of each number. Pass a number above 0 "
                "and at most 1, or None to search everywhere."
            )
        self._trusted_move = trusted_move
        self._num_initial, self._kernel, self._guarded = num_initial, kernel, guarded
        self._max_observed, self._seed = max_observed, seed
        empty = torch.empty((0, dimension), dtype=torch.float64)
        # In the user's units, as they were told.
        self._points, self._gradients = empty, empty
        self._values = empty[:, 0]
        self._pending = empty
        self._fitted: GradientGP | None = None

    def ask(self, batch: int = 1) -> Tensor:
        """Returns the next points, shape `(batch, dimension)`, float64; each is pending until it is told.

        Args:
            batch: how many.

        Raises:
            ValueError: if `batch` is no count.
        """
        if not is_count(batch):
            raise ValueError(f"`batch` is {batch!r}, which is no count. Pass a whole number of at least 1.")
        points = []
        for _ in range(batch):
            points.append(self._scale.from_unit(self._next()))
            self._pending = torch.cat([self._pending, points[-1].unsqueeze(0)])
        return torch.stack(points)

    def tell(self, points: Tensor, values: Tensor, gradients: Tensor | None = None) -> None:
        """Takes in what points gave, whether they were asked for or not.

        Args:
            points: shape `(points, dimension)`, within the bounds.
            values: shape `(points,)`; NaN or infinity for an evaluation that failed.
            gradients: in the units of the points, shape `(points, dimension)`; None if they are not known. A row that
                is not finite is an evaluation that failed.

        Raises:
            ValueError: if a shape is another, or a point is outside the bounds.
        """
        for name, value in (("points", points), ("values", values), ("gradients", gradients)):
            if not isinstance(value, Tensor) and not (value is None and name == "gradients"):
                raise TypeError(f"`{name}` is a {type(value).__name__}, not a tensor. Pass a batch, even of one.")
        points, values = points.detach().to(self._points), values.detach().to(self._points)
        count, dimension = values.numel(), self._scale.dimension
        unknown = gradients is None
        gradients = torch.full_like(points, torch.nan) if gradients is None else gradients.detach().to(self._points)
        if values.shape != (count,) or points.shape != (count, dimension) or gradients.shape != points.shape:
            raise ValueError(
                f"`points`, `values` and `gradients` have the shapes {tuple(points.shape)}, {tuple(values.shape)} and "
                f"{tuple(gradients.shape)}: there is a row for each point and a column for each of the {dimension} "
                "numbers. Pass a batch, even of one."
            )
        self._scale.check_within(points)
        values = torch.where(values.abs() < LARGEST, values, torch.nan)
        if not unknown:
            values = torch.where((gradients.abs() < LARGEST).all(dim=1), values, torch.nan)
        self._points = torch.cat([self._points, points])
        self._values = torch.cat([self._values, values])
        self._gradients = torch.cat([self._gradients, gradients])
        self._forget_pending(points)
        self._fitted = None

    def pend(self, points: Tensor) -> None:
        """Marks points as under way, as `ask` does with its own.

        Args:
            points: shape `(points, dimension)`, within the bounds.

        Raises:
            ValueError: if a point is outside the bounds.
        """
        points = points.detach().to(self._points)
        self._scale.check_within(points)
        self._pending = torch.cat([self._pending, points])

    @property
    def best(self) -> Best:
        """The evaluation with the least value.

        Raises:
            ValueError: if none has succeeded.
        """
        if not bool(self._succeeded.any()):
            raise ValueError(
                f"none of the {len(self._values)} evaluations told so far has succeeded, so none is the best. Tell "
                "one with a finite value."
            )
        index = int(torch.where(self._succeeded, self._values, torch.inf).argmin())
        return Best(point=self._points[index], value=float(self._values[index]))

    @property
    def uses_gradients(self) -> bool:
        """Whether the next point is chosen by a process that is conditioned on gradients."""
        if int(self._succeeded.sum()) < _LEAST:
            return False
        return bool(self._model().observations.has_gradient.any())

    @property
    def _succeeded(self) -> Tensor:
        return self._values.isfinite()

    def _next(self) -> Tensor:
        number = len(self._values) + len(self._pending)
        if number < self._num_initial or int(self._succeeded.sum()) < _LEAST:
            engine = SobolEngine(self._scale.dimension, scramble=True, seed=self._seed)
            return engine.fast_forward(number).draw(1, dtype=torch.float64).squeeze(0)
        # One seed for each search: 2 ** 20 points of a run do not meet those of the run with the next seed.
        return next_point(self._with_assumed(self._model()), seed=(self._seed << 20) + number, box=self._box())

    def _box(self) -> tuple[Tensor, Tensor] | None:
        """Returns the part of the unit cube that is trusted; None if all of it is."""
        if self._trusted_move is None:
            return None
        # Both ways from the best point.
        length = trusted_length(self._values, 2.0 * self._trusted_move, self._scale.dimension)
        return trusted_box(self._scale.to_unit(self.best.point), length)

    def _model(self) -> GradientGP:
        if self._fitted is None:
            done = self._succeeded
            points, values = self._points[done], self._values[done]
            observed = Observations.of(
                self._scale.to_unit(points), values, self._scale.unit_gradients(points, self._gradients[done])
            )
            self._fitted = self._fit(observed.without_outliers().with_newest_gradients(self._max_observed))
        return self._fitted

    def _fit(self, observed: Observations) -> GradientGP:
        if not bool(observed.has_gradient.any()):
            return fit_gradient_gp(observed, self._kernel)
        informed = fit_gradient_gp(observed, self._kernel)
        if not self._guarded:
            return informed
        plain = fit_gradient_gp(observed.without_gradients(), self._kernel)
        return informed if gradients_help(informed, plain) else plain

    def _with_assumed(self, model: GradientGP) -> GradientGP:
        """Returns the process that holds failed points to be bad, and pending ones to be as predicted."""
        failed = self._points[~self._succeeded]
        if len(failed):
            worst = model.observations.values.max().expand(len(failed))
            model = model.with_values(self._scale.to_unit(failed), worst, doubt=_DOUBT_OF_FAILURE)
        if len(self._pending):
            pending = self._scale.to_unit(self._pending)
            # One by one: the joint covariance of points that nearly coincide has no factor.
            model = model.with_values(pending, model.posterior(pending.unsqueeze(1)).mean.flatten())
        return model

    def _forget_pending(self, points: Tensor) -> None:
        for point in points:
            # A point that went through float32 has other last bits.
            apart = ((self._pending - point).abs() / (point.abs() + self._scale.widths)).amax(dim=1)
            if len(apart) and float(apart.min()) < _ROUNDING:
                kept = torch.ones(len(self._pending), dtype=torch.bool)
                kept[apart.argmin()] = False
                self._pending = self._pending[kept]
