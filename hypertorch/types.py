"""Names for the few data types that pass between the parts of the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

TensorDict: TypeAlias = dict[str, Tensor]
"""A flat dictionary of named tensors: params, hparams, buffers of an optimiser."""

TensorMapping: TypeAlias = Mapping[str, Tensor]
"""The same, where it is only read."""

Batch: TypeAlias = Any
"""Data of one step: a tensor, or tuples, lists, dicts and named tuples of tensors, or None."""
