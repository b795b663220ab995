"""The hypergradient from values of the outer loss alone, at perturbed hyperparameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_count
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, BlackBox
from hypertorch.hypergradients.evolution.antithetic_pairs import Pair, pairs_to_carry, read_pairs
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict, TensorMapping


@dataclass(frozen=True, kw_only=True)
class EvolutionStrategies(BlackBox):
    """An estimate of the hypergradient from forward runs alone, by antithetic evolution strategies.

    With standard normal `e_i` and the outer objective `f` of a whole run (terms at inner steps included),

        df/dhparams ~ 1 / (2 N sigma) sum_{i=1..N} e_i (f(hparams + sigma e_i) - f(hparams - sigma e_i))

    is an unbiased estimate of the gradient of the smoothed objective, the mean of `f(hparams + sigma e)`, which on a
    quadratic `f` is the gradient of `f`. No derivative is taken: losses may be steps (an error rate) or chaotic. On a
    linear `f` with gradient `a` the variance of entry `j` is `(|a|^2 + a_j^2) / N`: it grows with the number of
    hyperparameters. All runs see the same data and noise. Every floating-point hyperparameter and context entry is
    perturbed by the same `sigma`; learn the logarithm of what must stay positive.

    With `persistent` (PES) the problem is warm-started: each outer step is a window of `num_steps` steps of a longer
    run. Started from the state that unperturbed steps left, the estimate above forgets what hyperparameters did
    before the window. Here each of the `2 N` perturbed runs goes on from its own state, and the perturbations that a
    pair has met so far, `xi_i = sum over windows of e_i`, take the place of `e_i`:

        d(sum of window losses)/dhparams ~ sum over windows of 1 / (2 N sigma) sum_i xi_i (f_i+ - f_i-)

    Each outer step returns its window's term; their sum over a run is unbiased. The variance grows with the number of
    windows, and all runs start afresh after `horizon` steps.

    Values of the unperturbed hyperparameters are returned, from a run of their own.

    Cost: `(2 num_pairs + 1) num_steps` steps, one run after the other. Memory: of one state; of `2 num_pairs + 1`
    with `persistent`, which are carried to the next outer step.

    Args:
        num_pairs: `N`, pairs of opposite perturbations, at least 1.
        sigma: size of the perturbations (unit: of the hyperparameters, above 0).
        persistent: carry the perturbed runs on, for a warm-started problem.
        horizon: inner steps after which all runs start afresh (unit: steps, a multiple of `num_steps`); None for
            never. Needs `persistent`.

    Raises:
        ValueError: if a number is out of its range, or `horizon` is given without `persistent`.
        IncompatibleBackendError: (from `compute`) with `persistent`, if the problem is not warm-started, has no step
            or a context, if `horizon` is no multiple of `num_steps`, or if the carry has other particles.

    References:
        Salimans, Ho, Chen, Sidor and Sutskever (2017), Evolution strategies as a scalable alternative to
        reinforcement learning, section 2; Vicol, Metz and Sohl-Dickstein (2021), Unbiased gradient estimation in
        unrolled computation graphs with persistent evolution strategies, algorithm 2.
    """

    num_pairs: int
    sigma: float
    persistent: bool = False
    horizon: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "sigma", "persistent")
        check_count("`num_pairs`", self.num_pairs, "without a perturbed run there is no difference to learn from")
        if not 0.0 < self.sigma < math.inf:
            raise ValueError(
                f"`sigma` of `EvolutionStrategies` is {self.sigma!r}: perturbed runs must differ. Pass a finite "
                "number above 0, of the size of a change of the hyperparameters that matters."
            )
        if self.horizon is None:
            return
        if not self.persistent:
            raise ValueError(
                f"`horizon` is {self.horizon!r}, but `persistent` is False: no run goes on after its outer step, so "
                "none can be restarted. Pass `persistent=True`, or leave `horizon` out."
            )
        why = "runs start afresh after so many inner steps"
        check_count("`horizon`", self.horizon, why, advice=", or None for runs that never do")

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the estimate in `variables`; None only for what is no floating-point number."""
        if self.persistent:
            self._check_persistent(loop)
        values = tree.detach(variables)
        # Losses may have no derivative at all.
        with torch.no_grad():
            if self.horizon is not None and loop.first_index >= self.horizon:
                # The particles are read from the loop's carry, and start afresh with it.
                loop = loop.started_afresh()
            before = read_pairs(loop, self.num_pairs) if self.persistent else []
            outer_loss, state = _run(loop, values, loop.initial(values))
            perturbed = {name: values[name] for name, value in variables.items() if value.requires_grad}
            estimate = tree.PairwiseSum()
            after: list[Pair] = []
            for position in loop.share(self.num_pairs):
                pair, weight = self._advance(loop, values, perturbed, position, before[position] if before else None)
                estimate.add({name: weight.to(total.dtype) * total for name, total in pair.perturbations.items()})
                if self.persistent:
                    after.append(pair)
        if self.persistent:
            loop.record.hold(2 * self.num_pairs + 1)
        return BackendResult(
            grads={**dict.fromkeys(variables), **estimate.total()},
            outer_loss=outer_loss,
            state=state,
            # The state is that of this loop, which may have started afresh.
            carry={**loop.carry_after(state), **pairs_to_carry(after)},
        )

    def num_parts(self, hparams: TensorMapping) -> int:
        """Returns the number of pairs; 1 with `persistent`, whose pairs one process carries on."""
        return 1 if self.persistent else self.num_pairs

    def _advance(
        self, loop: InnerLoop, values: TensorDict, perturbed: TensorDict, position: int, before: Pair | None
    ) -> tuple[Pair, Tensor]:
        """Returns a pair after its two runs, and `(f+ - f-) / (2 N sigma)`."""
        # A function of the run and the pair: all slices of tasks are perturbed alike.
        generator = loop.generator(position)
        direction = {
            name: torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
            for name, value in perturbed.items()
        }
        losses: list[Tensor] = []
        states: list[InnerState] = []
        # Both runs see the same data and the same noise of the model, so that only the perturbation tells them apart.
        for side, sign in enumerate((1.0, -1.0)):
            moved = {**values, **tree.add(perturbed, direction, alpha=sign * self.sigma)}
            start = loop.initial(moved) if before is None else before.states[side]
            loss, state = _run(loop, moved, start)
            losses.append(loss)
            states.append(state)
        # The sum of all perturbations since the run began: the state depends on all of them. The last one alone would
        # give the biased estimate of a truncated run.
        total = direction if before is None else tree.add(before.perturbations, direction)
        weight = (losses[0] - losses[1]) / (2.0 * self.num_pairs * self.sigma)
        return Pair(states=(states[0], states[1]), perturbations=total), weight

    def _check_persistent(self, loop: InnerLoop) -> None:
        if loop.num_steps == 0:
            raise IncompatibleBackendError(
                "`EvolutionStrategies(persistent=True)` got a problem with `num_steps` = 0: without an inner loop "
                "nothing can persist. Leave `persistent` out, or use `Reverse()`."
            )
        if not loop.problem.warm_start:
            raise IncompatibleBackendError(
                "`EvolutionStrategies(persistent=True)` got a problem with `warm_start` = False: its runs end with the "
                "outer step, and nothing can persist. Set `warm_start=True`, or leave `persistent` out."
            )
        if self.horizon is not None and self.horizon % loop.num_steps:
            raise IncompatibleBackendError(
                f"`EvolutionStrategies(persistent=True, horizon={self.horizon})` got a problem with `num_steps` = "
                f"{loop.num_steps}: a run must be made of whole windows of at least one step. Make `horizon` a "
                "multiple of `num_steps`."
            )
        if loop.problem.context is not None:
            raise IncompatibleBackendError(
                "`EvolutionStrategies(persistent=True)` got a problem with a `context`: a run remembers contexts of "
                "earlier outer steps, whose derivative is no longer known. Compute it in the inner loss, or leave "
                "`persistent` out."
            )


def _run(loop: InnerLoop, variables: TensorDict, state: InnerState) -> tuple[Tensor, InnerState]:
    """Returns the outer loss of a run from a state, a scalar, and the last state."""
    terms: list[Tensor] = []

    def advance(state: InnerState, step: int) -> InnerState:
        done = loop.step(state, variables, step)
        terms.extend([] if done.term is None else [done.term])
        return done.state

    state = scan(advance, state, range(loop.num_steps))
    return loop.outer(state.params, variables) + sum(terms), state.detached()
