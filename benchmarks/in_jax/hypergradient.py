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
            `remat` (whether a step is computed again on the way back), `unroll` (whether the program has all steps one
            after the other, and no loop) and `tasks` ("vmap", or "in turn" for a call of the program for each).
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

        return jax.vmap(of_task)(data).mean() if all_tasks else of_task(data)

    num_tasks, in_turn = settings["num_tasks"], settings["tasks"] == "in turn"
    all_tasks = num_tasks is not None and not in_turn
    compiled = jax.jit(jax.grad(outer_loss))
    if num_tasks is None or not in_turn:
        return compiled

    def mean_over_tasks(hparams: Params, params: Params, data: Data) -> Params:
        each = [compiled(hparams, params, {name: data[name][task] for name in data}) for task in range(num_tasks)]
        return jax.tree.map(lambda *values: sum(values) / num_tasks, *each)

    return mean_over_tasks


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
    steps = jnp.arange(settings["num_steps"])
    (params, _), _ = lax.scan(step, (params, buffer), steps, unroll=settings["unroll"])
    return of_job.outer(params, variables, data)
