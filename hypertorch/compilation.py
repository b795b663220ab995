"""Functions of tensors compiled by `torch.compile`, once for all calls that are the same program."""

from __future__ import annotations

import importlib
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hypertorch.errors import HypertorchError

# The argument of this name is a whole number that changes from call to call: it never makes a new program.
# PyTorch makes programs of their own for 0 and 1, so callers add 2.
COUNTER = "counter"

# What makes code of a traced function; tests take one that makes none, which is quicker.
BACKEND = "inductor"

# The problems of one class with other sizes, settings or lengths of the last batch share a list of programs. Each takes
# seconds: more of them is a mistake.
_MOST_PROGRAMS = 16

_compiled: dict[Hashable, Callable[..., Any]] = {}
_refused: set[Hashable] = set()


class NotCompilableError(HypertorchError):
    """A function cannot be compiled; whoever asked runs it without compilation."""


def compiled(function: Callable[..., Any], key: Hashable, device: torch.device) -> Callable[..., Any]:
    """Returns a function that computes what `function` does, compiled at its first call.

    What makes calls the same program is found out by `torch.compile`: shapes, dtypes and the Python values that were
    read on the way. Tensors that are reached from the arguments, such as the attributes of an object, are inputs of
    the program like any other: where they change, so does the result, without a new compilation.

    Random numbers are drawn as without compilation, so that a seeded call gives the same noise.

    On CUDA the program's kernels are captured into a graph and replayed; results are copied out of its memory.

    Args:
        function: of tensors, and of objects that hold them, without side effects. One at the top level of a module.
        key: functions under different keys share nothing, so that the list of programs that each call is compared
            with stays short.
        device: that the tensors are on.
    """
    if (function, key, device.type) not in _compiled:
        # A list of programs belongs to a code object.
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        options = _options(device) if BACKEND == "inductor" else None
        program = torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND, options=options)
        _compiled[function, key, device.type] = _copied(program) if device.type == "cuda" else program
    return _compiled[function, key, device.type]


def _options(device: torch.device) -> Any:
    # Not at the top of this module: it loads the compiler, which takes seconds.
    mends = importlib.import_module("hypertorch.compiler_mends")
    return {
        # Random numbers by the operations that are run without compilation, not by those of the compiler's own.
        "fallback_random": True,
        "triton.cudagraphs": device.type == "cuda",
        "post_grad_custom_pre_pass": mends.CompilerMends(),
    }


def _copied(program: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a program whose results outlive the next replay of its graph."""

    def run(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        result = program(*arguments)
        return pytree.tree_map_only(torch.Tensor, torch.clone, result)

    return run


@contextmanager
def compilation() -> Iterator[None]:
    """Surrounds calls of compiled functions: derivatives inside them can be traced.

    Raises:
        NotCompilableError: where PyTorch cannot compile one.
    """
    with ExitStack() as stack:
        # Loaded by PyTorch when first asked for, which takes a second.
        dynamo: Any = torch._dynamo
        compiler: Any = torch.compiler
        try:
            stack.enter_context(dynamo.config.patch(trace_autograd_ops=True, recompile_limit=_MOST_PROGRAMS))
            stack.enter_context(compiler.config.patch(dynamic_sources=f"L['{COUNTER}']"))
            # What PyTorch says of its own insides while it compiles is no fault of the user's.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"torch\b")
        except AttributeError as error:
            raise NotCompilableError(
                f"PyTorch {torch.__version__} cannot compile code that takes derivatives"
            ) from error
        try:
            yield
        except dynamo.exc.FailOnRecompileLimitHit as error:
            raise NotCompilableError(
                f"it became another program {_MOST_PROGRAMS} times. Numbers that change from step to step belong into "
                f"tensors of the batch. {_first_sentence(str(error))}"
            ) from error
        except compiler_errors() as error:
            raise NotCompilableError(_first_sentence(str(error))) from error


def compiler_errors() -> tuple[type[Exception], ...]:
    """Returns what PyTorch raises where it cannot compile a function."""
    dynamo: Any = torch._dynamo
    return dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit


def may_compile(key: Hashable) -> bool:
    """Returns whether nothing of this key was found out not to be compilable."""
    return key not in _refused


def refuse(key: Hashable, what: str, error: NotCompilableError) -> None:
    """Remembers that what has this key cannot be compiled, and warns of it, once."""
    _refused.add(key)
    warnings.warn(
        f"`compile=True`: {what} cannot be compiled, and runs without compilation, with the same numbers. PyTorch "
        f"says: {error}",
        UserWarning,
        stacklevel=2,
    )


def _first_sentence(text: str) -> str:
    """Returns the first lines of an error of PyTorch, without its advice to developers."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "TORCH" not in line]
    return " ".join(lines[:3])[:500]
