"""Operations with a zero that has no memory: what PyTorch's own kernels give, without its slow functions."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hypertorch.autodiff.products import jvps, load_forward_mode
from hypertorch.types import TensorDict
from tests.helpers.problems import normal

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((2, 1), (1, 3)),
    ((), (2, 3)),
    ((0, 3), (1, 3)),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64)
OPERATIONS: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": torch.add,
    "add three times": lambda one, other: torch.add(one, other, alpha=3),
    "sub": torch.sub,
    "sub three times": lambda one, other: torch.sub(one, other, alpha=3),
    "sub from": lambda one, other: other - one,
    "mul": torch.mul,
    "div": torch.div,
}
NUMBERS: dict[str, tuple[str, tuple[int, ...], torch.dtype, Any]] = {
    " ".join(map(str, form)): form for form in itertools.product(OPERATIONS, [(), (3,), (0,)], DTYPES, (2, 0, 1.5, 2j))
}
Row = tuple[Tensor, bool, bool]


def some(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (4 * normal(*shape, seed=1)).to(dtype)


def zero(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    make: Any = torch._efficientzerotensor
    return make(shape, dtype=dtype)


def row(operation: Callable[[Any, Any], Tensor], one: Any, other: Any) -> Row:
    """Returns a result, whether it has no memory, and whether it shares that of an operand."""
    found = operation(one, other)
    has_none = found._is_zerotensor()
    shared = not has_none and any(
        not operand._is_zerotensor() and found.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr() != 0
        for operand in (one, other)
        if isinstance(operand, Tensor)
    )
    return found.clone(), has_none, shared


def table() -> dict[str, Row]:
    """Returns every operation on every form, where one operand or both have no memory; and on numbers."""
    rows = {}
    for name, operation in OPERATIONS.items():
        for shapes, dtypes in itertools.product(SHAPES, itertools.product(DTYPES, repeat=2)):
            for makers in ((zero, some), (some, zero), (zero, zero)):
                operands = [make(*form) for make, *form in zip(makers, shapes, dtypes, strict=True)]
                is_zero = [make is zero for make in makers]
                rows[f"{name} {shapes} {dtypes} {is_zero}"] = row(operation, *operands)
    for key, (name, shape, dtype, number) in NUMBERS.items():
        rows[key] = row(OPERATIONS[name], zero(shape, dtype), number)
    return rows


def test_every_result_is_that_of_pytorchs_own_kernels(tmp_path: Path) -> None:
    load_forward_mode()
    code = f"import sys, torch; from {__name__} import table; torch.save(table(), sys.argv[1])"
    path = tmp_path / "table.pt"
    subprocess.run([sys.executable, "-c", code, path], check=True, cwd=Path(__file__).parents[2])
    expected, found = torch.load(path), table()
    assert len(found) > 2_000
    assert found.keys() == expected.keys()
    for name, (value, *marks) in found.items():
        own, *own_marks = expected[name]
        assert marks == own_marks, name
        if name in NUMBERS:
            # PyTorch's own gives a tensor without axes the precision of the number, as no other of its sums does.
            operation, shape, dtype, number = NUMBERS[name]
            assert value.dtype == OPERATIONS[operation](torch.zeros(shape, dtype=dtype), number).dtype, name
            own = own.to(value.dtype)
        torch.testing.assert_close(value, own, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {value} and {own}")


def test_a_number_of_the_host_goes_with_another_device() -> None:
    load_forward_mode()
    there, number = torch.ones(3, device="meta"), zero((), torch.float32)
    for operation in OPERATIONS.values():
        assert operation(there, number).device == operation(number, there).device == there.device


def test_tangents_take_no_slow_function() -> None:
    """Counted in calls of Python: PyTorch's functions that find a shape make over two hundred for a product."""
    value, constant = normal(3, 4, seed=1), normal(4, seed=2)
    load_forward_mode()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        assert torch.equal(forward_ad.unpack_dual(dual * constant).tangent, constant.expand(3, 4))
        for step in (
            lambda: dual + constant,
            lambda: 1.0 - dual,
            lambda: dual * 2.0,
            lambda: dual * constant,
            lambda: constant / dual,
        ):
            assert len(calls_of(step)) <= 25


def test_the_step_of_a_forward_run_takes_none_either() -> None:
    def step(params: TensorDict) -> tuple[tuple[TensorDict, ...], TensorDict]:
        weight = params["weight"]
        return ({"weight": weight - 0.1 * (weight * params["scale"] + 1.0)},), {}

    def run(vectorised: bool) -> None:
        primals = {"weight": normal(3, seed=1), "scale": normal(3, seed=2)}
        jvps(step, [primals], [{"weight": torch.eye(3, dtype=torch.float64)}], vectorised=vectorised)

    for vectorised in (False, True):
        run(vectorised)
        assert not [file for file in calls_of(partial(run, vectorised)) if "_refs" in file or "_prims" in file]


def calls_of(function: Callable[[], object]) -> list[str]:
    """Returns the files of the functions that Python calls meanwhile."""
    files: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files
