"""Predicted peaks against counted ones, and the choice among the ways to fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hypertorch as ht
from benchmarks.gpt2_plan import Shape, language_problem
from hypertorch.autodiff.live_memory import PeakMemory
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.reverse_mode.memory_plan import MemoryPlan, plan_memory
from hypertorch.hypergradients.reverse_mode.revolve import recomputed_steps
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, task_problem
from tests.helpers.sized_problems import conv_net, mlp, sized_problem

Reverse = ht.hypergradients.Reverse
LR = {"lr": torch.tensor(0.1)}
PLENTY = "1TiB"


def small(num_steps: int = 12, **options: object) -> ht.BilevelProblem:
    return sized_problem(mlp(10, 8, 5), 20, 10, num_steps=num_steps, **options)  # type: ignore[arg-type]


def per_weight_decay(num_steps: int, copies: int = 1) -> ht.BilevelProblem:
    """A decay rate for each of 3000 weights, so that the hypergradient is as large as a state."""
    hparams = {"decay": torch.full((3000,), 0.1)}
    return ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.linspace(-1.0, 1.0, 3000)},
            lambda p, h, b: (h["decay"] * p["w"].square()).sum(),
        ),
        LambdaOuter(hparams, lambda p, h, b: (p["w"].repeat(copies) - 0.1).square().sum()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=num_steps,
    )


PROBLEMS = {
    "mlp": lambda: sized_problem(mlp(64, 128, 10), 200, 64, num_steps=50),
    "conv": lambda: sized_problem(conv_net(), 10, 1, 12, 12, num_steps=12, learnt_init=True),
    "few examples": lambda: sized_problem(mlp(64, 128, 10), 5, 64, num_steps=20),
    "many examples": lambda: sized_problem(mlp(10, 8, 5), 3000, 10, num_steps=10),
    "learnt initialisation": lambda: sized_problem(mlp(64, 32, 5), 30, 64, num_steps=20, learnt_init=True),
    "momentum": lambda: sized_problem(
        mlp(64, 32, 5), 30, 64, num_steps=20, dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.9), extra=LR
    ),
    # A step keeps the buffer that it starts from, but not the one that it ends with; the first step has none.
    "learnt momentum": lambda: sized_problem(
        mlp(64, 32, 5),
        5,
        64,
        num_steps=20,
        dynamics=ht.dynamics.SGD(lr=0.1, momentum=ht.Hyper("lr"), dampening=0.5),
        extra=LR,
    ),
    "as many hyperparameters as weights": lambda: per_weight_decay(20),
    "large outer problem": lambda: per_weight_decay(20, copies=40),
    "adam": lambda: sized_problem(
        mlp(64, 32, 5), 30, 64, num_steps=20, dynamics=ht.dynamics.Adam(lr=ht.Hyper("lr")), extra=LR
    ),
    "data loaded anew": lambda: sized_problem(mlp(64, 32, 5), 30, 64, num_steps=20, copies=True),
    "terms at inner steps": lambda: sized_problem(mlp(64, 32, 5), 30, 64, num_steps=20, step_terms=True),
}


VMAP = ht.Execution(tasks="vmap")


def plans(problem: ht.BilevelProblem) -> Iterator[tuple[int, MemoryPlan]]:
    """Yields budgets, each just below what the plan for the one before needs, with their plans."""
    hparams = problem.init_hparams()
    budget = 2**40
    while True:
        try:
            plan = plan_memory(problem, hparams, budget, execution=VMAP)
        except IncompatibleBackendError:
            return
        yield budget, plan
        budget = plan.peak_bytes - 1


def counted_peak(problem: ht.BilevelProblem, backend: ht.Hypergradient) -> int:
    hparams = problem.init_hparams()
    # What is probed once for a problem is not of the backend.
    ht.hypergradient(problem, hparams, backend=backend, execution=VMAP)
    with PeakMemory() as memory:
        ht.hypergradient(problem, hparams, backend=backend, execution=VMAP)
    return memory.peak


SLOW = pytest.mark.slow  # many plans, each run twice


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[SLOW] if name in ("conv", "adam", "learnt momentum") else []) for name in PROBLEMS],
)
def test_predictions_are_what_is_counted(name: str) -> None:
    problem = PROBLEMS[name]()
    found = [plan for _, plan in plans(problem)]
    assert {plan.method for plan in found} == {"whole graph", "checkpoints", "revolve"}
    for plan in [found[0], found[1], found[len(found) // 2], found[-2], found[-1]]:
        backend = Reverse(checkpoint_every=plan.checkpoint_every, snapshots=plan.snapshots)
        # What is left out: a few scalars, and what an optimiser's first step does not need.
        assert counted_peak(problem, backend) == pytest.approx(plan.peak_bytes, rel=0.08), str(plan)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_losses_of_many_steps_of_a_tiny_state_are_part_of_the_plan(size: int) -> None:
    problem = ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.ones(size, dtype=torch.float64)},
            lambda p, h, b: (h["decay"] * p["w"].square()).sum(),
        ),
        LambdaOuter({"decay": torch.tensor(0.1, dtype=torch.float64)}, lambda p, h, b: p["w"].square().sum()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=40,
    )
    found = [plan for _, plan in plans(problem)]
    assert ("revolve" in {plan.method for plan in found}) == (size > 1)
    for plan in [*found[:: len(found) // 4], found[-1]]:
        backend = Reverse(checkpoint_every=plan.checkpoint_every, snapshots=plan.snapshots)
        assert counted_peak(problem, backend) == pytest.approx(plan.peak_bytes, rel=0.08), str(plan)


@pytest.mark.parametrize("name", [pytest.param("mlp", marks=SLOW), pytest.param("conv", marks=SLOW), "momentum"])
def test_the_budget_is_kept(name: str) -> None:
    problem = PROBLEMS[name]()
    found = list(plans(problem))
    for budget, plan in (found[1], found[len(found) // 2], found[-1]):
        assert plan.peak_bytes <= budget
        assert counted_peak(problem, Reverse(memory_budget=budget)) <= 1.01 * budget
    # The measurement itself must not be what needs most.
    least = found[-1][1].peak_bytes
    assert counted_peak(problem, Reverse(memory_budget=least)) <= 1.01 * least
    with PeakMemory() as memory:
        plan_memory(problem, problem.init_hparams(), least)
    assert memory.peak <= 1.01 * least
    assert memory.current == 0


def many_hyperparameters() -> ht.BilevelProblem:
    """A hypergradient that is larger than the graph of a step."""
    return ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": torch.linspace(-1.0, 1.0, 100)}, lambda p, h, b: (h["matrix"] @ p["w"]).square().sum()
        ),
        LambdaOuter({"matrix": torch.full((30, 100), 0.1)}, lambda p, h, b: (p["w"] - 0.1).square().sum()),
        dynamics=ht.dynamics.SGD(lr=1e-3),
        num_steps=6,
    )


def many_tasks() -> ht.BilevelProblem:
    """Inner losses that are half as large as a state."""
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones(2)}, lambda p, h, b: h["decay"] * p["w"].square().sum()),
        LambdaOuter({"decay": torch.tensor(0.1)}, lambda p, h, b: p["w"].square().sum()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=4,
        num_tasks=1000,
    )


def hyperparameters_alone() -> ht.BilevelProblem:
    """A hypergradient beside which the graph of all steps is nothing."""
    features = torch.linspace(0.0, 0.01, 5000)
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones(1)}, lambda p, h, b: ((h["decay"] @ features) * p["w"].square()).sum()),
        LambdaOuter({"decay": torch.zeros(5000)}, lambda p, h, b: p["w"].square().sum()),
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=6,
    )


@pytest.mark.parametrize("make", [many_hyperparameters, hyperparameters_alone, many_tasks])
def test_no_plan_is_short_of_memory(make: Callable[[], ht.BilevelProblem]) -> None:
    problem = make()
    for _, plan in plans(problem):
        backend = Reverse(checkpoint_every=plan.checkpoint_every, snapshots=plan.snapshots)
        assert counted_peak(problem, backend) <= 1.01 * plan.peak_bytes, str(plan)


def test_less_memory_costs_more_steps_and_no_plan_is_worse_than_another() -> None:
    found = [plan for _, plan in plans(small(20))]
    recomputed = [plan.recomputed_steps for plan in found]
    assert recomputed == sorted(recomputed) and len(set(recomputed)) == len(recomputed)
    assert recomputed[0] == 0 and recomputed[-1] == 20 * 19 // 2
    methods = [plan.method for plan in found]
    assert methods == sorted(methods, key=["whole graph", "checkpoints", "revolve"].index)
    for plan in found:
        if plan.checkpoint_every is not None:
            assert plan.recomputed_steps == 20 - plan.checkpoint_every
        if plan.snapshots is not None:
            assert plan.recomputed_steps == recomputed_steps(20, plan.snapshots)


def test_every_plan_gives_the_whole_graphs_number_at_the_cost_it_tells() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3, momentum=0.5), {}, num_steps=11, dropout=0.4, step_terms=True)
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse())
    found = list(plans(problem))
    assert len(found) > 6
    for budget, plan in found:
        result = ht.hypergradient(problem, hparams, backend=Reverse(memory_budget=budget))
        for name in hparams:
            torch.testing.assert_close(result.grads[name], whole.grads[name], rtol=1e-12, atol=1e-14)
        stats = result.stats
        # One step more, the measured one.
        assert (stats.steps, stats.vjps) == (11 + plan.recomputed_steps + 1, 11 + 1)
        states, graph = {
            "whole graph": (0, 11),
            "checkpoints": (ceil(11 / (plan.checkpoint_every or 1)) + 1, plan.checkpoint_every),
            "revolve": ((plan.snapshots or 0) + 1, 1),
        }[plan.method]
        assert (stats.stored_states, stats.graph_steps) == (states, graph)


def test_the_choice_is_the_same_again_and_at_other_values() -> None:
    problem = small()
    hparams = problem.init_hparams()
    other = {name: value + 1 for name, value in hparams.items()}
    found = {plan_memory(problem, values, 40_000, outer_step=step) for values in (hparams, other) for step in (0, 9)}
    assert len(found) == 1


def test_a_budget_that_is_just_enough_is_enough() -> None:
    problem = small()
    hparams = problem.init_hparams()
    for _, plan in plans(problem):
        assert plan_memory(problem, hparams, plan.peak_bytes) == plan


def test_too_small_a_budget_is_refused_with_the_least_that_works() -> None:
    problem = small()
    hparams = problem.init_hparams()
    with pytest.raises(IncompatibleBackendError, match=r"`memory_budget` is 100 bytes .* Allow at least") as caught:
        ht.hypergradient(problem, hparams, backend=Reverse(memory_budget="100B"))
    least = int(str(caught.value).split(" take ")[1].split()[0])
    result = ht.hypergradient(problem, hparams, backend=Reverse(memory_budget=least))
    assert result.stats.stored_states == 2
    with pytest.raises(IncompatibleBackendError):
        ht.hypergradient(problem, hparams, backend=Reverse(memory_budget=least - 1))


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_horizons(num_steps: int) -> None:
    problem = small(num_steps)
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse())
    found = list(plans(problem))
    assert found[0][1].method == "whole graph"
    for budget, _ in found:
        result = ht.hypergradient(problem, hparams, backend=Reverse(memory_budget=budget))
        torch.testing.assert_close(result.grads["weights"], whole.grads["weights"])


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_tasks_and_running_statistics(route: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3)
    ).double()
    problem = task_problem(module, item=(4,), num_steps=7)
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks=route))
    for budget, _ in plans(problem):
        result = ht.hypergradient(
            problem, hparams, backend=Reverse(memory_budget=budget), execution=ht.Execution(tasks=route)
        )
        for name in hparams:
            torch.testing.assert_close(result.grads[name], whole.grads[name], rtol=1e-12, atol=1e-14)


def test_a_problem_without_steps_has_no_plan_but_a_result() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, num_steps=0)
    problem = ht.BilevelProblem(
        problem.inner, problem.outer, dynamics=problem.dynamics, num_steps=0, allow_unused=("weights",)
    )
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse())
    result = ht.hypergradient(problem, hparams, backend=Reverse(memory_budget="1MiB"))
    assert torch.equal(result.grads["init.first"], whole.grads["init.first"])
    with pytest.raises(ValueError, match=r"`problem` has `num_steps` = 0.* at least one step"):
        plan_memory(problem, hparams, PLENTY)


def test_generators_are_left_as_they_were() -> None:
    problem = small()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plan_memory(problem, problem.init_hparams(), PLENTY)
    assert torch.equal(before, torch.get_rng_state())


def test_plans_are_readable() -> None:
    texts = [str(plan) for _, plan in plans(small())]
    assert texts[0].startswith("the whole graph: ") and texts[0].endswith(" at most, 0 steps run again")
    assert "a state kept every 11 steps: " in texts[1] and texts[1].endswith(" at most, 1 steps run again")
    assert texts[-1].startswith("the binomial schedule with 1 kept states: ")


def test_a_plan_explains_itself() -> None:
    problem = small()
    hparams = problem.init_hparams()
    found = list(plans(problem))
    roomy, tight, least = found[0], found[1], found[-1]
    text = Reverse(memory_budget="1GiB").explain(problem, hparams)
    assert text.splitlines()[0] == "budget: 1.0 GiB for 12 inner steps"
    assert f"chosen: {roomy[1]}" in text and "too large" not in text and text.endswith("runs no step again")
    text = Reverse(memory_budget=tight[0]).explain(problem, hparams)
    assert f"too large: {roomy[1]}" in text and f"chosen: {tight[1]}" in text
    text = Reverse(memory_budget=least[0]).explain(problem, hparams)
    assert text.count("too large: ") == 2 and "because only this fits" in text
    assert "measured on one step: its state " in text
    with pytest.raises(ValueError, match="has no `memory_budget`"):
        Reverse().explain(problem, hparams)


@pytest.mark.parametrize("budget", ["1GiB", "20KiB", "14KiB"])
@pytest.mark.parametrize("rule", [ht.dynamics.SGD(lr=0.1), ht.dynamics.Adam(lr=0.01)], ids=["SGD", "Adam"])
def test_fake_tensors_have_the_plan_of_real_ones(budget: str, rule: ht.Dynamics) -> None:
    def plan() -> MemoryPlan:
        problem = net_problem(rule, {}, num_steps=30)
        return plan_memory(problem, problem.init_hparams(), budget)

    real = plan()
    with FakeTensorMode():
        assert plan() == real


@pytest.mark.slow
def test_the_plan_of_a_small_language_model_on_fake_tensors_is_what_a_run_takes() -> None:
    shape = Shape(layers=2, width=64, heads=4, vocabulary=300, length=48)
    with FakeTensorMode():
        problem = language_problem(shape, num_steps=12, rows=4)
        found = {budget: plan_memory(problem, problem.init_hparams(), budget) for budget in ("4GiB", "42MiB", "20MiB")}
    assert {plan.method for plan in found.values()} == {"whole graph", "checkpoints", "revolve"}
    problem = language_problem(shape, num_steps=12, rows=4)
    for plan in found.values():
        backend = Reverse(checkpoint_every=plan.checkpoint_every, snapshots=plan.snapshots)
        assert counted_peak(problem, backend) == pytest.approx(plan.peak_bytes, rel=0.15), str(plan)
