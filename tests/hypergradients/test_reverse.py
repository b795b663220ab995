"""Reverse mode against closed forms and central differences, and its forms of less memory against the whole graph."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError, ReplayError
from hypertorch.hypergradients.reverse_mode.revolve import recomputed_steps
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import Ridge, net_problem, task_problem

Reverse = ht.hypergradients.Reverse
F64 = torch.float64
LEARNT = {
    "lr": torch.tensor(0.3, dtype=F64),
    "momentum": torch.tensor(0.6, dtype=F64),
    "dampening": torch.tensor(0.2, dtype=F64),
    "weight_decay": torch.tensor(0.01, dtype=F64),
}
LEARNT_SGD = ht.dynamics.SGD(**{name: ht.Hyper(name) for name in LEARNT})


def every_choice(num_steps: int) -> list[int]:
    return [1, round(math.sqrt(num_steps)), num_steps]


def in_less_memory(num_steps: int) -> list[Reverse]:
    """Every form but the whole graph, in the cases that matter."""
    every = [Reverse(checkpoint_every=every) for every in {*every_choice(num_steps), max(1, num_steps - 1)}]
    few = [Reverse(snapshots=snapshots) for snapshots in {1, 2, 3, num_steps, num_steps + 5}]
    return [*every, Reverse(checkpoint_every="sqrt"), *few, Reverse(memory_budget="1GiB")]


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize("seed", [0, 7])
def test_gradient_descent_on_ridge_equals_the_formula(num_steps: int, seed: int) -> None:
    ridge = Ridge(seed)
    problem = ridge.problem(num_steps)
    hparams = problem.init_hparams()
    in_lam, in_eta = ridge.hypergradient_after(num_steps, hparams["lam"], hparams["eta"])
    for backend in [Reverse(), *in_less_memory(num_steps)]:
        if backend.snapshots == 1 and num_steps == 50:
            continue  # runs 1,225 steps
        result = ht.hypergradient(problem, hparams, backend=backend)
        torch.testing.assert_close(result.grads["lam"], in_lam, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result.grads["eta"], in_eta, rtol=1e-10, atol=1e-13)
        expected = ridge.params_after(num_steps, hparams["lam"], hparams["eta"])
        torch.testing.assert_close(result.params["w"], expected, rtol=1e-10, atol=1e-13)


def test_a_closed_form_in_init_params_is_differentiated_through() -> None:
    ridge = Ridge()
    problem = ridge.closed_form_problem()
    hparams = problem.init_hparams()
    result = ht.hypergradient(problem, hparams, backend=Reverse())
    exact = ridge.exact_hypergradient(hparams["lam"])
    torch.testing.assert_close(result.grads["lam"], exact, rtol=1e-10, atol=1e-13)
    assert result.grads["eta"] == 0 and result.stats.steps == 0


def test_long_unrolls_of_a_contraction_reach_the_implicit_hypergradient() -> None:
    ridge = Ridge()
    problem = ridge.problem(400)
    result = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every="sqrt"))
    torch.testing.assert_close(
        result.grads["lam"], ridge.exact_hypergradient(torch.tensor(0.3, dtype=F64)), rtol=1e-10, atol=0
    )
    assert abs(float(result.grads["eta"])) < 1e-10


@pytest.mark.parametrize(("derivative", "every"), [("reverse", 3), ("mixed", 4)])
def test_sqrt_is_the_root_of_the_horizon_over_what_a_segment_holds_of_a_step(
    derivative: Literal["reverse", "mixed"], every: int
) -> None:
    """Of 16 steps, `round(sqrt(16 / 2))` where a segment holds graphs, `sqrt(16)` where it holds states alone."""
    problem = net_problem(LEARNT_SGD, LEARNT, num_steps=16)
    chosen, told = (
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=kept, derivative=derivative))
        for kept in ("sqrt", every)
    )
    assert chosen.stats == told.stats


@pytest.mark.parametrize("backend", [Reverse(), Reverse(checkpoint_every=3), Reverse(snapshots=2)])
@pytest.mark.parametrize("step_terms", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_central_differences(backend: Reverse, step_terms: bool, dropout: float) -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, dropout=dropout, step_terms=step_terms)
    check = ht.check_hypergradient(problem, problem.init_hparams(), backend)
    assert check.passed, str(check)
    assert {entry.name for entry in check.checks} == set(problem.init_hparams())


@pytest.mark.parametrize("num_steps", [2, 9, 16])
@pytest.mark.parametrize("step_terms", [False, True])
def test_less_memory_gives_the_whole_graphs_number_with_minibatches_and_dropout(
    num_steps: int, step_terms: bool
) -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, num_steps=num_steps, dropout=0.5, step_terms=step_terms)
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse(), outer_step=4)
    for backend in in_less_memory(num_steps):
        again = ht.hypergradient(problem, hparams, backend=backend, outer_step=4)
        torch.testing.assert_close(again.outer_loss, whole.outer_loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(again.params["second"], whole.params["second"], rtol=1e-12, atol=1e-14)
        for name in hparams:
            torch.testing.assert_close(again.grads[name], whole.grads[name], rtol=1e-12, atol=1e-14)


def test_dropout_differs_between_steps_and_outer_steps() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, dropout=0.5)
    losses = [ht.unroll(problem, problem.init_hparams(), outer_step=step).outer_loss for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("backend", [*in_less_memory(4), Reverse(memory_budget="40KiB")])
def test_less_memory_gives_the_whole_graphs_number_with_tasks_and_buffers(backend: Reverse) -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3)
    ).double()
    problem = task_problem(module, item=(4,), num_steps=4)
    hparams = problem.init_hparams()
    for route in ("vmap", "loop"):
        execution = ht.Execution(tasks=route)
        whole = ht.hypergradient(problem, hparams, backend=Reverse(), execution=execution)
        again = ht.hypergradient(problem, hparams, backend=backend, execution=execution)
        for name in hparams:
            torch.testing.assert_close(again.grads[name], whole.grads[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_steps", [9, 10, 16])
def test_costs_are_as_documented(num_steps: int) -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, num_steps=num_steps)
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse()).stats
    assert (whole.steps, whole.vjps, whole.graph_steps) == (num_steps, num_steps, num_steps)
    for every in every_choice(num_steps):
        stats = ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=every)).stats
        assert (stats.steps, stats.vjps, stats.graph_steps) == (2 * num_steps - every, num_steps, every)
        assert stats.stored_states == math.ceil(num_steps / every) + 1
    for snapshots in (1, 2, 3, 5, num_steps, 2 * num_steps):
        stats = ht.hypergradient(problem, hparams, backend=Reverse(snapshots=snapshots)).stats
        steps = num_steps + recomputed_steps(num_steps, snapshots)
        assert (stats.steps, stats.vjps, stats.graph_steps) == (steps, num_steps, 1)
        assert stats.stored_states == min(snapshots, num_steps) + 1


def test_one_loss_is_kept_for_each_step_however_often_it_is_run() -> None:
    seen = []

    class Watching(Reverse):
        def compute(self, loop, variables):
            result = super().compute(loop, variables)
            seen.append(len(loop.record.losses))
            return result

    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, num_steps=12)
    result = ht.hypergradient(problem, problem.init_hparams(), backend=Watching(snapshots=1))
    assert result.stats.steps == 12 + 66
    assert seen == [12]


@pytest.mark.parametrize("backend", [Reverse(snapshots=2), Reverse(checkpoint_every=2), Reverse(memory_budget="8KiB")])
def test_warm_starts_go_on_from_the_carry(backend: Reverse) -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, num_steps=6)
    warm = ht.BilevelProblem(
        problem.inner, problem.outer, dynamics=LEARNT_SGD, num_steps=6, warm_start=True,
        allow_unused=("init.first", "init.second"),
    )  # fmt: skip
    hparams = warm.init_hparams()
    first = ht.hypergradient(warm, hparams, backend=Reverse())
    whole = ht.hypergradient(warm, hparams, backend=Reverse(), carry=first.carry, outer_step=1)
    again = ht.hypergradient(warm, hparams, backend=backend, carry=first.carry, outer_step=1)
    for name in hparams:
        torch.testing.assert_close(again.grads[name], whole.grads[name], rtol=1e-12, atol=1e-14)


def test_no_graph_is_left_and_no_grad_is_written() -> None:
    problem = net_problem(LEARNT_SGD, LEARNT)
    hparams = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
    result = ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=2))
    assert all(value.grad is None for value in hparams.values())
    values = [result.outer_loss, *result.grads.values(), *result.params.values()]
    assert not any(value.requires_grad for value in values)


class ForgetfulInner(ht.InnerProblem):
    """Breaks the replay rule, once `share` is 1: its data come from a counter of its own."""

    def __init__(self) -> None:
        self.calls = 0
        self.share = torch.zeros((), dtype=F64)

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.zeros(2, dtype=F64)}

    def batch(self, step: int) -> Batch:
        self.calls += 1
        return 1.0 + self.share * (self.calls - 1)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["c"] * batch).square().sum()


def forgetful(inner: ForgetfulInner, num_steps: int) -> ht.BilevelProblem:
    """Returns a problem that forgets, of a kind that was looked at for side effects when it did not."""
    problem = ht.BilevelProblem(inner, ForgetfulOuter(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=num_steps)
    ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    inner.share, inner.calls = torch.ones((), dtype=F64), 0
    return problem


class ForgetfulOuter(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {"c": torch.tensor(1.0, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"].sum()


@pytest.mark.parametrize(
    ("backend", "step"),
    [
        # The last piece is run only once; the one before ends at step 3.
        (Reverse(checkpoint_every=2), 3), (Reverse(checkpoint_every=1), 4), (Reverse(checkpoint_every=5), 0),
        (Reverse(snapshots=1), 4), (Reverse(snapshots=3), 4), (Reverse(snapshots=6), 4),
    ],
)  # fmt: skip
def test_data_that_change_on_replay_are_noticed(backend: Reverse, step: int) -> None:
    problem = forgetful(ForgetfulInner(), 6)
    with pytest.raises(ReplayError, match=rf"`w` after inner step {step} differs .*no iterator, no counter"):
        ht.hypergradient(problem, problem.init_hparams(), backend=backend)


def test_a_single_step_that_changes_on_replay_is_noticed_wherever_it_is() -> None:
    class ForgetsOnce(ForgetfulInner):
        def __init__(self, forgotten: int) -> None:
            super().__init__()
            self.forgotten = forgotten

        def batch(self, step: int) -> Batch:
            self.calls += step == self.forgotten
            return 1.0 + self.share * (self.calls - 1 if step == self.forgotten else 0)

    for forgotten in range(6):
        problem = forgetful(ForgetsOnce(forgotten), 7)
        for backend in (Reverse(snapshots=1), Reverse(snapshots=2), Reverse(snapshots=4), Reverse(checkpoint_every=1)):
            # The first step is looked at before the run.
            said = "`InnerProblem.loss` differs" if forgotten == 0 else "`w` after inner step"
            ht.memo.clear()
            with pytest.raises(ReplayError, match=said):
                ht.hypergradient(problem, problem.init_hparams(), backend=backend)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "all"])
def test_settings_are_validated(every: object) -> None:
    with pytest.raises(ValueError, match="`checkpoint_every` is .* at least 1. Pass a whole number"):
        Reverse(checkpoint_every=every)  # type: ignore[arg-type]


@pytest.mark.parametrize("snapshots", [0, -1, 1.5, True, "sqrt"])
def test_snapshots_are_validated(snapshots: object) -> None:
    with pytest.raises(ValueError, match="`snapshots` is .* at least 1. Pass a whole number"):
        Reverse(snapshots=snapshots)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, -5, "lots", "5 apples", True])
def test_budgets_are_validated(budget: object) -> None:
    with pytest.raises(ValueError, match="`memory_budget` is .* no number of bytes"):
        Reverse(memory_budget=budget)  # type: ignore[arg-type]


def test_settings_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="`checkpoint_every` and `snapshots` are both given.* Pass one of"):
        Reverse(checkpoint_every="sqrt", snapshots=3)
    with pytest.raises(ValueError, match="`snapshots` and `memory_budget` are both given"):
        Reverse(snapshots=3, memory_budget="1MiB")


def test_more_steps_between_checkpoints_than_there_are_steps_is_refused() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, num_steps=5)
    with pytest.raises(IncompatibleBackendError, match=r"checkpoint_every=6.* `num_steps` = 5.*Use at most"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=6))


def test_noise_differs_between_inner_steps_and_is_repeatable() -> None:
    class Noisy(ForgetfulInner):
        def batch(self, step: int) -> Batch:
            return None

        def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
            return (params["w"] * hparams["c"]).sum() + torch.randn((), dtype=F64)

    problem = ht.BilevelProblem(Noisy(), ForgetfulOuter(), dynamics=ht.dynamics.SGD(lr=0.0), num_steps=4)
    first, again = (ht.unroll(problem, problem.init_hparams()).inner_losses for _ in range(2))
    assert len(set(first.tolist())) == 4
    assert torch.equal(first, again)
