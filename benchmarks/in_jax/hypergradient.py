"""The hypergradient as a user of JAX writes it: `jax.jit` of `jax.grad` through `lax.scan` over the inner steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
from jax import lax  # pyright: ignore[reportMissingImports]
from jax import numpy as jnp  # pyright: ignore[reportMissingImports]
from losses import Data, Losses, losses
from networks import Params, network


def hypergradient(settings: Mapping[str, Any]) -> Callable[[Params, Params, Data], Params]:
    """Returns `(outer variables, first weights, data) -> hypergradient`, compiled at its first call.

    Args:
        settings: the job as numbers and names: `network` and `losses` with their own settings, `num_steps`, `lr`,
            `momentum`, `num_tasks` (None without tasks), `initialisation` (the weights that are outer variables),
            `remat` (whether a step is computed again on the way back) and `tasks` ("vmap", or "map" for one after the
            other).
    """
    of_job = losses(
        settings["losses"], network(settings["network"], settings["network_settings"]), settings["loss_settings"]
    )

    def outer_loss(hparams: Params, params: Params, data: Data) -> jax.Array:
        params = {
            name: hparams[name] if name in settings["initialisation"] else value for name, value in params.items()
        }

        def of_task(own: Data) -> jax.Array:
            return _outer_loss_after_training(of_job, settings, params, hparams, own)

        if settings["num_tasks"] is None:
            return of_task(data)
        return (jax.vmap(of_task)(data) if settings["tasks"] == "vmap" else lax.map(of_task, data)).mean()

    return jax.jit(jax.grad(outer_loss))


def _outer_loss_after_training(
    of_job: Losses, settings: Mapping[str, Any], params: Params, hparams: Params, data: Data
) -> jax.Array:
    variables = {**hparams, **of_job.context(hparams, data)}
    lr, momentum = settings["lr"], settings["momentum"]

    def step(state: tuple[Params, Params], index: jax.Array) -> tuple[tuple[Params, Params], None]:
        params, buffer = state
        update = jax.grad(of_job.inner)(params, variables, data, index)
        if momentum:
            # That of `torch.optim.SGD`: from zeros, it starts with the first gradient.
            update = buffer = jax.tree.map(lambda old, new: momentum * old + new, buffer, update)
        return (jax.tree.map(lambda old, change: old - lr * change, params, update), buffer), None

    if settings["remat"]:
        # In a scan nothing can undo it by finding the same operations twice.
        step = jax.checkpoint(step, prevent_cse=False)
    buffer = jax.tree.map(jnp.zeros_like, params) if momentum else {}
    (params, _), _ = lax.scan(step, (params, buffer), jnp.arange(settings["num_steps"]))
    return of_job.outer(params, variables, data)
