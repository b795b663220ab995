"""Reverse-mode differentiation through the whole unrolled inner loop."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hypertorch import tree
from hypertorch.checks.values import check_switch
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.reverse_mode.checkpointing import Checkpointing
from hypertorch.hypergradients.reverse_mode.compiled.looped_steps import by_compiled_loop
from hypertorch.hypergradients.reverse_mode.compiled.single_steps import CompiledSteps
from hypertorch.hypergradients.reverse_mode.compiled.whole_run import compiled_whole, run_compiled
from hypertorch.hypergradients.reverse_mode.derivative_choice import Derivative, is_mixed
from hypertorch.hypergradients.reverse_mode.graph import whole_graph
from hypertorch.hypergradients.reverse_mode.memory_plan import plan_memory
from hypertorch.hypergradients.reverse_mode.steps import EagerSteps, Steps
from hypertorch.hypergradients.reverse_mode.sweep import sweep
from hypertorch.inner import memo
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.loop import InnerLoop
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict

_NOTHING_SAID = (None,) * 4  # of what is kept of a run, and where
FOLLOWED = "variables with a path, of problems with a zero derivative in mixed mode"


@dataclass(frozen=True, kw_only=True)
class Reverse(Hypergradient):
    """The exact hypergradient by reverse mode through all inner steps.

    With `a_T = dE/ds_T`, going back: `a_{t-1} = a_t dPhi_t/ds_{t-1}` and `df/dhparams` gathers
    `a_t dPhi_t/dhparams`, the initialisation's part `a_0 dPhi_0/dhparams` and the direct term `dE/dhparams`.

    Without settings the graph of all steps is kept. Each of the first three settings keeps states instead, from which
    steps are run again when the reverse pass reaches them: the same number, less memory. At most one of them can be
    given.

    With `checkpoint_every=k`, one state in every `k` is kept, counted from the end, and each segment between two is
    run again with its graph. 1 keeps every state and one step's graph. With "sqrt" memory grows as the square root of
    the horizon: `n / k` states and a segment of `k` steps are least in sum at `k = sqrt(n / r)`, where a segment holds
    `r` states' worth per step. Graphs of steps hold at least the state after the step and its gradient, often much
    more, so `r = 2`; compiled and mixed segments hold states alone, so `r = 1`.

    With `snapshots=c`, at most `c` states and one step's graph are kept, and states in between are run again and
    again, by the schedule that runs the fewest steps (Revolve).

    With `memory_budget`, one step is measured at each outer step, in bytes of live tensors, and the cheapest of these
    is taken that fits: the whole graph, else states kept every `k` steps with the largest `k` that fits, else Revolve
    with as many states as fit. The budget is for what the backend holds beside the problem's own data,
    the hyperparameters and a context; bytes asked for are counted, not what an allocator makes of them, so leave it a
    tenth free. The choice depends on shapes only, those of the second step, which the others must share; `explain` and
    `plan_memory` tell it in advance. It is a plan for reverse over reverse: not with another `derivative`.

    With `compile`, the step, and the step with its vjp, are compiled by `torch.compile`, once for all steps, outer
    iterations and problems of the same classes and shapes; changed tensors change the results and compile nothing. A
    run is one program, from the initial state to the hypergradient, with a loop over the steps forward and one back;
    it keeps every state, and the matrix products that cost more to make again than to read. With `checkpoint_every`,
    and for more than 8 steps with data of their own, the two loops are programs apart, and keep states alone. Horizons
    above 8 share programs. Single steps are called from Python where that cannot be: with noise, buffers of the
    params, `snapshots` or `spill_to`, in mixed mode, for data of several shapes, and for a rule that branches on the
    index of the step. Compilation takes seconds to minutes; the log says how long, and from how many hypergradients on
    it pays. What cannot be compiled (a schedule given as a list of numbers and a beta that is learnt are examples)
    runs without, after one warning. With "auto", runs go without compilation until they have taken as long as a
    compilation is estimated to take. The change is made by the clock, and changes the last bits: for runs that must be
    repeated or resumed bit for bit, say True or False.

    `derivative` says how the inner gradient is differentiated. By "reverse", reverse over reverse. By "mixed", forward
    over reverse: the Hessian product and the cross derivative of a step are the gradient in params and hyperparameters,
    moved along one direction, which keeps no graph of a backward pass. Without compilation this saves up to a quarter
    of a step's memory, or nothing: that depends on the model's operations. Every state is kept unless a setting says
    less. By "auto", the one that a measurement on the first step of a problem of these sizes favours. Before mixed mode
    serves a kind of problem, a step is differentiated both ways and compared: where an operation has no forward
    derivative, or PyTorch has a wrong one (of determinants and linear solves, for example), "auto" takes reverse over
    reverse and "mixed" raises. They agree up to rounding.
    Steps of problems with buffers, and compiled ones that draw noise, always go by reverse over reverse.

    Cost, with `T = num_steps`, in steps beside `T` vjps, and in memory:

        Reverse()                       T steps                       graphs of T steps
        Reverse(checkpoint_every=k)     2 T - k steps                 T / k states, graphs of k steps
        Reverse(snapshots=c)            T + recomputed_steps(T, c)    c states, the graph of one step
        Reverse(memory_budget=bytes)    as chosen, and one step more  as allowed
        derivative="mixed"              2 T steps, an inner loss,     T states, the tangents of one step
                                        2 to 3 gradients for a vjp
        compile=True                    2 T steps                     T states, large products of T steps
        ... with checkpoint_every=k     3 T steps at most             T / k + k states, the graph of one step
        spill_to=folder                 as without                    of `T / k` or `c` states 2 are in memory

    Args:
        checkpoint_every: steps between kept states (unit: steps, at least 1); "sqrt" for
            `round(sqrt(num_steps / 2))`, compiled or in mixed mode `round(sqrt(num_steps))`.
        snapshots: most states kept at once, the first one included (unit: states, at least 1).
        memory_budget: bytes, or a string such as "512MiB" or "1.5 GB".
        compile: run the steps as compiled functions; "auto" once runs without have taken as long as a compilation.
        derivative: "reverse", "mixed" or "auto".
        spill_to: a folder for the kept states, with one of the first three settings; None to keep them in memory.

    Raises:
        ValueError: if a setting is out of its range or an unknown word, more than one of the first three is given,
            `memory_budget` together with a `derivative`, or `spill_to` is no folder or given without one of the first
            three.
        TypeError: if `compile` is neither True nor False nor "auto".
        IncompatibleBackendError: (from `compute`) if `checkpoint_every` is above `num_steps`, nothing fits
            `memory_budget` (the message then says what would), or mixed mode is not possible or would be wrong.
        ReplayError: (from `compute`) if steps run again do not arrive at the same state.
        OSError: (from `compute`, before the first step) if the kept states find no room in `spill_to`; later, if they
            cannot be written or read.

    References:
        Maclaurin, Duvenaud and Adams (2015), algorithm 2, without reversal; Franceschi et al. (2017), algorithm 1;
        Griewank and Walther (2000), Algorithm 799: Revolve (snapshots); Engstrom et al. (2025), Optimizing ML training
        with metagradient descent (states on disk); Kemaev et al. (2025), Scalable
        meta-learning via mixed-mode differentiation (mixed mode).
    """

    checkpoint_every: int | Literal["sqrt"] | None = None
    snapshots: int | None = None
    memory_budget: int | str | None = None
    compile: bool | Literal["auto"] = False
    derivative: Derivative = "reverse"
    spill_to: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.derivative not in ("reverse", "mixed", "auto"):
            raise ValueError(
                f"`derivative` is {self.derivative!r}, which names no way to differentiate the inner gradient. Use "
                "'reverse', 'mixed' or 'auto'."
            )
        if not isinstance(self.compile, bool):
            check_switch("compile", self.compile, "auto")
        if (self.checkpoint_every, self.snapshots, self.memory_budget, self.spill_to) != _NOTHING_SAID:
            _ = self.checkpointing  # which checks the settings
        if self.spill_to is not None:
            # This sets a field of a frozen class. A text would be a setting of a run, which may not change when it is
            # resumed; a place may.
            object.__setattr__(self, "spill_to", Path(self.spill_to))
        if self.memory_budget is not None and self.derivative != "reverse":
            raise ValueError(
                f"`memory_budget` is given with `derivative={self.derivative!r}`: what is planned is reverse over "
                "reverse, and mixed mode would not keep the budget. Leave `derivative` out, or say what is kept by "
                "`checkpoint_every` or `snapshots`."
            )

    @property
    def checkpointing(self) -> Checkpointing:
        """What is kept of a run, by the first three settings, and where."""
        return Checkpointing(
            checkpoint_every=self.checkpoint_every,
            snapshots=self.snapshots,
            memory_budget=self.memory_budget,
            spill_to=self.spill_to,
        )

    def explain(
        self, problem: BilevelProblem, hparams: TensorDict, *, outer_step: int = 0, execution: Execution = DEFAULT
    ) -> str:
        """Returns what `memory_budget` makes of a problem, and why, to be printed; as `plan_memory` tells it.

        Args:
            problem: the problem.
            hparams: the outer variables.
            outer_step: chooses the outer data and the noise.
            execution: how the problem is run.

        Raises:
            ValueError: if there is no `memory_budget`, and so nothing that was chosen.
            IncompatibleBackendError: if nothing fits.
        """
        if self.memory_budget is None:
            raise ValueError(
                f"`{self!r}` has no `memory_budget`: it runs as its settings say, and chooses nothing that could be "
                "explained. Pass one, such as `Reverse(memory_budget='512MiB')`."
            )
        plan = plan_memory(
            problem,
            hparams,
            self.memory_budget,
            spill=self.spill_to is not None,
            outer_step=outer_step,
            execution=execution,
        ).explain()
        return f"{plan}\ncompiled steps keep states in place of graphs, and hold less" if self.compile else plan

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the exact derivative of the outer loss in `variables`.

        The recursion of the class docstring is `sweep`; the settings choose the segments that it goes back through,
        and how each of them is differentiated.
        """
        # Without settings there is one graph of all steps; a closed form has no step to keep, compile or mix.
        if loop.num_steps == 0 or self == _WHOLE_GRAPH:
            return sweep(loop, variables, *whole_graph(loop, variables))
        # Planned for each loop: bytes depend on its data and on how many tasks run together.
        kept = self.checkpointing.planned(loop, variables)
        if self.compile:
            return run_compiled(
                loop,
                self.derivative,
                run=lambda trial: self._compiled(trial, variables, kept),
                otherwise=lambda: self._eager(loop, variables, kept),
                where_it_pays=self.compile == "auto",
            )
        return self._eager(loop, variables, kept)

    def _eager(self, loop: InnerLoop, variables: TensorDict, kept: Checkpointing) -> BackendResult:
        mixed = self.derivative != "reverse" and is_mixed(
            self.derivative, loop, variables, _eager_steps, compiled=False
        )
        # One graph of all steps: no step is run twice, and none has to be compared.
        if kept.whole_graph and not mixed:
            return sweep(loop, variables, *whole_graph(loop, variables))
        steps = EagerSteps(loop, variables, mixed=mixed)
        # Mixed mode goes by single steps, which hold states where reverse over reverse holds graphs.
        with closing(kept.segments(loop, variables, steps, with_graphs=not mixed)) as segments:
            result = sweep(loop, variables, segments, steps.vjp)
        return _without_missing_paths(loop, variables, result, kept) if mixed else result

    def _compiled(self, loop: InnerLoop, variables: TensorDict, kept: Checkpointing) -> BackendResult:
        if kept.whole_graph and self.derivative == "reverse":
            # A short horizon is one program, without Python between its steps.
            result = compiled_whole(loop, variables)
            if result is not None:
                return _without_missing_paths(loop, variables, result, kept)
        # A program with the loop inside gives all its states at once, in memory.
        if kept.snapshots is None and kept.spill_to is None and self.derivative == "reverse":
            result = by_compiled_loop(loop, variables, kept.interval(loop.num_steps))
            if result is not None:
                return _without_missing_paths(loop, variables, result, kept)
        mixed = self.derivative != "reverse" and is_mixed(
            self.derivative, loop, variables, _compiled_steps, compiled=True
        )
        steps = CompiledSteps(loop, variables, mixed=mixed)
        with closing(kept.segments(loop, variables, steps, with_graphs=False)) as segments:
            result = sweep(loop, variables, segments, steps.vjp)
        # After the sweep and all at once: comparing each step would wait for an accelerator each time.
        steps.check_replays()
        return _without_missing_paths(loop, variables, result, kept) if mixed else result


