"""Live tensor bytes against numbers that follow from shapes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.autodiff.live_memory import PeakMemory, format_bytes, parse_bytes, storage_bytes
from tests.helpers.problems import net_problem

F64 = torch.float64
ROW = 8 * 100  # bytes of a hundred numbers


@pytest.fixture(autouse=True)
def _without_garbage_collection() -> Iterator[None]:
    """What is freed must be freed by counting references, or the numbers would depend on chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def row(requires_grad: bool = False) -> Tensor:
    return torch.ones(100, dtype=F64, requires_grad=requires_grad)


def test_results_count_until_they_die() -> None:
    old = row()
    with PeakMemory() as memory:
        first = old + 1
        second = first * 2
        assert (memory.current, memory.peak) == (2 * ROW, 2 * ROW)
        del first
        assert (memory.current, memory.peak) == (ROW, 2 * ROW)
        third = second + 1
        assert (memory.current, memory.peak) == (2 * ROW, 2 * ROW)
        del second, third
        assert (memory.current, memory.peak) == (0, 2 * ROW)


def test_inputs_and_results_of_an_operation_live_at_once() -> None:
    value = row()
    with PeakMemory() as memory:
        for _ in range(5):
            value = value + 1
    assert (memory.current, memory.peak) == (ROW, 2 * ROW)


def test_storages_count_once_and_only_if_they_are_new() -> None:
    old = row()
    with PeakMemory() as memory:
        views = [old[:50], old.view(10, 10), old.expand(7, 100), old.detach()]
        old.add_(1)
        assert memory.peak == 0
        new = old.clone()
        views += [new[:1], new.reshape(10, 10), new.reshape(10, 10).T]
        new.mul_(2)
        assert memory.peak == ROW
        del new
        assert memory.current == ROW  # a view keeps all of it
        views.clear()
        assert memory.current == 0


def test_what_a_graph_keeps_counts_until_the_graph_is_freed() -> None:
    start = row(requires_grad=True)
    with PeakMemory() as memory:
        value = start
        for _ in range(6):
            value = value.sin()  # keeps its input
        assert memory.current == 6 * ROW
        total = value.sum()
        del value
        assert memory.current == 5 * ROW + 8  # nothing needs the last sine
        (grad,) = torch.autograd.grad(total, start)
        assert memory.current == ROW + 8
        del grad, total
        assert memory.current == 0


def test_a_backward_pass_frees_the_graph_as_it_goes() -> None:
    start = row(requires_grad=True)
    with PeakMemory() as memory:
        value = start
        for _ in range(50):
            value = value.sin()
        memory.reset_peak()
        assert memory.peak == 50 * ROW
        torch.autograd.grad(value.sum(), start)
    assert memory.peak < 54 * ROW


def test_a_second_order_graph_counts() -> None:
    start = row(requires_grad=True)
    with PeakMemory() as memory:
        (grad,) = torch.autograd.grad(start.exp().sum(), start, create_graph=True)
        assert memory.current == 2 * ROW + 8  # the gradient; for its own, the exponential and the one it is times
        del grad
        assert memory.current == 0


def test_new_tensors_without_inputs_count() -> None:
    with PeakMemory() as memory:
        kept = [torch.zeros(100, dtype=F64), torch.tensor([1.0] * 100, dtype=F64), torch.arange(100)]
        assert memory.current == 3 * ROW
        kept.append(torch.ones(100, dtype=torch.float32))
        assert memory.current == 3.5 * ROW
        kept.append(torch.randn(2, 100, dtype=torch.complex128))
        assert memory.current == 7.5 * ROW


def test_a_storage_that_grows_is_counted_anew() -> None:
    with PeakMemory() as memory:
        value = torch.zeros(50, dtype=F64)
        value.resize_(100)
        assert memory.current == ROW
        torch.add(row(), 1, out=value)
        assert memory.current == ROW


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, at its first dual number
def test_under_transforms_the_whole_batch_counts() -> None:
    rows = torch.ones(3, 100, dtype=F64)
    with PeakMemory() as memory:
        result = torch.func.vmap(lambda value: value.sin().cos())(rows)
        assert (memory.current, memory.peak) == (3 * ROW, 6 * ROW)
        del result
        grads = torch.func.vmap(torch.func.grad(lambda value: value.sin().sum()))(rows)
        assert memory.current == 3 * ROW
        del grads
        value, tangent = torch.func.jvp(torch.sin, (rows,), (rows,))
        assert memory.current == 6 * ROW
        del value, tangent
        assert memory.current == 0


