"""Bayesian optimisation that conditions on gradients, as a sampler of Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import Tensor

from hypertorch.search.gradient_bayes import MAX_DIMENSION, GradientBayes
from hypertorch.search.kernels import Kernel, Matern52

_STATES = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING)


class GradientSampler(BaseSampler):
    """Optuna's interface to `GradientBayes`: a trial reports its hypergradient beside its value.

        def objective(trial):
            lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
            ...
            ht.search.GradientSampler.report(trial, {"lr": float(result.grads["lr"])})
            return float(result.outer_loss)

        study = optuna.create_study(sampler=ht.search.GradientSampler(seed=0))

    Floats without a step that every trial has are chosen together; integers, choices, stepped floats and what only
    some trials have are drawn at random. A trial without a report, or whose report lacks one of these floats, is one
    without a gradient. Trials that failed or were pruned count as failed evaluations; running ones as pending.

    What it suggests depends on the seed and on the trials of the study alone, so that an interrupted study goes on.

    Args:
        num_initial: trials at points of a Sobol sequence, once what they have in common is known.
        kernel: of the process.
        guarded: whether gradients that predict left-out values worse than none are left aside.
        max_observed: as in `GradientBayes`.
        trusted_move: as in `GradientBayes`: an observer, that moves from the best trial in steps that it trusts.
        seed: of the search, and of what is drawn at random.

    Raises:
        ValueError: if a setting is out of range; (from `sample_relative`) if the study has several objectives, or more
            than 20 such floats.
    """

    USER_ATTRIBUTE: ClassVar[str] = "hypertorch.hypergradient"

    def __init__(
        self,
        *,
        num_initial: int = 5,
        kernel: Kernel = Matern52(),  # noqa: B008 (frozen)
        guarded: bool = True,
        max_observed: int = 1500,
        trusted_move: float | None = None,
        seed: int = 0,
    ) -> None:
        self._settings: dict[str, Any] = {
            "num_initial": num_initial,
            "kernel": kernel,
            "guarded": guarded,
            "max_observed": max_observed,
            "trusted_move": trusted_move,
            "seed": seed,
        }
        GradientBayes([(0.0, 1.0)], **self._settings)  # which refuses what is out of range, before the first trial
        self._space = IntersectionSearchSpace(include_pruned=True)
        self._independent = RandomSampler(seed=seed)

    @classmethod
    def report(cls, trial: Trial, grads: Mapping[str, float]) -> None:
        """Stores the derivatives of a trial's value with the trial.

        Args:
            trial: under way.
            grads: by the names of its parameters, in their own units, of the value that the objective returns (which
                may be maximised).
        """
        unknown = sorted(set(grads) - trial.params.keys())
        if unknown:
            raise ValueError(
                f"`grads` names {unknown}, which the trial has not suggested (it has {sorted(trial.params)}): no "
                "search would use them. Report after the suggestions, under their names."
            )
        for name, value in grads.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"`grads[{name!r}]` has shape {tuple(value.shape)}, but a parameter of a trial is one number. "
                    "Report the derivative of each number under a name of its own."
                )
        trial.set_user_attr(cls.USER_ATTRIBUTE, {name: float(value) for name, value in grads.items()})

    def reseed_rng(self) -> None:
        """Draws what is drawn at random anew, as Optuna asks for in parallel workers."""
        self._independent.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns the floats that all trials have so far."""
        space = self._space.calculate(study)
        return {
            name: own
            for name, own in space.items()
            if isinstance(own, FloatDistribution) and own.step is None and not own.single()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns the next point of the floats in the search space; nothing if there are none."""
        if len(study.directions) > 1:
            raise ValueError(
                f"the study has {len(study.directions)} objectives, but `GradientSampler` minimises one. Use "
                "`optuna.samplers.NSGAIISampler` for several."
            )
        if len(search_space) > MAX_DIMENSION:
            raise ValueError(
                f"the study has {len(search_space)} floats, but `GradientSampler` finds its way among at most "
                f"{MAX_DIMENSION}. Fix some of them, or use `optuna.samplers.CmaEsSampler`."
            )
        if not search_space:
            return {}
        names = list(search_space)
        floats = [own for own in search_space.values() if isinstance(own, FloatDistribution)]
        search = GradientBayes(
            [(own.low, own.high) for own in floats], log=[own.log for own in floats], **self._settings
        )
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        for other in study.get_trials(deepcopy=False, states=_STATES):
            # One that was enqueued outside of the range says nothing about the box.
            inside = all(name in other.params and search_space[name]._contains(other.params[name]) for name in names)
            if other.number != trial.number and inside:
                self._take_in(search, other, names, sign)
        return dict(zip(names, search.ask().squeeze(0).tolist(), strict=True))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns a random value of a parameter that is not searched together with others."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _take_in(self, search: GradientBayes, trial: FrozenTrial, names: Sequence[str], sign: float) -> None:
        point = torch.tensor([[trial.params[name] for name in names]], dtype=torch.float64)
        if trial.state == TrialState.RUNNING:
            search.pend(point)
            return
        value = trial.value if trial.state == TrialState.COMPLETE and trial.value is not None else math.nan
        values = torch.tensor([sign * value], dtype=torch.float64)
        report = trial.user_attrs.get(self.USER_ATTRIBUTE, {})
        if all(name in report for name in names):
            search.tell(point, values, sign * torch.tensor([[report[name] for name in names]], dtype=torch.float64))
        else:
            search.tell(point, values)
