"""A wider net that computes the same: weights are inherited instead of trained again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hypertorch.checks.values import check_seed, is_count
from hypertorch.types import TensorDict, TensorMapping


def widen(
    params: TensorMapping,
    layer: str,
    *,
    num_units: int,
    following: str | Sequence[str],
    beside: str | Sequence[str] = (),
    seed: int = 0,
) -> TensorDict:
    """Returns weights of a net with more units in a layer, which computes the same function.

    Every new unit is a copy of an old one, drawn at random: it has the same weights and bias. Each layer that reads the
    unit's output `h` reads all copies, and the old weight `v` is shared out among them:

        v h = sum_k s_k v h_k      h_k = h,   sum_k s_k = 1

    The shares `s` are random and differ, so that the copies have different gradients and grow apart; equal shares would
    need noise on the weights, and the function would change.

    The units may pass through whatever treats each of them alone, on the way to the layers that read them: an
    activation, pooling, a batch norm (named in `beside`). A norm over units, a softmax or dropout is another function
    of more units.

    Cost: a copy of the weights of these layers; the others are the same tensors.

    Args:
        params: the weights by name, `{layer}.weight` of shape `(units, inputs, ...)` and, if it has one,
            `{layer}.bias` of shape `(units,)`: those of a linear layer or a convolution. Other tensors are passed on.
        layer: name of the layer that is widened.
        num_units: how many units (channels, of a convolution) it is to have, at least as many as it has.
        following: names of the layers that read its units. Their weights have shape `(outputs, units, ...)`, or
            `(outputs, units * positions)` if the channels of a convolution are flattened, channel by channel.
        beside: names of layers with one entry per unit, such as batch norms: every tensor `{name}.*` with axes is
            copied along the first.
        seed: of the draws.

    Returns:
        All weights, in the order of `params`.

    Raises:
        TypeError: if `params` is no mapping to tensors, a name no text, or a weight no floating-point tensor.
        ValueError: if a weight is missing, a layer has two roles, or a shape or number does not fit.

    References:
        Chen, Goodfellow and Shlens (2016), Net2Net: accelerating learning via knowledge transfer, section 2.2 (wider
        nets; there with equal shares).
    """
    _check_params(params)
    check_seed(seed)
    if not isinstance(layer, str):
        raise TypeError(_no_name("layer", layer))
    following, beside = _names("following", following), _names("beside", beside)
    weight = _weight(params, layer, "layer")
    old = weight.shape[0]
    if not is_count(num_units) or num_units < old:
        raise ValueError(
            f"`num_units` is {num_units!r}, but `{layer}` has {old} units: a net with fewer does not compute the same. "
            "Pass a whole number of at least as many."
        )
    if not following:
        raise ValueError(
            "`following` names no layer: whatever reads the units would have to change with them. Name the layers that "
            "do."
        )
    copied = _entries(params, beside, old)
    for name in following:
        if name == layer or any(key.startswith(f"{name}.") for key in copied):
            other = "layer" if name == layer else "beside"
            raise ValueError(
                f"`following` names {name!r}, and so does `{other}`: a layer that reads the units and has one entry "
                "for each, such as a recurrent one, would need both its axes widened, which is not done. Name a layer "
                "in one role."
            )
    generator = torch.Generator().manual_seed(seed)
    source = torch.cat([torch.arange(old), torch.randint(old, (num_units - old,), generator=generator)])
    # No share is near 0: each copy is read, and learns.
    drawn = 0.5 + torch.rand(num_units, generator=generator, dtype=torch.float64)
    # The shares of the copies of one unit sum to 1, so that the next layer reads what it read before.
    shares = drawn / torch.zeros(old, dtype=torch.float64).index_add(0, source, drawn)[source]
    wider = dict(params)
    for name in (f"{layer}.weight", f"{layer}.bias", *copied):
        if name in params:
            wider[name] = params[name][source.to(params[name].device)]
    for name in following:
        reader = _weight(params, name, "following")
        if reader.shape[1] % old:
            raise ValueError(
                f"`{name}.weight` has shape {tuple(reader.shape)}, whose second axis does not hold the {old} units of "
                f"`{layer}`, each equally often: it does not read them alone. Name the layer that does."
            )
        # A channel that is flattened is read at several positions, which lie side by side.
        positions = reader.shape[1] // old
        by_unit = reader.reshape(reader.shape[0], old, positions, *reader.shape[2:])
        factors = shares.to(reader).reshape(-1, *[1] * (by_unit.dim() - 2))
        shared = by_unit[:, source.to(reader.device)] * factors
        wider[f"{name}.weight"] = shared.reshape(reader.shape[0], num_units * positions, *reader.shape[2:])
    return wider


def _check_params(params: object) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(
            f"`params` is a `{type(params).__name__}`: weights are looked up in a mapping from names to tensors. Pass "
            "such a one; `module.state_dict()` is that of a module."
        )
    for name, value in params.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`params[{name!r}]` is a `{type(value).__name__}`, which has no shape to widen. Pass tensors alone."
            )


def _names(argument: str, names: str | Sequence[str]) -> tuple[str, ...]:
    listed = (names,) if isinstance(names, str) else names
    if not isinstance(listed, Sequence) or not all(isinstance(name, str) for name in listed):
        raise TypeError(_no_name(argument, names))
    return tuple(listed)


def _no_name(argument: str, value: object) -> str:
    return (
        f"`{argument}` is {value!r}, a `{type(value).__name__}`: layers are called by text, as in the names of "
        "`params`. Pass the name of a layer, such as 'hidden' for `hidden.weight`."
    )


def _weight(params: TensorMapping, layer: str, argument: str) -> Tensor:
    weight = params.get(f"{layer}.weight")
    if weight is None or weight.dim() < 2:
        found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
        raise ValueError(
            f"`{argument}` names {layer!r}, but `{layer}.weight` {found}: a layer with units has a weight of shape "
            f"(units, inputs, ...). The weights are {sorted(params)}."
        )
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(
            f"`{argument}` names {layer!r}, but `{layer}.weight` has dtype {weight.dtype}: shares of a weight are "
            "fractions, which it would cut to 0. Pass floating-point weights, such as `weight.float()`."
        )
    return weight


def _entries(params: TensorMapping, beside: Sequence[str], units: int) -> list[str]:
    """Returns the names of tensors with one entry per unit."""
    found: list[str] = []
    for name in beside:
        own = [key for key, value in params.items() if key.startswith(f"{name}.") and value.dim()]
        if not own or any(len(params[key]) != units for key in own):
            shapes = {key: tuple(params[key].shape) for key in own}
            raise ValueError(
                f"`beside` names {name!r}, whose tensors are {shapes}: they do not have one entry for each of {units} "
                "units. Name a layer that has, such as the batch norm after the widened one."
            )
        found += own
    return found
