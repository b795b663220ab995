"""Sums and products with a tangent of zero, without hundreds of calls of Python to find their shapes.

In forward mode an operand that does not move has a tangent of zero, a tensor without memory. A sum or product with one
asks PyTorch's meta device for the shape and precision of the result. PyTorch 2.13 finds those by functions in Python
that serve symbolic shapes too, and take much longer than the sum or product of a small net.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Number = bool | int | float | complex


def quicken_zero_tangents() -> None:
    """Gives PyTorch shorter kernels for tensors without memory, for the life of the process.

    The results are the same, but for a tensor without axes and a number of Python: PyTorch's own has the precision of
    the number. For good, because kernels must not change while another thread calls them: call it once.
    """
    with warnings.catch_warnings():
        # PyTorch tells, once in a process, that kernels are replaced.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, kernel in _KERNELS.items():
            _LIBRARY.impl(f"{name}.Tensor", kernel, "ZeroTensor")


_LIBRARY = torch.library.Library("aten", "IMPL")


# At least one operand of each is a zero without memory. A number of Python is one that PyTorch makes a tensor of: it
# stands for its own value, or for the tangent of a number, whose value is zero too.
def _sum(one: Tensor | Number, other: Tensor | Number, *, alpha: Number = 1) -> Tensor:
    with torch._C.DisableTorchFunction():
        size, dtype, device = _form(one, other)
        if not _is_zero(one):  # then the other is
            return _spread(one, size, dtype, device)
        if _is_zero(other):
            return _zero(size, dtype, device)
        spread = _spread(other, size, dtype, device)
        return spread if alpha == 1 else spread.mul(alpha)


def _difference(one: Tensor | Number, other: Tensor | Number, *, alpha: Number = 1) -> Tensor:
    return _sum(one, other, alpha=-alpha)


def _product(one: Tensor | Number, other: Tensor | Number) -> Tensor:
    with torch._C.DisableTorchFunction():
        return _zero(*_form(one, other))


def _quotient(one: Tensor | Number, other: Tensor | Number) -> Tensor:
    with torch._C.DisableTorchFunction():
        size, dtype, device = _form(one, other)
        if not (dtype.is_floating_point or dtype.is_complex):
            dtype = torch.get_default_dtype()
        if _is_zero(other):  # as PyTorch's own, whatever the sign
            return torch.full(size, math.nan if _is_zero(one) else math.inf, dtype=dtype, device=device)
        return _zero(size, dtype, device)


_KERNELS: dict[str, Callable[..., Tensor]] = {"add": _sum, "sub": _difference, "mul": _product, "div": _quotient}


def _form(one: Tensor | Number, other: Tensor | Number) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Returns the shape, the precision and the device of what an operation on two operands gives."""
    if not isinstance(other, Tensor):
        assert isinstance(one, Tensor)
        return one.shape, torch.result_type(one, other), one.device
    if not isinstance(one, Tensor):
        return other.shape, torch.result_type(one, other), other.device
    # `torch.broadcast_shapes` is one of the slow functions.
    size = one.shape if one.shape == other.shape else torch._C._infer_size(one.shape, other.shape)
    dtype = torch.result_type(one, other)
    # A number of the host goes with tensors of any device.
    return size, dtype, other.device if one.device.type == "cpu" else one.device


def _is_zero(operand: Tensor | Number) -> bool:
    return isinstance(operand, Tensor) and operand._is_zerotensor()


def _zero(size: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    make: Any = torch._efficientzerotensor  # pyright: ignore[reportPrivateImportUsage]
    return make(size, dtype=dtype, device=device)


def _spread(operand: Tensor | Number, size: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an operand in the form of the result, with memory of its own."""
    if not isinstance(operand, Tensor):
        return torch.full(size, operand, dtype=dtype, device=device)
    return torch.ops.aten._to_copy.default(operand.expand(size), device=device, dtype=dtype)
