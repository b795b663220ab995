"""Products with Jacobians, by reverse and by forward mode; the only place that knows how they are computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hypertorch.autodiff.zero_tangents import quicken_zero_tangents
from hypertorch.types import TensorDict

K = TypeVar("K", bound=Hashable)


def vjp(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    variables: Mapping[K, Tensor],
    *,
    retain_graph: bool = False,
) -> dict[K, Tensor | None]:
    """Returns the product of the cotangents with the Jacobian of `outputs` in `variables`, by reverse mode.

    None, unlike zeros, says that there is no path from a variable to the outputs: autograd's answer, which is how a
    hyperparameter that does nothing is noticed. Integer variables, and outputs without a graph, have no path.

    Args:
        outputs: tensors computed from `variables`.
        cotangents: one per output, of its shape; None where the output plays no role.
        variables: the leaves by name.
        retain_graph: keep the graph, for another product.
    """
    reached: list[Tensor] = []
    seeds: list[Tensor] = []
    for output, cotangent in zip(outputs, cotangents, strict=True):
        if output.requires_grad and cotangent is not None:
            reached.append(output)
            seeds.append(cotangent)
    names: list[K] = []
    leaves: list[Tensor] = []
    for name, value in variables.items():
        if value.requires_grad:
            names.append(name)
            leaves.append(value)
    result: dict[K, Tensor | None] = dict.fromkeys(variables)
    if reached and leaves:
        # Not `backward`, which writes to `.grad` of the user's tensors.
        gradients = torch.autograd.grad(
            reached, leaves, grad_outputs=seeds, allow_unused=True, retain_graph=retain_graph
        )
        result.update(zip(names, gradients, strict=True))
    return result


class Pushed(NamedTuple):
    """What a function returned, and its Jacobian times every tangent.

    Attributes:
        outputs: the function's outputs.
        tangents: for every output that depends on what was moved, its tangents, of shape `(tangents, *output)`.
        values: what else the function returned, not differentiated.
    """

    outputs: tuple[TensorDict, ...]
    tangents: tuple[TensorDict, ...]
    values: TensorDict


def jvps(
    function: Callable[..., tuple[tuple[TensorDict, ...], TensorDict]],
    primals: Sequence[TensorDict],
    tangents: Sequence[TensorDict],
    *,
    vectorised: bool,
) -> Pushed:
    """Returns a function's outputs and the product of its Jacobian with each of several tangents, by forward mode.

    Vectorised, the function is evaluated once and only the tangents have the further axis: noise is the same for all
    of them, and checks on values still see plain numbers. Else it is evaluated once for each tangent, on dual numbers.

    Args:
        function: `(*dictionaries) -> (dictionaries to differentiate, further values)`. It takes its gradients by
            the route "functional" if vectorised, else by "dual".
        primals: its arguments.
        tangents: for each argument, the entries that are moved: at least one in all, of shape `(tangents, *entry)`.
        vectorised: by `torch.func.vmap` of `torch.func.jvp`, not one by one.
    """
    load_forward_mode()
    # Else autograd would keep a graph of the run beside its tangents, and forward mode would lose its small memory.
    with torch.no_grad():
        pushed = (_jvps_at_once if vectorised else _jvps_one_by_one)(function, primals, tangents)
    # PyTorch gives the tangent of a 0-dimensional tensor times a Python number the number's precision.
    moved = tuple(
        {name: value.to(outputs[name].dtype) for name, value in part.items()}
        for outputs, part in zip(pushed.outputs, pushed.tangents, strict=True)
    )
    return pushed._replace(tangents=moved)


@cache
def load_forward_mode() -> None:
    """Makes the first dual number of this process, and operations with a tangent of zero quick.

    PyTorch then compiles some formulas in a way that it warns of as deprecated, which is no fault of the user's.
    """
    quicken_zero_tangents()
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _jvps_at_once(
    function: Callable[..., tuple[tuple[TensorDict, ...], TensorDict]],
    primals: Sequence[TensorDict],
    tangents: Sequence[TensorDict],
) -> Pushed:
    moving = tuple({name: whole[name] for name in part} for whole, part in zip(primals, tangents, strict=True))

    def at(*duals: TensorDict) -> tuple[tuple, tuple]:
        outputs, values = function(*({**whole, **part} for whole, part in zip(primals, duals, strict=True)))
        # What does not move is left out: a run then carries no zeros for it.
        moved = tuple(
            {name: value for name, value in part.items() if forward_ad.unpack_dual(value).tangent is not None}
            for part in outputs
        )
        # `jvp` refuses a function without outputs. One whose outputs are all constant has none left here.
        return (moved, () if any(moved) else next(filter(None, duals))), (outputs, values)

    def push(*tangent: TensorDict) -> tuple[tuple[TensorDict, ...], tuple[TensorDict, ...], TensorDict]:
        pushed: Any = torch.func.jvp(at, moving, tangent, has_aux=True)
        _, (moved, _), (outputs, values) = pushed
        return moved, outputs, values

    # The outputs themselves do not depend on the tangent: None says so, and refuses what does.
    out_dims: Any = (0, None, None)
    # "same": all tangents belong to one run, whose noise is drawn once.
    moved, outputs, values = torch.func.vmap(push, out_dims=out_dims, randomness="same")(*tangents)
    return Pushed(outputs, moved, values)


def _jvps_one_by_one(
    function: Callable[..., tuple[tuple[TensorDict, ...], TensorDict]],
    primals: Sequence[TensorDict],
    tangents: Sequence[TensorDict],
) -> Pushed:
    count = len(next(value for part in tangents for value in part.values()))
    rows: list[tuple[TensorDict, ...]] = []
    for row in range(count):
        with forward_ad.dual_level():
            duals = (
                {**whole, **{name: _dual(whole[name], value[row]) for name, value in part.items()}}
                for whole, part in zip(primals, tangents, strict=True)
            )
            results, values = function(*duals)
            pairs = [{name: forward_ad.unpack_dual(value) for name, value in part.items()} for part in results]
            # A buffer computed beside the loss has its graph.
            outputs = tuple({name: pair.primal.detach() for name, pair in part.items()} for part in pairs)
            values = {name: forward_ad.unpack_dual(value).primal.detach() for name, value in values.items()}
            rows.append(
                tuple(
                    {name: pair.tangent.detach() for name, pair in part.items() if pair.tangent is not None}
                    for part in pairs
                )
            )
    moved = [{name for row in rows for name in row[position]} for position in range(len(outputs))]
    # An entry that some tangents move has a row for each of them.
    stacked = tuple(
        {
            name: torch.stack([row[position].get(name, torch.zeros_like(value)) for row in rows])
            for name, value in part.items()
            if name in moved[position]
        }
        for position, part in enumerate(outputs)
    )
    return Pushed(outputs, stacked, values)


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    # A tangent takes the memory layout of its value, and there must be room for every entry of it.
    return forward_ad.make_dual(with_room(value), tangent)


def with_room(value: Tensor) -> Tensor:
    """Returns the same values with memory for every entry, unlike an expanded tensor's."""
    return value.contiguous() if 0 in value.stride() else value