_WHOLE_GRAPH = Reverse()


def _eager_steps(loop: InnerLoop, variables: TensorDict, mixed: bool) -> Steps:
    return EagerSteps(loop, variables, mixed=mixed)


def _compiled_steps(loop: InnerLoop, variables: TensorDict, mixed: bool) -> Steps:
    return CompiledSteps(loop, variables, mixed=mixed)


def _without_missing_paths(
    loop: InnerLoop, variables: TensorDict, result: BackendResult, kept: Checkpointing
) -> BackendResult:
    """Returns the result with None for a zero where there is no path: forward mode cannot tell the two apart.

    Cost: nothing, unless a derivative is exactly zero: then a run by reverse over reverse, in as little memory and not
    counted, the first time that the question comes up for this kind of problem.
    """
    # A number that is not zero shows that there is a path.
    found = {name: value for name, value in result.grads.items() if value is not None}
    with_path = tree.not_zero(found)
    if with_path == found.keys():
        return result
    key = (kind_of(loop.problem), loop.num_steps, *variables)

    def follow() -> frozenset[str]:
        own = loop.uncounted()
        steps = EagerSteps(own, variables, mixed=False)
        with closing(kept.segments(own, variables, steps, with_graphs=not kept.whole_graph)) as segments:
            known = sweep(own, variables, segments, steps.vjp)
        return frozenset(name for name, value in known.grads.items() if value is not None)

    with_path |= memo.recall(FOLLOWED, key, follow)
    grads = {name: value if name in with_path else None for name, value in result.grads.items()}
    return replace(result, grads=grads)
