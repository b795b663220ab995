"""Runs a function in a new process, where nothing that ran before can be felt."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.contestant import NotMeasured

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")
_ROOT = Path(__file__).resolve().parents[1]
_MODULE = "benchmarks.own_process"
_LONGEST_WAIT = 2e6  # the system counts milliseconds in 32 bits (unit: seconds)


def in_own_process(function: Callable[[_Argument], _Result], argument: _Argument, longest: float) -> _Result:
    """Returns `function(argument)` as a new interpreter computes it.

    Args:
        function: at the top level of a module.
        argument: what it gets; pickled.
        longest: seconds after which the process is ended, 23 days at most.

    Raises:
        NotMeasured: if the function raised it, the process failed or was ended, or took too long.
    """
    longest = min(longest, _LONGEST_WAIT)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        try:
            done = subprocess.run(
                [sys.executable, "-m", _MODULE, str(answer)],
                input=pickle.dumps((function, argument)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=_ROOT,
                timeout=longest,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotMeasured(f"takes more than {longest:g} s") from None
        if done.returncode < 0:
            raise NotMeasured(f"its process was ended by signal {-done.returncode}")
        if done.returncode > 0 or not answer.exists():
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise NotMeasured(f"its process failed ({lines[-1] if lines else 'without a word'})")
        result, reason = pickle.loads(answer.read_bytes())
    if reason is not None:
        raise NotMeasured(reason)
    return result


def main() -> None:
    """Answers a request on stdin into the file that the command names."""
    function, argument = pickle.load(sys.stdin.buffer)
    # What the imports made lives on: collections in what is measured need not look at it.
    gc.collect()
    gc.freeze()
    answer: tuple[Any, str | None]
    try:
        answer = function(argument), None
    except NotMeasured as error:
        answer = None, str(error)
    Path(sys.argv[1]).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
