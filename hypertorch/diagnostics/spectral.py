"""Whether the inner map contracts: its largest eigenvalue, and the growth of its product along the trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.products import vjp
from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import check_seed, is_count
from hypertorch.diagnostics.arnoldi import Spectrum, leading_spectrum
from hypertorch.errors import NonFiniteError
from hypertorch.hypergradients import Reverse, measured_execution
from hypertorch.hypergradients.guards.examination import examine
from hypertorch.hypergradients.guards.finiteness import first_non_finite
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.execution import DEFAULT, Execution
from hypertorch.inner.kinds import kind_of
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.scan import scan
from hypertorch.inner.state import InnerState
from hypertorch.inner.tasks import TaskSlice, task_slices
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict

Verdict: TypeAlias = Literal["contracts", "is marginal", "explodes"]
"""The product of a factor per step over the horizon: below `1/e`, in between, above `e`."""

_SETTLED = 1e-2  # a residual below it does not change the verdict

_MEANING: dict[Verdict, str] = {
    "contracts": "the effect of early steps fades, so truncated and implicit hypergradients approach the exact one",
    "is marginal": "over this horizon the effect of early steps neither fades nor grows much: no step can be left out",
    "explodes": "changes of the state grow, and the unrolled hypergradient with them; the step size is too large or, "
    "where the eigenvalue is real and positive, the inner loss curves downwards",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SpectralRadius:
    """The spectrum of the inner map at one inner step, and the growth of the product of maps up to it.

    Attributes:
        step: the inner step, counted from 0.
        num_steps: the horizon that the verdicts are about (unit: steps).
        eigenvalues: the eigenvalue of largest modulus at `step`, complex, shape `()` or `(tasks,)`.
        residuals: `|J'y - eigenvalue y| / |eigenvalue y|` of its eigenvector, in balanced units, shape `()` or
            `(tasks,)`.
        ritz_values: estimates of the outer eigenvalues, complex, largest first, shape `(dimension,)` or
            `(tasks, dimension)`. The first are accurate; the last only outline the spectrum.
        step_growths: factor by which the product grows at each step from 0 to `step`, shape `(step + 1,)` or
            `(tasks, step + 1)`.
    """

    step: int
    num_steps: int
    eigenvalues: Tensor
    residuals: Tensor
    ritz_values: Tensor
    step_growths: Tensor

    @property
    def radius(self) -> float:
        """The largest modulus of an eigenvalue, of all tasks."""
        return float(self.eigenvalues.abs().max())

    @property
    def growth(self) -> float:
        """The mean factor per step along the trajectory, `exp` of the Lyapunov exponent; the largest of all tasks."""
        # In logarithms: the product itself leaves the range of floats in a long run.
        return float(self.step_growths.log().mean(dim=-1).exp().max())

    @property
    def verdict(self) -> Verdict:
        """What repeating the map at `step` over the horizon would do."""
        return _judged(self.radius, self.num_steps)

    def __str__(self) -> str:
        worst = int(self.eigenvalues.abs().argmax())
        eigenvalue = complex(self.eigenvalues.reshape(-1)[worst])
        residual = float(self.residuals.max())
        unsettled = "" if residual < _SETTLED else "; not settled: a larger `dimension` helps"
        task = f" (of task {worst}, the largest of {len(self.eigenvalues)})" if self.eigenvalues.dim() else ""
        return "\n".join(
            [
                f"the inner map at step {self.step} {self.verdict}: {_MEANING[self.verdict]}",
                f"  largest |eigenvalue|{task} {self.radius:.6g}: {_power(self.radius, self.num_steps)} over "
                f"{self.num_steps} steps (eigenvalue {eigenvalue:.6g}, residual {residual:.2g}{unsettled})",
                f"  growth along the trajectory {self.growth:.6g} per step: "
                f"{_power(self.growth, self.step + 1)} over {self.step + 1} steps",
            ]
        )


@typed("problem", "tolerance")
def spectral_radius(
    problem: BilevelProblem,
    hparams: TensorDict,
    *,
    step: int | None = None,
    dimension: int = 30,
    max_restarts: int = 20,
    tolerance: float = 1e-8,
    outer_step: int = 0,
    seed: int = 0,
    execution: Execution = DEFAULT,
) -> SpectralRadius:
    """Returns the largest eigenvalue of the inner map `J = dPhi/ds`, and the growth of `J_t ... J_0` up to a step.

    The state `s` holds the params and the optimiser's buffers; `J` is taken at the state that the run has before
    `step`. Below 1 the effect of the state on later states fades, and with it the bias of truncation and of implicit
    differentiation; above 1 small changes grow geometrically with the horizon, and hypergradients with them.

    The eigenvalue is found by Arnoldi's method on `J'` (which has the same eigenvalues) with vjps of one recorded
    step, restarted from the leading Ritz vectors until the residual is small. Unlike power iteration it settles on
    complex pairs, which momentum makes; and the state is measured in units that balance the map, without which Adam's
    squared gradients would hide the params. The growth is that of a cotangent carried back from `step` to the start, as
    reverse mode does it, beginning at the eigenvector:

        growth = (|J_0' ... J_t' y| / |y|)^(1 / (t + 1)),

    the exponential of a finite-time Lyapunov exponent. It is a lower bound of the largest singular value of
    `J_t ... J_0`, to the same power, from which it differs by a factor that does not grow with the number of steps.

    Cost: `step + 1` steps, run twice, and a vjp for each of them; of the step looked at, `6 + dimension` vjps and half
    as many for each restart. Memory: `step + 1` states, `dimension + 1` vectors of a state's size and one step's graph.

    Args:
        problem: the problem.
        hparams: the outer variables.
        step: the inner step, counted from 0; None for the last.
        dimension: of the Krylov space.
        max_restarts: how often it may be cut down to its leading half and grown again.
        tolerance: relative residual at which no more restarts are made.
        outer_step: chooses the outer data and the noise.
        seed: of the first vector.
        execution: how the problem is run.

    Raises:
        ValueError: if there is no such step, or a number is out of range.
        NonFiniteError: if the run, or the derivative at `step`, holds NaN or infinity.

    References:
        Arnoldi (1951), The principle of minimized iterations; Pascanu, Mikolov and Bengio (2013), On the difficulty of
        training recurrent neural networks, section 2 (exploding products).
    """
    step = _checked_step(step, problem.num_steps)
    _check_numbers(dimension, max_restarts)
    check_seed(seed)
    if not 0.0 < tolerance < math.inf:
        raise ValueError(
            f"`tolerance` is {tolerance}: restarts would end at once or never, for every residual. Pass a finite "
            "number above 0, such as 1e-8."
        )
    # The backend whose cost is like this function's: vjps of single steps.
    execution = measured_execution(
        problem, hparams, backend=Reverse(checkpoint_every=1), outer_step=outer_step, execution=execution
    )
    bound = BoundProblem(problem, hparams, outer_step, None, execution)
    constants = tree.detach(hparams)
    slices = task_slices(problem.num_tasks, execution)
    examine(bound, hparams, slices[0], kind=kind_of(problem), use="second")

    def of_slice(item: TaskSlice | None) -> tuple[Spectrum, Tensor]:
        with torch.no_grad():
            context = bound.context(constants, item)
        variables = {**constants, **context}
        trajectory = _Trajectory(bound.loop(item, context), variables, step)
        # A second run finds the step and the entry: the first has looked at its last state only.
        if not trajectory.is_finite:
            with torch.no_grad():
                found = first_non_finite(bound.loop(item, context), variables)
            raise found or _infinite_derivative(step)
        start = trajectory.random_vectors(seed)
        apply = trajectory.transposed(step)
        # `eig` on NaN raises an error that names no cause.
        if not tree.all_finite([apply(start)]):
            raise _infinite_derivative(step)
        spectrum = leading_spectrum(apply, start, dimension=dimension, max_restarts=max_restarts, tolerance=tolerance)
        return spectrum, trajectory.growths(spectrum.vectors)

    with bound.running():
        parts = [of_slice(item) for item in slices]
    has_tasks = problem.num_tasks is not None

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat(values) if has_tasks else values[0].squeeze(0)

    return SpectralRadius(
        step=step,
        num_steps=problem.num_steps,
        eigenvalues=joined([spectrum.eigenvalues for spectrum, _ in parts]),
        residuals=joined([spectrum.residuals for spectrum, _ in parts]),
        ritz_values=joined([spectrum.ritz_values for spectrum, _ in parts]),
        step_growths=joined([growths for _, growths in parts]),
    )


class _Trajectory:
    """The states of a run up to a step, and the transposed derivatives of its steps.

    Those act on vectors `(tasks, entries)`: cotangents of the whole state.

    Attributes:
        is_finite: whether the state after the last step is.

    Args:
        loop: the inner loop.
        variables: hyperparameters and context, without a graph.
        last_step: the last step to take.
    """

    def __init__(self, loop: InnerLoop, variables: TensorDict, last_step: int) -> None:
        self._loop = loop
        self._variables = variables
        self._states: list[InnerState] = []
        with torch.no_grad():
            state = scan(
                lambda state, step: loop.advance(state, variables, step),
                loop.initial(variables),
                range(last_step + 1),
                lambda state, _: self._states.append(state),
            )
        self.is_finite = tree.all_finite(state.tensors())
        self._names = list(_differentiable(state))

    def random_vectors(self, seed: int) -> Tensor:
        """Returns a standard normal vector, the same for each task."""
        zeros = torch.zeros_like(self._vectors(_differentiable(self._states[-1])))
        generator = torch.Generator().manual_seed(seed)
        # One vector for all tasks: the result of a task does not depend on how many run beside it.
        return zeros + torch.randn(zeros.shape[1], generator=generator, dtype=zeros.dtype).to(zeros.device)

    def transposed(self, step: int) -> Callable[[Tensor], Tensor]:
        """Returns `v -> J'v` for the derivative `J` of a step in the state before it."""
        # The graph of one step alone, so that memory does not grow with the run.
        leaves = self._loop.leaves(self._states[step])
        with torch.enable_grad():
            outputs = _differentiable(self._loop.advance(leaves, self._variables, step))
        inputs = _differentiable(leaves)

        def apply(vectors: Tensor) -> Tensor:
            cotangents = self._cotangents(vectors, outputs)
            # Retained: the same graph serves every product of the Krylov space.
            pulled = vjp(list(outputs.values()), [cotangents[name] for name in outputs], inputs, retain_graph=True)
            # Autograd answers None where there is no path: as an entry of `J'v` that is a zero.
            return self._vectors(
                {
                    name: torch.zeros_like(leaf) if (value := pulled[name]) is None else value
                    for name, leaf in inputs.items()
                }
            )

        return apply

    def growths(self, vectors: Tensor) -> Tensor:
        """Returns by what factor each step, from the first, stretches `vectors` on their way back, `(tasks, steps)`."""
        smallest = torch.finfo(vectors.dtype).tiny
        factors: list[Tensor] = []
        for step in reversed(range(len(self._states))):
            # Normalised at every step: over a long run the product itself leaves the range of floats.
            vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=smallest)
            vectors = self.transposed(step)(vectors)
            factors.append(vectors.norm(dim=-1))
        return torch.stack(factors[::-1], dim=-1)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the state with one row for each task."""
        return tensor.flatten(1) if self._loop.has_tasks_axis else tensor.reshape(1, -1)

    def _vectors(self, cotangents: TensorDict) -> Tensor:
        """Returns the cotangents of a state's tensors, by name, as one vector for each task."""
        return torch.cat([self._rows(cotangents[name]) for name in self._names], dim=1)

    def _cotangents(self, vectors: Tensor, tensors: TensorDict) -> TensorDict:
        """Returns the cotangents of a state's tensors, by name, that a vector for each task holds."""
        parts = vectors.split([self._rows(tensors[name]).shape[1] for name in self._names], dim=1)
        return {
            name: part.reshape(tensors[name].shape).to(tensors[name].dtype)
            for name, part in zip(self._names, parts, strict=True)
        }


