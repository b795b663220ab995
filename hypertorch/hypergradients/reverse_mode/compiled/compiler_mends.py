"""Mends for what PyTorch's compiler gets silently wrong, made on every graph before the compiler's own changes.

- It writes to the entries of an expanded tensor as if each had memory of its own. The tangent of a constant is such a
  tensor (one zero, seen as many), so that forward mode through an index that a loss takes of its arguments would be
  wrong by any amount. https://github.com/pytorch/pytorch/issues/183986
- It fuses a matrix product and a sum with a factor, `w.add(a @ b, alpha=-lr)`, and drops the factor. That is the step
  of gradient descent on the weights of a linear layer.

Loading this module loads the compiler, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

_aten: Any = torch.ops.aten
# What other writes (`index_add`, `index_copy`, `index_fill`) have become when graphs are handed over.
_WRITES = (_aten.index_put.default, _aten._unsafe_index_put.default)
_CONTIGUOUS: Any = {"memory_format": torch.contiguous_format}


class CompilerMends(CustomGraphPass):
    """Rewrites what would be compiled wrongly into what is compiled rightly."""

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph in place."""
        for target in _WRITES:
            for node in graph.find_nodes(op="call_function", target=target):
                _write_to_own_memory(graph, node)
        for node in graph.find_nodes(op="call_function", target=_aten.add.Tensor):
            if "alpha" in node.kwargs:
                _multiply_before(graph, node)

    def uuid(self) -> bytes:
        """Returns what this pass is called in the compiler's cache of programs."""
        # Programs are kept on disk under it: the number goes up with what is rewritten, or old ones would be taken.
        return b"hypertorch.CompilerMends.1"


def _write_to_own_memory(graph: fx.Graph, node: fx.Node) -> None:
    """Makes a write go to a copy with memory for every entry, where entries share theirs."""
    written: Any = node.args[0]
    value = written.meta["val"]
    # A stride of 0 along a single entry shares nothing.
    if any(size != 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
        with graph.inserting_before(node):
            copy = graph.call_function(_aten.clone.default, (written,), _CONTIGUOUS)
        # Later passes of the compiler read sizes and strides here.
        copy.meta["val"] = value.clone(**_CONTIGUOUS)
        node.replace_input_with(written, copy)


def _multiply_before(graph: fx.Graph, node: fx.Node) -> None:
    """Makes `left + alpha * right` of two operations."""
    left, right = node.args
    alpha: Any = node.kwargs["alpha"]
    if isinstance(right, fx.Node):
        with graph.inserting_before(node):
            # A product of its own is no factor, which the fusion would drop.
            scaled = graph.call_function(_aten.mul.Tensor, (right, alpha))
        scaled.meta["val"] = right.meta["val"] * alpha
        node.args, node.kwargs = (left, scaled), {}
