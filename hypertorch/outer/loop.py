"""The outer loop: descends the hypergradient, and keeps, logs and validates what it finds."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from hypertorch.hypergradients import Hypergradient
from hypertorch.hypergradients.ranks.spread import check_spread
from hypertorch.outer.run import train
from hypertorch.outer.settings import OuterSettings, check_kind
from hypertorch.outer.trained import Trained
from hypertorch.problem import ProblemSource
from hypertorch.types import TensorMapping


@dataclass(frozen=True, eq=False)
class OuterLoop(OuterSettings):
    """Minimises the outer loss over the outer variables by gradient steps.

    Each outer step takes the problem of that step, computes its hypergradient, clips it, steps the optimizer and the
    scheduler, and moves constrained outer variables back into their sets; the first step starts from inside them. A
    run that was stopped at any moment and is resumed continues bit for bit.

    Logged every `log_every` steps and at the end, in one record: `outer_loss`, the outer problem's metrics under their
    names, `hypergradient_norm` (before clipping), `learning_rate`, every outer variable of one entry as
    `hparams/<name>`, and `steps_per_second` (validation and checkpoints left out). All but the speed are values from
    before the step; the record is numbered by the steps done, this one included. Each validation logs a record of its
    own: `validation/<metric>` and `validation/<metric>_half_width`.

    An outer variable whose hypergradient is exactly zero at each of the first five steps is named in a
    `ZeroHypergradientWarning`, unless the problem has it in `allow_unused`. Without a validation, the loop warns if the
    outer loss at the last step is more than ten times that at the first.

    With `ranks` in the execution (`ht.join_ranks`) several processes make one run: each is given the same loop and
    calls `run`, and each gets what was found. All start from the first one's outer variables, or from its checkpoint,
    and take the same steps; it alone reads checkpoints, logs, and writes.

    Cost: per step, one hypergradient and one optimizer step. The loop waits for an accelerator once per record, and
    once more at the first step. Several processes exchange their hypergradients once per step, and their metrics once
    per record.

    Args:
        source: where the problems come from; a `BilevelProblem` is its own source.
        optimizer: makes the outer optimizer from the list of outer variables, in the order of `init_hparams`.
        backend: how hypergradients are computed.
        learning_rates: those of outer variables that have one of their own, by name or by pattern (`"schedule.*"`), in
            place of the optimizer's `lr`; a name wins over a pattern, an earlier pattern over a later one. A scheduler
            scales them all alike. None for one rate.
        scheduler: makes a learning-rate scheduler, stepped after every outer step.
        constraints: by name of an outer variable, or by pattern (`"lr*"`); a name wins over a pattern, an earlier
            pattern over a later one, and all of these over the constraints that the problem declares.
        clip_norm: greatest Euclidean norm of the hypergradient over all outer variables; None for no clipping.
        validation: when and on what to validate; None for never.
        loggers: receive the figures.
        log_every: outer steps between two records, at least 1.
        snapshots: which tensors and pictures the loggers are handed, and how often; None for none.
        checkpoints: where and how often to write checkpoints; None for never.
        progress: show a bar on a terminal, or an occasional line elsewhere, on standard error.
        execution: how the problems are run, those of the validation too. Tasks that do not fit into memory together are
            run in smaller chunks from there on, with a warning.
        on_non_finite: what is done about an outer step that meets NaN or infinity: "raise" ends the run; "skip" leaves
            the step out; "shorten" takes it over the inner steps before the first NaN, or half as many where that is
            not finite either. The record says how many there were, as `non_finite_steps`.
        most_non_finite: outer steps that may be skipped or shortened before the run ends, at least 1.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a number is out of range.
        IncompatibleBackendError: if the processes in `execution` cannot share the work.
    """

    source: ProblemSource
    _: KW_ONLY
    backend: Hypergradient

    def __post_init__(self) -> None:
        check_kind("source", self.source, ProblemSource, "a `BilevelProblem` or `learner.on(episodes)`")
        check_kind("backend", self.backend, Hypergradient, "for example `ht.hypergradients.Reverse()`")
        super().__post_init__()
        if self.execution.ranks is not None:
            problem, hparams = self.source.at(0), self.source.init_hparams()
            check_spread(problem, self.backend, hparams, self.execution.ranks)

    def run(
        self,
        num_outer_steps: int,
        *,
        start_from: TensorMapping | None = None,
        resume: bool = False,
        override: bool = False,
    ) -> Trained:
        """Returns what `num_outer_steps` outer steps found.

        With checkpoints, the best outer variables are also written to `hparams.safetensors` in their folder, and an
        interrupt (or `SystemExit`) writes a checkpoint first. Whatever ends a run, loggers are closed and what was
        written stays.

        Args:
            num_outer_steps: outer steps in all, those of the runs it resumes included; at least 1.
            start_from: outer variables to start from instead of the source's own, such as those that another run found
                (fine-tuning); the same names, shapes and types. They are copied. A run that goes on from a checkpoint
                takes that one's.
            resume: go on from the newest checkpoint if there is one; a run that has done as many steps returns at
                once. False starts afresh, and refuses a folder that holds checkpoints.
            override: go on although settings that decide the numbers are not those of the checkpoint: backend,
                dynamics, horizon, classes of the problems, optimizer, scheduler, constraints, `clip_norm`, the metric
                of the validation. The present ones hold from here on: an optimizer of another class starts with an
                empty state, a schedule goes on from where the present one would be. False refuses such a checkpoint.

        Raises:
            ValueError: if `num_outer_steps` is below 1, `resume` is asked for without `checkpoints`, a constraint or
                the validation's metric names nothing, a metric has a name that the loop logs another figure under, or
                `start_from` are not the outer variables of the source.
            CheckpointError: if a checkpoint is damaged, of another problem, of other settings (each is listed), or in
                the way, or cannot be written; if another run writes into the folder of the checkpoints.
            NonFiniteError: if NaN or infinity appears in a hypergradient (names the outer step, the inner step and the
                entry) and `on_non_finite` does not go on, or in the outer variables. Those are checked before every
                validation and checkpoint and at the end, so neither a checkpoint nor the result ever holds it.
            LostRankError: if one of several processes ended; the first one has written a checkpoint then.
            HypertorchError: whatever else the hypergradient raises.
        """
        return train(
            self,
            self.source,
            self.backend,
            num_outer_steps=num_outer_steps,
            start_from=start_from,
            resume=resume,
            override=override,
        )
