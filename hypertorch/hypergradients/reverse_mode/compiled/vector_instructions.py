"""Which vector instructions PyTorch's compiler may use, found out by one trial in place of one for each.

Loading this module loads the compiler, which takes seconds.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._inductor import config, cpu_vec_isa

_instructions: Any = cpu_vec_isa


@contextmanager
def widest_alone() -> Iterator[None]:
    """Lets PyTorch look at this processor's widest vectors alone, if code for them compiles and runs.

    PyTorch tries each set of instructions with the C++ compiler and in a new process of Python, and takes the first.
    With five sets that is 10 s for the first program, and 2 s in every process. Those that add instructions for short
    numbers (VNNI, AMX) are of use to quantised models, and are left out. Compilations of others see all sets again.
    """
    widest = None
    is_left_to_us = "ATEN_CPU_CAPABILITY" not in os.environ and config.cpp.simdlen is None
    if is_left_to_us and platform.machine() in ("x86_64", "AMD64"):
        known = _instructions.x86_isa_checker()
        widest = next((own for own in _instructions.supported_vec_isa_list if str(own) in known), None)
    if not widest:  # asked for its truth, PyTorch tries it, and remembers
        yield
        return
    sets = _instructions.supported_vec_isa_list
    _instructions.supported_vec_isa_list = [widest]
    _instructions.valid_vec_isa_list.cache_clear()
    try:
        yield
    finally:
        _instructions.supported_vec_isa_list = sets
        _instructions.valid_vec_isa_list.cache_clear()
