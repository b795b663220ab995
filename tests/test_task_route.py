"""The route by which tasks are run: measured once, the loop unless vectorised wins by enough, and said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.autodiff.missing_derivatives import NotVectorisableError
from hypertorch.inner.tasks import TASKS, TaskSlice, measured, task_slices
from hypertorch.types import TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import one_by_one, task_problem

Reverse = ht.hypergradients.Reverse


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()


def test_auto_measures_once_and_takes_the_faster_route(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = task_problem(network(), item=(1, 4, 4), num_tasks=3)
    clock = {"now": 0.0}
    calls: list[int] = []
    monkeypatch.setattr("hypertorch.inner.tasks.time.perf_counter", lambda: clock["now"])

    def run(slices: list[TaskSlice | None]) -> None:
        calls.append(len(slices))
        clock["now"] += 1.0 if len(slices) == 1 else 0.5

    hparams = problem.init_hparams()
    assert measured(ht.Execution(), problem, "a stub", hparams, nothing_wrong, run).tasks == "loop"
    count = len(calls)
    assert measured(ht.Execution(), problem, "a stub", hparams, nothing_wrong, run).tasks == "loop"
    assert len(calls) == count
    named = ht.Execution(tasks="vmap", chunk=2)
    assert measured(named, problem, "a stub", hparams, nothing_wrong, run) == named


def nothing_wrong(item: TaskSlice | None) -> None:
    """What looks at a problem and finds nothing."""


@pytest.fixture
def fresh_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what earlier tests measured."""
    set_aside(monkeypatch, TASKS)


def measured_as(monkeypatch: pytest.MonkeyPatch, *, vmap: float, loop: float) -> list[float]:
    """Lets runs of tasks, at once and one by one, take these times (unit: seconds); returns what was handed out."""
    given: list[float] = []

    def timed(run: Callable[[], object]) -> float:
        run()
        # The two are measured in turn, the vectorised one first.
        given.append(loop if len(given) % 2 else vmap)
        return given[-1]

    monkeypatch.setattr("hypertorch.inner.tasks._time", timed)
    return given


class Source(ht.ProblemSource):
    """A new problem of the same kind at every outer step, as episodes give it."""

    def __init__(self, **settings: object) -> None:
        self.settings = settings

    def init_hparams(self) -> TensorDict:
        return self.at(0).init_hparams()

    def at(self, outer_step: int) -> ht.BilevelProblem:
        return task_problem(network(), item=(1, 4, 4), **self.settings)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_routes")
