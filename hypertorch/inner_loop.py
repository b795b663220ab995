"""The inner loop of one problem at one outer step, as the pure functions that every backend is handed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.checks import check_buffers, check_outer_loss, check_params, check_scalar
from hypertorch.cost import Cost
from hypertorch.grad_mode import stopping_tangents
from hypertorch.inner_loss import GradientRoute, InnerLoss
from hypertorch.inner_precision import in_precision
from hypertorch.inner_state import InnerState
from hypertorch.noise import mix, seed_generators
from hypertorch.problem import BilevelProblem, InnerProblem, OuterProblem
from hypertorch.tasks import TaskSlice, check_tasks_axis, lift
from hypertorch.types import Batch, TensorDict

INIT, OUTER, CONTEXT, MAP, BACKEND = -1, -2, -3, -4, -5  # positions of noise beside the inner steps, which count from 0


class LoopProgram(NamedTuple):
    """What a loop is made of beside the data of its steps and its noise: enough to build it inside a traced function.

    Attributes:
        problem: the problem.
        num_tasks: length of the tasks axis; None without one.
        per_task: names in hparams (entries of the context) that have a tasks axis.
        outer_batch: the outer data of these tasks.
        device: of the tensors.
    """

    problem: BilevelProblem
    num_tasks: int | None
    per_task: frozenset[str]
    outer_batch: Batch
    device: torch.device

    def loop(self, draw: Callable[[int], Batch]) -> InnerLoop:
        """Returns the loop with the data of each step given, and no noise seeded: the caller does that.

        Args:
            draw: the data by the index of the step, of these tasks.
        """
        task_slice = None if self.num_tasks is None else TaskSlice(start=0, stop=self.num_tasks, whole=True)
        return InnerLoop(
            self.problem,
            outer_batch=self.outer_batch,
            task_slice=task_slice,
            per_task=self.per_task,
            outer_step=0,
            device=self.device,
            carry={},
            draw=draw,
        )


class InnerLoop:
    """One problem at one outer step as pure functions of `(state, hparams)`, task route, data and noise bound.

    This is all that a backend sees. Each function seeds torch's generators from the position in the run, so that a
    replayed step draws the same noise.

    Attributes:
        num_steps: the horizon (unit: steps).
        has_step_loss: whether the outer loss has terms at inner steps.
        has_buffers: whether untrained buffers (running statistics) are carried along with the params.
        has_context: whether some of the hparams were computed from the others before the loop.
        has_tasks_axis: whether the tensors of the state have a leading tasks axis.
        first_task: position of this loop's first task in the batch.
        is_warm_started: whether the next run starts from this run's last state.
        dynamics: the inner optimiser.
        device: of the noise.
        inner_eps: machine epsilon of the inner loss's products where they are coarser than the params; else 0.
        first_index: index of the first step, counted since the state was made (unit: steps).
        cost: what was done so far, counted.
        inner_losses: the inner loss before each step taken so far, replays included, of shape `()` or `(tasks,)`.

    Args:
        problem: the problem.
        outer_batch: the outer data of these tasks.
        task_slice: which tasks; None for a problem without tasks.
        per_task: names in hparams (entries of the context) that have a tasks axis.
        outer_step: part of the key of the noise.
        device: of the noise.
        carry: state to start from (warm start), as an earlier run's `carry` holds it; empty to start afresh.
        draw: the data of a step by its index, drawn and sliced already, for a loop whose noise somebody else seeds;
            None to ask the problem.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        *,
        outer_batch: Batch,
        task_slice: TaskSlice | None,
        per_task: frozenset[str],
        outer_step: int,
        device: torch.device,
        carry: TensorDict,
        draw: Callable[[int], Batch] | None = None,
    ) -> None:
        self.num_steps = problem.num_steps
        self.has_step_loss = problem.outer.has_step_loss
        self.has_buffers = bool(problem.inner.buffers)
        self.has_context = problem.context is not None
        self.is_warm_started = problem.warm_start
        self.dynamics = problem.dynamics
        self.inner_eps = 0.0 if problem.inner_dtype is None else torch.finfo(problem.inner_dtype).eps
        self.first_task = 0 if task_slice is None else task_slice.start
        self.cost = Cost()
        self.inner_losses: list[Tensor] = []
        self._tracked_buffers: frozenset[str] = frozenset()
        self._problem = problem
        self._outer_batch = outer_batch
        self._task_slice = task_slice
        self._draw = draw
        self._noise_key = (problem.seed, outer_step, self.first_task) if draw is None else None
        self.device = device
        self._carry = carry
        self.first_index = int(carry["index"]) if carry else 0
        num_tasks = None if task_slice is None else task_slice.num_tasks
        self.has_tasks_axis = num_tasks is not None
        self._init = lift(
            lambda _, hparams, __: stopping_tangents(problem.inner.init_params, hparams), num_tasks, per_task
        )
        # Of the problem, not of this object: an object that refers to itself holds its data until garbage is collected.
        inner_loss = partial(_inner_loss, problem.inner)
        if problem.inner_dtype is not None:
            inner_loss = partial(in_precision, inner_loss, problem.inner_dtype)
        self._inner = lift(inner_loss, num_tasks, per_task)
        self._outer = lift(partial(_outer_loss, problem.outer), num_tasks, per_task)
        self._metrics = lift(problem.outer.metrics, num_tasks, per_task)
        self._num_tasks = num_tasks
        self._per_task = per_task

    def program(self) -> LoopProgram:
        """Returns what the loop is made of beside the data of its steps and its noise."""
        return LoopProgram(self._problem, self._num_tasks, self._per_task, self._outer_batch, self.device)

    def prepare_step(self, step: int) -> Batch:
        """Returns the data of a step, and seeds its noise, for a step that is run elsewhere."""
        index = self.first_index + step
        batch = self._inner_batch(index)
        self._seed(index)
        return batch

    def prepare_initial(self) -> None:
        """Seeds the noise of the initial state, for one that is computed elsewhere."""
        self._seed(INIT)

    @property
    def outer_batch(self) -> Batch:
        """The outer data of the loop's tasks."""
        return self._outer_batch

    @property
    def carry(self) -> TensorDict:
        """The state that the run starts from, as the last run's `carry` holds it; empty for a fresh start."""
        return self._carry

    @property
    def tracked_buffers(self) -> frozenset[str]:
        """Names of the buffers that some step so far has computed with a derivative."""
        return self._tracked_buffers

    def note_tracked(self, names: frozenset[str]) -> None:
        """Takes down that a step has computed these buffers with a derivative."""
        self._tracked_buffers |= names

    def uncounted(self) -> InnerLoop:
        """Returns the same loop with counts and losses of its own, for steps that are no part of the run."""
        other = copy.copy(self)
        other.cost, other.inner_losses = Cost(), []
        return other

    def start_afresh(self) -> None:
        """Drops the carry: the run starts from `init_params`, at index 0."""
        self._carry = {}
        self.first_index = 0

    def initial(self, hparams: TensorDict) -> InnerState:
        """Returns the inner state before the first step, `s_0 = Phi_0(hparams)`."""
        if self._carry:
            return InnerState(tree.without_prefix("params", self._carry), tree.without_prefix("dynamics", self._carry))
        self._seed(INIT)
        params = self._init({}, hparams, None)
        problem = self._problem
        check_params(params, problem.inner.buffers, problem.num_steps)
        trained = self.trained(params)
        one_task = {name: value[0] for name, value in trained.items()} if self.has_tasks_axis else trained
        problem.dynamics.check(one_task, hparams, problem.num_steps)
        return InnerState(params, problem.dynamics.init(trained, hparams) if problem.num_steps else {})

    def step(
        self, state: InnerState, hparams: TensorDict, step: int, route: GradientRoute = "differentiable"
    ) -> InnerState:
        """Returns the inner state after a step of the horizon, `s_t = Phi_t(s_{t-1}, hparams)`."""
        return self.step_and_loss(state, hparams, step, route)[0]

    def step_and_loss(
        self, state: InnerState, hparams: TensorDict, step: int, route: GradientRoute = "differentiable"
    ) -> tuple[InnerState, Tensor | None]:
        """Returns the state after a step, and the inner loss before it, shape `()` or `(tasks,)`."""
        loss = self.bound_loss(state, step, route)
        new_state = self.apply(loss, state, hparams, step)
        self.count_step(loss)
        return new_state, loss.value

    def bound_loss(self, state: InnerState, step: int, route: GradientRoute = "differentiable") -> InnerLoss:
        """Returns the inner loss of a step with its data and the state's buffers bound, and its noise seeded."""
        index = self.first_index + step
        loss = InnerLoss(
            self._inner,
            self._buffers(state),
            self._inner_batch(index),
            route,
            # The first state is the problem's own. A compiled step is one program for all, the first among them.
            separate_params=not torch.compiler.is_compiling() and step > 0 and self.dynamics.separate_params,
        )
        self._seed(index)
        return loss

    def apply(self, loss: InnerLoss, state: InnerState, hparams: TensorDict, step: int) -> InnerState:
        """Returns the state after a step whose loss is bound already; nothing is counted or kept."""
        params, dynamics = self.dynamics.step(
            loss, self.trained(state.params), state.dynamics, hparams, self.first_index + step
        )
        params = {**params, **loss.new_buffers} if self.has_buffers else params
        return InnerState(self._in_order(params, state.params), self._in_order(dynamics, state.dynamics))

    def _in_order(self, new: TensorDict, old: TensorDict) -> TensorDict:
        """Returns the entries of a new state in the order of the old one, in which backends pair their tensors."""
        if list(new) == list(old):
            return new
        if new.keys() != old.keys():
            raise ValueError(
                f"`{type(self.dynamics).__name__}.step` returned the entries {sorted(new)} for a state with "
                f"{sorted(old)}: a step keeps the names of params and buffers. Make every buffer in `init`."
            )
        return {name: new[name] for name in old}

    def count_step(self, loss: InnerLoss) -> None:
        """Counts a step and keeps the value of its loss; not for losses inside a transform of `torch.func`."""
        self._tracked_buffers |= loss.tracked_buffers
        self.count_value(loss.value)

    def count_value(self, value: Tensor | None) -> None:
        """Counts a step and keeps the value of its loss, shape `()` or `(tasks,)`."""
        self.cost.steps += 1
        if value is not None:
            self.inner_losses.append(value)

    def map_loss(self, state: InnerState, route: GradientRoute = "differentiable") -> InnerLoss:
        """Returns the inner loss whose minimum is the inner solution, its data and the state's buffers bound.

        The data is `InnerProblem.full_batch`, or that of the last inner step.
        """
        inner = self._problem.inner
        batch = self._own_tasks(inner.full_batch()) if inner.has_full_batch else self._inner_batch(self._last_index)
        loss = InnerLoss(self._inner, self._buffers(state), batch, route)
        self._seed(MAP)
        return loss

    def map_step(self, state: InnerState, hparams: TensorDict, route: GradientRoute = "differentiable") -> InnerState:
        """Returns the state after the last step's rule is applied once more, to the loss of the inner solution."""
        loss = self.map_loss(state, route)
        new_state = self.apply(loss, state, hparams, self._last_index - self.first_index)
        self.count_step(loss)
        return new_state

    def trained(self, params: TensorDict) -> TensorDict:
        """Returns the params that are trained, without the untrained buffers."""
        if not self.has_buffers:
            return params
        return {name: value for name, value in params.items() if name not in self._problem.inner.buffers}

    def carried(self, prefix: str) -> TensorDict:
        """Returns the entries `prefix.name` of the carry that this run started with; empty for a fresh start."""
        return tree.without_prefix(prefix, self._carry)

    def generator(self, *position: int) -> torch.Generator:
        """Returns a generator for a backend's own noise, a function of the run and the position, not of the tasks."""
        assert self._noise_key is not None
        seed, outer_step, _ = self._noise_key
        return torch.Generator(self.device).manual_seed(mix(seed, outer_step, BACKEND, *position) >> 1)

    def leaves(self, state: InnerState) -> InnerState:
        """Returns a state cut from its graph, as leaves that a derivative can be taken in, for a step to run again.

        A buffer that no step so far has tracked is a constant.
        """
        constant = set(self._problem.inner.buffers) - self._tracked_buffers
        params = tree.leaves_requiring_grad(state.params)
        return InnerState(
            {name: value.detach() if name in constant else params[name] for name, value in state.params.items()},
            tree.leaves_requiring_grad(state.dynamics),
        )

    def outer_losses(self, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the outer loss at the last params, shape `()` or `(tasks,)`."""
        self._seed(OUTER)
        return self._outer(params, hparams, self._outer_batch)

    def outer_loss(self, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the outer loss at the last params, a scalar: the mean over tasks."""
        return self.outer_losses(params, hparams).mean()

    def step_loss(self, params: TensorDict, hparams: TensorDict, step: int) -> Tensor:
        """Returns the term of the outer loss at the params after a step, a scalar: the mean over tasks."""
        return self.step_losses(params, hparams, step).mean()

    def step_losses(self, params: TensorDict, hparams: TensorDict, step: int) -> Tensor:
        """Returns the term of the outer loss at the params after a step, shape `()` or `(tasks,)`."""

        def at_index(params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            loss = stopping_tangents(self._problem.outer.step_loss, params, hparams, batch, self.first_index + step)
            check_outer_loss(loss, "step_loss")
            return loss

        self._seed(OUTER, step)
        return lift(at_index, self._num_tasks, self._per_task)(params, hparams, self._outer_batch)

    def metrics(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the problem's figures, each of shape `()` or `(tasks,)`."""
        self._seed(OUTER)
        return self._metrics(params, hparams, self._outer_batch)

    def carry_after(self, state: InnerState) -> TensorDict:
        """Returns what a warm-started next run needs: this run's last state; nothing if the problem starts afresh."""
        if not self._problem.warm_start:
            return {}
        state = state.detached()
        return {
            **tree.with_prefix("params", state.params),
            **tree.with_prefix("dynamics", state.dynamics),
            "index": torch.tensor(self.first_index + self.num_steps),
        }

    @property
    def _last_index(self) -> int:
        return self.first_index + max(self.num_steps - 1, 0)

    def _buffers(self, state: InnerState) -> TensorDict:
        return {name: state.params[name] for name in self._problem.inner.buffers}

    def _inner_batch(self, index: int) -> Batch:
        if self._draw is not None:
            return self._draw(index)
        batch = self._problem.inner.batch(index)
        return self._own_tasks(batch, check=index == self.first_index)

    def _own_tasks(self, batch: Batch, *, check: bool = True) -> Batch:
        if self._task_slice is None or batch is None:
            return batch
        assert self._problem.num_tasks is not None
        if check:
            check_tasks_axis("InnerProblem.batch", batch, self._problem.num_tasks)
        return self._task_slice.take(batch)

    def _seed(self, *position: int) -> None:
        if self._noise_key is not None:
            seed_generators(self.device, *self._noise_key, *position)


def _inner_loss(
    inner: InnerProblem, params: TensorDict, hparams: TensorDict, batch: Batch
) -> tuple[Tensor, TensorDict]:
    result = stopping_tangents(inner.loss, params, hparams, batch)
    value, new_buffers = result if isinstance(result, tuple) else (result, {})
    check_scalar(value, "InnerProblem.loss")
    check_buffers(new_buffers, inner.buffers)
    return value, new_buffers


def _outer_loss(outer: OuterProblem, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
    value = stopping_tangents(outer.loss, params, hparams, batch)
    check_outer_loss(value, "loss")
    return value
