"""Peak memory in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import (
    LargeUnroll,
    variants,
)
from benchmarks.contestant import NotMeasured
from benchmarks.memory import peak_bytes
from benchmarks.own_process import in_own_process
from tests.benchmarks.benchmark_works import memory_request

ROOT = Path(__file__).resolve().parents[2]


def test_memory_of_a_process_of_its_own() -> None:
    """The graph of a step holds at least the hidden layer's outputs; plain training holds those of one step."""
    pytest.importorskip("psutil", reason="psutil is not installed; it comes with the extra `benchmark`")
    work = LargeUnroll(num_steps=8, num_rows=1000, features=16, hidden=2000)
    hidden = 1000 * 2000 * 4
    whole, plain = (peak_bytes(memory_request(work, name)) for name in (variants.EAGER, variants.PLAIN))
    assert 8 * hidden < whole < 64 * hidden
    assert hidden < plain < whole / 2
    if sys.platform == "linux":
        with pytest.raises(NotMeasured, match=r"^needs more than 45.8 MiB$"):
            peak_bytes(memory_request(work, variants.EAGER, limit=6 * hidden))


# Every second of 40 blocks of a MiB is freed, then 10 of 1.9 MiB are taken: 40 MiB live at most, but none of the gaps
# is large enough for a block.
_WITH_GAPS = """
import torch
from benchmarks import memory

memory.keep_no_freed_blocks()

def run():
    blocks = [torch.ones(2**18) for _ in range(40)]
    del blocks[::2]
    return [*blocks, *(torch.ones(19 * 2**18 // 10) for _ in range(10))]

torch.ones(2**20)  # by default, a freed block of this size makes the C library keep all smaller ones
print(memory._resident_peak(run, 2**30))
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="other C libraries differ")
def test_gaps_between_blocks_are_no_memory() -> None:
    pytest.importorskip("psutil", reason="psutil is not installed; it comes with the extra `benchmark`")
    ran = subprocess.run([sys.executable, "-c", _WITH_GAPS], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 39 * 2**20 < int(ran.stdout) < 44 * 2**20  # the system counts pages roughly


def test_a_process_that_fails_or_lasts_is_said() -> None:
    with pytest.raises(NotMeasured, match=r"its process failed \(ValueError: "):
        in_own_process(int, "no number", 60.0)
    with pytest.raises(NotMeasured, match="takes more than 0.05 s"):
        in_own_process(int, "1", 0.05)
    assert in_own_process(int, "1", 1e9) == 1
