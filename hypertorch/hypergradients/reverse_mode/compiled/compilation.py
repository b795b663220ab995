"""Functions of tensors compiled by `torch.compile`, once for all calls that are the same program."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import threading
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.utils import _pytree as pytree

from hypertorch.dynamics.settings import first_match
from hypertorch.hypergradients.reverse_mode.compiled.errors import (
    NotCompilableError,
    TooLargeError,
    TooManyProgramsError,
)
from hypertorch.hypergradients.reverse_mode.compiled.program_folder import FOLDER, keep_in_cache_of_user, refuse_folder
from hypertorch.hypergradients.reverse_mode.compiled.step_index import refuse_large_numbers
from hypertorch.hypergradients.reverse_mode.compiled.traced_code import is_checked, traced_code_is_checked
from hypertorch.inner import memo

# The argument of this name is a whole number that changes from call to call: it never makes a new program.
# PyTorch makes programs of their own for 0 and 1, so callers add 2.
COUNTER = "counter"

# What makes code of a traced function; tests take one that makes none, which is quicker.
BACKEND = "inductor"

# The problems of one class with other sizes, settings or lengths of the last batch share a list of programs. Each takes
# seconds: more of them is a mistake.
_MOST_PROGRAMS = 16

# Calls in a program with a loop inside. With 1,100 of them (MAML with Conv-4) it takes up to an eighth longer to
# compile than two loops in programs of their own, and is a seventh faster; with 2,900 (a Transformer of four layers)
# PyTorch takes twice as long as for single steps.
MOST_CALLS_LOOPED = 1_500

# What is set up for a compilation holds for the whole process: a thread must not undo it while another one compiles.
_one_at_a_time = threading.RLock()

PROGRAMS = "compiled programs"
MADE = "number of programs that were compiled"


def compiled(
    function: Callable[..., Any], key: Hashable, device: torch.device, *, loops: bool = False
) -> Callable[..., Any]:
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
        loops: whether there is a loop inside, which then runs in C++ and not in Python.
    """

    def make() -> Callable[..., Any]:
        # A list of programs belongs to a code object.
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        # Its types lack the last argument.
        compile_function: Any = torch.compile
        # `fullgraph`: what cannot be traced raises, and all of it runs without compilation, with a warning.
        program = compile_function(
            own,
            fullgraph=True,
            dynamic=False,
            backend=partial(_make_code, BACKEND, device, loops),
            recompile_limit=_MOST_PROGRAMS,
        )
        return _copied(program) if device.type == "cuda" and not loops else program

    # Hooks of all modules, which no program looks for.
    hooks = [
        *modules._global_forward_pre_hooks.values(),
        *modules._global_forward_hooks.values(),
        *modules._global_backward_pre_hooks.values(),
        *modules._global_backward_hooks.values(),
    ]
    return memo.recall(PROGRAMS, (function, key, device.type, *hooks), make)


def programs_made() -> int:
    """Returns how many programs this process has compiled: where it has grown, a program is new."""
    return memo.get(MADE, None, 0)


def _make_code(
    backend: str, device: torch.device, loops: bool, graph: fx.GraphModule, inputs: list[Any]
) -> Callable[..., Any]:
    """Returns the code of a traced function."""
    if not is_checked(torch._dynamo):
        raise NotCompilableError(
            "something else was compiled at the same time. PyTorch tells of the first of several compilations only, so "
            "the checks of traced code were off. Compile where nothing else is compiled"
        )
    if loops:
        _refuse_large(graph)
    refuse_large_numbers(graph)
    memo.note(MADE, None, programs_made() + 1)
    if backend == "inductor":
        refuse_folder()
        # Not at the top of this module: they load the compiler, which takes seconds.
        inductor = importlib.import_module("torch._inductor")
        with importlib.import_module(f"{__package__}.quick_compiler").quick_compiler():
            return inductor.compile(graph, inputs, options=_options(device, loops))
    dynamo: Any = torch._dynamo
    return dynamo.lookup_backend(backend)(graph, inputs)


def _refuse_large(graph: fx.GraphModule) -> None:
    """Raises `TooLargeError` for a graph with a loop that would take too long to compile."""
    graphs = [module.graph for module in graph.modules() if isinstance(module, fx.GraphModule)]
    check_size(sum(node.op.startswith("call") for own in graphs for node in own.nodes))


