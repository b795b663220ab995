"""States in a file against states in memory: the same bits, a bounded memory, and nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import tree
from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.errors import IncompatibleBackendError, ReplayError
from hypertorch.hypergradients.reverse_mode.memory_plan import plan_memory
from hypertorch.hypergradients.reverse_mode.spilled_states import SpilledStates
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.state import InnerState
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, scalar_problem, task_problem
from tests.helpers.sized_problems import mlp, sized_problem
from tests.helpers.small_files import small_files

Reverse = ht.hypergradients.Reverse
LR = {"lr": torch.tensor(0.1, dtype=torch.float64)}
KEPT = (
    {"checkpoint_every": 1},
    {"checkpoint_every": 3},
    {"checkpoint_every": 11},
    {"snapshots": 3},
    {"snapshots": 1},
    {"checkpoint_every": "sqrt"},
    {"snapshots": 20},
)
RULES = {
    "SGD": (ht.dynamics.SGD(lr=ht.Hyper("lr")), LR),
    "momentum": (ht.dynamics.SGD(lr=0.3, momentum=0.5), {}),
    "Adam": (ht.dynamics.Adam(lr=ht.Hyper("lr")), LR),
}


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every file of states when it is closed."""
    found: list[int] = []
    close = SpilledStates.__exit__

    def closing(self: SpilledStates, *exception: object) -> None:
        found.append(os.fstat(self._file.fileno()).st_size)
        close(self, *exception)

    monkeypatch.setattr(SpilledStates, "__exit__", closing)
    return found


def assert_same_bits(
    problem: ht.BilevelProblem, tmp_path: Path, settings: tuple[dict, ...] = KEPT, **options: object
) -> None:
    hparams = problem.init_hparams()
    for kept in settings:
        in_memory = ht.hypergradient(problem, hparams, backend=Reverse(**kept), **options)
        spilled = ht.hypergradient(problem, hparams, backend=Reverse(**kept, spill_to=tmp_path), **options)
        for name in hparams:
            assert spilled.grads[name].dtype == in_memory.grads[name].dtype
            assert torch.equal(spilled.grads[name], in_memory.grads[name]), (kept, name)
        assert torch.equal(spilled.outer_loss, in_memory.outer_loss)
        assert spilled.stats == in_memory.stats


@pytest.mark.parametrize("name", RULES)
def test_the_hypergradient_has_the_same_bits_with_noise_and_terms_at_steps(name: str, tmp_path: Path) -> None:
    rule, extra = RULES[name]
    assert_same_bits(net_problem(rule, extra, num_steps=11, dropout=0.4, step_terms=True), tmp_path)


def test_in_mixed_mode(tmp_path: Path, sizes: list[int]) -> None:
    problem = net_problem(*RULES["momentum"], num_steps=11)
    hparams = problem.init_hparams()
    for kept in ({"checkpoint_every": 1}, {"checkpoint_every": 4}, {"snapshots": 2}):
        backend = Reverse(**kept, derivative="mixed")
        in_memory = ht.hypergradient(problem, hparams, backend=backend)
        spilled = ht.hypergradient(
            problem, hparams, backend=Reverse(**kept, derivative="mixed", spill_to=str(tmp_path))
        )
        assert all(torch.equal(spilled.grads[name], in_memory.grads[name]) for name in hparams)
    assert [size > 0 for size in sizes] == 3 * [True]


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_with_tasks_and_running_statistics(route: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3)
    ).double()
    problem = task_problem(module, item=(4,), num_steps=5)
    assert_same_bits(problem, tmp_path, KEPT[1:5:2], execution=ht.Execution(tasks=route))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.ones(4, 6, dtype=dtype).T, "b": torch.zeros((), dtype=dtype)},
            lambda p, h, b: (h["scale"] * (matrix @ p["w"] + p["b"] - 1)).square().mean(),
        ),
        LambdaOuter({"scale": torch.ones((), dtype=dtype)}, lambda p, h, b: p["w"].square().sum() + p["b"]),
        dynamics=ht.dynamics.SGD(lr=0.1, momentum=0.5),
        num_steps=11,
    )
    assert_same_bits(problem, tmp_path)


