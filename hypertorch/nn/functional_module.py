"""A module brought by the user, as a function of a dictionary of params."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hypertorch.autodiff.parameter_slots import ParameterSlots, one_at_a_time, thread
from hypertorch.autodiff.recomputation import hold_while_recomputing
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import TensorDict, TensorMapping

# At import: hooks that were entered before would not know of the weights of a call.
hold_while_recomputing()


class FunctionalModule:
    """An `nn.Module` seen as `outputs = f(params, *inputs)`; the module itself is never changed.

    Parameters with `requires_grad=False` are frozen: they stay in the module as constants. A parameter shared by
    several sub-modules has one entry, under its first name.

    Args:
        module: the module; its mode (`train()` or `eval()`) is the one it has when called.

    Raises:
        TypeError: if it is no module.
        IncompatibleBackendError: if a part of it has no right second derivative in PyTorch: weight normalisation, or an
            embedding with sparse gradients.

    Attributes:
        buffers: names of the module's buffers (running statistics), for `InnerProblem.buffers`.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"`module` is a {type(module).__name__}, not a `torch.nn.Module`: it has no parameters to take out. "
                "Write a plain function of `params` instead."
            )
        _refuse_parts(module)
        self.module = module
        self.buffers: tuple[str, ...] = tuple(name for name, _ in module.named_buffers())
        self._slots: ParameterSlots | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds the places in its own module.
        return {**vars(self), "_slots": None}

    def init_params(self) -> TensorDict:
        """Returns copies of the module's trainable parameters and of its buffers, by name.

        Raises:
            IncompatibleBackendError: if a part of the module is compiled already.
        """
        _refuse_compiled(self.module)
        # Clones: what is trained is never the module's own memory.
        # Another thread would find the values there that this one calls it with; a compiler has one thread.
        with nullcontext() if torch.compiler.is_compiling() else one_at_a_time:
            own = self.module.named_parameters()
            params = {name: value.detach().clone() for name, value in own if value.requires_grad}
            return {**params, **{name: value.detach().clone() for name, value in self.module.named_buffers()}}

    def trained_names(self) -> list[str]:
        """Returns the names of the trainable parameters."""
        with nullcontext() if torch.compiler.is_compiling() else one_at_a_time:
            return [name for name, value in self.module.named_parameters() if value.requires_grad]

    def __call__(self, params: TensorMapping, *inputs: Any, **options: Any) -> Any:
        """Returns the module's outputs; updates of its buffers are dropped.

        Args:
            params: values of parameters and buffers by name; those missing keep the module's own values.
            inputs: passed on.
            options: passed on by name.
        """
        if self.buffers:
            return self._moving(params, inputs, options, is_returned=False)[0]
        return self._call(dict(params), inputs, options)

    def with_buffers(self, params: TensorMapping, *inputs: Any, **options: Any) -> tuple[Any, TensorDict]:
        """Returns the module's outputs and the new values of its buffers.

        Args:
            params: values of parameters and buffers by name; those missing keep the module's own values.
            inputs: passed on.
            options: passed on by name.
        """
        if self.buffers:
            return self._moving(params, inputs, options, is_returned=True)
        return self._call(dict(params), inputs, options), {}

    def _moving(
        self, params: TensorMapping, inputs: tuple, options: dict[str, Any], *, is_returned: bool
    ) -> tuple[Any, TensorDict]:
        """Returns the outputs of a module with buffers, and their new values."""
        values = dict(params)
        watch = None if torch.compiler.is_compiling() else thread.watch
        # A caller who passes no buffers gets the module's own, for this call alone.
        with nullcontext() if torch.compiler.is_compiling() else one_at_a_time:
            starts = {name: values.get(name, own) for name, own in self.module.named_buffers()}
        if watch is not None:
            starts = {name: watch.start(name, value) for name, value in starts.items()}
        # Modules update buffers in place; the clone takes the update and leaves the caller's tensor alone.
        values.update({name: value.clone() for name, value in starts.items()})
        outputs = self._call(values, inputs, options)
        ends = {name: values[name] for name in starts}
        if watch is not None:
            watch.note(self.module, starts, ends, is_returned=is_returned)
        return outputs, ends

    def _call(self, values: TensorDict, inputs: tuple, options: dict[str, Any]) -> Any:
        # The compiler knows PyTorch's own way, and the time to find the places is no part of a program.
        if torch.compiler.is_compiling():
            # To look for ties takes a seventh of the time of tracing; the call before without a compiler has done it.
            is_tied = self._slots is None or self._slots.is_tied
            return functional_call(self.module, values, inputs, options, tie_weights=is_tied)
        with one_at_a_time:
            slots = self._slots
            if slots is None or slots.module is not self.module or not slots.is_current():
                slots = self._slots = ParameterSlots(self.module)
            if not slots.serves(values):
                with slots.under_way():
                    return functional_call(self.module, values, inputs, options)
            with slots.holding(values):
                return self.module(*inputs, **options)


def _refuse_parts(module: nn.Module) -> None:
    """Raises if a part of a module has no right second derivative in PyTorch, whatever it is called with.

    Fused weight normalisation: its first derivative is right and its second silently wrong
    (`torch.autograd.gradgradcheck` of `torch._weight_norm` fails on PyTorch 2.13), so an unrolled hypergradient would
    be wrong by tens of per cent.
    """
    for name, part in module.named_modules():
        where = f"at `{name}`" if name else "itself"
        # PyTorch has it as a private parametrisation, and as a hook of old: both call the same fused operation.
        if type(part).__name__ == "_WeightNorm" or any(
            type(hook).__name__ == "WeightNorm" for hook in part._forward_pre_hooks.values()
        ):
            raise IncompatibleBackendError(
                f"`module` normalises a weight {where} with PyTorch's weight_norm, whose second derivative is "
                "silently wrong: hypergradients through an inner loop would be too. Remove it, or write the weight as "
                "`g * v / v.norm(...)` in a parametrisation of your own, which is exact."
            )
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and part.weight.requires_grad:
            raise IncompatibleBackendError(
                f"`module` has an `{type(part).__name__}` {where} with `sparse=True`, of whose sparse gradient PyTorch "
                "takes no second derivative: no hypergradient goes through it. Build it with `sparse=False` (an "
                "`EmbeddingBag` has none then either: write it as `nn.Embedding(...)(tokens).mean(dim=1)`)."
            )


def _refuse_compiled(module: nn.Module) -> None:
    """Raises if a part of a module is compiled: not where it is handed over, since it may serve without training."""
    for name, part in module.named_modules():
        if _is_compiled(part):
            where = f"at `{name}`" if name else "itself"
            raise IncompatibleBackendError(
                f"`module` is compiled already ({where}, by `torch.compile`, `.compile()` or TorchScript), and PyTorch "
                "takes no second derivative of compiled code: its params cannot be trained in an inner loop. Hand over "
                "the plain module, and let `Reverse(compile=True)` compile the step with its derivative."
            )


def _is_compiled(module: nn.Module) -> bool:
    return (
        # Three ways to compile a module, of which each leaves another mark.
        isinstance(module, torch.jit.ScriptModule)
        or module._compiled_call_impl is not None
        or type(module).__name__ == "OptimizedModule"  # whose class is in a part of PyTorch that takes seconds to load
    )
