"""The identity `<u, J v> = <J'u, v>`, by which a derivative of one mode is compared with that of another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypertorch import tree
from hypertorch.hypergradients.reverse_mode.sweep import Grads
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict

T = TypeVar("T")

_ROUNDING = 100.0  # in units of machine epsilon: what the terms of a product may lose beside their size
_WORDS = {"variables": "the hyperparameters", "params": "the params", "dynamics": "the optimiser's buffers"}


class Products:
    """`J'u` of a function by reverse over reverse for a generic `u`, and generic directions `v` to compare it along.

    The entries of `u` and `v` are normal and independent, so that no wrong entry of the Jacobian `J` of another way to
    differentiate goes unseen. What the function is of has names: `variables.name`, `params.name`, `dynamics.name`.

    A step maps most of the state to itself, and its inner gradient adds a small part to `J'u`: an error is measured
    relative to that part. The directions are scaled by its inverse, so that no entry's error is lost beside another's
    size.

    Attributes:
        outputs: the function's outputs.
        cotangents: `u`, one for each tensor of the outputs; None for integers.
        directions: `v`, by name.

    Args:
        what: names the function, for messages.
        outputs: its outputs.
        cotangents: as above.
        inputs: what it is a function of, by name.
        vjps: `J'u` by name; None where there is no path.
        past: the part of it that goes past the inner gradient.
        inner_eps: machine epsilon of the inner loss's products where they are coarser than the state; else 0.
    """

    def __init__(
        self,
        what: str,
        outputs: InnerState,
        cotangents: Sequence[Tensor | None],
        inputs: TensorDict,
        vjps: Grads,
        past: Grads,
        *,
        inner_eps: float = 0.0,
    ) -> None:
        self.outputs, self.cotangents = outputs, cotangents
        self._what = what
        self._vjps = vjps
        real = [value for value in outputs.tensors() if tree.is_differentiable(value)]
        eps = max([torch.finfo(value.dtype).eps for value in real], default=0.0)
        self._tolerance = min(10.0 * max(inner_eps, eps) ** 0.5, 0.1)
        self._rounding = _ROUNDING * eps
        moved = {name: value for name, value in inputs.items() if tree.is_differentiable(value)}
        # What is no more than rounding of the outputs, or far below the others, has no size of its own.
        least = self._rounding * math.hypot(*map(_norm, real))
        sizes = {
            name: max(_size(vjps[name], past.get(name)), least / max(_norm(value), 1.0), 1e-30)
            for name, value in moved.items()
        }
        largest = {part: max([0.0, *finite]) for part, finite in _by_part(sizes).items()}
        self._sizes = {name: max(size, 1e-3 * largest[_part(name)]) for name, size in sizes.items()}
        # Divided by the size of its part of J'u, each entry weighs about 1 in the product.
        self.directions = {
            name: normal_like(value, 1 + position) / self._sizes[name]
            for position, (name, value) in enumerate(moved.items())
        }

    def of_outputs(self, tangents: InnerState, row: int) -> float:
        """Returns `<u, J v>`.

        Args:
            tangents: `J` times several directions, of shape `(directions, *entry)`; zero for an entry that is missing.
            row: which of the directions.
        """
        found = by_name({}, tangents.params, tangents.dynamics)
        names = by_name({}, self.outputs.params, self.outputs.dynamics)
        return sum(
            _inner(cotangent, found[name][row])
            for name, cotangent in zip(names, self.cotangents, strict=True)
            if name in found
        )

    def of_inputs(self, vjps: Grads, names: Iterable[str]) -> float:
        """Returns `<J'u, v>` for a `v` with these entries and no other."""
        return sum(_inner(vjps[name], self.directions[name]) for name in names)

    def fault(self, found: float, names: Sequence[str]) -> str | None:
        """Returns how a number differs from `<J'u, v>`, in words; None if it does not.

        What is infinite or NaN by either way is not judged: a run refuses it, and says more of it.

        Args:
            found: the number, by the way that is judged.
            names: of the entries of `v`: all of the variables, of the params or of the optimiser's buffers, or one.
        """
        expected = self.of_inputs(self._vjps, names)
        if not (math.isfinite(expected) and math.isfinite(found)):
            return None
        gap, size = abs(found - expected), math.sqrt(len(names))
        terms = math.hypot(*(_norm(self._vjps[name]) / self._sizes[name] for name in names))
        if gap <= self._tolerance * size + self._rounding * terms:
            return None
        where = f"`{names[0].partition('.')[2]}`" if len(names) == 1 else _WORDS[_part(names[0])]
        return (
            f"the derivative of {self._what} in {where} differs by {gap / size:.1e}, relative, from that of reverse "
            "over reverse (PyTorch has a wrong derivative of an operation, or the two take different sides of a kink)"
        )


class CoarsestPrecision(TorchDispatchMode):
    """Notes the coarsest precision that is computed in: a loss may leave that of the params (by `.float()`, autocast).

    Attributes:
        eps: the largest machine epsilon of a result so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree.batch_tensors(result):
            if tree.is_differentiable(value):
                self.eps = max(self.eps, torch.finfo(value.dtype).eps)
        return result


def generic_cotangents(state: InnerState) -> list[Tensor | None]:
    """Returns a generic cotangent for each tensor of a state; None for integers."""
    return [
        # Seeds apart from those of the directions, of which u must be independent.
        normal_like(value, 1000 + position) if tree.is_differentiable(value) else None
        for position, value in enumerate(state.tensors())
    ]


def normal_like(value: Tensor, seed: int) -> Tensor:
    """Returns normal numbers of a generator of their own: along them no sum is zero by symmetry."""
    dtype = torch.complex128 if value.is_complex() else torch.float64
    # Drawn on the host, in double precision: the same directions on every device.
    numbers = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return numbers.to(device=value.device, dtype=value.dtype)


def by_name(variables: Mapping[str, T], params: Mapping[str, T], dynamics: Mapping[str, T]) -> dict[str, T]:
    """Returns what belongs to entries of the variables and of a state under the names that `Products` has for them."""
    parts = {"variables": variables, "params": params, "dynamics": dynamics}
    return {f"{part}.{name}": value for part, entries in parts.items() for name, value in entries.items()}


def _part(name: str) -> str:
    return name.partition(".")[0]


def _by_part(sizes: Mapping[str, float]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {}
    for name, size in sizes.items():
        parts.setdefault(_part(name), []).extend([size] if math.isfinite(size) else [])
    return parts


def _size(vjp: Tensor | None, past: Tensor | None) -> float:
    """Returns the size of the part through the inner gradient; of the whole where nothing goes through it."""
    if vjp is None:
        return 0.0
    return _norm(vjp if past is None else vjp - past) or _norm(vjp)


def _norm(value: Tensor | None) -> float:
    return 0.0 if value is None else float(torch.linalg.vector_norm(value.detach(), dtype=_exact(value)))


def _inner(left: Tensor | None, right: Tensor) -> float:
    return 0.0 if left is None else float((left.conj() * right).detach().sum(dtype=_exact(left)).real)


# Products are summed in double precision, so that the comparison adds no rounding of its own.
def _exact(value: Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64
