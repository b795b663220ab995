"""Real-time hyperparameter optimisation: exact while nothing changes, and the paper's loop when it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import outer
from hypertorch.errors import (
    DetachedHyperparameterError,
    IncompatibleBackendError,
    NonFiniteError,
    ZeroHypergradientWarning,
)
from hypertorch.hypergradients import Forward
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import normal, scalars
from tests.outer.runs import assert_same_checkpoint, assert_same_run, records

F64 = torch.float64
SGD = ht.dynamics.SGD
FROZEN = partial(torch.optim.SGD, lr=0.0)
FEATURES = 3
TRUTH = torch.tensor([2.0, -1.0, 1.5], dtype=F64)
INPUTS, HELD_OUT = normal(12, FEATURES, seed=1), normal(9, FEATURES, seed=3)
TARGETS, JUDGED = INPUTS @ TRUTH + 0.3 * normal(12, seed=2), HELD_OUT @ TRUTH + 0.3 * normal(9, seed=4)
SIZE = 4  # of a minibatch


class Regression(ht.InnerProblem):
    """Linear regression with L2 on minibatches that cycle through the data, one per task if there are tasks."""

    def __init__(self, num_tasks: int | None = None, at_step: Callable[[int], None] | None = None) -> None:
        self.num_tasks, self.at_step = num_tasks, at_step

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": hparams["start"] * torch.linspace(-1.0, 1.0, FEATURES, dtype=F64)}

    def batch(self, step: int) -> Batch:
        if self.at_step is not None:
            self.at_step(step)
        rows = torch.arange(SIZE * step, SIZE * (step + 1)) % len(INPUTS)
        if self.num_tasks is None:
            return INPUTS[rows], TARGETS[rows]
        turned = [(rows + task) % len(INPUTS) for task in range(self.num_tasks)]
        return torch.stack([INPUTS[own] for own in turned]), torch.stack([TARGETS[own] for own in turned])

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        inputs, targets = batch
        penalty = hparams["log_l2"].exp() * params["w"].square().sum()
        return (inputs @ params["w"] - targets).square().mean() + penalty


class HeldOut(ht.OuterProblem):
    """Squared error on held-out data, with a direct term; tasks are judged on the same data."""

    def __init__(self, hparams: TensorDict | None = None, num_tasks: int | None = None) -> None:
        values = scalars(start=0.5, log_lr=-2.5, momentum=0.5, log_l2=-4.0)
        self.values, self.num_tasks = values if hparams is None else hparams, num_tasks

    def init_hparams(self) -> TensorDict:
        return dict(self.values)

    def batch(self, outer_step: int) -> Batch:
        return None if self.num_tasks is None else torch.arange(self.num_tasks)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (HELD_OUT @ params["w"] - JUDGED).square().mean() + 1e-3 * hparams["log_l2"].square()


LEARNT = SGD(lr=ht.Hyper("log_lr", torch.exp), momentum=ht.Hyper("momentum"))


def regression(dynamics: ht.Dynamics = LEARNT, **options: Any) -> ht.BilevelProblem:
    inner = options.pop("inner", Regression(options.get("num_tasks")))
    judge = options.pop("outer", HeldOut(num_tasks=options.get("num_tasks")))
    return ht.BilevelProblem(inner, judge, dynamics=dynamics, num_steps=options.pop("num_steps", 1), **options)


class Decaying(ht.GradientDynamics):
    """Momentum with a step size that decays in the number of steps since the state was made."""

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {name: torch.zeros_like(value) for name, value in params.items()}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        buffers = {name: hparams["momentum"] * state[name] + grad for name, grad in grads.items()}
        rate = hparams["log_lr"].exp() / (1.0 + 0.1 * index)
        return {name: value - rate * buffers[name] for name, value in params.items()}, buffers


# The number


@pytest.mark.parametrize("dynamics", [LEARNT, Decaying()], ids=["sgd", "decaying"])
@pytest.mark.parametrize("chunk_size", [None, 2, 1])
def test_frozen_hyperparameters_give_the_exact_hypergradient_of_the_run_so_far(
    tmp_path: Path, dynamics: ht.Dynamics, chunk_size: int | None
) -> None:
    """State and tangents after every update are those of one long run, read at that step; so is what is logged."""
    memory, checkpoints = outer.MemoryLogger(), outer.Checkpoints(tmp_path, every=1, keep=100)
    problem = regression(dynamics)
    ht.RealTime(
        problem,
        optimizer=FROZEN,
        every=2,
        chunk_size=chunk_size,
        loggers=[memory],
        log_every=1,
        checkpoints=checkpoints,
    ).run(10)

    long = replace(problem, num_steps=10)
    hparams = problem.init_hparams()
    loop, backend = BoundProblem(long, hparams, 0, None).loop(None, {}), Forward()
    run = backend.start(loop, hparams)
    for step in range(10):
        run = backend.advance(loop, hparams, run, step)
        if step % 2 == 0:
            continue
        update = (step + 1) // 2
        carry = checkpoints.load(tmp_path / f"step_{update:08d}.safetensors").carry
        for name, value in run.state.params.items():
            torch.testing.assert_close(carry[f"params.{name}"], value, rtol=1e-12, atol=1e-14)
        expected = {
            **{f"tangents.params.{name}": value for name, value in run.tangents.params.items()},
            **{f"tangents.dynamics.{name}": value for name, value in run.tangents.dynamics.items()},
        }
        assert {name for name in carry if name.startswith("tangents.")} == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(carry[name], value, rtol=1e-12, atol=1e-14)
        exact = ht.hypergradient(replace(long, num_steps=step + 1), hparams, backend=ht.hypergradients.Reverse())
        norm = torch.stack([value.square() for value in exact.grads.values()]).sum().sqrt()
        assert memory.records[update - 1]["hypergradient_norm"] == pytest.approx(float(norm), rel=1e-11)
        assert memory.records[update - 1]["outer_loss"] == pytest.approx(float(exact.outer_loss), rel=1e-12)


def by_hand(num_inner_steps: int, every: int, outer_lr: float) -> tuple[list[TensorDict], Tensor]:
    """The outer variables after each update and the last params, from Jacobians of a step written out."""
    values = torch.stack(list(HeldOut().init_hparams().values()))

    def initial(values: Tensor) -> Tensor:
        return torch.cat([values[0] * torch.linspace(-1.0, 1.0, FEATURES, dtype=F64), torch.zeros(FEATURES, dtype=F64)])

    def after(state: Tensor, values: Tensor, step: int) -> Tensor:
        w, buffer = state[:FEATURES], state[FEATURES:]
        rows = torch.arange(SIZE * step, SIZE * (step + 1)) % len(INPUTS)
        inputs, targets = INPUTS[rows], TARGETS[rows]
        gradient = 2 * inputs.T @ (inputs @ w - targets) / SIZE + 2 * values[3].exp() * w
        buffer = gradient if step == 0 else values[2] * buffer + gradient
        return torch.cat([w - values[1].exp() * buffer, buffer])

    def judged(state: Tensor, values: Tensor) -> Tensor:
        return (HELD_OUT @ state[:FEATURES] - JUDGED).square().mean() + 1e-3 * values[3].square()

    jacobian = torch.autograd.functional.jacobian
    state, z = initial(values), jacobian(initial, values)
    path = []
    for step in range(num_inner_steps):
        in_state, in_values = jacobian(partial(after, step=step), (state, values))
        state, z = after(state, values, step), in_state @ z + in_values
        if (step + 1) % every == 0:
            in_state, in_values = jacobian(judged, (state, values))
            values = values - outer_lr * (in_state @ z + in_values)
            path.append(dict(zip(HeldOut().init_hparams(), values, strict=True)))
    return path, state[:FEATURES]


@pytest.mark.parametrize("every", [1, 4])
def test_is_the_loop_of_the_paper(tmp_path: Path, every: int) -> None:
    path, params = by_hand(20, every, outer_lr=0.02)
    checkpoints = outer.Checkpoints(tmp_path, every=1, keep=100)
    loop = ht.RealTime(regression(), optimizer=partial(torch.optim.SGD, lr=0.02), every=every, checkpoints=checkpoints)
    trained = loop.run(20)
    assert trained.num_outer_steps == len(path) == 20 // every
    for update, expected in enumerate(path, start=1):
        found = checkpoints.load(tmp_path / f"step_{update:08d}.safetensors").hparams
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)
    carry = checkpoints.load(tmp_path / f"step_{len(path):08d}.safetensors").carry
    torch.testing.assert_close(carry["params.w"], params, rtol=1e-12, atol=1e-14)
    assert int(carry["index"]) == 20


def test_tasks_are_runs_of_their_own_on_every_route() -> None:
    """By hand: the mean of the hypergradients of each task's own run; the routes agree."""
    results = []
    for route, chunk in (("vmap", None), ("vmap", 2), ("loop", None)):
        execution = ht.Execution(tasks=route, chunk=chunk)  # type: ignore[arg-type]
        loop = ht.RealTime(
            regression(num_tasks=3), optimizer=partial(torch.optim.SGD, lr=0.02), every=2, execution=execution
        )
        results.append(loop.run(12).hparams)
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-11, atol=1e-13)

    memory = outer.MemoryLogger()
    problem, execution = regression(num_tasks=3), ht.Execution(tasks="vmap")
    ht.RealTime(problem, optimizer=FROZEN, every=3, loggers=[memory], log_every=1, execution=execution).run(9)
    exact = ht.hypergradient(
        replace(problem, num_steps=9), problem.init_hparams(), backend=ht.hypergradients.Reverse(), execution=execution
    ).grads
    norm = torch.stack([value.square() for value in exact.values()]).sum().sqrt()
    assert memory.records[-1]["hypergradient_norm"] == pytest.approx(float(norm), rel=1e-11)


