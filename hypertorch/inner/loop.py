"""The inner loop of one problem at one outer step, as the pure functions that every backend is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.inner_loss import GradientRoute, InnerLoss
from hypertorch.autodiff.noise import mix, seed_generators
from hypertorch.checks.values import check_params
from hypertorch.dynamics import Dynamics
from hypertorch.inner.functions import LoopFunctions, loop_functions
from hypertorch.inner.ranks import Ranks
from hypertorch.inner.record import Record
from hypertorch.inner.state import InnerState
from hypertorch.inner.task_settings import for_tasks
from hypertorch.inner.tasks import TaskSlice, check_tasks_axis
from hypertorch.problem import BilevelProblem
from hypertorch.types import Batch, TensorDict

# Negative, so that no position is the index of a step: two draws from one seed would be the same numbers.
INIT, OUTER, CONTEXT, MAP, BACKEND = -1, -2, -3, -4, -5  # positions of noise beside the inner steps, which count from 0


class Step(NamedTuple):
    """What one step of the inner loop gives.

    Attributes:
        state: the inner state after the step, `s_t = Phi_t(s_{t-1}, hparams)`.
        loss: the inner loss before the step, shape `()` or `(tasks,)`, without a graph; None if the rule took none.
        term: the term `E_t(s_t, hparams)` of the outer loss, a scalar: the mean over tasks; None if the problem has no
            terms at inner steps.
    """

    state: InnerState
    loss: Tensor | None
    term: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class InnerLoop:
    """One problem at one outer step as pure functions of `(state, variables)`: tasks, data and noise are bound.

    This is all that a backend sees. `initial`, `step` and `outer` make the run; `variables` are the hyperparameters and
    the context. Each function seeds torch's generators from the position in the run, so that a step that is run again
    draws the same noise.

    Nothing here changes but `record`, which counts what is run. `uncounted` makes a loop that counts elsewhere.

    Attributes:
        problem: the problem.
        num_steps: the horizon (unit: steps).
        outer_batch: the outer data of the loop's tasks.
        tasks: which tasks of the batch; None for a problem without tasks.
        num_tasks: length of the tasks axis of the state's tensors; None without one.
        context: names of the variables that are the context's.
        noise_key: what the noise of the run is seeded from; None if whoever runs the loop seeds it.
        device: of the noise.
        carry: the state that the run starts from (warm start), as an earlier run's `carry_after` holds it; empty to
            start from `init_params`.
        first_index: index of the first step, counted since the state was made (unit: steps).
        draw: the data of a step by its index.
        functions: the functions of the problem.
        record: what was run so far.
        inner_dtype: of the inner loss's products; None for that of the params.
        has_terms: whether the outer loss has terms at inner steps.
        ranks: the processes that share this one loop; None if this process runs all of it.
    """

    problem: BilevelProblem
    num_steps: int
    outer_batch: Batch
    tasks: TaskSlice | None
    num_tasks: int | None
    context: frozenset[str]
    noise_key: tuple[int, ...] | None
    device: torch.device
    carry: TensorDict
    first_index: int
    draw: Callable[[int], Batch]
    functions: LoopFunctions
    record: Record
    inner_dtype: torch.dtype | None
    has_terms: bool
    ranks: Ranks | None = None

    @property
    def dynamics(self) -> Dynamics:
        """The inner optimiser."""
        return self.problem.dynamics

    @property
    def has_buffers(self) -> bool:
        """Whether untrained buffers (running statistics) are carried along with the params."""
        return bool(self.problem.inner.buffers)

    @property
    def per_task(self) -> frozenset[str]:
        """Names of the variables that have a tasks axis: entries of the context."""
        return self.context - frozenset(self.problem.shared_context)

    @property
    def has_tasks_axis(self) -> bool:
        """Whether the tensors of the state have a leading tasks axis."""
        return self.num_tasks is not None

    @property
    def first_task(self) -> int:
        """Position of the loop's first task in the batch."""
        return 0 if self.tasks is None else self.tasks.start

    @property
    def inner_eps(self) -> float:
        """Machine epsilon of the inner loss's products where they are coarser than the params; else 0."""
        return 0.0 if self.inner_dtype is None else torch.finfo(self.inner_dtype).eps

    def share(self, count: int) -> range:
        """Returns which of `count` parts of a backend's work this process takes; their sum is taken over all."""
        return range(count) if self.ranks is None else self.ranks.share(count)

    def uncounted(self) -> InnerLoop:
        """Returns the same loop with a record of its own, for steps that are no part of the run."""
        return self._with(record=Record())

    def started_afresh(self) -> InnerLoop:
        """Returns the same loop without the carry: it starts from `init_params`, at index 0."""
        return self._with(carry={}, first_index=0)

    def _with(self, **changes: Any) -> InnerLoop:
        return InnerLoop(**{**vars(self), **changes})

    # The three functions of a run.

    def initial(self, variables: TensorDict) -> InnerState:
        """Returns the inner state before the first step, `s_0 = Phi_0(variables)`."""
        # A carry is a constant: a warm-started run has no derivative through the run before it.
        if self.carry:
            return InnerState(tree.without_prefix("params", self.carry), tree.without_prefix("dynamics", self.carry))
        self.seed(INIT)
        params = self.functions.initial({}, variables, None)
        names, rule = self.problem.inner.buffers, self.problem.dynamics
        check_params(params, names, self.num_steps)
        # Without a step nobody reads the optimiser's settings or buffers: a schedule of any length fits.
        if not self.num_steps:
            return InnerState(params, {})
        trained = self.trained(params) if names else params
        # A compiled run is one program for all horizons; what calls it has tried a step without compilation.
        if not torch.compiler.is_compiling():
            # Rules check their settings against the params that a user wrote, those of one task.
            one_task = {name: value[0] for name, value in trained.items()} if self.num_tasks is not None else trained
            rule.check(one_task, variables, self.num_steps)
        return InnerState(params, rule.init(trained, variables))

    def step(
        self, state: InnerState, variables: TensorDict, step: int, route: GradientRoute = "differentiable"
    ) -> Step:
        """Returns the state after a step of the horizon, the inner loss before it and the outer term after it."""
        new_state, loss = self.transition(state, variables, step, route)
        self.record.add_step(step, loss.value, loss.tracked_buffers)
        return Step(new_state, loss.value, self.term(new_state, variables, step))

    def outer(self, params: TensorDict, variables: TensorDict, *, of_each_task: bool = False) -> Tensor:
        """Returns the outer loss at the last params, a scalar: the mean over tasks; or that of each, `(tasks,)`."""
        # By the position alone: every evaluation at this outer step, of whatever backend, sees the same noise.
        self.seed(OUTER)
        losses = self.functions.outer(params, variables, self.outer_batch)
        return losses if of_each_task else losses.mean()

    # What they are made of.

    def advance(self, state: InnerState, variables: TensorDict, step: int) -> InnerState:
        """Returns the state after a step, as `step` does, and evaluates no term of the outer loss."""
        new_state, loss = self.transition(state, variables, step)
        self.record.add_step(step, loss.value, loss.tracked_buffers)
        return new_state

    def transition(
        self, state: InnerState, variables: TensorDict, step: int, route: GradientRoute = "differentiable"
    ) -> tuple[InnerState, InnerLoss]:
        """Returns the state after a step, and the inner loss that was stepped along; nothing is counted.

        For a step inside a transform of `torch.func` or a compiled function: there the caller counts the step.
        """
        problem, index = self.problem, self.first_index + step
        names = problem.inner.buffers
        params = state.params
        buffers = {name: params[name] for name in names} if names else {}
        loss = InnerLoss(
            self.functions.inner,
            buffers,
            self.draw(index),
            route,
            # Not at the first step: its params are the problem's own tensors. Compilation is asked about first, because
            # a compiled step is one program for all steps and must not depend on the step.
            separate_params=not torch.compiler.is_compiling() and step > 0 and problem.dynamics.separate_params,
        )
        # Seeded after the data is drawn: what `InnerProblem.batch` takes
        # from torch's generators does not shift the noise.
        if self.noise_key is not None:
            seed_generators(self.device, *self.noise_key, index)
        trained = self.trained(params) if names else params
        new_params, dynamics = problem.dynamics.step(loss, trained, state.dynamics, variables, index)
        if names:
            # The rule was handed the trained params alone: the buffers come back beside what it returns.
            new_params = {**new_params, **loss.new_buffers}
        # Backends pair the tensors of two states by their order.
        if list(new_params) != list(params):
            new_params = in_order(new_params, params, problem.dynamics)
        if list(dynamics) != list(state.dynamics):
            dynamics = in_order(dynamics, state.dynamics, problem.dynamics)
        return InnerState(new_params, dynamics), loss

    def term(self, state: InnerState, variables: TensorDict, step: int, *, of_each_task: bool = False) -> Tensor | None:
        """Returns the term of the outer loss after a step, as `outer` returns the loss; None if there are no terms."""
        if not self.has_terms:
            return None
        self.seed(OUTER, step)
        terms = self.functions.term(state.params, variables, self.outer_batch, self.first_index + step)
        return terms if of_each_task else terms.mean()

    def metrics(self, params: TensorDict, variables: TensorDict) -> TensorDict:
        """Returns the problem's metrics, each of shape `()` or `(tasks,)`."""
        self.seed(OUTER)
        return self.functions.metrics(params, variables, self.outer_batch)

    # The inner loss apart from the run.

    def loss_at(
        self,
        state: InnerState,
        step: int,
        route: GradientRoute = "differentiable",
        *,
        separate_params: bool = False,
    ) -> InnerLoss:
        """Returns the inner loss of a step with its data and the state's buffers bound, and its noise seeded.

        Args:
            state: for its buffers.
            step: the step.
            route: how its gradient enters the derivative of a step.
            separate_params: whether its gradient is taken at params of their own, which no other tensor was made of.
        """
        index = self.first_index + step
        loss = InnerLoss(
            self.functions.inner, self.buffers(state), self.draw(index), route, separate_params=separate_params
        )
        self.seed(index)
        return loss

    # States.

    def trained(self, params: TensorDict) -> TensorDict:
        """Returns the params that are trained, without the untrained buffers."""
        names = self.problem.inner.buffers
        return {name: value for name, value in params.items() if name not in names} if names else params

    def leaves(self, state: InnerState) -> InnerState:
        """Returns a state cut from its graph, as leaves that a derivative can be taken in, for a step to run again.

        A buffer that no step so far has computed with a derivative is a constant: PyTorch's norm layers refuse to
        update statistics that ask for one.
        """
        params = tree.leaves_requiring_grad(state.params)
        for name in self.problem.inner.buffers:
            if name not in self.record.tracked_buffers:
                params[name] = params[name].detach()
        return InnerState(params, tree.leaves_requiring_grad(state.dynamics))

    def carried(self, prefix: str) -> TensorDict:
        """Returns the entries `prefix.name` of the carry that this run started with; empty for a fresh start."""
        return tree.without_prefix(prefix, self.carry)

    def carry_after(self, state: InnerState) -> TensorDict:
        """Returns what a warm-started next run needs: this run's last state; nothing if the problem starts afresh."""
        if not self.problem.warm_start:
            return {}
        state = state.detached()
        return {
            **tree.with_prefix("params", state.params),
            **tree.with_prefix("dynamics", state.dynamics),
            # A tensor, like everything in a carry: checkpoints hold tensors.
            "index": torch.tensor(self.first_index + self.num_steps),
        }

    # Noise and data.

    def seed(self, *position: int) -> None:
        """Seeds torch's generators for a position in the run."""
        if self.noise_key is not None:
            seed_generators(self.device, *self.noise_key, *position)

    def generator(self, *position: int) -> torch.Generator:
        """Returns a generator for a backend's own noise, a function of the run and the position, not of the tasks."""
        assert self.noise_key is not None
        # The third part, the first task, is left out: where hyperparameters
        # are perturbed, every slice of tasks is perturbed alike.
        seed, outer_step, _ = self.noise_key
        return torch.Generator(self.device).manual_seed(mix(seed, outer_step, BACKEND, *position) >> 1)

    def buffers(self, state: InnerState) -> TensorDict:
        """Returns the untrained buffers of a state."""
        return {name: state.params[name] for name in self.problem.inner.buffers}

    def of_tasks(self, batch: Batch) -> Batch:
        """Returns the part of this loop's tasks of a batch of all tasks."""
        return batch if self.tasks is None else _own_part(self.problem, self.tasks, batch)


