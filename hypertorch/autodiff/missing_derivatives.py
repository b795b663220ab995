"""What PyTorch cannot differentiate twice, forwards or for several tangents at once, explained to the user."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._C import _functions
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypertorch.errors import ForwardModeError, IncompatibleBackendError


class _Thread(threading.local):
    """How many runs of an inner loop are under way in a thread."""

    def __init__(self) -> None:
        self.runs = 0


_thread = _Thread()


def in_run() -> bool:
    """Returns whether this thread is inside `second_order`."""
    return _thread.runs > 0


@contextmanager
def second_order() -> Iterator[None]:
    """Surrounds a run: attention has its only kernel with a second derivative, and missing ones are explained.

    Raises:
        IncompatibleBackendError: if an operation in the inner loss has no second derivative in PyTorch.
    """
    # A count and not a switch: a run may be started inside another one.
    _thread.runs += 1
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        advice = _second_order_advice(str(error))
        if advice is None:
            raise
        raise IncompatibleBackendError(advice) from error
    finally:
        _thread.runs -= 1


_NO_SECOND_DERIVATIVE = re.compile(r"derivative for '?([\w:]+)'? is not implemented|([\w:]+) is not implemented")


def _second_order_advice(text: str) -> str | None:
    """Returns what PyTorch's error means for second derivatives and what to do; None if it is of another kind."""
    # PyTorch raises a plain `RuntimeError` for each of these: only its words tell them apart.
    if "sparse" in text.lower():
        return (
            f"the inner loss has a sparse gradient, of which PyTorch takes no second derivative ({text}). Make it "
            "dense: `sparse=False` in `nn.Embedding` or `F.embedding`."
        )
    if "does not currently support double backward" in text or "donated buffers" in text:
        return (
            "the inner loss calls a function or module that is compiled already, and PyTorch takes no second "
            f"derivative of compiled code ({_first_line(text)}). Hand over the plain one, and let `Reverse("
            "compile=True)` compile the step with its derivative."
        )
    if "region computed under selective activation checkpoint" in text:
        return (
            "the inner loss uses selective activation checkpointing (`context_fn` of `torch.utils.checkpoint`), which "
            "PyTorch goes through once only: a hypergradient does twice. Call `checkpoint` without `context_fn`."
        )
    operation = _NO_SECOND_DERIVATIVE.search(text)
    if operation is None:
        return None
    name = operation.group(1) or operation.group(2)
    return (
        f"the inner loss uses `{name}`, which PyTorch cannot differentiate twice ({text}): the hypergradient of "
        "an unrolled gradient step needs that second derivative. Write the operation out of simpler ones."
    )


def _refuse_once_differentiable() -> None:
    """Makes the backward pass of a `once_differentiable` function raise where a second derivative is to be taken.

    PyTorch raises only if it comes by the place where that derivative is missing. `torch.autograd.grad` does not, since
    none of its inputs lies behind, and would silently leave out what passes through.
    """
    delayed_error = _functions.DelayedError

    @functools.wraps(delayed_error)
    def raise_at_once(message: Any, count: int) -> Any:
        # `torch.compile` makes errors of this class too, to stand for the graphs of its arguments.
        if in_run() and "once_differentiable" in str(message):
            raise IncompatibleBackendError(
                "the inner loss uses a `torch.autograd.Function` whose backward pass is marked `once_differentiable`: "
                "it has no second derivative, which the hypergradient of an unrolled gradient step needs. Compute the "
                "backward pass from `ctx.saved_tensors` by differentiable operations and drop the mark, or use "
                "`FirstOrder()`, which drops second derivatives."
            )
        return delayed_error(message, count)

    # PyTorch has no hook at this place. Outside of a run the class that stands here now does what its own does.
    _functions.DelayedError = raise_at_once


_refuse_once_differentiable()


def _first_line(text: str) -> str:
    return text.splitlines()[0].rstrip(".")


class NotVectorisableError(ForwardModeError, RuntimeError):
    """An operation cannot be vectorised over tangents.

    It is a `RuntimeError` too, as PyTorch's own is: who can run the tasks one by one instead then does so.
    """


_NO_FORWARD_DERIVATIVE = re.compile(
    r"forward AD with ([\w:]+) that does not support it|must implement the jvp function for custom (autograd.Function)"
)
_NOT_VECTORISED = re.compile(
    r"vmap|batching rule|functorch|torch\.func|saved tensor hooks|mutate a captured Tensor|access data pointer",
    flags=re.IGNORECASE,
)


@contextmanager
def forward_mode(one_by_one: str | None) -> Iterator[None]:
    """Explains what cannot be differentiated in forward mode, or not for several tangents at once.

    Args:
        one_by_one: how the user asks for one tangent at a time; None if that is what is done.

    Raises:
        ForwardModeError: instead of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if limit := _limit(text):
            raise ForwardModeError(*limit) from error
        if one_by_one is not None and _NOT_VECTORISED.search(text):
            raise NotVectorisableError(
                "the inner problem cannot be vectorised (by vmap) over several tangents. PyTorch says: "
                f"{text.splitlines()[0].removesuffix('.')}",
                f"Push one at a time with `{one_by_one}`, or use reverse mode, for example `Reverse()`.",
            ) from error
        raise


def _limit(text: str) -> tuple[str, str] | None:
    """Returns what PyTorch's error means for forward mode, and what to do; None if it is of another kind."""
    if "sparse" in text:
        return (
            "the inner problem has a sparse gradient, which has no forward derivative in PyTorch",
            "Make it dense: `sparse=False` in `nn.Embedding` or `F.embedding`.",
        )
    operation = _NO_FORWARD_DERIVATIVE.search(text)
    if operation is not None:
        # PyTorch has another implementation, with a forward derivative, of what oneDNN does (an LSTM).
        switch = ", switch oneDNN off (`torch.backends.mkldnn.flags(enabled=False)`)" if "mkldnn" in text else ""
        return (
            f"the inner problem uses `{operation.group(1) or operation.group(2)}`, which has no forward derivative in "
            "PyTorch: no tangent can pass through it",
            f"Write it out of simpler operations{switch}, or use reverse mode, for example `Reverse()`.",
        )
    if "ZeroTensors are immutable" in text:
        return (
            f"the inner problem uses an operation that cannot push a tangent past a constant argument ({text})",
            "`mse_loss` is one: write it out, as `(outputs - targets).square().mean()` for a mean. Or use reverse "
            "mode, for example `Reverse()`.",
        )
    if "Nested forward mode AD" in text:
        return (
            "the inner problem takes forward derivatives of its own, which PyTorch cannot nest into dual numbers",
            "Push several tangents at once (a `chunk_size` above 1), or use reverse mode, for example `Reverse()`.",
        )
    return None
