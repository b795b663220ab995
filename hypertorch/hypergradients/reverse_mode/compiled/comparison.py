"""Programs that are new are not trusted: what they give is compared with the same steps without compilation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError

# Steps of a new program that are compared with the same steps without compilation, at either end of the horizon.
_STEPS_COMPARED = 8


def compared(steps: range) -> list[range]:
    """Returns which steps are compared: the first and the last ones. What depends on the index may show late."""
    first, last = steps[:_STEPS_COMPARED], steps[-_STEPS_COMPARED:]
    return [first] if first == last else [first, last]


def compare(what: str, found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Raises unless what a new program gives is what the same steps give without compilation, up to rounding.

    PyTorch's compiler has made wrong code of right loops, without a word.

    Raises:
        NotCompilableError: naming what differs.
    """
    for got, right in zip(found, expected, strict=True):
        if got is not None and got.numel() and not _are_equal(got, right):
            raise NotCompilableError(f"the program gives other numbers for {what} than the same steps without it")


def _are_equal(got: Tensor, right: Tensor | None) -> bool:
    right = torch.zeros_like(got) if right is None else right.detach()
    if not tree.is_differentiable(got):
        return torch.equal(got, right)
    # Half of the digits: a few steps lose less to rounding, and wrong code has none of them right.
    allowed = torch.finfo(got.dtype).eps ** 0.5 * max(float(right.abs().max()), 1e-30)
    return float((got - right).abs().max()) <= allowed or not bool(torch.isfinite(right).all())
