"""How reverse mode fits a memory budget: what one step holds is measured, what a whole run holds follows from it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

from hypertorch import tree
from hypertorch.autodiff.live_memory import format_bytes, parse_bytes
from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import check_switch
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.reverse_mode.revolve import recomputed_steps, states_alive
from hypertorch.hypergradients.reverse_mode.step_memory import StepMemory, measure_step
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.tasks import task_slices
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How reverse mode runs a problem within a budget.

    Attributes:
        method: "whole graph", "checkpoints" (states kept at a fixed distance) or "revolve" (the binomial schedule).
        checkpoint_every: steps between kept states; None for the other methods.
        snapshots: most states kept at once; None for the other methods.
        peak_bytes: the most bytes of tensors that will live at once, predicted, beside what lives before the run.
        recomputed_steps: inner steps run again.
        kept_states: most states kept at once in memory.
        spilled_states: most states kept at once in a file.
        spilled_bytes: size of that file.
        too_large: what would run fewer steps again but does not fit; of its kind what takes the least.
        reasons: what was measured and asked for, for `explain`.
    """

    method: Literal["whole graph", "checkpoints", "revolve"]
    checkpoint_every: int | None = None
    snapshots: int | None = None
    peak_bytes: int
    recomputed_steps: int
    kept_states: int = 0
    spilled_states: int = 0
    spilled_bytes: int = 0
    too_large: tuple[MemoryPlan, ...] = field(default=(), compare=False)
    reasons: PlanReasons | None = field(default=None, compare=False)

    @property
    def how(self) -> str:
        """What is kept, in words."""
        return {
            "whole graph": "the whole graph",
            "checkpoints": f"a state kept every {self.checkpoint_every} steps{self._file.replace(' and', ',', 1)}",
            "revolve": f"the binomial schedule with {self.snapshots} kept states",
        }[self.method]

    @property
    def _file(self) -> str:
        if not self.spilled_states:
            return ""
        return f", {self.spilled_states} in a file of {format_bytes(self.spilled_bytes)}"

    def __str__(self) -> str:
        return f"{self.how}: {format_bytes(self.peak_bytes)} at most, {self.recomputed_steps} steps run again"

    def explain(self) -> str:
        """Returns what was measured, what was passed over, and what was chosen and why, in a few lines."""
        why = {
            "whole graph": "it fits, and runs no step again",
            "checkpoints": "of what fits, it runs the fewest steps again",
            "revolve": "only this fits; more kept states would not",
        }[self.method]
        lines = [] if self.reasons is None else self.reasons.lines()
        lines += [f"too large: {plan}" for plan in self.too_large]
        kept = f"kept at once: {self.kept_states} states in memory{self._file}"
        return "\n".join([*lines, f"chosen: {self}", kept, f"because {why}"])


@dataclass(frozen=True, kw_only=True)
class PlanReasons:
    """What a plan follows from.

    Attributes:
        budget: the bytes to keep.
        num_steps: the horizon (unit: steps).
        step: what the pieces of a run hold, as they were measured on one step.
    """

    budget: int
    num_steps: int
    step: StepMemory

    def lines(self) -> list[str]:
        """Returns them in words."""
        return [
            f"budget: {format_bytes(self.budget)} for {self.num_steps} inner steps",
            f"measured on one step: its state {format_bytes(self.step.state)}, its graph "
            f"{format_bytes(self.step.graph)} (each further one {format_bytes(self.step.further_graph)}), going back "
            f"through it {format_bytes(self.step.backward)}",
        ]


@typed("problem")
def plan_memory(
    problem: BilevelProblem,
    hparams: TensorDict,
    budget: int | str,
    *,
    spill: bool = False,
    outer_step: int = 0,
    execution: Execution = DEFAULT,
) -> MemoryPlan:
    """Returns how `Reverse(memory_budget=budget)` runs a problem, with `spill_to` perhaps, without running it.

    With tasks, the plan is that of the first slice of them that is run together, and what the results of the others
    hold is not in it; `tasks="auto"` is planned as "vmap". Neither is a context, with its graph.

    Cost: the context, and one step with its vjp, slowed down by counting.

    Args:
        problem: the problem, of at least one step.
        hparams: the outer variables.
        budget: bytes, or a string such as "512MiB".
        spill: whether states may lie in a file. Whether the disk has room for it is not asked here.
        outer_step: chooses the outer data and the noise.
        execution: how the problem is run.

    Raises:
        ValueError: if the budget is no number of bytes, or the problem has no step to plan.
        TypeError: if `spill` is neither True nor False.
        IncompatibleBackendError: if no way to run the problem fits.
    """
    check_switch("spill", spill)
    if problem.num_steps == 0:
        raise ValueError(
            "`problem` has `num_steps` = 0: there is no inner loop whose states could be kept or not. Plan a problem "
            "of at least one step."
        )
    bound = BoundProblem(problem, hparams, outer_step, None, execution)
    constants = tree.detach(hparams)
    first = task_slices(problem.num_tasks, execution)[0]
    with bound.running():
        # Its values are what a step reads; its graph is not planned.
        context = tree.detach(bound.context(constants, first))
        variables = tree.leaves_requiring_grad({**constants, **context})
        return plan_loop(bound.loop(first, context), variables, parse_bytes(budget, "budget"), spill=spill)


