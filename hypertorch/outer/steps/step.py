"""One outer step: a hypergradient, and what is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from hypertorch.constraints import Constraint
from hypertorch.errors import NonFiniteError
from hypertorch.hypergradients import Hypergradient, HypergradientResult, hypergradient
from hypertorch.inner.execution import Execution
from hypertorch.outer.evaluation.evaluate import OUTER_LOSS
from hypertorch.outer.steps.clipping import clip_to_norm, total_norm
from hypertorch.outer.steps.constraining import project_in_place
from hypertorch.outer.steps.state import OuterState
from hypertorch.problem import BilevelProblem, OuterProblem
from hypertorch.types import TensorDict, TensorMapping
from hypertorch.unroll import outer_metrics, unroll

HYPERGRADIENT_NORM = "hypergradient_norm"
STEPS_PER_SECOND = "steps_per_second"
NON_FINITE_STEPS = "non_finite_steps"
LEARNING_RATE = "learning_rate"
HPARAMS = "hparams/"
VALIDATION = "validation/"
_STEP = "step"  # what loggers call the number of the step in a record
# A metric of one of these names would replace the loop's own figure in a record.
_OWN_NAMES = (OUTER_LOSS, HYPERGRADIENT_NORM, STEPS_PER_SECOND, NON_FINITE_STEPS, LEARNING_RATE, _STEP)
_OWN_BEGINNINGS = (f"{LEARNING_RATE}/", HPARAMS, VALIDATION)


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """A computed outer step that is not yet taken.

    Attributes:
        grads: the clipped hypergradient.
        outer_loss: the outer loss that the step started from.
        carry: what the next hypergradient is handed.
        figures: what is to be logged, as numbers or tensors of one entry; empty if nothing is.
    """

    grads: TensorDict
    outer_loss: Tensor
    carry: TensorDict
    figures: Mapping[str, float | Tensor]


def propose(
    problem: BilevelProblem,
    state: OuterState,
    *,
    backend: Hypergradient,
    execution: Execution,
    clip_norm: float | None,
    with_figures: bool,
) -> Proposal:
    """Returns the outer step from a state, without changing the state: an interrupt here loses nothing.

    Args:
        problem: the problem of this outer step.
        state: where the run stands.
        backend: how the hypergradient is computed.
        execution: how the problem is run.
        clip_norm: greatest norm of the hypergradient; None for no clipping.
        with_figures: also compute what is logged.

    Raises:
        NonFiniteError: with the outer step named; and whatever else the hypergradient raises.
    """
    try:
        result = hypergradient(
            problem,
            state.hparams,
            backend=backend,
            outer_step=state.step,
            carry=state.carry or None,
            execution=execution,
        )
    except NonFiniteError as error:
        raise NonFiniteError(f"outer step {state.step}: {error}", inner_step=error.inner_step) from error
    # Not computed where nobody reads it: it is one pass over the hypergradient.
    norm = total_norm(result.grads) if with_figures or clip_norm is not None else None
    figures: dict[str, float | Tensor] = {}
    if with_figures and norm is not None:
        figures = _figures(problem, state, result, norm, execution)
    grads = result.grads if clip_norm is None or norm is None else clip_to_norm(result.grads, norm, clip_norm)
    # A carry may share memory with the outer variables (an initialisation), which the optimizer changes in place.
    return Proposal(grads=grads, outer_loss=result.outer_loss, carry=state.own_carry(result.carry), figures=figures)


def take(proposal: Proposal, state: OuterState, constraints: Mapping[str, Constraint]) -> None:
    """Moves the state one outer step on."""
    # Projected after the optimizer's step: its moments see the hypergradient as it is.
    state.descend(proposal.grads, proposal.carry)
    project_in_place(state.hparams, constraints)


def refuse_reserved_metrics(problem: BilevelProblem, state: OuterState, *, execution: Execution) -> None:
    """Raises if a metric cannot be logged, before an outer step is taken.

    Cost: nothing for a problem without metrics. Else the first params, the outer loss there, and its metrics twice.

    Args:
        problem: the problem of the first outer step.
        state: where the run stands.
        execution: how the problem is run.

    Raises:
        ValueError: if a metric has a name that the loop logs another figure under, or is not one figure per task.
    """
    if type(problem.outer).metrics is OuterProblem.metrics:
        return
    execution = replace(execution, ranks=None)  # every process looks at the names
    at_start = unroll(
        replace(problem, num_steps=0),
        state.hparams,
        outer_step=state.step,
        carry=state.carry or None,
        execution=replace(execution, inner_dtype=None),  # which is refused where there is no inner step
    )
    _check_names(outer_metrics(problem, at_start.params, state.hparams, outer_step=state.step, execution=execution))


def _check_names(metrics: TensorMapping) -> None:
    clash = sorted(name for name in metrics if name in _OWN_NAMES or name.startswith(_OWN_BEGINNINGS))
    if clash:
        raise ValueError(
            f"`OuterProblem.metrics` returned {clash}, names that the outer loop logs other figures under: one of them "
            "would be lost. Rename the metric."
        )


def _figures(
    problem: BilevelProblem, state: OuterState, result: HypergradientResult, norm: Tensor, execution: Execution
) -> dict[str, float | Tensor]:
    metrics = outer_metrics(problem, result.params, state.hparams, outer_step=state.step, execution=execution)
    _check_names(metrics)
    return {
        OUTER_LOSS: result.outer_loss,
        **metrics,
        HYPERGRADIENT_NORM: norm,
        **state.learning_rates(LEARNING_RATE),
        # Cloned: `state.hparams` are views, and the figures are read after the step has changed them.
        **{f"{HPARAMS}{name}": value.clone() for name, value in state.hparams.items() if value.numel() == 1},
    }