def inner_loop(
    problem: BilevelProblem,
    *,
    outer_batch: Batch,
    tasks: TaskSlice | None,
    context: frozenset[str],
    noise_key: tuple[int, ...] | None,
    device: torch.device,
    carry: TensorDict,
    inner_dtype: torch.dtype | None = None,
    draw: Callable[[int], Batch] | None = None,
    ranks: Ranks | None = None,
) -> InnerLoop:
    """Returns the inner loop of some tasks of a problem.

    Args:
        problem: the problem.
        outer_batch: the outer data of these tasks.
        tasks: which tasks; None for a problem without tasks.
        context: names of the variables that are the context's.
        noise_key: of the run; None for a loop whose noise somebody else seeds.
        device: of the noise.
        carry: state to start from (warm start); empty to start from `init_params`.
        inner_dtype: of the inner loss's products; None for that of the params.
        draw: the data of a step by its index, drawn and of these tasks already; None to ask the problem.
        ranks: the processes that share this one loop; None if this process runs all of it.
    """
    num_tasks = None if tasks is None else tasks.num_tasks
    per_task = context - frozenset(problem.shared_context)
    functions = loop_functions(problem, num_tasks, context, per_task, inner_dtype)
    if num_tasks is not None and per_task:
        problem = replace(problem, dynamics=for_tasks(problem.dynamics, per_task))
    # Data, noise and schedules of a warm-started run count on from its first outer step.
    first_index = int(carry["index"]) if carry else 0
    if draw is None:
        draw = problem.inner.batch if tasks is None else partial(_batch_of_tasks, problem, tasks, first_index)
    return InnerLoop(
        problem=problem,
        num_steps=problem.num_steps,
        outer_batch=outer_batch,
        tasks=tasks,
        num_tasks=num_tasks,
        context=context,
        noise_key=noise_key,
        device=device,
        carry=carry,
        first_index=first_index,
        draw=draw,
        functions=functions,
        record=Record(),
        inner_dtype=inner_dtype,
        has_terms=problem.outer.has_step_loss,
        ranks=ranks,
    )


def _batch_of_tasks(problem: BilevelProblem, tasks: TaskSlice, first_index: int, index: int) -> Batch:
    """Returns the data of some tasks at a step. Only the first of a run is checked: the others have its structure."""
    return _own_part(problem, tasks, problem.inner.batch(index), check=index == first_index)


def _own_part(problem: BilevelProblem, tasks: TaskSlice, batch: Batch, *, check: bool = True) -> Batch:
    """Returns the part of some tasks of a batch of all tasks."""
    if batch is None:
        return None
    if check:
        assert problem.num_tasks is not None
        check_tasks_axis("InnerProblem.batch", batch, problem.num_tasks)
    return tasks.take(batch)


def in_order(new: TensorDict, old: TensorDict, dynamics: Dynamics) -> TensorDict:
    """Returns the entries of a new state in the order of the old one."""
    if new.keys() != old.keys():
        raise ValueError(
            f"`{type(dynamics).__name__}.step` returned the entries {sorted(new)} for a state with {sorted(old)}: a "
            "step keeps the names of params and buffers. Make every buffer in `init`."
        )
    return {name: new[name] for name in old}
