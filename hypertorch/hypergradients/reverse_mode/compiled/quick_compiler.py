"""PyTorch's compiler made quicker: no trials of vector instructions, C++ on several cores, strides by expansion.

Loading this module loads PyTorch's compiler, which takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import sympy
import torch
from torch._inductor import codecache, config, cpu_vec_isa, dtype_propagation, sizevars
from torch._inductor.codegen import common, cpp
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

_builds: Any = codecache
_kernels: Any = cpp
_instructions: Any = cpu_vec_isa


@contextmanager
def quick_compiler() -> Iterator[None]:
    """Makes PyTorch's compiler quicker; compilations of others are as before."""
    with ExitStack() as stack:

        def change(module: Any, name: str, value: object) -> None:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)

        known = _known_instructions()
        if known:
            stack.callback(_instructions.valid_vec_isa_list.cache_clear)
            change(_instructions, "supported_vec_isa_list", known)
            _instructions.valid_vec_isa_list.cache_clear()
        change(_builds, "_worker_compile_cpp", _beside_each_other(_builds._worker_compile_cpp))
        change(_kernels, "stride_at_vec_range", _strides)
        change(sizevars, "sympy", _algebra)
        # PyTorch's own is one object, and is filled with its 200 rules again whenever it is asked for.
        change(common, "DtypePropagationOpsHandler", lru_cache(dtype_propagation.DtypePropagationOpsHandler))
        yield


# A large program asks for the strides of some thousand indices, again and again. PyTorch remembers 128.
_strides = lru_cache(maxsize=50_000)(sizevars.stride_at_vec_range.__wrapped__)


def _simplified(expression: sympy.Expr) -> sympy.Expr:
    """Returns an index, or what it grows by, in a simple form.

    `sympy.simplify` takes 10 to 30 ms. Sums of products, of variables and of their quotients, need only be expanded.
    """
    is_sum = all(isinstance(part, _SUMS_OF_PRODUCTS) for part in sympy.preorder_traversal(expression))
    return sympy.expand(expression) if is_sum else sympy.simplify(expression)


_SUMS_OF_PRODUCTS = (sympy.Add, sympy.Mul, sympy.Symbol, sympy.Integer, FloorDiv, ModularIndexing)
_algebra = ModuleType(sympy.__name__)
_algebra.__dict__.update(vars(sympy), simplify=_simplified)


class _Avx512(cpu_vec_isa.VecAVX512):
    def __bool__(self) -> bool:
        return True


class _Avx2(cpu_vec_isa.VecAVX2):
    def __bool__(self) -> bool:
        return True


# By PyTorch's names of what its own operations use.
_RUNNING = {"AVX512": _Avx512(), "AVX2": _Avx2()}


def _known_instructions() -> list[Any]:
    """Returns the vector instructions by which PyTorch's own operations run in this process; none if not known.

    PyTorch tries each set of instructions with the C++ compiler and in a new process of Python: 10 s for the first
    program, and 1 s in every process. Those that add instructions for short numbers (VNNI, AMX) are of use to quantised
    models, and are left out. A choice of the user's stays.
    """
    is_left_to_us = "ATEN_CPU_CAPABILITY" not in os.environ and config.cpp.simdlen is None
    own = _RUNNING.get(torch.backends.cpu.get_cpu_capability())
    return [own] if own is not None and is_left_to_us else []


def _beside_each_other(build: Callable[[str, Sequence[Any]], None]) -> Callable[[str, Sequence[Any]], None]:
    """Returns a way to build the parts of a program beside each other, and then what joins them.

    Args:
        build: PyTorch's own, one after the other. It takes the path of a lock, and passes over what is there.
    """

    def run(lock: str, builders: Sequence[Any]) -> None:
        parts = builders[:-1]
        if len(parts) > 1:
            with ThreadPoolExecutor(len(parts)) as pool:
                # Each under a lock of its own, of threads as of processes.
                list(pool.map(lambda number: build(f"{lock}.{number}", [parts[number]]), range(len(parts))))
        build(lock, builders)

    return run
