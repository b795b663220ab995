"""Reverse mode against closed forms and central differences, and its checkpointed form against the whole graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError, ReplayError
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


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize("seed", [0, 7])
def test_gradient_descent_on_ridge_equals_the_formula(num_steps: int, seed: int) -> None:
    ridge = Ridge(seed)
    problem = ridge.problem(num_steps)
    hparams = problem.init_hparams()
    in_lam, in_eta = ridge.hypergradient_after(num_steps, hparams["lam"], hparams["eta"])
    for every in [None, *every_choice(num_steps)]:
        result = ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=every))
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


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("step_terms", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_central_differences(every: int | None, step_terms: bool, dropout: float) -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, dropout=dropout, step_terms=step_terms)
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(checkpoint_every=every))
    assert check.passed, str(check)
    assert {entry.name for entry in check.checks} == set(problem.init_hparams())


@pytest.mark.parametrize("num_steps", [2, 9, 16])
@pytest.mark.parametrize("step_terms", [False, True])
def test_checkpoints_equal_the_whole_graph_with_minibatches_and_dropout(num_steps: int, step_terms: bool) -> None:
    problem = net_problem(LEARNT_SGD, LEARNT, num_steps=num_steps, dropout=0.5, step_terms=step_terms)
    hparams = problem.init_hparams()
    whole = ht.hypergradient(problem, hparams, backend=Reverse(), outer_step=4)
    for every in [*every_choice(num_steps), "sqrt"]:
        again = ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=every), outer_step=4)
        torch.testing.assert_close(again.outer_loss, whole.outer_loss, rtol=1e-12, atol=1e-14)
        for name in hparams:
            torch.testing.assert_close(again.grads[name], whole.grads[name], rtol=1e-12, atol=1e-14)


def test_dropout_differs_between_steps_and_outer_steps() -> None:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, dropout=0.5)
    losses = [ht.unroll(problem, problem.init_hparams(), outer_step=step).outer_loss for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpoints_equal_the_whole_graph_with_tasks_and_buffers(every: int) -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3)
    ).double()
    problem = task_problem(module, item=(4,))
    hparams = problem.init_hparams()
    for route in ("vmap", "loop"):
        routed = problem.with_task_route(route)
        whole = ht.hypergradient(routed, hparams, backend=Reverse())
        again = ht.hypergradient(routed, hparams, backend=Reverse(checkpoint_every=every))
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


class LiveGraph:
    """Counts the most bytes that autograd keeps for backward at once, each storage once."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[int, int]] = {}
        self.peak = 0

    def pack(self, tensor: Tensor) -> Kept:
        return Kept(self, tensor)

    def __enter__(self) -> LiveGraph:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.hooks.__exit__(*exc)


class Kept:
    def __init__(self, owner: LiveGraph, tensor: Tensor) -> None:
        self.owner, self.tensor, self.key = owner, tensor, tensor.untyped_storage().data_ptr()
        count, size = owner.live.get(self.key, (0, tensor.untyped_storage().nbytes()))
        owner.live[self.key] = (count + 1, size)
        owner.peak = max(owner.peak, sum(size for _, size in owner.live.values()))

    def __del__(self) -> None:
        count, size = self.owner.live[self.key]
        if count == 1:
            del self.owner.live[self.key]
        else:
            self.owner.live[self.key] = (count - 1, size)


def graph_bytes(num_steps: int, every: int | None) -> int:
    problem = net_problem(ht.dynamics.SGD(lr=0.3), {}, num_steps=num_steps)
    with LiveGraph() as live:
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=every))
    return live.peak


def test_memory_of_the_graph_grows_with_the_segment_not_with_the_horizon() -> None:
    assert graph_bytes(64, None) > 6 * graph_bytes(8, None)
    assert graph_bytes(64, 8) < 1.3 * graph_bytes(8, None)
    assert graph_bytes(64, 1) < 1.1 * graph_bytes(8, 1)


def test_no_graph_is_left_and_no_grad_is_written() -> None:
    problem = net_problem(LEARNT_SGD, LEARNT)
    hparams = {name: value.requires_grad_() for name, value in problem.init_hparams().items()}
    result = ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=2))
    assert all(value.grad is None for value in hparams.values())
    values = [result.outer_loss, *result.grads.values(), *result.params.values()]
    assert not any(value.requires_grad for value in values)


class ForgetfulInner(ht.InnerProblem):
    """Breaks the replay rule: its data come from a counter of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.zeros(2, dtype=F64)}

    def batch(self, step: int) -> Batch:
        self.calls += 1
        return torch.tensor(float(self.calls), dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["c"] * batch).square().sum()


class ForgetfulOuter(ht.OuterProblem):
    def init_hparams(self) -> TensorDict:
        return {"c": torch.tensor(1.0, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"].sum()


def test_data_that_change_on_replay_are_noticed() -> None:
    problem = ht.BilevelProblem(ForgetfulInner(), ForgetfulOuter(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=6)
    with pytest.raises(ReplayError, match=r"`w` after inner step 3 differs .*no iterator, no counter"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(checkpoint_every=2))


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "all"])
def test_settings_are_validated(every: object) -> None:
    with pytest.raises(ValueError, match="`checkpoint_every` is .* at least 1. Pass a whole number"):
        Reverse(checkpoint_every=every)  # type: ignore[arg-type]


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
