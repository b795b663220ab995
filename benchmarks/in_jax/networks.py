"""The networks of the works in JAX, as functions of weights that are named and laid out as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax  # pyright: ignore[reportMissingImports]
from jax import lax  # pyright: ignore[reportMissingImports]
from jax import numpy as jnp  # pyright: ignore[reportMissingImports]

Params: TypeAlias = dict[str, jax.Array]
Network: TypeAlias = Callable[[Params, jax.Array], jax.Array]

_EPS = 1e-5  # that of PyTorch's norm layers


def network(name: str, settings: Mapping[str, Any]) -> Network:
    """Returns a network as a function of weights and inputs.

    Args:
        name: "mlp", "conv4" or "transformer".
        settings: what the weights do not tell: the activation, the way to halve an image, the number of heads.
    """
    return partial({"mlp": _mlp, "conv4": _conv4, "transformer": _transformer}[name], settings)


def _mlp(settings: Mapping[str, Any], params: Params, inputs: jax.Array) -> jax.Array:
    """Linear layers; `settings` has the `activation` between them, "tanh" or "relu"."""
    activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[settings["activation"]]
    layers = sorted({name.rpartition(".")[0] for name in params}, key=lambda name: int(name.rpartition(".")[2] or 0))
    values = inputs.reshape(len(inputs), -1)
    for layer in layers[:-1]:
        values = activation(_linear(params, layer, values))
    return _linear(params, layers[-1], values)


def _conv4(settings: Mapping[str, Any], params: Params, images: jax.Array) -> jax.Array:
    """Conv-4 with batch norm by the statistics of the call; `settings` has `downsample`, "max_pool" or "stride"."""
    pools = settings["downsample"] == "max_pool"
    stride = 1 if pools else 2
    # Channels come last: the layout that XLA's convolutions are made for.
    values = images.transpose(0, 2, 3, 1)
    for block in range(4):
        weight = params[f"blocks.{block}.conv.weight"].transpose(2, 3, 1, 0)
        values = lax.conv_general_dilated(
            values, weight, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        normalised = _normalised(values, (0, 1, 2))
        values = normalised * params[f"blocks.{block}.norm.weight"] + params[f"blocks.{block}.norm.bias"]
        values = jax.nn.relu(values)
        values = _pooled(values) if pools else values
    features = values.transpose(0, 3, 1, 2).reshape(len(values), -1)
    return _linear(params, "classifier", features) if "classifier.weight" in params else features


def _transformer(settings: Mapping[str, Any], params: Params, tokens: jax.Array) -> jax.Array:
    """A causal language model; `settings` has `num_layers` and `num_heads`."""
    values = params["tokens.weight"][tokens] + params["places"]
    for layer in range(settings["num_layers"]):
        block = f"blocks.{layer}"
        attended = _attention(params, block, _layer_norm(params, f"{block}.before_attention", values), settings)
        values = values + _linear(params, f"{block}.after_attention", attended)
        hidden = _linear(params, f"{block}.mlp.0", _layer_norm(params, f"{block}.before_mlp", values))
        values = values + _linear(params, f"{block}.mlp.2", jax.nn.gelu(hidden, approximate=False))
    return _linear(params, "readout", _layer_norm(params, "norm", values))


def _attention(params: Params, block: str, values: jax.Array, settings: Mapping[str, Any]) -> jax.Array:
    count, places, width = values.shape
    projected = _linear(params, f"{block}.queries_keys_values", values)
    split = projected.reshape(count, places, 3, settings["num_heads"], -1)
    queries, keys, values = (split[:, :, part].transpose(0, 2, 1, 3) for part in range(3))
    scores = queries @ keys.transpose(0, 1, 3, 2) * queries.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones((places, places), bool))
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return (shares @ values).transpose(0, 2, 1, 3).reshape(count, places, width)


def _linear(params: Params, layer: str, values: jax.Array) -> jax.Array:
    return values @ params[f"{layer}.weight"].T + params[f"{layer}.bias"]


def _layer_norm(params: Params, layer: str, values: jax.Array) -> jax.Array:
    return _normalised(values, -1) * params[f"{layer}.weight"] + params[f"{layer}.bias"]


def _normalised(values: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    centred = values - values.mean(axes, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + _EPS)


def _pooled(images: jax.Array) -> jax.Array:
    """Returns the largest of every 2x2; an odd last row and column are dropped.

    Not `jnp.max` of a reshaped image: with `jax.checkpoint` its hypergradient is silently wrong, by its own size.
    """
    window = (1, 2, 2, 1)
    return lax.reduce_window(images, -jnp.inf, lax.max, window, window, "VALID")