def _differentiable(state: InnerState) -> TensorDict:
    """Returns the tensors of a state that have a derivative, by name: integers have none.

    By name, because a step may return its buffers in another order than they were made in.
    """
    named = zip(state.names(), state.tensors(), strict=True)
    return {name: tensor for name, tensor in named if tree.is_differentiable(tensor)}


def _infinite_derivative(step: int) -> NonFiniteError:
    return NonFiniteError(
        f"the derivative of inner step {step} in its state is not finite, although the state is: it has no "
        "eigenvalues. Look for an infinite derivative in the losses (such as of a square root at 0)."
    )


def _judged(factor: float, num_steps: int) -> Verdict:
    log = math.log(factor) * num_steps if factor > 0 else -math.inf
    return "contracts" if log < -1 else "explodes" if log > 1 else "is marginal"


def _power(base: float, exponent: int) -> str:
    """Returns `base ** exponent` in words that do not overflow."""
    digits = exponent * math.log10(base) if base > 0 else -math.inf
    if digits == -math.inf:
        return "0"
    return f"{10**digits:.3g}" if abs(digits) < 4 else f"1e{digits:+.0f}"


def _checked_step(step: int | None, num_steps: int) -> int:
    chosen = num_steps - 1 if step is None else step
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < num_steps:
        raise ValueError(
            f"`step` is {step!r} in a problem with `num_steps` = {num_steps}: there is no such inner step, whose map "
            "could be looked at. Pass a number from 0 to `num_steps - 1`, or None for the last step."
        )
    return chosen


def _check_numbers(dimension: int, max_restarts: int) -> None:
    if not is_count(dimension, least=4):
        raise ValueError(
            f"`dimension` is {dimension!r}: a Krylov space needs at least 4 vectors, to be cut down to a complex pair "
            "of eigenvalues and grown again. 20 to 30 are usual."
        )
    if not is_count(max_restarts, least=0):
        raise ValueError(
            f"`max_restarts` is {max_restarts!r}: the Krylov space is grown once, and as often again as this whole "
            "number says. Pass 0 for no restarts."
        )