def test_improves_on_constant_hyperparameters() -> None:
    """A step size that is much too small, and an L2 that is much too large, are mended during a single run."""
    bad = scalars(start=0.5, log_lr=-5.0, momentum=0.0, log_l2=0.0)
    problem = regression(outer=HeldOut(bad))
    memory = outer.MemoryLogger()
    trained = ht.RealTime(
        problem,
        optimizer=partial(torch.optim.Adam, lr=0.1),
        every=5,
        constraints={"momentum": ht.Box(lower=0.0, upper=0.9)},
        loggers=[memory],
        log_every=1,
    ).run(300)
    constant = ht.unroll(replace(problem, num_steps=300), bad).outer_loss
    assert memory.records[-1]["outer_loss"] < 0.5 * float(constant)
    assert trained.hparams["log_lr"] > -5.0 and trained.hparams["log_l2"] < 0.0
    assert 0.0 <= float(trained.hparams["momentum"]) <= 0.9


# Killed and resumed


class StoppedError(Exception):
    """The power went out."""


def stop_at(step: int) -> Callable[[int], None]:
    # Index 0 is also that of the check before the run.
    def check(index: int) -> None:
        if index == step:
            raise StoppedError

    return check


def full(folder: Path, inner: ht.InnerProblem, num_tasks: int | None) -> ht.RealTime:
    return ht.RealTime(
        regression(Decaying(), inner=inner, num_tasks=num_tasks),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        every=2,
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.7),
        clip_norm=0.5,
        constraints={"momentum": ht.Box(lower=0.0, upper=0.9)},
        loggers=[outer.JsonLinesLogger(folder / "metrics.jsonl")],
        log_every=2,
        checkpoints=outer.Checkpoints(folder / "checkpoints", every=3),
        execution=ht.Execution(tasks="loop" if num_tasks else "auto"),
    )


