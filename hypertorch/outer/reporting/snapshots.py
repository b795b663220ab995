"""What is shown of the outer variables every so often: tensors and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from hypertorch.checks.argument_types import check_fields
from hypertorch.checks.values import is_count
from hypertorch.outer.reporting.loggers import Logger
from hypertorch.types import TensorDict, TensorMapping

Shown: TypeAlias = Callable[[TensorDict], TensorMapping]
"""What to show of outer variables, by name."""


def _everything(hparams: TensorDict) -> TensorMapping:
    return hparams


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshots:
    """Hands tensors and pictures of the outer variables to the loggers, before the first step and after the last, too.

    Cost: what the two functions do, and a copy to the host by the loggers; nothing at other steps.

    Args:
        every: outer steps between two snapshots, at least 1.
        tensors: which tensors, of the outer variables; by default all of these.
        pictures: which pictures, of the outer variables: shape `(1, height, width)` or `(3, height, width)`, entries
            from 0 to 1; None for none.

    Raises:
        ValueError: if `every` is below 1.
    """

    every: int
    tensors: Shown = _everything
    pictures: Shown | None = None

    def __post_init__(self) -> None:
        check_fields(self, "tensors", "pictures")
        if not is_count(self.every):
            raise ValueError(
                f"`every` is {self.every!r}: it counts outer steps between two snapshots. Pass a whole number of at "
                "least 1."
            )

    def show(self, step: int, hparams: TensorDict, loggers: Sequence[Logger]) -> None:
        """Hands what is to be shown to the loggers that take it.

        Args:
            step: outer steps done.
            hparams: the outer variables after them.
            loggers: those of the run.

        Raises:
            TypeError: if what is to be shown is no dict of tensors.
            ValueError: if a picture has another shape, or entries outside of 0 to 1.
        """
        tensors = self.tensors(hparams)
        pictures = {} if self.pictures is None else self.pictures(hparams)
        for which, shown in (("tensors", tensors), ("pictures", pictures)):
            if not isinstance(shown, Mapping) or not all(isinstance(value, Tensor) for value in shown.values()):
                raise TypeError(
                    f"`Snapshots.{which}` returned {shown!r}, a {type(shown).__name__}: loggers take tensors by name. "
                    "Return a dict from names to tensors."
                )
        for name, picture in pictures.items():
            _check_picture(name, picture)
        for logger in loggers:
            logger.log_tensors(step, tensors)
            logger.log_pictures(step, pictures)


def takes_snapshots(logger: Logger) -> bool:
    """Returns whether a logger does anything with tensors or pictures."""
    kind = type(logger)
    return kind.log_tensors is not Logger.log_tensors or kind.log_pictures is not Logger.log_pictures


def _check_picture(name: str, picture: object) -> None:
    shape = tuple(getattr(picture, "shape", ()))
    is_picture = len(shape) == 3 and shape[0] in (1, 3) and 0 not in shape
    # Not `all(0 <= x <= 1)` negated by parts: NaN must not pass.
    if not is_picture or not bool(((picture >= 0) & (picture <= 1)).all()):  # pyright: ignore[reportOperatorIssue]
        raise ValueError(
            f"`Snapshots.pictures` returned {name!r} of shape {shape}: a picture has the shape (1, height, width) or "
            "(3, height, width) and entries from 0 to 1. Scale and clamp it, for example by "
            "`(x / x.abs().max() / 2 + 0.5)[None]`."
        )
