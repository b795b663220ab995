"""What a module recomputes at backward time: done with the weights that the module was called with.

A module holds other weights in its places only for as long as its call lasts. Activation checkpointing, and any other
pair of hooks on saved tensors, runs parts of the module again when a derivative is taken, after the call. The places
then hold the module's own weights, and the derivative would silently be that of another function.

So hooks that are entered during a call remember what the places held, and put it back while they unpack a tensor.
PyTorch tells nobody of hooks: the method that enters them is wrapped here, for the whole process. Outside of calls of
a module by `FunctionalModule` the wrapper does nothing.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction

from hypertorch.autodiff.missing_derivatives import NotVectorisableError, in_run
from hypertorch.autodiff.parameter_slots import thread
from hypertorch.autodiff.stopped_gradients import in_forward_mode
from hypertorch.errors import ForwardModeError, IncompatibleBackendError


def hold_while_recomputing() -> None:
    """Wraps PyTorch's hooks on saved tensors and its reentrant checkpoint, once for the process."""
    _wrap_hooks()
    _wrap_reentrant_checkpoint()


def _wrap_hooks() -> None:
    """Makes hooks on saved tensors unpack with the weights that were held when they were entered."""
    enter = saved_tensors_hooks.__enter__

    @functools.wraps(enter)
    def enter_holding(hooks: saved_tensors_hooks) -> None:
        if in_run() and in_forward_mode() and _are_nested():
            raise ForwardModeError(
                "the inner problem recomputes a part of what it recomputes at backward time (by checkpoints inside of "
                "`torch.utils.checkpoint`), where forward mode loses its tangents",
                "Switch the inner ones off, or use reverse mode, for example `Reverse()`.",
            )
        calls = [slots.contents() for slots in thread.calls]
        if not calls:
            return enter(hooks)
        unpack = hooks.unpack_hook

        def unpack_holding(packed: Any) -> torch.Tensor:
            with ExitStack() as stack:
                for contents in calls:
                    stack.enter_context(contents.held())
                return unpack(packed)

        hooks.unpack_hook = unpack_holding
        try:
            enter(hooks)
        finally:
            hooks.unpack_hook = unpack  # they may be entered again, elsewhere
        if torch._C._are_functorch_transforms_active():
            # They are entered by now: left so, PyTorch would go on packing tensors by them.
            hooks.__exit__()
            raise NotVectorisableError(
                "a module recomputes a part of itself at backward time (by `torch.utils.checkpoint`, or other hooks on "
                "saved tensors), when the function that is vectorised by vmap is over",
                "Run the tasks one by one with `execution=ht.Execution(tasks='loop')`, or switch its checkpointing "
                "off.",
            )
        return None

    saved_tensors_hooks.__enter__ = enter_holding  # pyright: ignore[reportAttributeAccessIssue]


def saving_nothing() -> saved_tensors_hooks:
    """Surrounds operations whose graph is never gone through: it keeps no tensor."""
    return saved_tensors_hooks(_drop, _drop)


def _drop(_: object) -> Any:
    return None


def _are_nested() -> bool:
    """Returns whether hooks of a checkpoint are active already, or nobody can tell."""
    autograd: Any = getattr(torch._C, "_autograd", None)
    top: Any = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return True
    active = top(True)
    # The hooks of `saving_nothing` recompute nothing.
    return active is not None and active[0] is not _drop


def _wrap_reentrant_checkpoint() -> None:
    """Makes the reentrant kind of checkpointing raise where its derivative would be asked for."""
    apply = CheckpointFunction.apply

    def apply_or_refuse(*arguments: Any) -> Any:
        # It is handed the inputs of its function, and never learns of the weights that the function reads.
        if (in_run() or thread.calls) and torch.is_grad_enabled():
            raise IncompatibleBackendError(
                "`torch.utils.checkpoint` is called with `use_reentrant=True`, which gives no derivative in the "
                "weights to `torch.autograd.grad`: they would silently not be trained. Pass `use_reentrant=False`."
            )
        return apply(*arguments)

    CheckpointFunction.apply = apply_or_refuse  # pyright: ignore[reportAttributeAccessIssue]
