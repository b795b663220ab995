"""Figures of an outer run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import checked_path
from hypertorch.outer.reporting.loggers import Logger, written_or_named
from hypertorch.types import TensorMapping


class TensorBoardLogger(Logger):
    """Writes every figure as a TensorBoard scalar, and of snapshots tensors as histograms and pictures as images.

    A tensor of one entry is a scalar, too. A histogram leaves out entries that are not finite.

    Args:
        directory: folder of the event files; made when the first record comes.
    """

    @typed("directory")
    def __init__(self, directory: str | Path) -> None:
        self._directory = checked_path("directory", directory)
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one scalar per figure."""
        for name, value in scalars.items():
            self._open().add_scalar(name, value, step)

    def log_tensors(self, step: int, tensors: TensorMapping) -> None:
        """Writes one histogram per tensor of several entries, and one scalar per tensor of one."""
        for name, tensor in tensors.items():
            finite = tensor.detach()[tensor.isfinite()]
            if tensor.numel() == 1:
                self._open().add_scalar(name, tensor.detach().item(), step)
            elif len(finite):
                self._open().add_histogram(name, finite.cpu(), step)

    def log_pictures(self, step: int, pictures: TensorMapping) -> None:
        """Writes one image per picture."""
        for name, picture in pictures.items():
            self._open().add_image(name, picture.detach().cpu(), step)

    def _open(self) -> SummaryWriter:
        if self._writer is None:  # made late, so that a run that fails before its first record leaves no file
            with written_or_named(self._directory):
                self._writer = SummaryWriter(str(self._directory), purge_step=self._purge_step)
            # Once: a file that is opened again later must not hide what this one wrote.
            self._purge_step = None
        return self._writer

    def rewind(self, step: int) -> None:
        """Makes TensorBoard hide what earlier event files hold after a step."""
        self.close()
        # Event files can only grow: TensorBoard hides records from this step on that an earlier file holds.
        self._purge_step = step + 1

    def close(self) -> None:
        """Writes pending events and closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
