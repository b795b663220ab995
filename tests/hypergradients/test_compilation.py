"""What is set up around compiled runs and around compilations, and is gone after them."""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.hypergradients.reverse_mode.compiled import compilation, looped_steps, not_compilable
from hypertorch.hypergradients.reverse_mode.compiled.errors import NotCompilableError
from hypertorch.hypergradients.reverse_mode.compiled.program_folder import refuse_folder
from hypertorch.hypergradients.reverse_mode.compiled.traced_code import is_checked
from hypertorch.types import TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import net_problem

Reverse = ht.hypergradients.Reverse
HPARAMS = {"lr": torch.tensor(0.3, dtype=torch.float64)}
SGD = ht.dynamics.SGD(lr=ht.Hyper("lr"))


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces functions and their derivatives, but makes no machine code of them."""
    refused = not_compilable.REFUSED, not_compilable.ATTEMPTS, not_compilable.WARNED
    set_aside(monkeypatch, compilation.PROGRAMS, looped_steps.ONE_BY_ONE, *refused)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


def hypergradient(backend: Reverse) -> TensorDict:
    problem = net_problem(SGD, HPARAMS, num_steps=3)
    return ht.hypergradient(problem, problem.init_hparams(), backend=backend).grads


def halve(tensor: Tensor) -> Tensor:
    return tensor / 2


def test_a_program_is_set_up_for_where_it_is_compiled_and_not_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    checks = compilation.traced_code_is_checked

    def counted(dynamo: Any) -> AbstractContextManager[None]:
        made.append(dynamo)
        return checks(dynamo)

    monkeypatch.setattr(compilation, "traced_code_is_checked", counted)
    first = hypergradient(Reverse(compile=True))
    assert made
    made.clear()
    torch.testing.assert_close(hypergradient(Reverse(compile=True)), first, rtol=0, atol=0)
    assert not made
    torch.testing.assert_close(first, hypergradient(Reverse()))


def test_a_compiled_run_inside_of_another_leaves_nothing_behind() -> None:
    dynamo: Any = torch._dynamo
    before = dynamo.config.trace_autograd_ops
    with compilation.compilation(lambda: None), compilation.compilation(lambda: None):
        compilation.compiled(halve, "inside", torch.device("cpu"))(torch.ones(2))
    assert not is_checked(dynamo)
    assert dynamo.config.trace_autograd_ops is before
    assert gc.isenabled()


def test_what_another_thread_compiles_in_the_meantime_is_compiled_as_ever() -> None:
    told: list[str] = []
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(is_checked(torch._dynamo))
        return graph.forward

    other = threading.Thread(target=lambda: torch.compile(halve, backend=backend)(torch.ones(3)))
    with compilation.compilation(lambda: told.append("began")):
        other.start()
        other.join()
        assert not is_checked(torch._dynamo)
    assert seen == [False]
    assert not told


def test_code_that_was_traced_without_the_checks_is_not_used() -> None:
    """PyTorch tells of the first of several compilations at a time, and not of one that begins in between."""
    callback: Any = torch._dynamo.callback
    with callback.callback_handler.install_callbacks(callback.CallbackTrigger.LAZY_BACKWARD, "of another thread"):
        with (
            compilation.compilation(lambda: None),
            pytest.raises(NotCompilableError, match="something else was compiled at the same time"),
            compilation.attempt(),
        ):
            compilation.compiled(halve, "unchecked", torch.device("cpu"))(torch.ones(2))
        with pytest.warns(UserWarning, match="cannot be compiled, and runs without"):
            found = hypergradient(Reverse(compile=True))
    torch.testing.assert_close(found, hypergradient(Reverse()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "part"), [("callback", "callback_handler"), ("variables.builder", "make_dupe_guard")]
)
def test_a_pytorch_that_lacks_what_is_checked_compiles_nothing(
    module: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(importlib.import_module(f"torch._dynamo.{module}"), part)
    with pytest.warns(UserWarning, match=f"lacks parts of the compiler that trace derivatives .`{part}`"):
        found = hypergradient(Reverse(compile=True))
    torch.testing.assert_close(found, hypergradient(Reverse()), rtol=0, atol=0)


def test_a_compilation_waits_for_that_of_another_thread() -> None:
    """The setup holds for the whole process: the first would undo it while the second compiles."""
    is_inside, may_leave, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with compilation.compilation(lambda: None):
            is_inside.set()
            may_leave.wait(30)
            order.append("first")

    def second() -> None:
        with compilation.compilation(lambda: None):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert is_inside.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    may_leave.set()
    for thread in threads:
        thread.join(30)
    assert order == ["first", "second"]
    assert gc.isenabled()


def test_compiled_runs_leave_no_settings_of_pytorch_behind() -> None:
    """A patch of PyTorch's settings leaves a context variable for the life of the process."""

    def number() -> int:
        with compilation.compilation(lambda: None):
            pass
        return len(copy_context())

    assert number() == number() == number()


@pytest.mark.parametrize(("name", "is_taken"), [("ordinary", True), ("zwölf", True), ("a b", False), ("a'b", False)])
def test_a_folder_of_programs_that_a_compiler_cannot_be_called_with_is_named(
    name: str, is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
    with nullcontext() if is_taken else pytest.raises(NotCompilableError, match=f"{name}.*blanks or quotes in a path"):
        refuse_folder()


@pytest.mark.parametrize("is_on", [True, False])
def test_garbage_is_not_looked_for_while_a_program_is_compiled(is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    make = compilation._make_code
    monkeypatch.setattr(compilation, "_make_code", lambda *own: (seen.append(gc.isenabled()), make(*own))[1])
    was_on = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    try:
        with compilation.compilation(lambda: None):
            compilation.compiled(halve, "garbage", torch.device("cpu"))(torch.ones(2))
            assert gc.isenabled() is is_on
        hypergradient(Reverse(compile=True))
        assert gc.isenabled() is is_on
    finally:
        (gc.enable if was_on else gc.disable)()
    assert seen
    assert not any(seen)
