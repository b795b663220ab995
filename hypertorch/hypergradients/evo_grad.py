"""The hypergradient through the weights of perturbed copies of the model, by first derivatives only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.products import vjp
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import BackendResult, Hypergradient
from hypertorch.hypergradients.reverse_mode.prefix import run_prefix
from hypertorch.inner.loop import InnerLoop
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
    counted as steps; two evaluations of the outer loss, one with its derivative. Memory: `num_copies` copies and the
    graphs of their losses.

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
        if isinstance(self.num_copies, bool) or not isinstance(self.num_copies, int) or self.num_copies < 2:
            raise ValueError(
                f"`num_copies` is {self.num_copies!r}: a single copy has all the weight whatever its loss, so that no "
                "hyperparameter could change it. Pass a whole number of at least 2."
            )
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
        with torch.enable_grad():
            losses: list[Tensor] = []
            for direction in noise:
                copy = tree.add(theta, direction, alpha=self.sigma)
                # Bound anew for each copy: the noise of the model is seeded again, and so the same.
                losses.append(loop.map_loss(state)(copy, variables))
                loop.record.add_step(None)
            # w = softmax(-l / temperature) over the copies, for each task by itself.
            weights = torch.softmax(torch.stack(losses, dim=-1) / -self.temperature, dim=-1)
            mixed = self._mix(theta, noise, weights)
            mixed_loss = loop.outer({**state.params, **mixed}, variables)
        # Hyperparameters reach theta* through the weights, and E directly: first derivatives alone.
        grads = vjp([mixed_loss], [torch.ones_like(mixed_loss)], variables)
        with torch.no_grad():
            # Reported is what was trained; theta* is there to be differentiated.
            outer_loss = loop.outer(state.params, tree.detach(variables))
        return end.add_to(
            BackendResult(
                grads=grads,
                outer_loss=outer_loss,
                state=state,
                # All of them where they weigh alike, 1 where one has all the weight and the estimate vanishes.
                figures={"effective_copies": 1.0 / weights.detach().square().sum(-1)},
            )
        )

    def _mix(self, theta: TensorDict, noise: list[TensorDict], weights: Tensor) -> TensorDict:
        """Returns `sum_k w_k theta_k`, computed as `theta + sigma sum_k w_k e_k`.

        The two are equal, as the weights sum to 1. But in the derivative in `w_k` the first has the whole of
        `theta_k`, next to which the perturbations, all that matters, drown in rounding.
        """
        mixed: TensorDict = {}
        for name, value in theta.items():
            shape = weights.shape[:-1] + (1,) * (value.dim() - weights.dim() + 1)
            shift = sum(
                weights[..., position].reshape(shape).to(value.dtype) * direction[name]
                for position, direction in enumerate(noise)
            )
            mixed[name] = value + self.sigma * shift
        return mixed

    def _noise(self, loop: InnerLoop, theta: TensorDict) -> list[TensorDict]:
        """Returns `e_k` for each copy; a task's noise depends on its place in the batch, not on how tasks are run."""
        if not loop.has_tasks_axis:
            stacked = self._noise_of_task(loop, theta, loop.first_task)
        else:
            num_tasks = next(iter(theta.values())).shape[0]
            # Drawn task by task from a generator of the task's own: vectorised or not, a task has the same copies.
            tasks = [
                self._noise_of_task(loop, {name: value[task] for name, value in theta.items()}, loop.first_task + task)
                for task in range(num_tasks)
            ]
            stacked = {name: torch.stack([own[name] for own in tasks], dim=1) for name in theta}
        return [{name: value[position] for name, value in stacked.items()} for position in range(self.num_copies)]

    def _noise_of_task(self, loop: InnerLoop, theta: TensorDict, task: int) -> TensorDict:
        """Returns the noise of all copies of a task, each entry of shape `(copies, *shape of the param)`."""
        generator = loop.generator(task)
        return {name: self._draw(value, generator) for name, value in theta.items()}

    def _draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        shape = (self.num_copies, *like.shape)
        if self.noise == "sign":
            return 2 * torch.randint(0, 2, shape, generator=generator, dtype=like.dtype, device=like.device) - 1
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
