"""The outer loop: what it computes, logs, validates and refuses."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import hypertorch as ht
from hypertorch import outer
from hypertorch.errors import DetachedHyperparameterError, NonFiniteError
from hypertorch.outer.steps import step as step_module
from hypertorch.outer.steps.state import OuterState
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter
from tests.outer.problems import Outer, Quadratics, centres
from tests.outer.runs import assert_same_run, make_loop

SGD = partial(torch.optim.SGD, lr=0.1)


def by_hand(source: Quadratics, num_steps: int, *, lr: float = 0.1, clip_norm: float = math.inf) -> list[TensorDict]:
    """The outer variables before each step and after the last, by the formula."""
    path = [source.init_hparams()]
    for step in range(num_steps):
        grads = source.formula(path[-1], step)[1]
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        factor = min(1.0, clip_norm / norm)
        path.append({name: value - lr * factor * grads[name] for name, value in path[-1].items()})
    return path


@pytest.mark.parametrize("num_tasks", [None, 4])
def test_descends_the_hypergradient(num_tasks: int | None) -> None:
    source = Quadratics(num_tasks=num_tasks)
    trained = make_loop(source).run(6)
    for name, value in by_hand(source, 6)[-1].items():
        torch.testing.assert_close(trained.hparams[name], value, rtol=1e-12, atol=1e-14)
    assert trained.num_outer_steps == trained.best_step == 6
    assert trained.best_value is None
    assert trained.best_hparams.keys() == trained.hparams.keys()
    assert trained.seconds > 0


def test_init_hparams_stay_untouched() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Fixed(Quadratics):
        kept: tuple[Tensor, Tensor] = (torch.ones(3, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))

        def init_hparams(self) -> TensorDict:
            return {"start": self.kept[0], "curvature": self.kept[1]}

    source = Fixed()
    make_loop(source).run(3)
    assert source.kept[0].tolist() == [1.0, 1.0, 1.0]
    assert not source.kept[0].requires_grad


def test_clipping_scales_to_the_norm() -> None:
    source = Quadratics()
    trained = make_loop(source, clip_norm=0.2).run(5)
    for name, value in by_hand(source, 5, clip_norm=0.2)[-1].items():
        torch.testing.assert_close(trained.hparams[name], value, rtol=1e-12, atol=1e-14)
    unclipped = make_loop(source, clip_norm=1e6).run(5)
    for name, value in by_hand(source, 5)[-1].items():
        torch.testing.assert_close(unclipped.hparams[name], value, rtol=1e-12, atol=1e-14)


def test_the_scheduler_steps_once_per_outer_step() -> None:
    memory = outer.MemoryLogger()
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    make_loop(scheduler=scheduler, loggers=[memory]).run(5)
    assert memory.series("learning_rate")[1] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_a_learning_rate_tensor_is_logged_as_it_was_used() -> None:
    memory = outer.MemoryLogger()
    optimizer = partial(torch.optim.Adam, lr=torch.tensor(0.1), capturable=False, foreach=False)
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    make_loop(optimizer=optimizer, scheduler=scheduler, loggers=[memory]).run(3)
    assert memory.series("learning_rate")[1] == pytest.approx([0.1, 0.05, 0.025])


def test_each_group_has_its_learning_rate() -> None:
    def grouped(variables: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": variables[:1], "lr": 0.3}, {"params": variables[1:]}], lr=0.1)

    memory = outer.MemoryLogger()
    make_loop(optimizer=grouped, loggers=[memory]).run(1)
    assert memory.records[0]["learning_rate/0"] == 0.3
    assert memory.records[0]["learning_rate/1"] == 0.1


def test_records_hold_what_the_step_started_from() -> None:
    source, memory = Quadratics(), outer.MemoryLogger()
    make_loop(source, loggers=[memory], log_every=2).run(5)
    assert [record["step"] for record in memory.records] == [2, 4, 5]
    path = by_hand(source, 5)
    for record in memory.records:
        before = int(record["step"]) - 1
        loss, grads = source.formula(path[before], before)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        params = 1 + (1 - 0.1 * path[before]["curvature"]) ** 3 * (path[before]["start"] - 1)
        distance = (params - centres(before, 4, 3)).abs().amax(1).mean()
        assert record["outer_loss"] == pytest.approx(float(loss), rel=1e-12)
        assert record["hypergradient_norm"] == pytest.approx(norm, rel=1e-12)
        assert record["hparams/curvature"] == pytest.approx(float(path[before]["curvature"]), rel=1e-12)
        assert record["distance"] == pytest.approx(float(distance), rel=1e-6)
        assert record["steps_per_second"] > 0
        assert "hparams/start" not in record


def test_one_copy_to_the_host_per_record(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: copies.append(1) or original(self))
    make_loop(loggers=[outer.MemoryLogger()], log_every=3).run(6)
    assert len(copies) == 2 + 1  # and one at the first step, for hypergradients that are zero


def test_figures_are_computed_only_where_they_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = step_module.outer_metrics
    monkeypatch.setattr(
        step_module, "outer_metrics", lambda *args, **named: calls.append(1) or original(*args, **named)
    )
    make_loop(log_every=4).run(8)
    assert len(calls) == 1 + 2  # once before the first step, to see the names


# Validation


def test_validation_keeps_the_best() -> None:
    memory = outer.MemoryLogger()
    validation = outer.Validation(
        source=Quadratics(offset=50), every=2, num_episodes=6, metric="outer_loss", mode="min"
    )
    trained = make_loop(validation=validation, loggers=[memory], optimizer=partial(torch.optim.SGD, lr=2.5)).run(7)
    steps, losses = memory.series("validation/outer_loss")
    assert steps == [2, 4, 6, 7]
    assert trained.best_value == min(losses)
    assert trained.best_step == steps[losses.index(min(losses))] == 6
    report = outer.evaluate(validation.source, trained.best_hparams, num_episodes=6)
    assert report.metrics["outer_loss"].mean == pytest.approx(trained.best_value, rel=1e-12)
    record = next(record for record in memory.records if "validation/outer_loss" in record)
    assert set(record) == {
        "step",
        *(f"validation/{name}{end}" for name in ("distance", "outer_loss") for end in ("", "_half_width")),
    }


def test_the_larger_figure_wins_in_mode_max() -> None:
    memory = outer.MemoryLogger()
    validation = outer.Validation(source=Quadratics(offset=50), every=1, num_episodes=4, metric="distance")
    trained = make_loop(validation=validation, loggers=[memory]).run(4)
    steps, values = memory.series("validation/distance")
    assert trained.best_value == max(values)
    assert trained.best_step == steps[values.index(max(values))]


def test_improvement_is_strict_and_never_nan() -> None:
    validation = outer.Validation(source=Quadratics(), every=1, num_episodes=1)
    assert validation.improves(0.5, None)
    assert validation.improves(0.6, 0.5)
    assert not validation.improves(0.5, 0.5)
    assert not validation.improves(math.nan, None)
    assert not validation.improves(math.nan, 0.5)
    assert replace(validation, mode="min").improves(0.4, 0.5)


def test_a_misspelt_metric_shows_before_the_first_step() -> None:
    validation = outer.Validation(source=Quadratics(), every=100, num_episodes=1, metric="acuracy")
    memory = outer.MemoryLogger()
    message = r"`metric` of `Validation` is 'acuracy', which the problem does not report; it has \['distance', 'outer_l"
    with pytest.raises(ValueError, match=message):
        make_loop(validation=validation, loggers=[memory]).run(100)
    assert memory.records == []


@dataclass(frozen=True)
class Counting(Quadratics):
    """Notes which problems were asked for."""

    asked: list[int] = field(default_factory=list)

    def at(self, outer_step: int) -> ht.BilevelProblem:
        self.asked.append(outer_step)
        return super().at(outer_step)


def test_one_episode_shows_before_the_first_step_that_validation_works() -> None:
    source = Counting(num_tasks=None)
    validation = outer.Validation(source=source, every=2, num_episodes=6, metric="distance")
    make_loop(validation=validation).run(2)
    assert source.asked == [0, *range(6)]


# Optimizers, schedulers


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`optimizer` returned `LBFGS`, whose `step` needs a closure"):
        make_loop(optimizer=torch.optim.LBFGS).run(1)


def test_refused_optimizers() -> None:
    with pytest.raises(TypeError, match=r"`optimizer` returned a list, not a `torch\.optim\.Optimizer`"):
        make_loop(optimizer=list).run(1)
    with pytest.raises(ValueError, match=r"`optimizer` returned an optimizer that lacks \['curvature'\]"):
        make_loop(optimizer=lambda variables: SGD(variables[:1])).run(1)
    with pytest.raises(ValueError, match=r"holds tensors that are no outer variables"):
        make_loop(optimizer=lambda variables: SGD([*variables, torch.zeros(1)])).run(1)


def test_refused_schedulers() -> None:
    with pytest.raises(TypeError, match=r"`scheduler` returned a `ReduceLROnPlateau`, whose step needs a figure"):
        make_loop(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau).run(1)
    with pytest.raises(TypeError, match=r"`scheduler` returned a SGD, not a"):
        make_loop(scheduler=lambda optimizer: optimizer).run(1)


# Errors


def test_a_failing_hypergradient_names_the_outer_step_and_closes_the_loggers() -> None:
    closed = []

    class Watching(outer.MemoryLogger):
        def close(self) -> None:
            closed.append(len(self.records))

    diverging = Quadratics(lr=1e200, num_steps=6)
    with pytest.raises(NonFiniteError, match=r"outer step 0: .* inner step"):
        make_loop(diverging, loggers=[Watching()]).run(3)
    assert closed == [0]


@dataclass(frozen=True, kw_only=True)
class WithUnused(Quadratics):
    def init_hparams(self) -> TensorDict:
        return {**super().init_hparams(), "unused": torch.tensor(1.0, dtype=torch.float64)}


def test_other_errors_pass_through() -> None:
    with pytest.raises(DetachedHyperparameterError, match=r"unused"):
        make_loop(WithUnused()).run(1)
    with pytest.raises(RuntimeError, match=r"the power went out"):
        make_loop(Quadratics(fail_at=2)).run(3)


def test_a_learning_rate_that_leaves_the_range_of_its_numbers_is_named() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["start"]}, lambda p, h, b: p["w"].square().sum()),
        LambdaOuter({"start": torch.ones(2)}, lambda p, h, b: 1e-9 * p["w"].square().sum()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=1,
    )
    growing = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=1e45)
    with pytest.raises(NonFiniteError, match=r"`lr` = 1e\+44 after 2 outer steps.*Lower that setting"):
        make_loop(problem, scheduler=growing).run(4)


# What is said of the result


def test_a_result_prints_its_sizes_and_whether_it_was_validated() -> None:
    trained = make_loop().run(2)
    assert repr(replace(trained, seconds=1.5)) == (
        "Trained(num_outer_steps=2, seconds=1.5, best_step=2, not validated: best_hparams are the last, "
        "hparams={start: (3,), curvature: ()})"
    )
    validation = outer.Validation(source=Quadratics(), every=1, num_episodes=2, metric="distance")
    validated = make_loop(validation=validation).run(2)
    assert str(replace(validated, best_value=0.25, best_step=1, seconds=100.4)) == (
        "Trained(num_outer_steps=2, seconds=100, best_step=1, best_value=0.25, hparams={start: (3,), curvature: ()})"
    )


@pytest.mark.parametrize("factor", [9.0, 10.0, 11.0])
def test_an_outer_loss_that_rose_tenfold_is_said(factor: float) -> None:
    """Without a step of the optimizer, the loss is what the data of its outer step make it."""

    @dataclass(frozen=True, kw_only=True)
    class Rising(Outer):
        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return params["w"].square().sum() * (factor if self.step == 2 else 1.0 + 100.0 * self.step)

    @dataclass(frozen=True, kw_only=True)
    class Source(Quadratics):
        def at(self, outer_step: int) -> ht.BilevelProblem:
            problem = super().at(outer_step)
            return replace(problem, outer=Rising(**vars(problem.outer)))

    still: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    if factor <= 10.0:
        make_loop(Source(), **still).run(3)
        return
    message = r"`outer_loss` is .* at outer step 2, and was .* at outer step 0: .*`clip_no"
    with pytest.warns(UserWarning, match=message) as caught:
        make_loop(Source(), **still).run(3)
    assert caught[0].filename == __file__
    validation = outer.Validation(source=Quadratics(), every=1, num_episodes=2, metric="distance")
    make_loop(Source(), validation=validation, **still).run(3)
    make_loop(Source(), **still).run(1)


def test_an_outer_loss_that_rose_from_zero_is_no_multiple_of_it() -> None:
    @dataclass(frozen=True, kw_only=True)
    class FromZero(Outer):
        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return params["w"].square().sum() * self.step

    @dataclass(frozen=True, kw_only=True)
    class Source(Quadratics):
        def at(self, outer_step: int) -> ht.BilevelProblem:
            problem = super().at(outer_step)
            return replace(problem, outer=FromZero(**vars(problem.outer)))

    with warnings.catch_warnings(record=True) as said:
        make_loop(Source(), optimizer=partial(torch.optim.SGD, lr=0.0)).run(3)
    assert not said


def test_a_run_that_is_done_asks_for_no_problem(tmp_path: Path) -> None:
    checkpoints = outer.Checkpoints(tmp_path, every=1)
    trained = make_loop(checkpoints=checkpoints).run(2)
    again = make_loop(Quadratics(fail_at=2), checkpoints=checkpoints).run(2, resume=True)
    assert_same_run(again, trained)
    # Nor one whose steps are done, and whose last validation is not.
    validation = outer.Validation(source=Quadratics(), every=2, num_episodes=2, metric="distance")
    late = make_loop(Quadratics(fail_at=2), checkpoints=checkpoints, validation=validation).run(2, resume=True)
    assert late.best_step == 2 and late.best_value is not None


def test_refused_arguments() -> None:
    source = Quadratics()
    with pytest.raises(TypeError, match=r"`source` is .*, not a `ProblemSource`"):
        make_loop(source.init_hparams())
    with pytest.raises(TypeError, match=r"`backend` is 'reverse', not a `Hypergradient`.*Reverse"):
        make_loop(backend="reverse")
    with pytest.raises(TypeError, match=r"`constraints\['start'\]` is 'positive', not a `Constraint`"):
        make_loop(constraints={"start": "positive"})
    with pytest.raises(TypeError, match=r"`loggers\[1\]` is None, not a `Logger`"):
        make_loop(loggers=[outer.MemoryLogger(), None])
    for clip_norm in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`clip_norm` is .*: no hypergradient can be scaled"):
            make_loop(clip_norm=clip_norm)
    with pytest.raises(ValueError, match=r"`log_every` is 0"):
        make_loop(log_every=0)
    for num_outer_steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"`num_outer_steps` is .*Pass a whole number of at least 1"):
            make_loop().run(num_outer_steps)


def test_refused_validations() -> None:
    settings: dict[str, Any] = {"source": Quadratics(), "every": 1, "num_episodes": 1}
    with pytest.raises(TypeError, match=r"`source` of `Validation` is a int, not a `ProblemSource`"):
        outer.Validation(**{**settings, "source": 3})
    with pytest.raises(ValueError, match=r"`every` of `Validation` is 0"):
        outer.Validation(**{**settings, "every": 0})
    with pytest.raises(ValueError, match=r"`num_episodes` of `Validation` is 0"):
        outer.Validation(**{**settings, "num_episodes": 0})
    with pytest.raises(ValueError, match=r"`mode` of `Validation` is 'best'"):
        outer.Validation(**settings, mode="best")


# How tasks are run

LOOP = ht.Execution(tasks="loop")


def test_the_task_route_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypertorch.outer import run as run_module

    seen: list[str] = []
    original = step_module.hypergradient
    monkeypatch.setattr(run_module, "measured_execution", lambda *args, **named: LOOP)
    monkeypatch.setattr(
        step_module,
        "hypergradient",
        lambda *args, execution, **named: seen.append(execution.tasks) or original(*args, **named),
    )
    make_loop(Quadratics(num_tasks=2), execution=ht.Execution()).run(2)
    assert seen == ["loop", "loop"]
    make_loop(Quadratics(num_tasks=2), execution=ht.Execution(tasks="vmap")).run(1)
    assert seen[2:] == ["vmap"]
    make_loop(Quadratics(num_tasks=None), execution=ht.Execution()).run(1)
    assert seen[3:] == ["auto"]


# Carry, memory


@dataclass(frozen=True, kw_only=True)
class Warm(Quadratics):
    """Quadratics that go on from the last inner state."""

    def at(self, outer_step: int) -> ht.BilevelProblem:
        return replace(super().at(outer_step), warm_start=True)


@dataclass(frozen=True, kw_only=True)
class Direct(Outer):
    """Judges by the start as well, which a warm-started inner run does not reach."""

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return super().loss(params, hparams, batch) + (hparams["start"] - params["w"].detach()).square().sum() / 8


def test_the_carry_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Tensor] | None] = []
    original = step_module.hypergradient

    def watching(problem: ht.BilevelProblem, *args: Any, carry: TensorDict | None, **named: Any) -> Any:
        seen.append(carry)
        problem = replace(problem, outer=Direct(**vars(problem.outer)))
        return original(problem, *args, carry=carry, **named)

    monkeypatch.setattr(step_module, "hypergradient", watching)
    make_loop(Warm()).run(3)
    assert seen[0] is None
    assert [int(carry["index"]) for carry in seen[1:] if carry] == [3, 6]


def test_a_warm_run_says_where_its_params_ended() -> None:
    warm = ht.Problems(lambda step: replace(Warm().at(step), allow_unused=("start",)))
    trained = make_loop(warm).run(3)
    assert set(trained.params) == {"w"}
    assert torch.equal(trained.params["w"], trained.carry["params.w"])
    assert make_loop().run(1).params == {}


def test_a_carry_shares_no_memory_with_the_outer_variables() -> None:
    state = OuterState(Quadratics().init_hparams(), optimizer=SGD, scheduler=None)
    start = state.leaves["start"].detach()
    carry = state.own_carry({"alias": start, "part": start[1:], "other": torch.arange(6).reshape(2, 3).T})
    start.zero_()
    assert carry["alias"].tolist() == [3.0, -2.0, 0.5]
    assert carry["part"].tolist() == [-2.0, 0.5]
    assert carry["other"].is_contiguous()


def live_bytes() -> int:
    gc.collect()
    # By type: asking a lazy object for its class may run code. The compiler's own tensors, which hold nothing, stay
    # behind in a process that compiled.
    tensors = [
        value
        for value in gc.get_objects()
        if issubclass(type(value), Tensor)
        and not issubclass(type(value), FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    ]
    # Sparse tensors of other tests have no storage of their own.
    plain = [value.untyped_storage() for value in tensors if value.layout is torch.strided and not value.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in plain}.values())


def test_memory_is_flat_over_outer_steps() -> None:
    measured: list[int] = []

    class Measuring(outer.MemoryLogger):
        def log(self, step: int, scalars: Mapping[str, float]) -> None:
            if "outer_loss" in scalars:
                measured.append(live_bytes())

    validation = outer.Validation(source=Quadratics(), every=2, num_episodes=4, metric="distance")
    optimizer = partial(torch.optim.Adam, lr=0.01)
    make_loop(optimizer=optimizer, loggers=[Measuring()], validation=validation, log_every=10).run(40)
    assert len(measured) == 4
    assert len(set(measured)) == 1


def test_an_optimizer_that_is_made_already_is_refused() -> None:
    made = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    with pytest.raises(TypeError, match=r"`optimizer` is a Adam, which is made already.*functools\.partial"):
        make_loop(optimizer=made)


def test_a_problem_with_metrics_learns_a_schedule() -> None:
    class Judged(LambdaOuter):
        def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
            return {"distance": params["w"].abs().sum()}

    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones(2)}, lambda p, h, b: p["w"].square().sum()),
        Judged({"log_lr": torch.full((3,), -3.0)}, lambda p, h, b: p["w"].square().sum()),
        dynamics=ht.dynamics.SGD(lr=ht.Hyper("log_lr", torch.exp, per="step"), momentum=[0.0, 0.1, 0.2]),
        num_steps=3,
    )
    trained = make_loop(problem).run(4)
    assert (trained.hparams["log_lr"] > -3.0).all()