def check_size(calls: int) -> None:
    """Raises `TooLargeError` if a program with a loop of this number of calls would take too long to compile."""
    if calls > MOST_CALLS_LOOPED:
        raise TooLargeError(
            f"a loop over its steps has {calls} operations or more. Above {MOST_CALLS_LOOPED} it takes much longer to "
            "compile than single steps, and is little faster"
        )


def _options(device: torch.device, loops: bool) -> Any:
    # Not at the top of this module: it loads the compiler, which takes seconds.
    mends, kept = (importlib.import_module(f"{__package__}.{name}") for name in ("compiler_mends", "kept_products"))
    on_cpu = device.type == "cpu"
    return {
        # Random numbers by the operations that are run without compilation, not by those of the compiler's own.
        "fallback_random": True,
        "triton.cudagraphs": device.type == "cuda" and not loops,
        "cpp_wrapper": loops or on_cpu,
        # One file of calls and one of what is called. The first is long: to optimise it takes most of the time, and
        # saves nothing.
        "cpp_wrapper_build_separate": on_cpu,
        # Line numbers for profilers take a sixth of the time of the C++ compiler.
        "aot_inductor.enable_line_tables": False,
        # PyTorch keeps precompiled headers in a folder for temporary files, which others may have made.
        "cpp_cache_precompile_headers": False,
        "post_grad_custom_pre_pass": mends.CompilerMends(),
        "joint_custom_pre_pass": kept.KeptProducts() if loops else None,
        # Without it PyTorch keeps no program with a loop on disk. What the loop does is in the key all the same.
        "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.scan": torch.__version__},
    }


def _copied(program: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a program whose results outlive the next replay of its graph."""

    def run(*arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        result = program(*arguments)
        # A replayed graph writes its results to the same memory each time: the caller is given copies.
        return pytree.tree_map_only(torch.Tensor, torch.clone, result)

    return run


@contextmanager
def _autograd_as_before() -> Iterator[None]:
    """Leaves autograd's state of the process as it was found.

    Where the compiler gives up inside of a transform of `torch.func`, PyTorch leaves hooks on saved tensors switched
    off, so that every later activation checkpoint fails. It leaves a level of forward mode open, so that none can be
    entered any more.
    """
    internals: Any = torch._C
    hooks, made = internals._autograd, programs_made()
    had_hooks, had_level = hooks._saved_tensors_hooks_is_enabled(), forward_ad._current_level >= 0
    is_changed = True
    try:
        yield
        # Only tracing changes it. To ask for an open level raises inside PyTorch where there is none, which takes time.
        is_changed = programs_made() != made
    finally:
        if had_hooks:
            hooks._saved_tensors_hooks_enable()
        if is_changed and not had_level:
            with suppress(RuntimeError):  # raised if none is open
                internals._exit_dual_level(level=0)


@contextmanager
def compilation(tell: Callable[[], None]) -> Iterator[None]:
    """Surrounds calls of compiled functions: derivatives inside them can be traced. Threads wait for each other.

    Args:
        tell: called once, when PyTorch begins to compile.

    Raises:
        NotCompilableError: where PyTorch cannot compile one.
    """
    keep_in_cache_of_user()
    with _one_at_a_time, ExitStack() as stack:
        try:
            # Loaded by PyTorch when first asked for, which takes a second, and looks for the folder of programs.
            dynamo: Any = torch._dynamo
        except OSError as error:
            raise _refusal(error) from error
        with _parts_of_the_compiler():
            stack.enter_context(_watched(dynamo.callback.callback_handler, partial(_set_up, dynamo), tell))
        # What PyTorch says of its own insides is no fault of the user's.
        for own in ("torch._inductor.ir", "torch._dynamo.convert_frame"):
            notes = logging.getLogger(own)
            notes.addFilter(_is_error)
            stack.callback(notes.removeFilter, _is_error)
        stack.enter_context(attempt())
        yield


@contextmanager
def _parts_of_the_compiler() -> Iterator[None]:
    """Refuses to compile by a PyTorch that lacks something which is used inside."""
    try:
        yield
    except AttributeError as error:
        raise NotCompilableError(
            f"PyTorch {torch.__version__} lacks parts of the compiler that trace derivatives (`{error.name}`). "
            "PyTorch 2.13 has them"
        ) from error


@contextmanager
def _watched(
    handler: Any, set_up: Callable[[], AbstractContextManager[None]], tell: Callable[[], None]
) -> Iterator[None]:
    """Surrounds every compilation with what is set up for it. Runs of programs pay nothing for it.

    Args:
        handler: what PyTorch asks to be told when a compilation starts and ends.
        set_up: what lasts as long as a compilation.
        tell: called once, when the first starts.
    """
    untold, stack, thread = [tell], ExitStack(), threading.get_ident()

    def start(_: Any) -> None:
        # PyTorch tells of what other threads compile too, which is no business of this run.
        if threading.get_ident() == thread:
            if untold:
                untold.pop()()
            stack.enter_context(set_up())

    def end(_: Any) -> None:
        if threading.get_ident() == thread:
            stack.close()

    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)
        stack.close()


@contextmanager
def _set_up(dynamo: Any) -> Iterator[None]:
    """Sets PyTorch's compiler up for one compilation."""
    compiler: Any = torch.compiler
    with ExitStack() as stack:
        with _parts_of_the_compiler():
            is_set_up = is_checked(dynamo)
        if is_set_up:  # by the run around this one, which PyTorch tells first
            yield
            return
        with _parts_of_the_compiler():
            # Without the first, `torch.autograd.grad` inside a function cannot be traced. Without the second, hooks
            # that a module is given later would not be seen.
            stack.enter_context(dynamo.config.patch(trace_autograd_ops=True, skip_nnmodule_hook_guards=False))
            stack.enter_context(compiler.config.patch(dynamic_sources=f"L['{COUNTER}']"))
            stack.enter_context(traced_code_is_checked(dynamo))
            # Text alone goes in and comes out; how patterns are matched cannot be traced.
            compiler.assume_constant_result(first_match)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"torch\b")
        # The compiler makes millions of objects that stay; to look through them again and again takes a quarter of
        # its time.
        if gc.isenabled():
            stack.callback(gc.enable)
            gc.disable()
        yield