def test_a_run_that_goes_on_from_another(tmp_path: Path) -> None:
    problem = net_problem(*RULES["Adam"], num_steps=6)
    problem = ht.BilevelProblem(
        problem.inner,
        problem.outer,
        dynamics=problem.dynamics,
        num_steps=6,
        warm_start=True,
        allow_unused=("init.first", "init.second"),
    )
    hparams = problem.init_hparams()
    carry = ht.hypergradient(problem, hparams, backend=Reverse()).carry
    expected, found = (
        ht.hypergradient(problem, hparams, backend=backend, carry=carry)
        for backend in (Reverse(checkpoint_every=2), Reverse(checkpoint_every=2, spill_to=tmp_path))
    )
    assert all(torch.equal(found.grads[name], expected.grads[name]) for name in ("weights", "log_l2", "lr"))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [{"checkpoint_every": 4}, {"snapshots": 3}], ids=str)
def test_compiled_steps(kept: dict, tmp_path: Path) -> None:
    problem = net_problem(*RULES["momentum"], num_steps=14)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=Reverse())
    found = ht.hypergradient(problem, hparams, backend=Reverse(**kept, compile=True, spill_to=tmp_path))
    for name in hparams:
        torch.testing.assert_close(found.grads[name], expected.grads[name], rtol=1e-10, atol=1e-12)