@pytest.mark.parametrize("num_tasks", [None, 2])
@pytest.mark.parametrize("step", [5, 6, 13, 19])
def test_a_run_that_is_killed_continues_bit_for_bit(tmp_path: Path, num_tasks: int | None, step: int) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    expected = full(straight, Regression(num_tasks), num_tasks).run(20)
    with pytest.raises(StoppedError):
        full(stopped, Regression(num_tasks, stop_at(step)), num_tasks).run(20)
    resumed = full(stopped, Regression(num_tasks), num_tasks).run(20, resume=True)
    assert_same_run(resumed, expected)
    assert records(stopped / "metrics.jsonl") == records(straight / "metrics.jsonl")
    last = "checkpoints/step_00000010.safetensors"
    assert_same_checkpoint(stopped / last, straight / last)


def test_a_finished_run_can_be_prolonged(tmp_path: Path) -> None:
    expected = ht.RealTime(regression(), optimizer=partial(torch.optim.Adam, lr=0.05), every=3).run(18)
    loop = ht.RealTime(
        regression(),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        every=3,
        checkpoints=outer.Checkpoints(tmp_path),
    )
    loop.run(9)
    assert_same_run(loop.run(18, resume=True), expected)


# Hyperparameters that do nothing, and those that do nothing yet or no longer


