"""Forward mode made to follow `torch.no_grad()` and `.data`, which stop gradients.

PyTorch's forward mode goes through both: a loss with a pseudo-label or a target network in it would have another
derivative by forward mode than by reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hypertorch.errors import ForwardModeError

T = TypeVar("T")


def stopping_tangents(function: Callable[..., T]) -> Callable[..., T]:
    """Returns a function of the user as it is; in forward mode, with tangents stopped where gradients are.

    Namely inside `torch.no_grad()` (or any other way to switch gradients off) and past `.data`. And a mean squared
    error by `mse_loss` is written out, which PyTorch cannot push a tangent through past a constant target. Compiled
    functions are not mended: there mixed mode is compared with reverse mode.

    Cost: nothing outside of forward mode; there, a Python call for every operation of the function.

    Raises:
        ForwardModeError: (from the function) in forward mode, for a tensor hook, which changes gradients only.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return function
    return partial(_stopped, function)


def _stopped(function: Callable[..., T], *arguments: Any) -> T:
    # A function may return with gradients switched off: tangents are off then too, and are put back in the end.
    before = torch._C._is_fwd_grad_enabled()
    try:
        # Where gradients are switched off from the start, nothing would tell what the function switches itself.
        with torch.enable_grad(), _StoppingTangents():
            return function(*arguments)
    finally:
        torch._C._set_fwd_grad_enabled(before)


def in_forward_mode() -> bool:
    """Returns whether dual numbers are being computed with."""
    return forward_ad._current_level >= 0


class _StoppingTangents(TorchFunctionMode):
    """Switches tangents together with gradients."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # `no_grad`, `enable_grad` and `set_grad_enabled` all come by here, as contexts and as decorators.
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])
        elif func == _DATA:
            return args[0].detach()
        elif func is F.mse_loss and _is_plain_mean(args, kwargs or {}):
            return (args[0] - args[1]).square().mean()
        elif func is torch.Tensor.register_hook:
            raise ForwardModeError(
                "the inner problem registers a hook on a tensor, which changes gradients but no tangents: forward mode "
                "would have another derivative",
                "Leave the hook out, and change gradients in the dynamics (`ht.dynamics.Clipped`) or in the loss.",
            )
        return func(*args, **(kwargs or {}))


def _is_plain_mean(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    others = (*args[2:], *(kwargs.get(name) for name in ("size_average", "reduce", "weight")))
    # What is left to PyTorch fails loudly there, and is explained.
    is_mean = kwargs.get("reduction", "mean") == "mean" and all(value is None for value in others)
    return is_mean and args[0].shape == args[1].shape


_DATA: Any = torch.Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
