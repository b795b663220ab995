"""Outer variables whose hypergradient stays exactly zero: a path leads from them, but nothing comes back."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from hypertorch import tree
from hypertorch.errors import ZeroHypergradientWarning
from hypertorch.types import TensorMapping

# A zero at one step is often right: a layer in front of one that starts from zero has a zero hypergradient until that
# one has moved, and a layer in front of two such until both have.
_LOOKS = 5


class ZeroWatch:
    """Watches the first outer steps of a run, and warns of hypergradients that are zero at all of them.

    Cost: at the first outer step one reduction per outer variable and one wait for the device; at the next four the
    same for those variables only that were zero at every step before.

    Args:
        names: the outer variables.
        first: the first outer step of the run.
        last: the last one.
    """

    def __init__(self, names: Collection[str], *, first: int, last: int) -> None:
        self._zero = list(names)
        self._first = first
        self._last = min(last, first + _LOOKS - 1)

    def look(self, step: int, grads: TensorMapping, allowed: Collection[str]) -> None:
        """Looks at a hypergradient; warns at the last of the steps that are looked at.

        Args:
            step: the outer step.
            grads: its hypergradient.
            allowed: names whose zeros are expected.
        """
        # A run of a single step shows too little.
        if not self._zero or step > self._last or self._last == self._first:
            return
        looked_at = {name: grads[name] for name in self._zero if name not in allowed and grads[name].numel()}
        moved = tree.not_zero(looked_at)
        # What has moved once is not looked at again: a zero later on is no sign of a mistake.
        self._zero = [name for name in looked_at if name not in moved]
        if self._zero and step == self._last:
            warnings.warn(
                ZeroHypergradientWarning(self._message(), tuple(self._zero)), stacklevel=7
            )  # the caller of `run`

    def _message(self) -> str:
        others = f" (so are those of {self._zero[1:]})" if self._zero[1:] else ""
        return (
            f"the hypergradient of `hparams[{self._zero[0]!r}]` is exactly zero at each of the outer steps "
            f"{self._first} to {self._last}{others}, although a path leads from it to the outer loss: no step will "
            "move it. A clamp or sigmoid may be saturated at its value, a rounding or a sign may have no slope, or the "
            "setting may act in no inner step that is taken (a momentum with `num_steps=1`). Start from another value, "
            "replace the operation, or list the name in `allow_unused` to accept zeros."
        )
