"""Which vector instructions PyTorch's compiler may use, found out by one trial in place of one for each.

Loading this module loads the compiler, which takes seconds.
"""

from __future__ import annotations

import platform
from typing import Any

from torch._inductor import cpu_vec_isa

_instructions: Any = cpu_vec_isa


def are_tried() -> bool | None:
    """Returns True where the first choice of this processor compiles and runs; None to let PyTorch try all of them.

    PyTorch tries each set of instructions with the C++ compiler and in a new process of Python, and takes the first.
    With five sets that is 10 s for the first program, and 2 s in every process. A compiler for the first set knows the
    others, which are older.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    known = _instructions.x86_isa_checker()
    for choice in _instructions.supported_vec_isa_list:
        if all(flag in known for flag in str(choice).split()):
            return True if choice else None  # asked for its truth, PyTorch tries it
    return None
