"""Real-time hyperparameter optimisation: outer steps while a single inner run is going on."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import torch

from hypertorch.autodiff.noise import preserved_generators
from hypertorch.checks.values import is_count
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients import Forward, Reverse, hypergradient
from hypertorch.outer.run import train
from hypertorch.outer.settings import OuterSettings
from hypertorch.outer.steps.constraining import match_constraints, project_in_place
from hypertorch.outer.trained import Trained
from hypertorch.problem import BilevelProblem

_PROBE_STEPS = 2  # a momentum and a dampening have no effect in the first step


@dataclass(frozen=True, eq=False)
class RealTime(OuterSettings):
    """An outer loop that updates the outer variables while the inner run is still going (RTHO).

    The inner run is never started again. After every `every` inner steps the hypergradient of the outer loss at the
    present params is read off the tangents, which are carried on along with the inner state:

        s_t = Phi_t(s_{t-1}, hparams),   Z_t = dPhi_t/ds Z_{t-1} + dPhi_t/dhparams             at every inner step
        hparams <- outer step along  dE/ds Z_t + dE/dhparams                                   at every `every`-th

    After the first update `Z` still holds derivatives at earlier outer variables. This approximation is good while the
    outer variables change slowly. With an outer learning rate of 0 it is the exact hypergradient of the run so far.

    It is an `OuterLoop` over the warm-started problem with the backend `Forward(keep_tangents=True)`. Logging,
    constraints, checkpoints and resuming work as described there, with an update in place of an outer step. A short
    fresh run before the first step shows whether every hyperparameter reaches the outer loss. A hyperparameter whose
    hypergradient is exactly zero at each of the first five updates is named in a `ZeroHypergradientWarning`, unless
    `allow_unused` has it. A resumed run does not look again, because the effect of an initialisation fades.

    Cost: per inner step, as for `Forward`, one jvp for every scalar entry of the outer variables. Memory: one tangent
    of the size of the inner state for each entry, whatever the length of the run. `Forward` compares a step with
    reverse over reverse; here it does so twice for a kind of problem, at the fresh start and at the second update.

    Args:
        problem: the problem, without a context and without schedules over the horizon. Its `num_steps` and
            `warm_start` play no role.
        optimizer: makes the outer optimizer from the list of outer variables.
        every: inner steps between two updates (unit: steps, at least 1).
        chunk_size: entries of the outer variables whose tangents are computed together, as in `Forward`.
        learning_rates: those of outer variables that have one of their own, by name or by pattern (`"schedule.*"`), in
            place of the optimizer's `lr`; a name wins over a pattern, an earlier pattern over a later one. A scheduler
            scales them all alike. None for one rate.
        scheduler: makes a learning-rate scheduler, stepped after every update.
        constraints: by name of an outer variable, or by pattern.
        clip_norm: greatest Euclidean norm of the hypergradient; None for no clipping.
        validation: when and on what to validate; None for never.
        loggers: receive the figures.
        log_every: updates between two records, at least 1.
        snapshots: which tensors and pictures the loggers are handed, and how often; None for none.
        checkpoints: where and how often (unit: updates) to write checkpoints; None for never.
        progress: show a bar on a terminal, or an occasional line elsewhere, on standard error.
        execution: how the problems are run, those of the validation too.
        on_non_finite: what is done about an update that meets NaN or infinity; see `OuterLoop`.
        most_non_finite: updates that may be skipped or shortened before the run ends, at least 1.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a number is out of range, or the dynamics has a schedule over the horizon.
        IncompatibleBackendError: if the problem has a context.

    References:
        Franceschi, Donini, Frasconi and Pontil (2017), section 3.3.
    """

    problem: BilevelProblem
    _: KW_ONLY
    every: int
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.problem, BilevelProblem):
            raise TypeError(
                f"`problem` is a {type(self.problem).__name__}, not a `BilevelProblem`: a single inner run goes on "
                "through all updates, so there is one problem. Pass a `BilevelProblem`; a source of several needs an "
                "`OuterLoop`."
            )
        if not is_count(self.every):
            raise ValueError(
                f"`every` is {self.every!r}: it counts inner steps between two updates. Pass a whole number of at "
                "least 1."
            )
        if self.problem.context is not None:
            raise IncompatibleBackendError(
                "`problem` has a `context`, which is computed anew at every update: the tangents that a real-time run "
                "carries on belong to the entries of the last one. Compute it in the losses instead, or use an "
                "`OuterLoop`."
            )
        # Both check what they are made of.
        self._source()
        self._backend()
        super().__post_init__()
        if self.execution.ranks is not None:
            raise IncompatibleBackendError(
                f"`execution` has {self.execution.ranks.size} processes, but a real-time run is one inner run, whose "
                "tangents one process carries on: the others would have nothing to do. Leave `ranks` out, and start "
                "the run without `torchrun`."
            )

    def run(self, num_inner_steps: int, *, resume: bool = False, override: bool = False) -> Trained:
        """Returns what an inner run of `num_inner_steps` steps found, with an update after every `every` of them.

        Args:
            num_inner_steps: inner steps in all, those of the runs it resumes included; a multiple of `every`.
            resume: go on from the newest checkpoint if there is one, as `OuterLoop.run` does: bit for bit.
            override: go on although settings are not those of the checkpoint, as `OuterLoop.run` does.

        Raises:
            ValueError: if `num_inner_steps` is not a positive multiple of `every`, or as `OuterLoop.run` says.
            DetachedHyperparameterError: if a hyperparameter does not reach the outer loss.
            IncompatibleBackendError: if PyTorch has no right forward derivative of an operation.
            HypertorchError: whatever else `OuterLoop.run` raises.
        """
        if not is_count(num_inner_steps):
            raise ValueError(
                f"`num_inner_steps` is {num_inner_steps!r}: it counts steps of the inner run. Pass a whole number of "
                "at least 1."
            )
        if num_inner_steps % self.every:
            raise ValueError(
                f"`num_inner_steps` is {num_inner_steps}, no multiple of `every` = {self.every}: steps after the last "
                f"update would be lost. Pass {num_inner_steps - num_inner_steps % self.every + self.every}, say."
            )
        names = self._check_reach()
        return train(
            self,
            self._source(names),
            self._backend(),
            num_outer_steps=num_inner_steps // self.every,
            resume=resume,
            override=override,
            zeros_allowed=self.problem.allow_unused,
        )

    def _source(self, names: tuple[str, ...] = ()) -> BilevelProblem:
        return replace(self.problem, num_steps=self.every, warm_start=True, allow_unused=names)

    def _backend(self) -> Forward:
        return Forward(chunk_size=self.chunk_size, keep_tangents=True)

    def _check_reach(self) -> tuple[str, ...]:
        """Returns the names of the outer variables; raises if one has no influence in a short fresh run.

        The run itself must not raise: there a path may open after the first update (a momentum's, with `every=1`), or
        fade until it is zero (an initialisation's).
        """
        problem = replace(self.problem, num_steps=max(self.every, _PROBE_STEPS), warm_start=False)
        # The run draws its own first values: this draw must not move torch's generator.
        with preserved_generators(torch.device("cpu")):
            hparams = {name: value.detach().clone() for name, value in problem.init_hparams().items()}
        project_in_place(hparams, match_constraints(hparams, chosen=self.constraints or {}, problem=problem))
        # Reverse mode: forward mode answers zeros, not None, where there is no path.
        hypergradient(problem, hparams, backend=Reverse(checkpoint_every="sqrt"), execution=self.execution)
        return tuple(hparams)
