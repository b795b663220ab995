"""Programs with a loop inside are kept on disk: the next process takes its own, and no other's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hypertorch as ht
from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError
from hypertorch.hypergradients.reverse_mode.compiled.not_compilable import ATTEMPTS, REFUSED, WARNED
from hypertorch.hypergradients.reverse_mode.compiled.program_folder import keep_in_cache_of_user
from tests.helpers.memo import set_aside
from tests.helpers.problems import scalar_problem

CHECKOUT = Path(__file__).resolve().parents[2]
# Prints what a process did whose inner loss and horizon are given.
PROCESS = """
import json, os, sys
import torch
import hypertorch as ht
from tests.helpers.problems import LambdaInner, LambdaOuter, normal

power, num_steps = float(sys.argv[1]), int(sys.argv[2])
target = normal(4, seed=1)
inner = LambdaInner(
    lambda h: {"w": h["init"].clone()}, lambda p, h, b: ((p["w"] - target) ** power * h["c"].exp()).sum()
)
outer = LambdaOuter({"init": normal(4, seed=2), "c": normal(4, seed=3)}, lambda p, h, b: p["w"].square().sum())
problem = ht.BilevelProblem(inner, outer, dynamics=ht.dynamics.SGD(lr=0.01), num_steps=num_steps)
hparams = problem.init_hparams()
right = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse()).grads
found = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse(compile=True)).grads
error = max(float((found[name] - right[name]).abs().max()) for name in right)

from torch._dynamo.utils import counters  # not before: the compiler looks for its folder when it is loaded

kept, made = (counters["inductor"]["fxgraph_cache_" + what] for what in ("hit", "miss"))
print(json.dumps([error, kept, made, os.environ["TORCHINDUCTOR_CACHE_DIR"]]))
"""


def run(home: Path, power: int, num_steps: int) -> tuple[float, int, int, str]:
    """Returns the largest error, how many programs came from disk and how many were made, and the folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(power), str(num_steps)],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
        env=environment | {"XDG_CACHE_HOME": str(home)},
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the user's cache folder has another place")
@pytest.mark.parametrize("num_steps", [5, 20])
def test_a_second_process_compiles_nothing_and_another_problem_is_not_mistaken(tmp_path: Path, num_steps: int) -> None:
    # A short run is one program, a long one is two: forward and back.
    programs = 1 if num_steps == 5 else 2
    folder = tmp_path / "hypertorch" / "programs"
    error, kept, made, place = run(tmp_path, power=2, num_steps=num_steps)
    assert (kept, made, place) == (0, programs, str(folder))
    assert folder.stat().st_mode & 0o077 == 0  # what lies there is run: nobody else may write to it
    assert error < 1e-12
    error, kept, made, _ = run(tmp_path, power=2, num_steps=num_steps)
    assert (kept, made) == (programs, 0)
    assert error < 1e-12
    # Only a number inside of the loop differs.
    error, kept, made, _ = run(tmp_path, power=4, num_steps=num_steps)
    assert (kept, made) == (0, programs)
    assert error < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("is_file", [True, False])
def test_where_programs_cannot_be_kept_the_run_goes_without_them(tmp_path: Path, is_file: bool) -> None:
    place = tmp_path / "file"
    place.write_text("no folder", encoding="utf-8")
    folder = str(place) if is_file else "/proc/nowhere"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", PROCESS.partition("from torch._dynamo")[0] + "print(error)", "2", "20"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
    )
    assert float(done.stdout) == 0.0
    assert f"programs are kept in '{folder}'" in done.stderr
    assert "set `TORCHINDUCTOR_CACHE_DIR` to another folder" in done.stderr


def no_folder_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what is chosen meanwhile is forgotten.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def open_to_others(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def linked_by_another(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    own = folder.with_name("own")
    own.mkdir(mode=0o700)
    folder.symlink_to(own)
    os.chown(folder, 12345, 12345, follow_symlinks=False)


def owned_by_another(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, 12345, 12345)


IS_ROOT = hasattr(os, "getuid") and os.getuid() == 0
for_root = pytest.mark.skipif(not IS_ROOT, reason="nobody else may give a folder away")


@pytest.mark.skipif(sys.platform != "linux", reason="the user's cache folder has another place")
@pytest.mark.parametrize(
    "make",
    [open_to_others, pytest.param(linked_by_another, marks=for_root), pytest.param(owned_by_another, marks=for_root)],
)
def test_nothing_is_run_from_a_folder_that_others_may_write_to(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_folder_is_chosen(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for memory in (REFUSED, ATTEMPTS, WARNED):
        set_aside(monkeypatch, memory)
    make(tmp_path / "hypertorch" / "programs")
    problem = scalar_problem()
    hparams = problem.init_hparams()
    with pytest.warns(UserWarning, match="which another user owns or may write to"):
        found = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse(compile=True))
    right = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse())
    assert torch.equal(found.grads["c"], right.grads["c"])
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="the user's cache folder has another place")
def test_without_a_cache_folder_programs_are_kept_among_temporary_files_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_folder_is_chosen(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keep_in_cache_of_user()
    folder = tmp_path / f"hypertorch-programs-{os.getuid()}"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    # A stranger who was here first.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder.chmod(0o777)
    with pytest.raises(NotCompilableError, match="which another user owns or may write to.* Delete that folder"):
        keep_in_cache_of_user()
