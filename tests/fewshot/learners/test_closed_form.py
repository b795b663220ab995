"""Learners without an inner loop: every backend gives their hypergradient, or refuses in one line."""

from __future__ import annotations

import pytest
import torch

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from hypertorch.fewshot import ClosedFormHead, Learner
from hypertorch.types import TensorDict
from tests.fewshot.learners.test_learners import Blobs
from tests.fewshot.learners.test_methods import LEARNERS, assert_same
from tests.helpers.leaves import leaves

F64 = torch.float64
backends = ht.hypergradients
solvers = ht.linear_solvers
CLOSED_FORM = [name for name, make in LEARNERS.items() if isinstance(make(), ClosedFormHead)]
# Nothing is cut off, solved or reversed where there is no step.
SERVING: dict[str, ht.Hypergradient] = {
    "step-wise": backends.Reverse(checkpoint_every=1),
    "sqrt": backends.Reverse(checkpoint_every="sqrt"),
    "snapshots": backends.Reverse(snapshots=2),
    "budget": backends.Reverse(memory_budget="1GiB"),
    "a window of one": backends.Truncated(window=1),
    "first order": backends.FirstOrder(),
    "forward": backends.Forward(),
    "forward by duals": backends.Forward(chunk_size=1),
    "reversible": backends.Reversible(),
}
NO_LOSS = (
    "`{name}` has no inner loop (`num_steps` = 0), and its head minimises no inner loss: there is nothing that this "
    "backend could solve or step along. Use `Reverse()`, which differentiates through the head."
)
NO_STEP = (
    "`OneStep` got a problem with `num_steps` = 0: there is no last step to differentiate. Use `Reverse()`, which "
    "differentiates through `init_params`."
)
REFUSED: dict[str, tuple[ht.Hypergradient, str]] = {
    "implicit": (backends.Implicit(), NO_LOSS),
    "implicit without its checks": (
        backends.Implicit(solver=solvers.Dense(), residual_tolerance=None, stationarity_tolerance=None),
        NO_LOSS,
    ),
    "implicit, map of steps": (backends.Implicit(map="step"), NO_LOSS),
    "EvoGrad": (backends.EvoGrad(), NO_LOSS),
    "one step": (backends.OneStep(), NO_STEP),
    "one step by differences": (backends.OneStep(finite_difference=True), NO_STEP),
}
# Their mean over many draws is the hypergradient.
UNBIASED: dict[str, ht.Hypergradient] = {
    "forward gradient": backends.ForwardGradient(num_samples=400),
    "evolution strategies": backends.EvolutionStrategies(num_pairs=400, sigma=1e-3),
}
# A new backend is held to be exact, unless it is named above.
_LISTED = {
    type(backend) for backend in [*SERVING.values(), *UNBIASED.values(), *(each for each, _ in REFUSED.values())]
}
SERVING |= {name: leaf() for name, leaf in leaves(backends, ht.Hypergradient).items() if leaf not in _LISTED}


def compute(name: str, backend: ht.Hypergradient, route: str = "vmap") -> TensorDict:
    source = LEARNERS[name]().on(Blobs())
    execution = ht.Execution(tasks=route)  # type: ignore[arg-type]
    return ht.hypergradient(source.at(0), source.init_hparams(), backend=backend, execution=execution).grads


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_without_an_inner_loop_nothing_is_truncated(name: str, backend: str) -> None:
    assert_same(compute(name, SERVING[backend]), compute(name, backends.Reverse()))


@pytest.mark.parametrize("backend", UNBIASED)
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_random_directions_point_along_the_hypergradient(name: str, backend: str) -> None:
    exact, estimate = (
        torch.cat([value.flatten() for _, value in sorted(compute(name, chosen).items())])
        for chosen in (backends.Reverse(), UNBIASED[backend])
    )
    # A direction that has nothing to do with it has a cosine of 0 with a standard deviation of 0.1 in this dimension.
    assert torch.nn.functional.cosine_similarity(exact, estimate, dim=0) > 0.6


@pytest.mark.parametrize("route", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("backend", REFUSED)
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_a_backend_that_needs_an_inner_solution_refuses_in_one_line(name: str, backend: str, route: str) -> None:
    chosen, message = REFUSED[backend]
    with pytest.raises(IncompatibleBackendError) as caught:
        compute(name, chosen, route)
    assert str(caught.value) == message.format(name=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_what_cannot_persist_refuses_in_one_line(name: str) -> None:
    backend = backends.EvolutionStrategies(num_pairs=1, sigma=0.1, persistent=True)
    with pytest.raises(IncompatibleBackendError, match="Leave `persistent` out") as caught:
        compute(name, backend)
    assert "\n" not in str(caught.value)


def test_every_backend_is_here() -> None:
    tried = {type(backend) for backend in [*SERVING.values(), *UNBIASED.values()]}
    assert set(leaves(backends, ht.Hypergradient).values()) == tried | {
        type(backend) for backend, _ in REFUSED.values()
    }


@pytest.mark.parametrize("name", LEARNERS)
def test_which_learners_are_in_closed_form(name: str) -> None:
    learner: Learner = LEARNERS[name]()
    assert (learner.on(Blobs()).at(0).num_steps == 0) == (name in CLOSED_FORM)
    assert {"ProtoNet", "R2D2"} <= set(CLOSED_FORM)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_training_adapting_and_judging_need_no_inner_loss(name: str) -> None:
    learner = LEARNERS[name]()
    source = learner.on(Blobs())
    trained = ht.OuterLoop(source, optimizer=torch.optim.Adam, backend=backends.Reverse()).run(num_outer_steps=2)
    figures = ht.evaluate(source, trained.hparams, num_episodes=6).metrics
    assert 0.0 <= figures["accuracy"].mean <= 1.0
