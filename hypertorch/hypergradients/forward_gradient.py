"""Forward gradients: directional derivatives along random directions, an unbiased estimate of the hypergradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.checks.values import check_count
from hypertorch.hypergradients.base import BackendResult, RandomDirections
from hypertorch.hypergradients.forward_mode.tangent_choice import serving_route
from hypertorch.hypergradients.forward_mode.tangents import (
    ForwardState,
    TangentRoute,
    check_chunk_size,
    complete_grads,
    directional_grads,
)
from hypertorch.hypergradients.guards.replay import Replays
from hypertorch.inner.loop import InnerLoop
from hypertorch.types import TensorDict, TensorMapping


@dataclass(frozen=True, kw_only=True)
class ForwardGradient(RandomDirections):
    """An unbiased estimate of the hypergradient from derivatives along random directions, by forward mode.

    With directions `v_k` over all hyperparameters (and the context's entries), whose entries are independent with mean
    0 and variance 1:

        g = 1/K sum_{k=1..K} (df . v_k) v_k,   E g = df

    The variance of entry `i` is `(|df|^2 + df_i^2) / K` for normal directions and `(|df|^2 - df_i^2) / K` for
    Rademacher ones: it grows with the number of hyperparameters, at a cost that does not. A new set of directions is
    drawn at every outer step.

    Cost: with `K` samples, `num_steps` steps for each of the `K / chunk_size` chunks, `K num_steps` jvps, and one vjp
    of the outer loss per chunk. Memory: `1 + chunk_size` states and one step with as many tangents, whatever
    `num_steps` is. Before it serves a kind of problem, a step is compared with reverse over reverse, as `Forward` says;
    that is not counted.

    Args:
        num_samples: directions per outer step, `K` (at least 1).
        distribution: of a direction's entries: "normal", or "rademacher" (1 or -1, as likely).
        chunk_size: directions that are carried at once (at least 1); None for all. One at a time they are dual
            numbers over plain autograd, which asks less of a model.

    Raises:
        ValueError: if a number is below 1, or the distribution is another word.
        IncompatibleBackendError: (from `compute`) if PyTorch has no forward derivative of an operation, or a wrong one.
        ReplayError: (from `compute`) if a step, or the run of another chunk, does not arrive at the same state.

    References:
        Baydin, Pearlmutter, Syme, Wood and Torr (2022), Gradients without backpropagation, definition 1.
    """

    num_samples: int = 1
    distribution: Literal["normal", "rademacher"] = "normal"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_count("`num_samples`", self.num_samples, "without a direction there is no estimate")
        if self.distribution not in ("normal", "rademacher"):
            raise ValueError(
                f"`distribution` is {self.distribution!r}: with it the estimate would not be known to be unbiased. Use "
                "'normal' or 'rademacher'."
            )
        check_chunk_size(self.chunk_size, "directions")

    def compute(self, loop: InnerLoop, variables: TensorDict) -> BackendResult:
        """Returns an unbiased estimate of the derivative of the outer loss in `variables`."""
        size = min(self.chunk_size or self.num_samples, self.num_samples)
        # All drawn before the chunks: `chunk_size` changes the memory, and not the estimate.
        directions = self._directions(loop, variables)
        route = serving_route(loop, variables, TangentRoute(backend="ForwardGradient", vectorised=size > 1))
        total = tree.PairwiseSum()
        first: ForwardState | None = None
        replays = Replays(inner_eps=loop.inner_eps)
        own = loop.share(self.num_samples)
        for start in own[::size]:
            stop = min(start + size, own.stop)
            chunk = {name: value[start:stop] for name, value in directions.items()}
            run = route.run(loop, variables, route.start(loop, variables, chunk))
            # Every chunk is a run of its own, and must be the same one.
            if first is None:
                first = run
            else:
                replays.add(run.state, first.state, 0, loop.num_steps)
            total.add(directional_grads(variables, run))
        replays.check()
        # The mean of (df . v) v, which is unbiased since E[v v'] is the identity.
        grads = complete_grads(variables, [total.total()])
        return BackendResult(
            grads={name: None if value is None else value / self.num_samples for name, value in grads.items()},
            outer_loss=run.outer_loss,
            state=run.state,
        )

    def num_parts(self, hparams: TensorMapping) -> int:
        """Returns the number of directions."""
        return self.num_samples

    def _directions(self, loop: InnerLoop, variables: TensorDict) -> TensorDict:
        """Returns the directions in every floating-point variable, of shape `(num_samples, *variable)`."""
        # Not of torch's own generators, which the noise of the model is drawn from.
        generator = loop.generator()

        def draw(value: Tensor) -> Tensor:
            shape = (self.num_samples, *value.shape)
            if self.distribution == "normal":
                return torch.randn(shape, generator=generator, dtype=value.dtype, device=value.device)
            signs = torch.randint(0, 2, shape, generator=generator, device=value.device)
            return (2 * signs - 1).to(value.dtype)

        return {name: draw(value) for name, value in variables.items() if tree.is_differentiable(value)}
