"""Processes with one contestant: what they answer, and what is said of those that fail."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import SmallUnroll, jax_unroll, variants
from benchmarks.agreement import relative_error
from benchmarks.contestant import NotMeasured
from benchmarks.jax_unroll import InJax
from benchmarks.memory import peak_bytes
from benchmarks.turns import TurnsRequest
from benchmarks.worker import Worker, start
from hypertorch.types import TensorDict
from tests.benchmarks.benchmark_works import WORKS, job_of, memory_request

NO_JAX = "jax is not installed; it comes with the extra `benchmark`"
JAX_VARIANTS = {
    "all at once": InJax(),
    "rematerialised": InJax(remat=True),
    "in turn": InJax(unroll=True, tasks="in turn"),
}
ECHO = """
import json, os, sys
for line in sys.stdin:
    where = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    print(json.dumps({"line": line.strip(), "cores": where, "variable": os.environ.get("SOME")}), flush=True)
"""


def worker(folder: Path, program: str, *, num_cores: int | None = None, longest: float = 60.0) -> Worker:
    return Worker(
        [sys.executable, "-c", program],
        folder=folder,
        environment={"SOME": "value"},
        num_cores=num_cores,
        ends=time.monotonic() + longest,
    )


def request(contestant: str, dtype: torch.dtype = torch.float64) -> TurnsRequest:
    return TurnsRequest(
        work=SmallUnroll().tiny(), contestant=contestant, seed=0, device="cpu", dtype=dtype, num_threads=1
    )


def test_lines_are_answered_by_a_process_on_its_cores(tmp_path: Path) -> None:
    here = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else None
    one = worker(tmp_path, ECHO, num_cores=1)
    try:
        answer = one.ask("turn 3")
    finally:
        one.close()
    assert answer == {"line": "turn 3", "cores": here and here[-1:], "variable": "value"}
    assert here is None or sorted(os.sched_getaffinity(0)) == here


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("raise ValueError('no such thing')", r"its process failed \(ValueError: no such thing\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by signal 9"),
        ("pass", "its process failed .without a word"),
        ('print(\'{"reason": "TypeError: no"}\', flush=True); input()', "^TypeError: no$"),
    ],
)
def test_a_process_that_fails_is_said(tmp_path: Path, program: str, expected: str) -> None:
    one = worker(tmp_path, program)
    try:
        with pytest.raises(NotMeasured, match=expected):
            one.ask("first")
    finally:
        one.close()


def test_a_process_that_has_ended_is_asked_in_vain(tmp_path: Path) -> None:
    one = worker(tmp_path, "pass")
    one._process.wait()
    with pytest.raises(NotMeasured, match="its process failed"):
        one.ask("first")
    one.close()
    one.close()


def test_a_process_that_lasts_is_ended(tmp_path: Path) -> None:
    one = worker(tmp_path, "import time; time.sleep(60)", longest=0.1)
    with pytest.raises(NotMeasured, match=r"^takes more than 0.1 s$"):
        one.ask("first")
    one.close()


def test_a_contestant_has_its_turns_in_a_process(tmp_path: Path) -> None:
    one = start(request(variants.EAGER), folder=tmp_path / "a", caches=tmp_path / "caches", ends=math.inf)
    try:
        first = one.first()
        assert one.turn(2) > 0.0
        counts = one.counts()
    finally:
        one.close()
    expected = variants.VARIANTS[variants.EAGER].run(job_of(SmallUnroll().tiny())).grads
    assert first.grads is not None
    assert expected is not None
    assert relative_error(first.grads, expected) < 1e-12
    assert first.seconds > 0.0
    assert first.prepares is False
    assert counts.keys() == {"operations", "moved_bytes"}


def test_jax_that_is_missing_or_cannot_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(SmallUnroll().tiny())
    monkeypatch.setattr(jax_unroll.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NotMeasured, match=r"jax is not installed .*extra `benchmark`"):
        InJax().run(job)
    with pytest.raises(NotMeasured, match=r"jax is not installed .*extra `benchmark`"):
        start(request(variants.JAX), folder=tmp_path / "a", caches=tmp_path, ends=math.inf)
    monkeypatch.setattr(jax_unroll.importlib.util, "find_spec", lambda _: object())
    object.__setattr__(job, "stated", None)
    with pytest.raises(NotMeasured, match="the work is not written in JAX"):
        InJax().run(job)


@pytest.mark.parametrize("name", WORKS)
def test_every_work_is_stated_for_another_framework(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_unroll.importlib.util, "find_spec", lambda _: object())
    job = job_of(WORKS[name].tiny())
    command = InJax(remat=True).command(job, tmp_path)
    assert command[0] == sys.executable
    settings = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert (settings["num_steps"], settings["float64"], settings["remat"]) == (job.num_steps, True, True)
    assert variants.JAX in WORKS[name].contestants() or name == "forward"


def jax_grads(name: str, contestant: InJax) -> tuple[TensorDict, TensorDict]:
    """Returns the hypergradients of JAX and of `higher` on a tiny work, in float64."""
    job = job_of(WORKS[name].tiny())
    found = contestant.run(job).grads
    expected = variants.VARIANTS[variants.HIGHER].run(job).grads
    assert found is not None
    assert expected is not None
    return found, expected


def test_jax_agrees_and_has_a_peak(tmp_path: Path) -> None:
    pytest.importorskip("jax", reason=NO_JAX)
    assert relative_error(*jax_grads("small", InJax())) < 1e-9
    pytest.importorskip("psutil", reason="psutil is not installed; it comes with the extra `benchmark`")
    work = SmallUnroll(num_steps=200, num_rows=1000, features=2, hidden=100)
    whole, remat = (peak_bytes(memory_request(work, name)) for name in variants.IN_JAX)
    # A step's hidden values are kept, or only its weights.
    assert whole > 200 * 1000 * 100 * 4
    assert remat < whole / 4


@pytest.mark.slow
@pytest.mark.parametrize("contestant", list(JAX_VARIANTS.values()), ids=JAX_VARIANTS)
@pytest.mark.parametrize("name", WORKS)
def test_jax_agrees_on_every_work(name: str, contestant: InJax) -> None:
    pytest.importorskip("jax", reason=NO_JAX)
    if contestant.tasks == "in turn" and job_of(WORKS[name].tiny()).num_tasks is None:
        pytest.skip("there are no tasks")
    assert relative_error(*jax_grads(name, contestant)) < 1e-9