def test_a_hyperparameter_that_does_nothing_is_named() -> None:
    idle = {**HeldOut().init_hparams(), **scalars(idle=1.0)}
    loop = ht.RealTime(regression(outer=HeldOut(idle)), optimizer=FROZEN, every=2)
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['idle'\]` does not reach"):
        loop.run(4)
    allowed = regression(outer=HeldOut(idle), allow_unused=("idle",))
    assert ht.RealTime(allowed, optimizer=FROZEN, every=2).run(4).hparams["idle"] == 1.0


def test_a_momentum_that_waits_and_an_initialisation_that_is_forgotten_are_no_false_alarms() -> None:
    """After a first step of size 1 on a parabola nothing is left of the start; a momentum begins with the second."""

    class Parabola(Regression):
        def batch(self, step: int) -> Batch:
            return None

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return (params["w"] - hparams["log_l2"]).square().sum() / 2

    hparams = scalars(start=0.5, momentum=0.0, log_l2=-1.0)
    problem = regression(
        SGD(lr=1.0, momentum=ht.Hyper("momentum")), inner=Parabola(), outer=HeldOut(hparams), num_steps=1
    )
    # No error; but that no update moves the start is said.
    with pytest.warns(ZeroHypergradientWarning) as caught:
        trained = ht.RealTime(problem, optimizer=partial(torch.optim.SGD, lr=0.01), every=1).run(5)
    assert [warning.message.names for warning in caught] == [("start",)]  # type: ignore[union-attr]
    assert trained.hparams["momentum"] != 0.0
    assert trained.hparams["start"] == 0.5


@pytest.mark.parametrize("every", [1, 2])
def test_a_dampening_that_does_nothing_in_the_first_step_is_learnt(every: int) -> None:
    """The first step fills the buffer with the whole gradient: the check before the run looks at two."""
    hparams = scalars(start=0.5, dampening=0.3, log_l2=-4.0)
    problem = regression(SGD(lr=0.1, momentum=0.5, dampening=ht.Hyper("dampening")), outer=HeldOut(hparams))
    trained = ht.RealTime(problem, optimizer=partial(torch.optim.SGD, lr=0.01), every=every).run(6)
    assert trained.hparams["dampening"] != 0.3


def test_the_check_before_the_run_is_as_long_as_the_way_to_an_update() -> None:
    """A penalty that sets in at inner step 3 reaches the first update of every four, and none of every two."""

    class Late(Regression):
        def batch(self, step: int) -> Batch:
            return *super().batch(step), torch.tensor(float(step >= 3), dtype=F64)

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            *data, on = batch
            inputs, targets = data
            fit = (inputs @ params["w"] - targets).square().mean()
            return fit + (hparams["late"] * params["w"].square().sum() if on else 0.0)

    hparams = scalars(start=0.5, late=0.1, log_l2=-4.0)
    problem = regression(SGD(lr=0.05), inner=Late(), outer=HeldOut(hparams))
    moving = partial(torch.optim.SGD, lr=0.1)
    assert ht.RealTime(problem, optimizer=moving, every=4).run(8).hparams["late"] != 0.1
    with pytest.raises(DetachedHyperparameterError, match=r"`hparams\['late'\]` does not reach"):
        ht.RealTime(problem, optimizer=moving, every=2).run(8)


def test_first_values_that_are_drawn_are_those_of_an_outer_loop() -> None:
    class Drawn(HeldOut):
        def init_hparams(self) -> TensorDict:
            return {**super().init_hparams(), "start": torch.randn((), dtype=F64)}

    torch.manual_seed(7)
    expected = Drawn().init_hparams()["start"]
    torch.manual_seed(7)
    assert torch.equal(
        ht.RealTime(regression(outer=Drawn()), optimizer=FROZEN, every=2).run(2).hparams["start"], expected
    )


def test_constraints_hold_in_the_check_before_the_run_too() -> None:
    outside = scalars(start=0.5, log_lr=900.0, momentum=0.5, log_l2=-4.0)
    loop = ht.RealTime(
        regression(outer=HeldOut(outside)),
        optimizer=FROZEN,
        every=2,
        constraints={"log_lr": ht.Box(lower=-9.0, upper=-3.0)},
    )
    assert loop.run(2).hparams["log_lr"] == -3.0


# What is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"every": 0}, ValueError, "`every` is 0: it counts inner steps between two updates.*at least 1"),
        ({"every": True}, ValueError, "`every` is True"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` is 0"),
        ({"log_every": 0}, ValueError, "`log_every` is 0"),
        ({"problem": "a source"}, TypeError, "`problem` is a str, not a `BilevelProblem`: .*needs an `OuterLoop`"),
        ({"problem": regression(SGD(lr=[0.1]))}, ValueError, "`lr` of the dynamics is a schedule.*`warm_start`"),
    ],
)
def test_wrong_settings_are_explained(settings: dict, error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"problem": regression(), "optimizer": FROZEN, "every": 2, **settings}
    with pytest.raises(error, match=message):
        ht.RealTime(options.pop("problem"), **options)


