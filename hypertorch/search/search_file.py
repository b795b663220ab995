"""The evaluations of a search, in memory or in a file that an interrupted search goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hypertorch.errors import CheckpointError
from hypertorch.outer.fingerprint import changes
from hypertorch.outer.storage.tensor_files import read_tensor_file, write_tensor_file
from hypertorch.types import TensorDict

_ROWS = ("points", "values", "gradients")


class SearchFile:
    """Points, values and gradients, in their order; with a path, they are on disk after each.

    Args:
        path: the file, read if it exists; None for memory alone.
        settings: what the choice of the points depends on, as texts.
        dimension: of a point.

    Attributes:
        points: shape `(evaluations, dimension)`, float64.
        values: shape `(evaluations,)`; NaN for an evaluation that failed.
        gradients: shape `(evaluations, dimension)`; NaN where it is not known.

    Raises:
        CheckpointError: if the file is damaged, or was written with other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, str], dimension: int) -> None:
        self._path, self._settings = path, dict(settings)
        self.points = torch.empty((0, dimension), dtype=torch.float64)
        self.values, self.gradients = self.points[:, 0], self.points
        if path is None or not path.exists():
            return
        if not path.is_file():
            raise ValueError(f"`file` is {str(path)!r}, which is no file: a search is written into one. Name a file.")
        rows, written = read_tensor_file(path, remedy="Delete it, and the search starts anew.")
        differing = changes(written, self._settings)
        if differing:
            raise CheckpointError(
                f"`file` is {str(path)!r}, which was written by another search: {'; '.join(differing.values())}. Its "
                "figures would be those of neither. Pass the same problem and arguments, or another file."
            )
        self.points, self.values, self.gradients = (rows[name] for name in _ROWS)

    def add(self, point: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Appends an evaluation.

        Args:
            point: shape `(dimension,)`.
            value: scalar.
            gradient: shape `(dimension,)`.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        self.points = torch.cat([self.points, point.unsqueeze(0)])
        self.values = torch.cat([self.values, value.unsqueeze(0)])
        self.gradients = torch.cat([self.gradients, gradient.unsqueeze(0)])
        if self._path is not None:
            rows: TensorDict = dict(zip(_ROWS, (self.points, self.values, self.gradients), strict=True))
            write_tensor_file(self._path, rows, self._settings)
