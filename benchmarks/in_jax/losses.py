"""The losses of the works in JAX: what a step minimises, and what the trained network is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax  # pyright: ignore[reportMissingImports]
from jax import lax  # pyright: ignore[reportMissingImports]
from jax import numpy as jnp  # pyright: ignore[reportMissingImports]
from networks import Network, Params

Data: TypeAlias = dict[str, jax.Array]

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a job, of one task where there are tasks.

    Args:
        inner: `(params, outer variables with the context, data, step) -> scalar`.
        outer: `(params, outer variables with the context, data) -> scalar`.
        context: `(outer variables, data) -> entries beside the outer variables`, computed once before the first step.
    """

    inner: Callable[[Params, Params, Data, jax.Array], jax.Array]
    outer: Callable[[Params, Params, Data], jax.Array]
    context: Callable[[Params, Data], Params] = lambda _, __: {}


def losses(name: str, predict: Network, settings: Mapping[str, Any]) -> Losses:
    """Returns the losses of a kind of job.

    Args:
        name: "weighted_examples", "weighted_sequences", "regression", "classification" or "hyper_representation".
        predict: the network; the backbone of a hyper-representation, whose head is linear.
        settings: numbers that the kind needs.
    """
    kinds = {
        "weighted_examples": _weighted_examples,
        "weighted_sequences": _weighted_sequences,
        "regression": _regression,
        "classification": _classification,
        "hyper_representation": _hyper_representation,
    }
    return kinds[name](predict, settings)


def _weighted_examples(predict: Network, settings: Mapping[str, Any]) -> Losses:
    """`settings` has `rows`, `batch_size` and `rows_per_weight`."""
    rows, batch_size = settings["rows"], settings["batch_size"]

    def inner(params: Params, variables: Params, data: Data, step: jax.Array) -> jax.Array:
        weight = variables["weight"]
        if settings["rows_per_weight"] > 1:
            weight = jnp.repeat(weight, settings["rows_per_weight"])
        inputs, targets = data["inputs"], data["targets"]
        if batch_size < rows:
            start = step * batch_size % (rows - batch_size + 1)
            weight, inputs, targets = (
                lax.dynamic_slice_in_dim(x, start, batch_size) for x in (weight, inputs, targets)
            )
        return (jax.nn.sigmoid(weight) * _cross_entropy(predict(params, inputs), targets)).mean()

    def outer(params: Params, _: Params, data: Data) -> jax.Array:
        return _cross_entropy(predict(params, data["held_out_inputs"]), data["held_out_targets"]).mean()

    return Losses(inner=inner, outer=outer)


def _weighted_sequences(predict: Network, _: Mapping[str, Any]) -> Losses:
    def each(params: Params, tokens: jax.Array) -> jax.Array:
        return _cross_entropy(predict(params, tokens[:, :-1]), tokens[:, 1:]).mean(axis=1)

    return Losses(
        inner=lambda params, variables, data, _: (
            jax.nn.sigmoid(variables["weight"]) * each(params, data["tokens"])
        ).mean(),
        outer=lambda params, _, data: each(params, data["held_out"]).mean(),
    )


def _regression(predict: Network, _: Mapping[str, Any]) -> Losses:
    def loss(params: Params, data: Data, part: str) -> jax.Array:
        return jnp.square(predict(params, data[f"{part}_inputs"]) - data[f"{part}_targets"]).mean()

    return _of_parts(loss)


def _classification(predict: Network, _: Mapping[str, Any]) -> Losses:
    def loss(params: Params, data: Data, part: str) -> jax.Array:
        return _cross_entropy(predict(params, data[f"{part}_inputs"]), data[f"{part}_targets"]).mean()

    return _of_parts(loss)


def _of_parts(loss: Callable[[Params, Data, str], jax.Array]) -> Losses:
    return Losses(
        inner=lambda params, _, data, __: loss(params, data, "support"),
        outer=lambda params, _, data: loss(params, data, "query"),
    )


def _hyper_representation(predict: Network, _: Mapping[str, Any]) -> Losses:
    def context(variables: Params, data: Data) -> Params:
        count = len(data["support_inputs"])
        features = predict(variables, jnp.concatenate([data["support_inputs"], data["query_inputs"]]))
        support, query = features[:count], features[count:]
        centre = support.mean(axis=0)
        spread = jnp.sqrt(jnp.square(support - centre).sum(axis=1).mean() + _TINY)
        return {"support": (support - centre) / spread, "query": (query - centre) / spread}

    def loss(params: Params, variables: Params, data: Data, part: str) -> jax.Array:
        logits = variables[part] @ params["weight"].T + params["bias"]
        return _cross_entropy(logits, data[f"{part}_targets"]).mean()

    return Losses(
        inner=lambda params, variables, data, _: loss(params, variables, data, "support"),
        outer=lambda params, variables, data: loss(params, variables, data, "query"),
        context=context,
    )


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
