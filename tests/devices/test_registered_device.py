"""The same on a device that is registered with PyTorch: its backward pass runs in a thread of the engine, as on a GPU.

A registration holds for the rest of a process, and must come before its first backward pass: hence a process for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, threading
import pytest, torch
from torch.utils import backend_registration as registration
from tests.helpers import stand_in

class Module(registration._DummyBackendModule):
    get_rng_state = staticmethod(stand_in.MODULE.get_rng_state)
    set_rng_state = staticmethod(stand_in.MODULE.set_rng_state)

registration._setup_privateuseone_for_python_backend("standin", backend_module=Module())
stand_in.NAME = "standin:0"
threads = set()
with stand_in.StandIn() as device:
    there = torch.ones(3, device=device.device, requires_grad=True)
    there.register_hook(lambda _: threads.add(threading.get_ident()))
    there.sum().backward()
assert threads and threading.get_ident() not in threads, "the backward pass ran in the caller's thread"
chosen = "(SGD and not one) or noise or learner or outer or finite or sampler or gathered"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/devices/test_stand_in.py", "-k", chosen]))
"""


@pytest.mark.slow
def test_the_backward_pass_runs_in_a_thread_of_the_engine() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