def plan_loop(loop: InnerLoop, variables: TensorDict, budget: int, *, spill: bool) -> MemoryPlan:
    """Returns the plan that fits the budget and runs the fewest steps again.

    The whole graph runs none again; states kept every `k` steps run all but the last `k` once more; the binomial
    schedule runs the fewer the more states it may keep. States go into a file where they do not fit into memory.

    Cost: one step and one vjp (`measure_step`).

    Args:
        loop: an inner loop of at least one step.
        variables: hyperparameters and context, as leaves.
        budget: bytes.
        spill: whether states may lie in a file.

    Raises:
        IncompatibleBackendError: if not even one kept state and one step's graph fit.
    """
    memory, num_steps = measure_step(loop, variables), loop.num_steps
    reasons = PlanReasons(budget=budget, num_steps=num_steps, step=memory)
    whole = MemoryPlan(
        method="whole graph",
        peak_bytes=max(memory.initial_graph + memory.whole(num_steps), _result(memory, num_steps)),
        recomputed_steps=0,
        reasons=reasons,
    )
    # In the order of the steps that are run again: none, each about once, as often as it takes.
    if whole.peak_bytes <= budget:
        return whole
    passed: list[MemoryPlan] = [whole]
    for spilled in (False, True) if spill else (False,):
        checkpoints = min(
            (_checkpoints(memory, num_steps, every, spilled=spilled) for every in range(1, num_steps + 1)),
            # All that fit are equal in memory here: the fewest steps run again win, then the fewest bytes.
            key=lambda plan: (max(plan.peak_bytes, budget), plan.recomputed_steps, plan.peak_bytes),
        )
        if checkpoints.peak_bytes <= budget:
            return replace(checkpoints, too_large=tuple(passed), reasons=reasons)
        passed.append(checkpoints)
    # The more states are kept the more bytes are held, so the largest number that fits is found by halving.
    fitting = bisect_right(
        range(1, num_steps + 1), budget, key=lambda snapshots: _revolve_peak(memory, num_steps, snapshots)
    )
    if fitting == 0:
        least = min(*(plan.peak_bytes for plan in passed), _revolve_peak(memory, num_steps, 1))
        raise IncompatibleBackendError(
            f"`memory_budget` is {budget} bytes ({format_bytes(budget)}): one kept state and the graph of one inner "
            f"step take {least} bytes ({format_bytes(least)}) already. Allow at least that, or make a step smaller (a "
            "smaller minibatch; with tasks, a smaller `chunk` of the execution)."
        )
    return MemoryPlan(
        method="revolve",
        snapshots=fitting,
        peak_bytes=_revolve_peak(memory, num_steps, fitting),
        recomputed_steps=recomputed_steps(num_steps, fitting),
        kept_states=fitting,
        too_large=tuple(passed),
        reasons=reasons,
    )


def _checkpoints(memory: StepMemory, num_steps: int, every: int, *, spilled: bool) -> MemoryPlan:
    """Returns the plan with a state kept every `every` steps, counted from the end, in memory or in a file."""
    kept = ceil(num_steps / every)
    spilled = spilled and kept > 1
    # Of a file's states, there are in memory the one that is used and the next one, and the end to compare with.
    states = min(kept, 2) * memory.spilled_state if spilled else memory.initial + (kept - 1) * memory.state
    before = num_steps - every  # steps that are run without a graph, to the last kept state
    # The segment at the end of the run, with the outer loss beside its graph.
    peak = states + max(memory.graph_of(every) + memory.last_term, memory.segment(every)) + before * memory.loss
    if kept > 1:
        # The segment before has a kept state less, but its end to compare with, and the last state. The first segment
        # of the run may be shorter.
        length = every if kept > 2 else before
        behind = min(kept, 3) * memory.spilled_state if spilled else states
        peak = max(peak, behind + memory.state + _segment(memory, length) + num_steps * memory.loss)
    return MemoryPlan(
        method="checkpoints",
        checkpoint_every=every,
        peak_bytes=max(peak, _result(memory, num_steps)),
        recomputed_steps=before,
        kept_states=min(kept, 2) if spilled else kept,
        spilled_states=kept - 1 if spilled else 0,
        spilled_bytes=(kept - 1) * memory.spilled_state if spilled else 0,
    )


def _revolve_peak(memory: StepMemory, num_steps: int, snapshots: int) -> int:
    """Returns the most bytes by the binomial schedule."""
    before = num_steps - 1
    states = memory.initial + (states_alive(num_steps, snapshots) - 1) * memory.state
    at_end = memory.initial + min(snapshots, before) * memory.state + memory.graph + memory.last_term
    going_back = states + _segment(memory, 1) + num_steps * memory.loss
    return max(at_end + before * memory.loss, going_back, _result(memory, num_steps))


def _segment(memory: StepMemory, num_steps: int) -> int:
    """Returns the most bytes, beside states and losses, while a segment is differentiated and its part added."""
    held = memory.cotangents + memory.grads
    # The losses of steps that are run again take the place of those that were kept.
    graph = memory.segment(num_steps) - num_steps * memory.loss
    return max(memory.grads + graph, held + 2 * memory.grads, held + memory.initial_vjp)


def _result(memory: StepMemory, num_losses: int) -> int:
    """Returns the bytes at the end of a run: the inner losses, one by one and in one tensor, the state, the grads.

    Args:
        memory: what was measured.
        num_losses: one for every step.
    """
    return 2 * num_losses * memory.loss + memory.state + memory.grads