def test_wrong_numbers_of_steps_are_explained() -> None:
    loop = ht.RealTime(regression(), optimizer=FROZEN, every=4)
    with pytest.raises(ValueError, match="`num_inner_steps` is 10, no multiple of `every` = 4: .*Pass 12, say"):
        loop.run(10)
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="`num_inner_steps` is .*at least 1"):
            loop.run(wrong)  # type: ignore[arg-type]


def test_a_context_is_refused() -> None:
    problem = regression(context=lambda h, b: {"more": h["start"]})
    with pytest.raises(IncompatibleBackendError, match="`problem` has a `context`, .*use an `OuterLoop`"):
        ht.RealTime(problem, optimizer=FROZEN, every=2)
    backend = Forward(keep_tangents=True)
    with pytest.raises(IncompatibleBackendError, match="got a problem with a `context`, which is computed anew"):
        ht.hypergradient(replace(problem, warm_start=True), problem.init_hparams(), backend=backend)


def test_infinity_after_the_last_update_is_refused() -> None:
    # Finite in double precision as a gradient and as a factor, not as their product.
    with pytest.raises(NonFiniteError, match=r"`hparams\['\w+'\]` holds NaN or infinity after 1 outer steps"):
        ht.RealTime(regression(), optimizer=partial(torch.optim.SGD, lr=1e308 * 1.7), every=2).run(2)


# What is zero


class Saturated(HeldOut):
    """Has a hyperparameter at which a clamp has no slope."""

    def __init__(self) -> None:
        super().__init__({**HeldOut().values, "flat": torch.tensor(2.0, dtype=F64)})

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return super().loss(params, hparams, batch) + hparams["flat"].clamp(max=1.0)


def test_a_hypergradient_that_stays_zero_is_named(tmp_path: Path) -> None:
    def run(num_inner_steps: int, **options: Any) -> outer.Trained:
        checkpoints = outer.Checkpoints(tmp_path / str(options), every=1)
        loop = ht.RealTime(regression(outer=Saturated(), **options), optimizer=FROZEN, every=2, checkpoints=checkpoints)
        return loop.run(num_inner_steps, resume=True)

    with pytest.warns(ZeroHypergradientWarning, match="`hparams\\['flat'\\]` is exactly zero.* 0 to 4,") as caught:
        run(12)
    assert len(caught) == 1 and caught[0].message.names == ("flat",)  # type: ignore[union-attr]
    assert caught[0].filename == __file__
    run(30)  # resumed: what has faded since the start is not named
    run(12, allow_unused=("flat",))
