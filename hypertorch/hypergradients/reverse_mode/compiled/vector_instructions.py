"""Which vector instructions PyTorch's compiler may use, found out by one trial in place of one for each.

Loading this module loads the compiler, which takes seconds.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from torch._inductor import cpu_vec_isa

_instructions: Any = cpu_vec_isa


def choose() -> None:
    """Lets PyTorch look at this processor's widest vectors alone, if code for them compiles and runs.

    PyTorch tries each set of instructions with the C++ compiler and in a new process of Python, and takes the first.
    With five sets that is 12 s for the first program, and 2 s in every process. Those that add instructions for short
    numbers (VNNI, AMX) are of use to quantised models, and are left out. What it finds it keeps.
    """
    if platform.machine() not in ("x86_64", "AMD64") or "ATEN_CPU_CAPABILITY" in os.environ:  # the user's own choice
        return
    known, sets = _instructions.x86_isa_checker(), _instructions.supported_vec_isa_list
    first = next((own for own in sets if str(own) in known), None)
    if first:  # asked for its truth, PyTorch tries it
        _instructions.supported_vec_isa_list = [first]
        try:
            _instructions.valid_vec_isa_list()
        finally:
            _instructions.supported_vec_isa_list = sets
