"""What must hold of every leaf, as functions of the leaf: for those of the library, and for anybody's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import hypertorch as ht
from hypertorch.errors import DetachedHyperparameterError, IncompatibleBackendError
from hypertorch.fewshot import EpisodeSource, Examples, Learner
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import net_problem, task_problem
from tests.linear_solvers.systems import System, definite, skewed, stacked

F64 = torch.float64
backends = ht.hypergradients
NUM_STEPS = 3


def assert_equal(actual: TensorDict, expected: TensorDict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = float((actual[name] - value).norm() / value.norm().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: relative error {error:.2g}"


def check_dynamics(rule: ht.Dynamics, learnt: TensorDict) -> None:
    """Every learnt setting has its hypergradient, by every kind of differentiation; the rest is declared rightly.

    Args:
        rule: dynamics with settings that are learnt.
        learnt: first values of the learnt settings, within their ranges.
    """
    problem = net_problem(rule, learnt, num_steps=NUM_STEPS)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=backends.Reverse()).grads
    check = ht.check_hypergradient(problem, hparams, backends.Reverse(), num_directions=1, step_size=1e-5)
    assert check.passed, str(check)
    for backend in (backends.Reverse(checkpoint_every=1), backends.Forward(), backends.Truncated(window=NUM_STEPS)):
        assert_equal(ht.hypergradient(problem, hparams, backend=backend).grads, expected, 1e-10)
    for name in learnt:
        without = {key: value for key, value in hparams.items() if key != name}
        with pytest.raises(ValueError, match=f"reads the outer variable `{name}`, which is not among"):
            ht.unroll(problem, without)
    for name, constraint in rule.constraints().items():
        # The natural constraint lets the first value be, and brings a wild one back to where the rule takes it.
        torch.testing.assert_close(constraint.project(learnt[name]), learnt[name])
        for wild in (-1e3, 1e3):
            projected = constraint.project(torch.tensor(wild, dtype=F64))
            ht.unroll(problem, {**hparams, name: projected})


def check_setting_ranges(leaf: type[ht.Dynamics], given: Mapping[str, object]) -> None:
    """Every number out of range is refused, by the name of the setting.

    Args:
        leaf: the dynamics.
        given: arguments that make one.
    """
    for name, value in leaf(**given).settings().items():  # type: ignore[call-arg]
        for wrong in (math.nan, "fast"):
            with pytest.raises((ValueError, TypeError), match=f"`{name}` of `{leaf.__name__}` is"):
                leaf(**{**given, name: wrong})  # type: ignore[call-arg]
        leaf(**{**given, name: value})  # type: ignore[call-arg]


def _with_labels(hparams: TensorDict, batch: Batch) -> TensorDict:
    """A context of which one entry has no derivative."""
    return {"scale": hparams["lr"].square(), "labels": torch.zeros(2, dtype=torch.int64)}


def check_backend(backend: ht.Hypergradient) -> None:
    """An exact backend equals reverse mode on every kind of problem, and refuses what has no path."""
    sgd = ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=ht.Hyper("momentum"))
    learnt = {"lr": torch.tensor(0.3, dtype=F64), "momentum": torch.tensor(0.6, dtype=F64)}
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    tasks = task_problem(module, item=(2,), num_steps=NUM_STEPS)
    runs = [
        (net_problem(sgd, learnt, num_steps=NUM_STEPS), ht.Execution()),
        (net_problem(sgd, learnt, num_steps=NUM_STEPS, dropout=0.4, step_terms=True), ht.Execution()),
        (tasks, ht.Execution(tasks="vmap")),
        (tasks, ht.Execution(tasks="loop")),
        (dataclasses.replace(tasks, context=_with_labels, shared_context=("scale", "labels")), ht.Execution()),
    ]
    for problem, execution in runs:
        hparams = problem.init_hparams()
        expected = ht.hypergradient(problem, hparams, backend=backends.Reverse(), execution=execution)
        result = ht.hypergradient(problem, hparams, backend=backend, execution=execution)
        assert_equal(result.grads, expected.grads, 1e-10)
        torch.testing.assert_close(result.outer_loss, expected.outer_loss)
        assert_equal(result.params, expected.params, 1e-12)
        assert not any(value.requires_grad for value in (result.outer_loss, *result.params.values()))
    idle = net_problem(sgd, {**learnt, "idle": torch.zeros((), dtype=F64)}, num_steps=NUM_STEPS)
    with pytest.raises((DetachedHyperparameterError, IncompatibleBackendError), match="`hparams\\['idle'\\]`"):
        ht.hypergradient(idle, idle.init_hparams(), backend=backend)
    allowed = dataclasses.replace(idle, allow_unused=("idle",))
    assert not ht.hypergradient(allowed, idle.init_hparams(), backend=backend).grads["idle"].any()


def check_solver(solver: ht.LinearSolver) -> None:
    """The solution solves the system, the residual is that of the solution, and tasks do not mix.

    Args:
        solver: with settings that are enough for well-conditioned systems of six entries.
    """
    systems = [definite(6, seed=1)]
    if not isinstance(solver, ht.linear_solvers.SymmetricSolver):
        systems.append(skewed(6, seed=2))
    for system in systems:
        solution, found = system.solve(solver)
        torch.testing.assert_close(solution, system.exact(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.residual, system.residual(solution), rtol=1e-3, atol=1e-14)
        assert not solution.requires_grad
    several = [definite(6, seed=3), definite(6, seed=4)]
    together, found = stacked(several).solve(solver)
    assert found.residual.shape == (2,)
    for row, one in zip(together, several, strict=True):
        torch.testing.assert_close(row, one.solve(solver)[0], rtol=1e-9, atol=1e-11)
    nothing, found = System(several[0].matrix, torch.zeros(6, dtype=F64)).solve(solver)
    assert not nothing.any() and float(found.residual) == 0.0


def check_learner(learner: Learner, episodes: EpisodeSource, *, differentiable: bool = True) -> None:
    """A learner's hypergradient is right, tasks do not mix, and it answers as it was judged.

    Args:
        learner: with smooth activations, in float64.
        episodes: what it was built for, in float64.
        differentiable: whether the hypergradient is the derivative of the outer loss; Reptile's is not.
    """
    source = learner.on(episodes)
    problem, hparams = source.at(1), source.init_hparams()
    if differentiable:
        check = ht.check_hypergradient(problem, hparams, backends.Reverse(), num_directions=1, step_size=1e-4)
        assert check.passed, str(check)
    together, one_by_one = (
        ht.hypergradient(problem, hparams, backend=backends.Reverse(), execution=execution).grads
        for execution in (ht.Execution(tasks="vmap"), ht.Execution(tasks="loop"))
    )
    for name, value in together.items():
        torch.testing.assert_close(value, one_by_one[name], rtol=1e-10, atol=1e-13)
    # What a caller does to the outer variables must not reach the learner.
    next(iter(hparams.values())).add_(1.0)
    assert not torch.equal(next(iter(hparams.values())), next(iter(learner.init_hparams().values())))
    hparams = learner.init_hparams()
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in episodes.at(1))
    answers = learner.adapt(hparams, support)(query.inputs)
    assert answers.shape == (len(query.inputs), episodes.task_spec().outputs) and not answers.requires_grad
    with pytest.raises(ValueError, match="`hparams` of .* lacks"):
        learner.adapt({"another": torch.zeros((), dtype=F64)}, support)(query.inputs)


def check_episodes(episodes: EpisodeSource) -> None:
    """A batch is a pure function of its number, has a tasks axis, and is what the source says of it."""
    first = episodes.at(3)
    others = [episodes.at(step) for step in (0, 1)]
    for part, again in zip(first, episodes.at(3), strict=True):
        assert all(torch.equal(value, same) for value, same in zip(part, again, strict=True))
    assert not any(torch.equal(first.support.inputs, other.support.inputs) for other in others)
    spec = episodes.task_spec()
    for inputs, targets in first:
        assert inputs.shape[:2] == targets.shape[:2] and len(inputs) == episodes.num_tasks
        assert tuple(inputs.shape[2:]) == spec.item_shape
        if spec.is_classification:
            assert targets.dtype == torch.int64
            assert all(set(labels.tolist()) == set(range(spec.outputs)) for labels in targets)
        else:
            assert targets.is_floating_point() and math.prod(targets.shape[2:]) == spec.outputs
        assert inputs.isfinite().all() if inputs.is_floating_point() else True
    for support, query in zip(first.support.inputs.flatten(2), first.query.inputs.flatten(2), strict=True):
        assert not (support[:, None] == query).all(-1).any(), "an example is in support and query"
