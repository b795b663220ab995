"""What a step of the inner loop keeps, and what its noise depends on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.autodiff.inner_loss import GradientRoute, InnerLoss
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, scalars

F64 = torch.float64


class NoisyTerms(LambdaOuter):
    """Each step's term of the outer loss is one random number."""

    def __init__(self) -> None:
        self.drawn: list[float] = []
        super().__init__(scalars(c=1.0), lambda p, h, b: p["w"] + self.draw())

    def draw(self) -> Tensor:
        value = torch.rand((), dtype=F64)
        self.drawn.append(float(value))
        return value

    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return params["w"] * self.draw()


def test_noise_of_terms_at_steps_differs_by_step_and_is_that_of_a_replay() -> None:
    outer = NoisyTerms()
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["c"]}, lambda p, h, b: p["w"].square()),
        outer,
        dynamics=ht.dynamics.SGD(lr=0.1),
        num_steps=4,
    )
    hparams = problem.init_hparams()
    ht.unroll(problem, hparams)  # which looks at the kind of problem, and draws for that too
    outer.drawn.clear()
    ht.unroll(problem, hparams)
    first = list(outer.drawn)
    assert len(set(first)) == len(first) >= 5
    outer.drawn.clear()
    ht.unroll(problem, hparams)
    assert outer.drawn == first
    # Terms of steps that are run again, from the last to the first, are the same terms.
    whole, segments = (
        ht.hypergradient(problem, hparams, backend=backend)
        for backend in (ht.hypergradients.Reverse(), ht.hypergradients.Reverse(checkpoint_every=1))
    )
    torch.testing.assert_close(whole.outer_loss, segments.outer_loss)
    torch.testing.assert_close(whole.grads, segments.grads)


@pytest.mark.parametrize("busy", ["init", "loss", "term"])
def test_how_much_noise_one_function_draws_shifts_that_of_no_other(busy: str) -> None:
    def noise(extra: int) -> dict[str, list[float]]:
        """The first number that each function draws in a run."""
        drawn: dict[str, list[float]] = {"init": [], "loss": [], "term": [], "outer": []}

        def draw(place: str) -> Tensor:
            value = torch.rand((1 + extra * (place == busy),), dtype=F64)[0]
            drawn[place].append(float(value))
            return value

        class Outer(LambdaOuter):
            def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
                return params["w"] * draw("term")

        problem = ht.BilevelProblem(
            LambdaInner(lambda h: {"w": h["c"] + draw("init")}, lambda p, h, b: p["w"].square() * draw("loss")),
            Outer(scalars(c=1.0), lambda p, h, b: p["w"] + draw("outer")),
            dynamics=ht.dynamics.SGD(lr=0.1),
            num_steps=3,
        )
        ht.unroll(problem, problem.init_hparams())  # which looks at the kind of problem, and draws for that too
        for numbers in drawn.values():
            numbers.clear()
        torch.manual_seed(extra)  # the noise is the problem's own, whatever the generators held before
        ht.unroll(problem, problem.init_hparams())
        return drawn

    assert noise(0) == noise(3)
    found = noise(0)
    assert len({*found["init"], *found["loss"], *found["term"], *found["outer"]}) >= 1 + 3 + 3 + 1


class LookAhead(ht.Dynamics):
    """Steps along the gradient at a place that the gradient leads to: two evaluations of it."""

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {}

    def step(
        self, loss: InnerLoss, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        first = loss.gradient(params, hparams)
        second = loss.gradient({name: value - 0.5 * first[name] for name, value in params.items()}, hparams)
        return {name: value - 0.5 * second[name] for name, value in params.items()}, {}


class Moving(LambdaInner):
    """`(w - c)^2` with a buffer that holds twice the last `w` that the loss has seen."""

    buffers = ("seen",)

    def __init__(self) -> None:
        super().__init__(lambda h: {"w": h["c"] + 1.0, "seen": torch.zeros((), dtype=F64)}, self.value)

    def value(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return (params["w"] - hparams["c"]).square(), {"seen": 2.0 * params["w"]}  # type: ignore[return-value]


def test_the_value_and_the_buffers_are_those_of_the_first_evaluation() -> None:
    """`w` starts at 2, its gradient is 2, and the place ahead is 1: there the loss is 0 and the buffer 2."""
    problem = ht.BilevelProblem(
        Moving(), LambdaOuter(scalars(c=1.0), lambda p, h, b: p["w"] + p["seen"]), dynamics=LookAhead(), num_steps=1
    )
    hparams = problem.init_hparams()
    result = ht.unroll(problem, hparams)
    assert result.inner_losses.tolist() == [1.0]
    assert result.params["seen"] == 4.0
    # `w_1 = w_0` and `seen = 2 w_0`, at `w_0 = c + 1`; the gradient ahead does not depend on `c`.
    for backend in (ht.hypergradients.Reverse(), ht.hypergradients.Forward()):
        assert ht.hypergradient(problem, hparams, backend=backend).grads["c"] == 3.0


def test_every_route_of_the_gradient_keeps_the_first_evaluation() -> None:
    routes: tuple[GradientRoute, ...] = ("differentiable", "constant", "leaf", "functional", "dual")
    for route in routes:
        loss = InnerLoss(
            lambda params, hparams, batch: (params["w"].square().sum(), {"seen": params["w"]}),
            {"seen": torch.zeros((), dtype=F64)},
            None,
            route,
        )
        for place in (3.0, 5.0):
            loss.gradient(scalars(w=place), {})
        assert loss.value == 9.0
        assert loss.new_buffers["seen"] == 3.0