@contextmanager
def attempt() -> Iterator[None]:
    """Surrounds calls that may turn out not to be compilable, inside of `compilation`; others may be made after them.

    Raises:
        NotCompilableError: where PyTorch cannot compile a function.
    """
    dynamo: Any = torch._dynamo
    with _autograd_as_before():
        try:
            yield
        except dynamo.exc.FailOnRecompileLimitHit as error:
            raise TooManyProgramsError(
                f"it became another program {_MOST_PROGRAMS} times. Numbers that change from step to step belong in "
                f"tensors of the batch, and those that change from run to run into hyperparameters (`Hyper`). "
                f"{_first_sentence(str(error))}"
            ) from error
        # Checks of the compiler's own fail too, where it meets what it does not expect, such as a number of numpy's.
        except (*compiler_errors(), AssertionError, OSError) as error:
            raise _refusal(error) from error


def _refusal(error: BaseException) -> NotCompilableError:
    """Returns what an error of the compiler means."""
    # The compiler wraps what it meets, once or more often.
    causes = [error]
    while (cause := getattr(causes[-1], "inner_exception", None) or causes[-1].__cause__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, NotCompilableError):
            return cause
        if isinstance(cause, OSError):
            return NotCompilableError(
                f"programs are kept in '{os.environ.get(FOLDER)}', where PyTorch cannot read or write ({cause}). Make "
                f"room there, or set `{FOLDER}` to another folder"
            )
    # What is raised while a function is traced comes back as text.
    own = str(error).partition(f"{NotCompilableError.__name__}: ")[2]
    return NotCompilableError(own.splitlines()[0] if own else f"PyTorch says: {_first_sentence(str(error))}")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def compiler_errors() -> tuple[type[Exception], ...]:
    """Returns what PyTorch raises where it cannot compile a function."""
    dynamo: Any = torch._dynamo
    return dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit


def _first_sentence(text: str) -> str:
    """Returns the first lines of an error of PyTorch, without its advice to developers."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "TORCH" not in line]
    return " ".join(lines[:3])[:500]
