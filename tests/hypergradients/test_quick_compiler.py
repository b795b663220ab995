"""What makes PyTorch's compiler quicker: it changes no program, and nothing of others' compilations."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from hypertorch.hypergradients.reverse_mode.compiled import quick_compiler

instructions: Any = quick_compiler._instructions
builds: Any = quick_compiler._builds


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(instructions, "valid_vec_isa_list", Choice())
    monkeypatch.setattr(builds, "_worker_compile_cpp", builds._worker_compile_cpp)


class Choice:
    """What PyTorch chooses from, and remembers."""

    def __init__(self) -> None:
        self.remembered: list[str] | None = None

    def __call__(self) -> list[str]:
        if self.remembered is None:
            self.remembered = [str(own) for own in instructions.supported_vec_isa_list]
        return self.remembered

    def cache_clear(self) -> None:
        self.remembered = None


@pytest.mark.parametrize(("capability", "name"), [("AVX512", "avx512"), ("AVX2", "avx2")])
def test_the_instructions_of_pytorch_itself_are_taken_without_trial(
    monkeypatch: pytest.MonkeyPatch, capability: str, name: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(instructions.VecISA, "check_build", refuse)
    every = instructions.valid_vec_isa_list()  # by a compilation before
    with quick_compiler.quick_compiler():
        assert instructions.valid_vec_isa_list() == [name]
        assert all(instructions.supported_vec_isa_list)
    assert instructions.valid_vec_isa_list() == every
    assert len(every) > 1


@pytest.mark.parametrize("capability", ["DEFAULT", "SVE256", "NO AVX"])
def test_on_other_processors_pytorch_chooses(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    every = instructions.valid_vec_isa_list()
    with quick_compiler.quick_compiler():
        assert instructions.valid_vec_isa_list() == every


@pytest.mark.parametrize("way", ["environment", "setting"])
def test_the_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    if way == "environment":
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    every = instructions.valid_vec_isa_list()
    settings = {"cpp.simdlen": 256} if way == "setting" else {}
    with quick_compiler.config.patch(settings), quick_compiler.quick_compiler():
        assert instructions.valid_vec_isa_list() == every


@pytest.mark.slow
def test_pytorch_runs_what_is_taken_without_trial() -> None:
    # Of this processor: the trial that is left out, made.
    for own in quick_compiler._known_instructions():
        assert own.check_build(instructions.VecISA._avx_code)


def test_parts_are_built_beside_each_other_and_joined_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    both, built, locks = threading.Barrier(2, timeout=60), [], []

    def build(lock: str, builders: Sequence[str]) -> None:
        for part in builders:
            if len(builders) == 1:
                both.wait()  # for as long as the other part is not begun
            if part not in built:
                built.append(part)
        locks.append(lock)

    monkeypatch.setattr(builds, "_worker_compile_cpp", build)
    with quick_compiler.quick_compiler():
        builds._worker_compile_cpp("lock", ["calls", "kernels", "joined"])
    assert built[2:] == ["joined"]
    assert locks[2:] == ["lock"]
    assert len(set(locks)) == 3
    assert builds._worker_compile_cpp is build


def test_one_file_is_built_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(builds, "_worker_compile_cpp", lambda *call: calls.append(call))
    with quick_compiler.quick_compiler():
        builds._worker_compile_cpp("lock", ["alone"])
    assert calls == [("lock", ["alone"])]


def test_an_error_of_a_part_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: str, builders: Sequence[str]) -> None:
        if builders == ["kernels"]:
            raise OSError("no room")
        assert builders == ["calls"]

    monkeypatch.setattr(builds, "_worker_compile_cpp", build)
    with quick_compiler.quick_compiler(), pytest.raises(OSError, match="no room"):
        builds._worker_compile_cpp("lock", ["calls", "kernels", "joined"])


ROW, COLUMN = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("row", "column"))
SIZE = sympy.Symbol("s0", integer=True, positive=True)

# As PyTorch writes places in memory: sums of products, and quotients and remainders of a variable.
INDICES = [
    sympy.Integer(7),
    ROW,
    COLUMN,
    16 * ROW + COLUMN,
    4 * (ROW + 3 * COLUMN) + 5,
    SIZE * ROW + COLUMN,
    SIZE * (ROW + 1) + 2 * ROW * COLUMN,
    -ROW + 15,
    ROW**2 + COLUMN,
    FloorDiv(ROW, 16) + 3 * COLUMN,
    FloorDiv(ROW, 3) + ROW,
    ModularIndexing(ROW, 1, 16) + COLUMN,
    ModularIndexing(ROW, 1, 5) + 2 * ROW,
    ModularIndexing(ROW, 16, 4) + 7 * FloorDiv(COLUMN, 2),
]


@pytest.mark.parametrize("length", [None, 8, 16])
def test_strides_are_those_of_pytorch(length: int | None) -> None:
    cpp: Any = quick_compiler._kernels
    of_pytorch = cpp.stride_at_vec_range
    expected = [of_pytorch(index, var, length) for index in INDICES for var in (ROW, COLUMN)]
    with quick_compiler.quick_compiler():
        found = [cpp.stride_at_vec_range(index, var, length) for index in INDICES for var in (ROW, COLUMN)]
    assert [sympy.simplify(own - right) for own, right in zip(found, expected, strict=True)] == [0] * len(found)
    # What the compiler asks of a stride: whether it is a certain number.
    assert [own for own in found if own.is_number] == [right for right in expected if right.is_number]
    assert cpp.stride_at_vec_range is of_pytorch
    assert quick_compiler.sizevars.sympy is sympy


def test_strides_of_many_indices_are_computed_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cpp: Any = quick_compiler._kernels
    other = sympy.Symbol("other", integer=True)  # in no index before
    indices = [(number + 2) * ROW + FloorDiv(other, 2) for number in range(300)]
    monkeypatch.setattr(sympy, "simplify", lambda _: pytest.fail("a sum of products was simplified"))
    with quick_compiler.quick_compiler():
        before = cpp.stride_at_vec_range.cache_info().misses
        found = [[cpp.stride_at_vec_range(index, ROW, 16) for index in indices] for _ in range(2)]
        assert cpp.stride_at_vec_range.cache_info().misses == before + len(indices)
    assert found == [[number + 2 for number in range(300)]] * 2


def test_the_rules_of_dtypes_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rules: Any = quick_compiler.dtype_propagation.DtypePropagationOpsHandler
    gathered: list[Any] = []
    monkeypatch.setattr(rules, "__init__", lambda own: gathered.append(own))
    with quick_compiler.quick_compiler():
        handlers = {id(quick_compiler.common.DtypePropagationOpsHandler()) for _ in range(3)}
    assert len(handlers) == len(gathered) == 1
    assert quick_compiler.common.DtypePropagationOpsHandler is rules


def refuse(*_: object) -> bool:
    pytest.fail("a trial was made")
