"""A sample of a database as the inner loss of a bilevel problem, so that its second derivatives decide the answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import hypertorch as ht
from hypertorch.types import Batch, TensorDict
from tests.databases.samples import F64, Sample
from tests.helpers.problems import normal

NUM_STEPS = 3
LRS = (0.05, 0.001)
"""Step sizes: the second for operations that a larger step takes out of their domain."""
FACTORS = (1.0, 0.7)
"""What the tasks differ in: the factor of the operation."""


REACH = 0.3
"""How far an operation's inputs can move."""


class SampleInner(ht.InnerProblem):
    """Minimise `weight * (phi(z + shift d) + b'p / 10) + shift c'p / 10 + |p - start|^2 / 20` from `p = start`.

    `z = start + r tanh((p - start) / r)` keeps the operation near the sample, wherever a pole nearby sends the params.

    `phi` sums the sines of the outputs with fixed weights, and is scaled so that its largest slope at the start is 1:
    no entry moves by more than a few hundredths in a step. `shift` is 0, so that the first gradient is that at the
    sample itself, zeros and ties included. The derivative in `shift` holds the Hessian of the operation along `d`,
    and that in `weight` its gradient; the linear terms give every operation, a constant one too, a derivative.
    """

    def __init__(self, sample: Sample) -> None:
        self.name = sample.name  # tells the library that this is another kind of problem than the next sample
        self.sample = sample
        self.buffers = tuple(sample.buffers)
        self.direction = _like(sample.start, 100)
        self.in_weight, self.in_shift = _like(sample.start, 200), _like(sample.start, 300)
        self.scale = 1.0
        self.outputs = [_Output(value, 400 + place) for place, value in enumerate(self._start_outputs())]
        self.scale = _scale(self, sample)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {name: value.clone() for name, value in {**self.sample.start, **self.sample.buffers}.items()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor | tuple[Tensor, TensorDict]:
        shift, weight = hparams.get("shift"), hparams["weight"]
        moved = {name: params[name] for name in self.sample.start}
        at = {
            name: start + REACH * torch.tanh((moved[name] - start) / REACH) for name, start in self.sample.start.items()
        }
        if shift is not None:
            at = {name: value + shift * self.direction[name] for name, value in at.items()}
        phi, buffers = self.phi({**at, **{name: params[name] for name in self.buffers}})
        factor = 1.0 if batch is None else batch["factor"]
        value = factor * weight * (phi + 0.1 * _dot(self.in_weight, moved))
        if shift is not None:
            value = value + 0.1 * shift * _dot(self.in_shift, moved)
        value = value + 0.05 * _squares(moved, self.sample.start)
        return (value, buffers) if self.buffers else value

    def phi(self, values: TensorDict) -> tuple[Tensor, TensorDict]:
        """Returns the operation as one number, and the new buffers."""
        outputs, buffers = self.sample.function(values)
        terms = [output.term(value) for output, value in zip(self.outputs, tensors_of(outputs), strict=True)]
        return self.scale * sum(terms, torch.zeros((), dtype=F64)), buffers

    def _start_outputs(self) -> list[Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return tensors_of(self.sample.function(self.init_params({}))[0])


class TaskInner(SampleInner):
    """The same for each of two tasks."""

    def batch(self, step: int) -> Batch:
        return {"factor": torch.tensor(FACTORS, dtype=F64)}


class SampleOuter(ht.OuterProblem):
    """Judges where the params went, by `a'(p - start) + |p - start|^2 / 2`."""

    def __init__(self, sample: Sample, hparams: TensorDict) -> None:
        self.start, self.weights, self.hparams = sample.start, _like(sample.start, 500), hparams

    def init_hparams(self) -> TensorDict:
        return {name: value.clone() for name, value in self.hparams.items()}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        gone = {name: params[name] - value for name, value in self.start.items()}
        return _dot(self.weights, gone) + 0.5 * sum(value.square().sum() for value in gone.values())


def sample_problem(
    sample: Sample, *, lr: float = LRS[0], one_hparam: bool = False, route: str | None = None
) -> ht.BilevelProblem:
    """Returns the bilevel problem of a sample.

    Args:
        sample: the sample.
        lr: step size.
        one_hparam: `weight` alone, without `shift`.
        route: how two tasks are run; None for a single problem.
    """
    hparams = {"weight": torch.tensor(1.1, dtype=F64)}
    if not one_hparam:
        hparams["shift"] = torch.zeros((), dtype=F64)
    options: dict[str, Any] = {} if route is None else {"num_tasks": len(FACTORS)}
    return ht.BilevelProblem(
        (SampleInner if route is None else TaskInner)(sample),
        SampleOuter(sample, hparams),
        dynamics=ht.dynamics.SGD(lr=lr),
        num_steps=NUM_STEPS,
        **options,
    )


def written_out(problem: ht.BilevelProblem, hparams: TensorDict, factor: float = 1.0, *, graph: bool = False) -> Tensor:
    """Returns the outer loss by plain autograd, with nothing of the library.

    Args:
        problem: a single problem.
        hparams: the hyperparameters.
        factor: of the operation: what a task has for data.
        graph: keep the graph of the run, for a derivative in the hyperparameters.
    """
    inner, outer, lr = problem.inner, problem.outer, problem.dynamics.lr
    batch = {"factor": factor}
    params = inner.init_params(hparams)
    names = [name for name in params if name not in inner.buffers]
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(problem.num_steps):
            leaves = {
                name: params[name] if graph and params[name].requires_grad else params[name].detach().requires_grad_()
                for name in names
            }
            loss = inner.loss({**params, **leaves}, hparams, batch)
            value, buffers = loss if isinstance(loss, tuple) else (loss, {})
            gradient = torch.autograd.grad(value, list(leaves.values()), create_graph=graph)
            stepped = {name: leaves[name] - lr * slope for name, slope in zip(names, gradient, strict=True)}
            params = {**stepped, **{name: buffer.detach() for name, buffer in buffers.items()}}
        return outer.loss(params, hparams, None)


def tensors_of(outputs: Any) -> list[Tensor]:
    """Returns the outputs that can have a derivative, as dense real tensors in float64."""
    found: list[Tensor] = []
    for value in pytree.tree_leaves(outputs):
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.numel():
            dense = value if value.layout == torch.strided else value.to_dense()
            real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
            found.append(real.to(F64))
    return found


class _Output:
    """The sum of the sines of an output's entries with fixed weights, without those that are infinite at the start."""

    def __init__(self, value: Tensor, seed: int) -> None:
        finite = value.isfinite()
        self.places = None if bool(finite.all()) else finite.flatten().nonzero()[:, 0]
        entries = self._chosen(value)
        self.scale = 1.0 / (1.0 + float(entries.abs().max())) if entries.numel() else 1.0
        self.weights = normal(*entries.shape, seed=seed)

    def term(self, value: Tensor) -> Tensor:
        return (self.weights * torch.sin(self.scale * self._chosen(value) + 0.3)).sum()

    def _chosen(self, value: Tensor) -> Tensor:
        return value if self.places is None else value.flatten()[self.places]


def _scale(inner: SampleInner, sample: Sample) -> float:
    leaves = {name: value.clone().requires_grad_() for name, value in sample.start.items()}
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        value, _ = inner.phi({**leaves, **{name: buffer.clone() for name, buffer in sample.buffers.items()}})
        if not value.requires_grad:
            return 1.0
        slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    largest = max([float(slope.abs().max()) for slope in slopes if slope is not None and slope.numel()] or [0.0])
    return 1.0 / largest if largest > 0.0 and largest < float("inf") else 1.0


def _like(tensors: TensorDict, seed: int) -> TensorDict:
    return {name: normal(*value.shape, seed=seed + place) for place, (name, value) in enumerate(tensors.items())}


def _dot(left: TensorDict, right: TensorDict) -> Tensor:
    return sum(((left[name] * right[name]).sum() for name in left), torch.zeros((), dtype=F64))


def _squares(left: TensorDict, right: TensorDict) -> Tensor:
    return sum(((left[name] - right[name]).square().sum() for name in left), torch.zeros((), dtype=F64))
