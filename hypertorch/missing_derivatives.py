"""What PyTorch cannot differentiate twice, forwards or for several tangents at once, explained to the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

from hypertorch.errors import ForwardModeError, IncompatibleBackendError


@contextmanager
def second_order() -> Iterator[None]:
    """Makes attention use its math kernel, the only one with a second derivative, and explains missing derivatives.

    Raises:
        IncompatibleBackendError: if an operation in the inner loss has no second derivative in PyTorch.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        operation = re.search(r"derivative for '?([\w:]+)'? is not implemented|([\w:]+) is not implemented", str(error))
        if operation is None:
            raise
        name = operation.group(1) or operation.group(2)
        raise IncompatibleBackendError(
            f"the inner loss uses `{name}`, which PyTorch cannot differentiate twice ({error}): the hypergradient of "
            "an unrolled gradient step needs that second derivative. Write the operation out of simpler ones."
        ) from error


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
    operation = _NO_FORWARD_DERIVATIVE.search(text)
    if operation is not None:
        # PyTorch has another implementation, with a forward derivative, of what oneDNN does (an LSTM).
        switch = ", switch oneDNN off (`torch.backends.mkldnn.flags(enabled=False)`)" if "mkldnn" in text else ""
        return (
            f"the inner problem uses `{operation.group(1) or operation.group(2)}`, which has no forward derivative in "
            "PyTorch: no tangent can be pushed through it",
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
