"""The inner state that a step maps to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hypertorch import tree
from hypertorch.types import TensorDict


class InnerState(NamedTuple):
    """The inner state `s = (w, v)`: params (with untrained buffers among them), and the optimiser's buffers."""

    params: TensorDict
    dynamics: TensorDict

    def tensors(self) -> list[Tensor]:
        """Returns every tensor, in a fixed order."""
        return [*self.params.values(), *self.dynamics.values()]

    def names(self) -> list[str]:
        """Returns the names of `tensors()`: of params as they are, of the optimiser's buffers with `dynamics.`."""
        # A buffer of the optimiser may have the name of a param.
        return [*self.params, *(f"dynamics.{name}" for name in self.dynamics)]

    def replace_tensors(self, tensors: list[Tensor]) -> InnerState:
        """Returns a state of the same names that holds these tensors."""
        split = len(self.params)
        return InnerState(
            dict(zip(self.params, tensors[:split], strict=True)),
            dict(zip(self.dynamics, tensors[split:], strict=True)),
        )

    def detached(self) -> InnerState:
        """Returns the same state cut from its graph."""
        return InnerState(tree.detach(self.params), tree.detach(self.dynamics))
