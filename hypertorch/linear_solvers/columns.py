"""Dictionaries of tensors as flat vectors, one per task, and the columns of a linear map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypertorch.linear_solvers.base import Matvec
from hypertorch.types import TensorDict


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Where the entries of a dictionary lie in a flat vector, one vector for each task.

    Args:
        example: a dictionary of the names, shapes and dtypes.
        tasks_axis: whether its tensors have a leading tasks axis.
    """

    example: TensorDict
    tasks_axis: bool

    @property
    def num_entries(self) -> int:
        """Length of the vector of one task."""
        return sum(self._rows(value).shape[1] for value in self.example.values())

    def vectors(self, values: TensorDict) -> Tensor:
        """Returns the entries as one vector for each task, shape `(tasks, entries)`; one task without a tasks axis."""
        # In the order of the example, by name: a product may return its entries in another one.
        return torch.cat([self._rows(values[name]) for name in self.example], dim=1)

    def values(self, vectors: Tensor) -> TensorDict:
        """Returns a dictionary from vectors of shape `(tasks, entries)`."""
        parts = vectors.split([self._rows(value).shape[1] for value in self.example.values()], dim=1)
        return {
            # Joined, entries of several types have the widest; the map must get back each in its own.
            name: part.reshape(value.shape).to(value.dtype)
            for (name, value), part in zip(self.example.items(), parts, strict=True)
        }

    def columns(self, matvec: Matvec, positions: Sequence[int]) -> Tensor:
        """Returns columns of the matrix of a map, the same ones for each task, shape `(tasks, entries, positions)`.

        Cost: one product for each.
        """
        zeros = torch.zeros_like(self.vectors(self.example))
        columns: list[Tensor] = []
        for position in positions:
            # One unit vector for all tasks at once: the map is block-diagonal, so each task gets its own column.
            unit = zeros.clone()
            unit[:, position] = 1.0
            columns.append(self.vectors(matvec(self.values(unit))))
        return torch.stack(columns, dim=2)

    def _rows(self, value: Tensor) -> Tensor:
        return value.reshape(len(value), -1) if self.tasks_axis else value.reshape(1, -1)
