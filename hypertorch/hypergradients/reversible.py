"""Reverse-mode differentiation that runs the inner loop backwards instead of storing it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hypertorch.autodiff.missing_derivatives import NotVectorisableError
from hypertorch.checks.values import check_switch
from hypertorch.dynamics.reversible import ReversibleDynamics, reversible_rule
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.reverse_mode.compiled.whole_run import run_compiled
from hypertorch.hypergradients.reverse_mode.exact_reversal import CompiledReversal, ExactReversal
from hypertorch.hypergradients.reverse_mode.graph import whole_graph
from hypertorch.hypergradients.reverse_mode.sweep import sweep
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.task_settings import TaskSettings
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class Reversible(Hypergradient):
    """The exact hypergradient by reverse mode, the trajectory not stored but run backwards, bit for bit.

    The inner loop runs on integers. Going back from its last state, with the same gradient at every step:

        s_{t-1} = Phi_t^{-1}(s_t);   grads += a_t dPhi_t/dhparams;   a_{t-1} = a_t dPhi_t/ds_{t-1}

    What a step forgets is kept: `log2(1/momentum)` bits per weight, so with momentum 0.9 the memory of a run is 200
    times smaller than its trajectory in 32-bit numbers, and 1,000 times with 0.98. At the end the initial state must
    come back bit for bit, which proves that no derivative was taken elsewhere.

    It serves dynamics whose steps can be undone, such as `ReversibleMomentum`, with minibatches, noise, tasks, terms
    at inner steps and warm starts; not running statistics, whose steps cannot. Params and velocities must stay below
    1024 in magnitude. The gradient must be the same to the last bit whenever it is computed: on a GPU, see
    `torch.use_deterministic_algorithms`.

    `information_bits` in the result's `figures` is what was kept per weight at the end of the forward run, the mean
    (unit: bits).

    Cost: `2 num_steps` steps, both times with their graph, and `num_steps` vjps; compiled, `3 num_steps` steps.
    Memory: two states, one step's graph, and 64 bits per weight for the head of the information, which takes 32 more
    whenever it is full: whatever `num_steps` is, but for `num_steps log2(1/momentum)` bits per weight.

    With `compile`, the gradient of a step, and the step with its vjp, are compiled by `torch.compile`, once for all
    steps, as `Reverse(compile=True)` does it. That takes a gradient more for each step; what it saves is more for small
    models. The arithmetic on integers is not compiled.

    Args:
        compile: run derivatives as compiled functions; "auto" once runs without have taken as long as a compilation.

    Raises:
        TypeError: if `compile` is neither True nor False nor "auto".
        IncompatibleBackendError: (from `compute`) if the dynamics are not reversible, or the inner problem has
            untrained buffers.
        NonFiniteError: (from `compute`) if params, velocities or gradients leave the range of the integers.
        ReplayError: (from `compute`) if the run backwards does not end at the initial state.

    References:
        Maclaurin, Duvenaud and Adams (2015), Gradient-based hyperparameter optimization through reversible learning,
        algorithms 2 and 3.
    """

    compile: bool | Literal["auto"] = False

    def __post_init__(self) -> None:
        check_switch("compile", self.compile, "auto")

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the exact derivative of the outer loss in `variables`."""
        # Nothing to undo: the initial state is differentiated by its graph.
        if loop.num_steps == 0:
            return sweep(loop, variables, *whole_graph(loop, variables))
        rule = _checked_rule(loop)

        def run(loop: InnerLoop, kind: type[ExactReversal]) -> BackendResult:
            reversal = kind(loop, variables, rule)
            result = sweep(loop, variables, reversal.segments(), reversal.vjp)
            # Read after the sweep: `segments` is a generator, and knows the bits when the forward run is over.
            return replace(result, figures={"information_bits": reversal.information_bits})

        if not self.compile:
            return run(loop, ExactReversal)
        return run_compiled(
            loop,
            "reversible",
            run=lambda trial: run(trial, CompiledReversal),
            otherwise=lambda: run(loop, ExactReversal),
            where_it_pays=self.compile == "auto",
        )


def _checked_rule(loop: InnerLoop) -> ReversibleDynamics:
    """Returns the rule that the loop steps by, or raises if its steps cannot be undone."""
    rule = reversible_rule(loop.dynamics)
    if isinstance(loop.dynamics, TaskSettings) and reversible_rule(loop.dynamics.rule) is not None:
        raise NotVectorisableError(
            f"`Reversible()` got tasks with {sorted(loop.dynamics.own)} of their own: its steps in exact integers have "
            "one setting for all tasks that are run together",
            "Run the tasks one by one with `execution=ht.Execution(tasks='loop')`.",
        )
    if rule is None:
        raise IncompatibleBackendError(
            f"`Reversible()` got a problem with the dynamics `{type(loop.dynamics).__name__}`, whose steps cannot be "
            "undone bit for bit. Use `ht.dynamics.ReversibleMomentum(lr=..., momentum=...)`, or the backend "
            "`Reverse(checkpoint_every='sqrt')` for little memory with any dynamics."
        )
    if loop.has_buffers:
        raise IncompatibleBackendError(
            "`Reversible()` got an inner problem with untrained buffers (running statistics): a step overwrites them, "
            "and nothing keeps what they were. Let the norm layers use the statistics of the batch "
            "(`track_running_stats=False`), or use the backend `Reverse(checkpoint_every='sqrt')`."
        )
    return rule