@pytest.mark.parametrize(
    ("vmap", "loop", "route"), [(2e-3, 1e-3, "loop"), (1e-3, 1.1e-3, "loop"), (1e-3, 2e-3, "vmap")]
)
def test_a_run_measures_once_takes_the_faster_route_and_says_which_and_why(
    vmap: float, loop: float, route: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = measured_as(monkeypatch, vmap=vmap, loop=loop)
    taken: list[str] = []

    def recorded(num_tasks: int | None, execution: ht.Execution) -> list[TaskSlice | None]:
        taken.append(execution.tasks)
        return task_slices(num_tasks, execution)

    monkeypatch.setattr("hypertorch.hypergradients.api.task_slices", recorded)
    trainer = ht.OuterLoop(Source(num_tasks=6), optimizer=torch.optim.SGD, backend=Reverse())
    with caplog.at_level("INFO", logger="hypertorch.inner.tasks"):
        trainer.run(num_outer_steps=5)
    messages = [record.getMessage() for record in caplog.records if record.name == "hypertorch.inner.tasks"]
    assert messages == [
        f"4 tasks took {1e3 * vmap:.1f} ms vectorised and {1e3 * loop:.1f} ms one by one: tasks run by {route!r}"
    ]
    assert taken == [route] * 5
    assert len(given) == 10  # the best of five, of either


@pytest.mark.usefixtures("fresh_routes")
def test_a_named_route_is_not_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    given = measured_as(monkeypatch, vmap=1e-3, loop=2e-3)
    with caplog.at_level("INFO", logger="hypertorch.inner.tasks"):
        for route in ("vmap", "loop"):
            execution = ht.Execution(tasks=route)
            loop = ht.OuterLoop(Source(num_tasks=3), optimizer=torch.optim.SGD, backend=Reverse(), execution=execution)
            loop.run(num_outer_steps=2)
    assert not given and not caplog.records


@pytest.mark.usefixtures("fresh_routes")
def test_the_best_of_several_times_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes single times several times too long, at random."""
    seconds = iter([0.09, 0.002, 0.09, 0.002, 0.001, 0.09, 0.09, 0.09, 0.09, 0.09])
    monkeypatch.setattr("hypertorch.inner.tasks._time", lambda run: next(seconds))
    problem = task_problem(network(), item=(1, 4, 4), num_tasks=3)
    execution = measured(ht.Execution(), problem, "a stub", problem.init_hparams(), nothing_wrong, lambda slices: None)
    assert execution.tasks == "vmap"
    assert next(seconds, None) is None


@pytest.mark.usefixtures("fresh_routes")
def test_long_times_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = measured_as(monkeypatch, vmap=0.2, loop=0.9)
    problem = task_problem(network(), item=(1, 4, 4), num_tasks=3)
    execution = measured(ht.Execution(), problem, "a stub", problem.init_hparams(), nothing_wrong, lambda slices: None)
    assert execution.tasks == "vmap"
    assert given == [0.2, 0.9]


@pytest.mark.usefixtures("fresh_routes")
@pytest.mark.parametrize(
    ("loop", "finds", "route", "looked"),
    [(0.5, False, "loop", [1]), (3.0, False, "vmap", [1, 3]), (3.0, True, "loop", [1, 3])],
    ids=["a loop that wins", "vectorised tasks that win", "vectorised tasks that win and are wrong"],
)
def test_one_task_is_looked_at_first_and_vectorised_ones_where_they_win(
    loop: float, finds: bool, route: str, looked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at vectorised tasks takes longer than to run them."""
    measured_as(monkeypatch, vmap=1.0, loop=loop)
    problem = task_problem(network(), item=(1, 4, 4), num_tasks=3)
    done: list[int] = []
    ran: list[int] = []

    def look(item: TaskSlice | None) -> None:
        assert item is not None
        assert done or not ran
        done.append(item.stop)
        if finds and not item.squeeze:
            raise NotVectorisableError("a derivative differs", "Run them one by one.")

    def run(slices: list[TaskSlice | None]) -> None:
        ran.append(len(slices))

    assert measured(ht.Execution(), problem, "a stub", problem.init_hparams(), look, run).tasks == route
    assert done == looked


@pytest.mark.usefixtures("fresh_routes")
@pytest.mark.parametrize(("chunk", "first"), [(None, 6), (5, 5)])
@pytest.mark.parametrize(
    ("of_all", "route"), [((0.03, 0.02), "loop"), ((0.02, 0.023), "loop"), ((0.02, 0.025), "vmap")]
)
def test_what_is_won_on_a_few_tasks_by_little_is_measured_on_all(
    chunk: int | None, first: int, of_all: tuple[float, float], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of many tasks grows out of caches: four convolutional tasks can win, and sixteen lose by twice."""
    ran: list[list[tuple[int, int]]] = []

    def timed(run: Callable[[], object]) -> float:
        run()
        vectorised = ran[-1][0][1] > 1
        few = ran[-1][-1][1] <= 4
        return (0.01 if vectorised else 0.019) if few else of_all[not vectorised]

    def run(slices: list[TaskSlice | None]) -> None:
        ran.append([(item.start, item.stop) for item in slices if item is not None])

    monkeypatch.setattr("hypertorch.inner.tasks._time", timed)
    problem = task_problem(network(), item=(1, 4, 4), num_tasks=6)
    execution = ht.Execution(chunk=chunk)
    assert measured(execution, problem, "a stub", problem.init_hparams(), nothing_wrong, run).tasks == route
    whole = [(0, first), *([(first, 6)] if first < 6 else [])]
    each = [(task, task + 1) for task in range(6)]
    assert ran == [each[:1], [(0, 4)], *[[(0, 4)], each[:4]] * 5, *[whole, each] * 2]


@pytest.mark.usefixtures("fresh_routes")
def test_routes_are_measured_for_each_backend_and_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    given = measured_as(monkeypatch, vmap=1e-3, loop=2e-3)
    problem = task_problem(network(), item=(1, 4, 4), num_tasks=3)
    hparams = problem.init_hparams()
    for backend, changes, times in (
        (Reverse(), {}, 10),
        (Reverse(), {}, 10),
        (Reverse(checkpoint_every=1), {}, 20),
        (Reverse(), {"num_steps": 5}, 30),
    ):
        ht.hypergradient(dataclasses.replace(problem, **changes), hparams, backend=backend)  # type: ignore[arg-type]
        assert len(given) == times


@pytest.mark.usefixtures("fresh_routes")
def test_plain_runs_are_measured_for_each_kind_of_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of the same classes may hold other networks, of which another route is the faster."""
    given = measured_as(monkeypatch, vmap=1e-3, loop=2e-3)

    def problem(activation: nn.Module) -> ht.BilevelProblem:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), activation).double()
        return task_problem(module, item=(1, 4, 4), num_tasks=3)

    for activation, times in ((nn.Tanh(), 10), (nn.Tanh(), 10), (nn.Softmax(dim=1), 20)):
        chosen = problem(activation)
        ht.unroll(chosen, chosen.init_hparams())
        assert len(given) == times


@pytest.mark.usefixtures("fresh_routes")
def test_the_loop_of_what_cannot_be_vectorised_says_so(caplog: pytest.LogCaptureFixture) -> None:
    problem = task_problem(Recurrent().double(), item=(3, 4))
    with caplog.at_level("INFO", logger="hypertorch.inner.tasks"):
        for _ in range(3):
            ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    messages = [record.getMessage() for record in caplog.records if record.name == "hypertorch.inner.tasks"]
    assert len(messages) == 1
    assert messages[0].startswith("tasks run one by one: an operation cannot be vectorised (")


def test_auto_takes_the_loop_where_an_operation_cannot_be_vectorised() -> None:
    problem = task_problem(network(), item=(1, 4, 4), num_tasks=3)
    inner, outer = problem.inner, problem.outer
    data_dependent = type(
        "DataDependent",
        (type(inner),),
        {"loss": lambda self, p, h, b: type(inner).loss(self, p, h, b) if b[0].sum() > -1e9 else None},
    )(inner.net.module, *inner.data)  # type: ignore[attr-defined]
    rerouted = ht.BilevelProblem(data_dependent, outer, dynamics=problem.dynamics, num_steps=2, num_tasks=3)
    result = ht.hypergradient(rerouted, problem.init_hparams(), backend=Reverse())
    expected = ht.hypergradient(
        rerouted, problem.init_hparams(), backend=Reverse(), execution=ht.Execution(tasks="loop")
    )
    assert all(torch.equal(result.grads[name], expected.grads[name]) for name in expected.grads)


def test_auto_takes_the_loop_for_an_lstm() -> None:
    problem = task_problem(Recurrent().double(), item=(3, 4))
    hparams = problem.init_hparams()
    expected = one_by_one(problem, hparams)
    actual = ht.hypergradient(problem, hparams, backend=Reverse()).grads
    for name in hparams:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-13)