def test_what_a_function_of_ones_own_saves_counts() -> None:
    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            result = value * 2
            ctx.save_for_backward(value.exp(), result)
            return result.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    start = row(requires_grad=True)
    with PeakMemory() as memory:
        total = Saving.apply(start)
        assert memory.current == 2 * ROW + 8
        del total
        assert memory.current == 0


def test_compiled_functions_and_control_flow_are_seen() -> None:
    with PeakMemory() as memory:
        compiled = torch.compile(lambda value: value.sin().cos(), backend="eager")
        result = compiled(row())
        assert memory.current == ROW
        result = torch.cond(torch.tensor(True), lambda value: value * 2, lambda value: value * 3, (result,))
        assert memory.current == ROW


def test_other_layouts_are_left_out_and_do_no_harm() -> None:
    with PeakMemory() as memory:
        sparse = torch.eye(3, dtype=F64).to_sparse()
        dense = sparse @ torch.eye(3, dtype=F64)
    assert dense.shape == (3, 3)
    assert memory.current == storage_bytes([dense])


def test_the_peak_can_be_started_again() -> None:
    with PeakMemory() as memory:
        kept = row()
        (kept + 1).sum()
        assert memory.peak >= 2 * ROW
        memory.reset_peak()
        assert memory.peak == ROW
        kept = kept + 1
        assert memory.peak == 2 * ROW


def test_after_the_context_deaths_are_seen_and_births_are_not() -> None:
    with PeakMemory() as memory:
        kept = row()
    other = kept + 1
    assert memory.current == ROW
    del kept
    assert memory.current == 0
    with memory:
        another = other + 1
        assert memory.current == ROW
    del other, another
    assert memory.current == 0


def test_contexts_nest() -> None:
    with PeakMemory() as outside:
        first = row()
        with PeakMemory() as inside:
            second = first + 1
        third = second + 1
    assert (outside.current, inside.current) == (3 * ROW, ROW)
    del first, third
    assert (outside.current, inside.current) == (ROW, ROW)


def test_an_error_inside_leaves_the_context() -> None:
    with pytest.raises(KeyError), PeakMemory() as memory:
        raise KeyError
    row()
    assert memory.peak == 0


def test_nothing_is_kept_alive() -> None:
    old = row()
    with PeakMemory() as memory:
        new = old + 1
    seen = weakref.ref(new)
    del new
    assert seen() is None
    counter = weakref.ref(memory)
    del memory
    assert counter() is None


def test_numbers_are_the_same_again() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, dropout=0.3)
    hparams = problem.init_hparams()
    peaks = set()
    for _ in range(3):
        with PeakMemory() as memory:
            ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse())
        peaks.add(memory.peak)
    assert len(peaks) == 1


def test_results_are_the_same_inside() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, dropout=0.3)
    hparams = problem.init_hparams()
    plain = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse())
    with PeakMemory():
        counted = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse())
    for name in hparams:
        assert torch.equal(plain.grads[name], counted.grads[name])


def test_bytes_of_storages() -> None:
    first, second = row(), row()
    assert storage_bytes([first, second, first[:3], second.view(10, 10)]) == 2 * ROW
    assert storage_bytes([first[:3]]) == ROW
    assert storage_bytes([first, second], besides=[second[0]]) == ROW
    assert storage_bytes([]) == 0


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (1, 1), (2_000_000, 2_000_000), ("17", 17), ("512MiB", 512 * 2**20), ("1.5 GB", 1_500_000_000), ("2kb", 2000),
        (" 2 KiB ", 2048), ("3tib", 3 * 2**40), ("100 B", 100), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_numbers_of_bytes_are_read(written: int | str, size: int) -> None:
    assert parse_bytes(written) == size


@pytest.mark.parametrize("written", [0, -1, True, "", "MiB", "512 MiBs", "1,5 GB", "-3 MB", "0.1 B", "much", None, 1.5])
def test_what_is_no_number_of_bytes_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"`budget` is .* no number of bytes: .*MiB.* Write for example '512MiB'"):
        parse_bytes(written, "budget")  # type: ignore[arg-type]


def test_numbers_of_bytes_are_written() -> None:
    sizes = [0, 1023, 1024, 1536, 512 * 2**20, 3 * 2**30, 2**41]
    written = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "512.0 MiB", "3.0 GiB", "2.0 TiB"]
    assert [format_bytes(size) for size in sizes] == written
