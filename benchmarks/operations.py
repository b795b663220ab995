"""What a run asks of PyTorch, in figures that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Operations(TorchDispatchMode):
    """Counts the calls of PyTorch's dispatcher, on the way back too, and the bytes that they read and write.

    Attributes:
        operations: calls, views and copies among them.
        moved_bytes: of all tensors that the calls take or return, by their shapes; those of views do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.moved_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts it."""
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if not _is_view(func):
            self.moved_bytes += sum(
                value.numel() * value.element_size()
                for value in tree_iter((args, kwargs, result))
                if isinstance(value, torch.Tensor)
            )
        return result


def counted(run: Callable[[], object]) -> dict[str, int]:
    """Returns `operations` and `moved_bytes` of a run."""
    with Operations() as found:
        run()
    return {"operations": found.operations, "moved_bytes": found.moved_bytes}


def _is_view(func: Any) -> bool:
    aliases = (argument.alias_info for argument in func._schema.arguments)
    return any(alias is not None and not alias.is_write for alias in aliases)
