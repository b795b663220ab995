"""Whether a hypergradient predicts what a finite move of the outer variables does to training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.checks.argument_types import typed
from hypertorch.errors import NonFiniteError
from hypertorch.hypergradients import Hypergradient, Reverse, hypergradient, measured_execution
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict
from hypertorch.unroll import unroll


@dataclass(frozen=True, kw_only=True)
class Metasmoothness:
    """How training answers to two equal moves of the outer variables; printing it shows both figures.

    Attributes:
        step_size: length of each move.
        smoothness: agreement of the two changes of the last params, in [-1, 1]: 1 where every param goes on in its
            direction at the second move, 0 where the second says nothing of the first.
        predicted: change of the outer loss at the first move, by the hypergradient.
        actual: the same, by running it.
    """

    step_size: float
    smoothness: float
    predicted: float
    actual: float

    @property
    def error(self) -> float:
        """What the prediction misses, relative to the larger of the two changes; 0 where both are zero."""
        size = max(abs(self.predicted), abs(self.actual))
        return abs(self.predicted - self.actual) / size if size else 0.0

    def __str__(self) -> str:
        return "\n".join(
            [
                f"metasmoothness {self.smoothness:.3f} over moves of length {self.step_size:g} (1: params go on as "
                "they began; 0: no relation)",
                f"  change of the outer loss: predicted {self.predicted:.4g}, actual {self.actual:.4g}, "
                f"error {100 * self.error:.3g} %",
            ]
        )


@typed("direction")
def metasmoothness(
    problem: BilevelProblem,
    hparams: TensorDict,
    *,
    step_size: float,
    direction: TensorDict | None = None,
    backend: Hypergradient | None = None,
    outer_step: int = 0,
    execution: Execution = DEFAULT,
) -> Metasmoothness:
    """Returns how well the hypergradient predicts what a move of the outer variables does.

    A hypergradient can be exact and of no use, because training answers to the smallest change by another course. Let
    `A(z)` be the last params, `v` the direction of unit length, `h` the step size, and

        D_0 = A(z + h v) - A(z),   D_1 = A(z + 2 h v) - A(z + h v),
        smoothness = sum_i |D_0i| sign(D_0i) sign(D_1i) / sum_i |D_0i|.

    The outer loss of the first two runs tells what the move does, `h <gradient, v>` what was predicted. What makes
    training smoother is, among others, a larger `eps` in Adam, larger batches and a smaller learning rate: compare
    variants by this figure before learning through them.

    Cost: one hypergradient and three unrolls. Memory: that of the backend, and three times the params.

    Args:
        problem: the problem.
        hparams: the outer variables.
        step_size: `h`, the length of a move, above 0: about that of a step of the outer optimizer.
        direction: where to, of any length, with entries of `hparams`; those left out do not move. None for downhill,
            the negative hypergradient.
        backend: how the hypergradient is computed; None for `Reverse()`.
        outer_step: chooses the outer data and the noise, the same for all runs.
        execution: how the problem is run, the same for all runs.

    Raises:
        ValueError: if a number is out of range, the direction does not fit or has no length, or no param moves.
        NonFiniteError: if a moved run ends in NaN or infinity.

    References:
        Engstrom, Ilyas, Chen, Feldmann, Moses and Madry (2025), Optimizing ML training with metagradient descent,
        section 3 (empirical metasmoothness).
    """
    if isinstance(step_size, bool) or not isinstance(step_size, (int, float)) or not 0.0 < step_size < math.inf:
        raise ValueError(
            f"`step_size` is {step_size!r}: a move has a length. Pass a number above 0, about that of a step of your "
            "outer optimizer."
        )
    backend = Reverse() if backend is None else backend
    # The noise that a model draws differs between tasks by `vmap` and by the loop.
    execution = measured_execution(problem, hparams, backend=backend, outer_step=outer_step, execution=execution)
    result = hypergradient(problem, hparams, backend=backend, outer_step=outer_step, execution=execution)
    downhill = {name: -grad for name, grad in result.grads.items()}
    unit = _unit(downhill if direction is None else direction, hparams)

    def after(moves: int) -> tuple[list[Tensor], float]:
        moved = {
            name: value.detach() + moves * step_size * unit[name] if name in unit else value.detach()
            for name, value in hparams.items()
        }
        run = unroll(problem, moved, outer_step=outer_step, execution=execution)
        params = [value for value in run.params.values() if value.is_floating_point()]
        if not tree.all_finite([*params, run.outer_loss]):
            raise NonFiniteError(
                f"the run after {moves} moves of `step_size` = {step_size:g} ends in NaN or infinity: training "
                "diverges there, and nothing can be said of its params. Pass a smaller `step_size`, or other outer "
                "variables."
            )
        return params, float(run.outer_loss.mean())

    (at_start, before), (near, moved), (far, _) = after(0), after(1), after(2)
    first = torch.cat([(new - old).flatten() for new, old in zip(near, at_start, strict=True)])
    second = torch.cat([(new - old).flatten() for new, old in zip(far, near, strict=True)])
    length = first.abs().sum()
    if not bool(length > 0):
        raise ValueError(
            "no inner param changes along `direction`: these outer variables do not act on training, or by less than "
            "rounding. Pass another direction, a larger `step_size`, or float64."
        )
    return Metasmoothness(
        step_size=float(step_size),
        smoothness=float((first * second.sign()).sum() / length),
        predicted=step_size * sum(float((result.grads[name] * own).sum()) for name, own in unit.items()),
        actual=moved - before,
    )


def _unit(direction: TensorDict, hparams: TensorDict) -> TensorDict:
    """Returns a direction of unit length over all its entries together."""
    for name, value in direction.items():
        if name not in hparams or value.shape != hparams[name].shape:
            known = {known: tuple(own.shape) for known, own in hparams.items()}
            raise ValueError(
                f"`direction` has an entry {name!r} of shape {tuple(value.shape)}, but the outer variables are "
                f"{known}. Give entries of the same names and shapes."
            )
    length = float(tree.norm(tree.detach(direction)))
    if not 0.0 < length < math.inf:
        raise ValueError(
            f"`direction` has the length {length:g}: it points nowhere. Pass one with a finite length above 0; "
            "downhill has none where the hypergradient is zero."
        )
    return {name: value.detach() / length for name, value in direction.items()}