def test_a_state_that_is_not_what_was_kept_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps before it end elsewhere."""
    finished = SpilledStates.pop

    def other(self: SpilledStates) -> InnerState:
        state = finished(self)
        return state.replace_tensors([value + 1e-3 for value in state.tensors()])

    monkeypatch.setattr(SpilledStates, "pop", other)
    problem = net_problem(*RULES["SGD"], num_steps=6)
    with pytest.raises(ReplayError):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=2, spill_to=tmp_path))


# Memory and disk.


# Bytes of a state of `problem_of`: params and momenta.
STATE = 2 * 4 * (20 * 16 + 16 + 16 * 5 + 5)


def problem_of(num_steps: int) -> ht.BilevelProblem:
    return sized_problem(mlp(20, 16, 5), 80, 20, num_steps=num_steps, dynamics=ht.dynamics.SGD(lr=0.1, momentum=0.5))


def counted(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> int:
    ht.hypergradient(problem, problem.init_hparams(), backend=backend)
    gc.collect()
    with PeakMemory() as memory:
        ht.hypergradient(problem, problem.init_hparams(), backend=backend)
    return memory.peak


@pytest.mark.parametrize("kept", [{"checkpoint_every": 1}, {"checkpoint_every": 4}], ids=str)
def test_memory_does_not_grow_with_the_horizon(kept: dict, tmp_path: Path) -> None:
    short, long = (counted(problem_of(num_steps), Reverse(**kept, spill_to=tmp_path)) for num_steps in (12, 36))
    # An inner loss for every step, and for every step run again. One state more or less is on its way to the file.
    assert long - short <= 24 * 2 * 4 + STATE


@pytest.mark.parametrize("kept", [{"checkpoint_every": 7}, {"checkpoint_every": 7, "derivative": "mixed"}], ids=str)
def test_losses_of_a_long_run_share_memory_and_are_those_of_their_steps(kept: dict, tmp_path: Path) -> None:
    problem = scalar_problem(num_steps=600)
    hparams = problem.init_hparams()
    found = []
    for backend in (Reverse(**kept), Reverse(**kept, spill_to=tmp_path)):
        loop = BoundProblem(problem, hparams, 0, None).loop(None, {})
        backend.compute(loop, tree.leaves_requiring_grad(hparams))
        found.append(loop.record.losses)
    assert found[0].keys() == found[1].keys() == set(range(600))
    assert all(torch.equal(found[0][step], found[1][step]) for step in range(600))
    assert len({value.untyped_storage().data_ptr() for value in found[0].values()}) == 600
    assert len({value.untyped_storage().data_ptr() for value in found[1].values()}) < 100


def test_revolve_holds_few_of_its_states(tmp_path: Path) -> None:
    few, many = (counted(problem_of(30), Reverse(snapshots=c, spill_to=tmp_path)) for c in (4, 25))
    assert abs(many - few) <= 0.02 * few + STATE  # one state more or less is on its way to the file
    assert many < counted(problem_of(30), Reverse(snapshots=25)) / 2


def test_the_file_is_as_large_as_it_takes(tmp_path: Path, sizes: list[int]) -> None:
    problem = problem_of(10)
    ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=3, spill_to=tmp_path))
    assert sizes == [3 * STATE]  # of four kept states, one stays in memory


# The plan.


def spilled_plans(problem: ht.BilevelProblem) -> Iterator[tuple[int, ht.hypergradients.MemoryPlan]]:
    """Yields budgets with plans that need the file, each budget just too small for the one before."""
    hparams = problem.init_hparams()
    budget = 2**40
    while True:
        try:
            plan = plan_memory(problem, hparams, budget, spill=True)
        except IncompatibleBackendError:
            return
        if plan.spilled_states:
            yield budget, plan
        budget = plan.peak_bytes - 1


def test_a_plan_takes_the_file_only_where_memory_is_too_small() -> None:
    problem = problem_of(60)
    hparams = problem.init_hparams()
    found = list(spilled_plans(problem))
    for budget, plan in found:
        # Without the file a schedule that runs more steps again, or fewer states between longer segments.
        without = plan_memory(problem, hparams, budget)
        assert without.method == "revolve" and without.recomputed_steps > plan.recomputed_steps
        assert plan.peak_bytes <= budget and plan.recomputed_steps == 60 - (plan.checkpoint_every or 0)
    roomy = found[0][1].too_large[-1].peak_bytes
    assert plan_memory(problem, hparams, roomy, spill=True) == plan_memory(problem, hparams, roomy)
    assert plan_memory(problem, hparams, roomy).spilled_bytes == 0


def test_a_plan_says_what_is_in_memory_and_what_on_disk(tmp_path: Path, sizes: list[int]) -> None:
    problem = problem_of(60)
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse())
    found = list(spilled_plans(problem))
    assert len(found) > 3
    for budget, plan in (found[0], found[-1]):
        kept = ceil(60 / (plan.checkpoint_every or 1))
        assert (plan.kept_states, plan.spilled_states) == (2, kept - 1)
        backend = Reverse(memory_budget=budget, spill_to=tmp_path)
        sizes.clear()
        peak = counted(problem, backend)
        assert sizes == [plan.spilled_bytes] * 2
        assert peak == pytest.approx(plan.peak_bytes, rel=0.08)
        assert peak <= 1.01 * budget
        grads = ht.hypergradient(problem, hparams, backend=backend).grads
        torch.testing.assert_close(grads["weights"], whole.grads["weights"])
        text = backend.explain(problem, hparams)
        assert f"kept at once: 2 states in memory, {kept - 1} in a file of " in text
        assert f"chosen: a state kept every {plan.checkpoint_every} steps, {kept - 1} in a file of " in text
        assert text.count("too large: ") == 2


# What goes wrong.


def test_a_full_disk_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    problem = scalar_problem(inner=lambda p, h, b: steps.append(1) or (p["w"] - h["c"]).square(), num_steps=9)
    hparams = problem.init_hparams()
    ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=3))
    steps.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=15))
    with pytest.raises(
        OSError, match=r"`spill_to` is '.*', where 15 bytes .* free: 2 states of 8 B need 16 bytes .* Make room"
    ) as caught:
        ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=3, spill_to=tmp_path))
    assert caught.value.errno == errno.ENOSPC and steps == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=16))
    ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=3, spill_to=tmp_path))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system takes no room in advance")
def test_the_room_is_taken_and_not_only_asked_about(tmp_path: Path) -> None:
    problem = problem_of(10)
    with small_files(), pytest.raises(OSError, match="3 states of .* need 10"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=3, spill_to=tmp_path))


def test_a_disk_that_fails_later_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    problem = problem_of(10)
    told = pytest.raises(OSError, match=r"could not be written there .*File too large.* choose another folder")
    with small_files(), told:
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=3, spill_to=tmp_path))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [4, 12, 17])  # going forward, in the last segment, in the first
def test_nothing_is_left_behind(error: type[BaseException], when: int, tmp_path: Path) -> None:
    calls = []
    files = []

    def loss(params: dict[str, Tensor], hparams: dict[str, Tensor], batch: object) -> Tensor:
        calls.append(1)
        files.append([*tmp_path.iterdir()])
        if armed and len(calls) == when:
            raise error("stop")
        return (params["w"] - hparams["c"]).square()

    armed = False
    problem = scalar_problem(inner=loss, num_steps=10)
    hparams = problem.init_hparams()
    ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=2))
    calls.clear()
    armed = True
    before = open_files()
    with pytest.raises(error, match="stop") as caught:
        ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=2, spill_to=tmp_path))
    # While the exception still holds every frame.
    assert open_files() == before and caught.value is not None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hypertorch-spill")]
    assert [*tmp_path.iterdir()] == []
    if sys.platform == "linux":  # a file without a name, of which a process that is killed leaves nothing
        assert not any(files)


@pytest.mark.skipif(sys.platform != "linux", reason="the file has a name")
@pytest.mark.parametrize("when", [1, 3])
def test_a_folder_that_is_removed_meanwhile_does_no_harm(
    when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "states", []
    folder.mkdir()
    append = SpilledStates.append

    def removing(self: SpilledStates, state: InnerState) -> None:
        calls.append(1)
        if len(calls) == when:
            folder.rmdir()
        append(self, state)

    monkeypatch.setattr(SpilledStates, "append", removing)
    problem = problem_of(10)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=2))
    found = ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=2, spill_to=folder))
    assert all(torch.equal(found.grads[name], value) for name, value in expected.grads.items())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0  # noqa: PTH208


class Bytes(os.PathLike):  # type: ignore[type-arg]
    """A path that is no text."""

    def __fspath__(self) -> bytes:
        return b"/"

    def __repr__(self) -> str:
        return "a path in bytes"


@pytest.mark.parametrize(
    "folder", ["", "/no/such/folder", 3, True, __file__, "x" * 5000, "a\0b", "\ud800", b"/", Bytes()], ids=repr
)
def test_what_is_no_folder_is_refused(folder: object) -> None:
    with pytest.raises(ValueError, match="`spill_to` is .*, which is no folder.* Pass one that there is"):
        Reverse(checkpoint_every=1, spill_to=folder)  # type: ignore[arg-type]


def test_a_folder_without_states_to_keep_is_refused(tmp_path: Path) -> None:
    for options in ({}, {"compile": True}, {"derivative": "mixed"}):
        with pytest.raises(ValueError, match=r"nothing says which states are kept.* Pass `checkpoint_every`"):
            Reverse(spill_to=tmp_path, **options)
    problem = problem_of(2)
    with pytest.raises(TypeError, match="`spill` is 1"):
        plan_memory(problem, problem.init_hparams(), "1GiB", spill=1)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder where no file can be made")
def test_a_folder_where_no_file_can_be_made_is_named() -> None:
    problem = problem_of(6)
    backend = Reverse(checkpoint_every=2, spill_to="/proc")
    with pytest.raises(OSError, match="`spill_to` is '/proc', where no file can be made.*Pass a folder"):
        ht.hypergradient(problem, problem.init_hparams(), backend=backend)
