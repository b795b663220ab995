"""The hypergradient through the weights of perturbed copies of the model, by first derivatives only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.autodiff.products import vjp
from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import check_count
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.reverse_mode.prefix import run_prefix
from hypertorch.hypergradients.reverse_mode.sweep import Grads, pull_back
from hypertorch.inner.loop import MAP, InnerLoop
from hypertorch.inner.solution import map_loss
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True)
class EvoGrad(Hypergradient):
    """An estimate of the hypergradient through one imagined step of evolution in place of a gradient step.

    After `num_steps` steps (none if 0) the trained params `theta` are copied `K = num_copies` times and perturbed, and
    the copies are mixed by how well they do on the inner loss:

        theta_k = theta + sigma e_k,   l_k = L(theta_k, hparams),   w = softmax(-l / temperature)
        theta* = sum_k w_k theta_k,    df/dhparams ~ dE(theta*, hparams)/dhparams

    where hyperparameters act through the weights `w` and directly; no inner step is differentiated. The sign and the
    direction are of use, the size is not: as `sigma` goes to 0 the estimate at given noise tends to

        dE/dhparams - (sigma^2 / temperature) dE/dw C d2L/(dw dhparams),   C = mean_k (e_k - mean e)(e_k - mean e)'

    which on average, `C` being `(1 - 1/K)` times the identity, is `OneStep` with a step size of
    `sigma^2 (1 - 1/K) / temperature`. Where the losses of the copies differ by much more than `temperature` one copy
    takes all the weight and the estimate vanishes: see the figure `effective_copies`.

    `L` is the loss of `InnerProblem.full_batch`, or of the last step's data; all copies see the same data and noise.
    Running statistics are those after the last step. With tasks, each has copies, noise and weights of its own. The
    outer loss returned is that of `theta`, not of `theta*`; terms at inner steps give their direct derivative only.
    Hyperparameters with no part in the inner loss (initialisation, step size) have no path and are refused, unless
    they act directly.

    Cost: `num_steps` steps; `num_copies` evaluations of the inner loss and its derivative in the hyperparameters,
    counted as steps; two evaluations of the outer loss, one with its derivative. With a gradient counted as three
    forward passes and one inner step, that is `7 + K` passes; `Reverse` takes 8, and more with convolutions. Memory:
    `K + 2` times the params, their gradient, and the larger of two graphs: that of the outer loss, and that of the
    hyperparameters' part in the inner loss of one copy (of all copies, with vectorised tasks).

    Args:
        num_copies: copies of the model, at least 2.
        sigma: size of the perturbations (unit: of the params, above 0).
        temperature: of the softmax (unit: of the inner loss, above 0).
        noise: distribution of `e_k`: standard normal, or signs (each entry 1 or -1).

    Raises:
        ValueError: if a number is out of its range, or `noise` is an unknown word.
        IncompatibleBackendError: (from `compute`) if there is no trained parameter to perturb.

    References:
        Bohdal, Yang and Hospedales (2021), EvoGrad, algorithm 1 and equations 2 to 5.
    """

    takes = "first"

    num_copies: int = 2
    sigma: float = 0.001
    temperature: float = 0.05
    noise: Literal["gaussian", "sign"] = "gaussian"

    def __post_init__(self) -> None:
        check_fields(self, "sigma", "temperature")
        why = "a single copy has all the weight whatever its loss, so that no hyperparameter could change it"
        check_count("`num_copies`", self.num_copies, why, least=2)
        for name in ("sigma", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` of `EvoGrad` is {getattr(self, name)!r}: copies must differ, and be weighted by their "
                    "losses. Pass a finite number above 0."
                )
        if self.noise not in ("gaussian", "sign"):
            raise ValueError(f"`noise` is {self.noise!r}, which names no distribution. Use 'gaussian' or 'sign'.")

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns the derivative of the outer loss of the mixed copies in `variables`, direct term included."""
        # theta is a constant: no inner step is differentiated.
        end = run_prefix(loop, variables, loop.num_steps)
        state = end.state
        theta = loop.trained(state.params)
        if not theta:
            raise IncompatibleBackendError(
                "`EvoGrad` got a problem whose `init_params` returns no trained parameter: there is nothing to "
                "perturb. Use `Reverse()`, which differentiates through `init_params`."
            )
        noise = self._noise(loop, theta)
        losses = self._losses(loop, state, noise, variables)
        # Leaves: hyperparameters reach theta* through K numbers, so that the graph of E holds no inner loss.
        values = torch.stack([loss.value for loss in losses], dim=-1).requires_grad_()
        with torch.enable_grad():
            # w = softmax(-l / temperature) over the copies, for each task by itself.
            weights = torch.softmax(values / -self.temperature, dim=-1)
            mixed = {name: self._mix(value, noise[name], weights) for name, value in theta.items()}
            mixed_loss = loop.outer({**state.params, **mixed}, variables)
        # dE/dhparams at constant weights, and dE/dl_k.
        grads, [cotangents] = pull_back(
            [mixed_loss], [torch.ones_like(mixed_loss)], InnerState({"losses": values}, {}), variables
        )
        if cotangents is not None:
            # sum_k dE/dl_k dl_k/dhparams
            for loss, cotangent in zip(losses, cotangents.unbind(-1), strict=True):
                grads = tree.accumulate(grads, loss.pull_back(cotangent))
        with torch.no_grad():
            # The outer loss of the trained params is reported; theta* serves the derivative alone.
            outer_loss = loop.outer(state.params, tree.detach(variables))
        return end.add_to(
            BackendResult(
                grads=grads,
                outer_loss=outer_loss,
                state=state,
                # `num_copies` for equal weights, 1 where one copy has all the weight and the estimate vanishes.
                figures={"effective_copies": 1.0 / weights.detach().square().sum(-1)},
            )
        )

    def _losses(self, loop: InnerLoop, state: InnerState, noise: TensorDict, variables: TensorDict) -> list[_CopyLoss]:
        """Returns the inner loss of each copy; one copy lives at a time."""
        # One draw of the data serves all copies.
        inner_loss = map_loss(loop, state)
        losses = []
        for position in range(self.num_copies):
            # The noise of the model is seeded again, and so the same.
            loop.seed(MAP)
            own = {name: value.select(-2, position) for name, value in noise.items()}
            copy = {
                name: torch.add(value, own[name].view(value.shape), alpha=self.sigma)
                for name, value in loop.trained(state.params).items()
            }
            losses.append(_copy_loss(inner_loss, copy, variables))
            loop.record.add_step(None)
        return losses

    def _mix(self, value: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
        """Returns `sum_k w_k theta_k` for one param, computed as `theta + sigma sum_k w_k e_k`.

        The two are equal, as the weights sum to 1. But in the derivative in `w_k` the first has the whole of
        `theta_k`, and the rounding of that hides the perturbations, which alone matter.
        """
        weights = weights.to(value.dtype)
        if weights.dim() == 1:
            return torch.addmv(value.flatten(), noise.mT, weights, alpha=self.sigma).view(value.shape)
        row = value.reshape(len(noise), 1, noise.shape[-1])
        return torch.baddbmm(row, weights.unsqueeze(1), noise, alpha=self.sigma).view(value.shape)

    def _noise(self, loop: InnerLoop, theta: TensorDict) -> TensorDict:
        """Returns `e_k`, each entry of shape `(copies, size of the param)` or `(tasks, copies, size of the param)`.

        A task's noise depends on its place in the batch, not on how tasks are run.
        """
        if not loop.has_tasks_axis:
            generator = loop.generator(loop.first_task)
            return {name: self._draw(value, generator) for name, value in theta.items()}
        num_tasks = next(iter(theta.values())).shape[0]
        # Drawn task by task from a generator of the task's own: vectorised or not, a task has the same copies.
        generators = [loop.generator(loop.first_task + task) for task in range(num_tasks)]
        return {
            name: torch.stack([self._draw(own, generator) for own, generator in zip(value, generators, strict=True)])
            for name, value in theta.items()
        }

    def _draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the noise of all copies of one task's param, shape `(copies, size of the param)`."""
        shape = (self.num_copies, like.numel())
        if self.noise == "sign":
            signs = torch.randint(0, 2, shape, generator=generator, dtype=like.dtype, device=like.device)
            return signs.mul_(2).sub_(1)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


class _CopyLoss(NamedTuple):
    """The inner loss of one copy.

    Attributes:
        value: the loss without a graph, shape `()` or `(tasks,)`.
        pull_back: from a cotangent of that shape to its product with the derivative in each variable.
    """

    value: Tensor
    pull_back: Callable[[Tensor], Grads]


def _copy_loss(inner_loss: InnerLoss, copy: TensorDict, variables: TensorDict) -> _CopyLoss:
    """Returns the inner loss at a copy, whose params are constants: no backward pass reaches them."""
    with torch.enable_grad():
        loss = inner_loss(copy, variables)
    if loss.dim():
        # Each task has its own cotangent, and all share the hyperparameters: the graph is kept until those are known.
        return _CopyLoss(loss.detach(), lambda cotangent: vjp([loss], [cotangent], variables))
    # A single number has one derivative. Taken at once, it frees the graph before the next copy is run.
    slope = vjp([loss], [torch.ones_like(loss)], variables)
    return _CopyLoss(loss.detach(), partial(_scale, slope))


def _scale(slope: Grads, factor: Tensor) -> Grads:
    return {name: None if part is None else factor.to(part.dtype) * part for name, part in slope.items()}
