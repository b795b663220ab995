"""Learnt update rules: the cell, hypergradients of everything, and a rule that learns to beat gradient descent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.dynamics import CoordinatewiseLSTM, CoordinatewiseMLP, LearnedUpdate, UpdateRule
from hypertorch.dynamics.coordinatewise_rules import log_and_sign
from hypertorch.errors import DetachedHyperparameterError
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

F64 = torch.float64
# PyTorch's own, at the first dual number of a process; the library's backends silence it.
FORWARD_MODE_WARNS = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
Reverse, Forward = ht.hypergradients.Reverse, ht.hypergradients.Forward

RULES: dict[str, Callable[[], UpdateRule]] = {
    "one layer": lambda: CoordinatewiseLSTM(hidden=3, layers=1),
    "two layers": lambda: CoordinatewiseLSTM(hidden=3),
    "raw gradient": lambda: CoordinatewiseLSTM(hidden=3, layers=1, preprocess=None),
    "MLP": lambda: CoordinatewiseMLP(hidden=4, decays=(0.5, 0.9)),
    "MLP without memory": lambda: CoordinatewiseMLP(hidden=4, decays=(), preprocess=None),
}


def made(name: str) -> UpdateRule:
    torch.manual_seed(0)
    return RULES[name]().double()


def rule_problem(
    rule: UpdateRule, *, num_steps: int = 5, step_terms: bool = False, constant: bool = False
) -> ht.BilevelProblem:
    """The two-layer net from a learnt initialisation, with a learnt rule and a learnt scale of its updates."""
    dynamics = LearnedUpdate(rule, scale=ht.Hyper("scale"), gradient_is_constant=constant)
    extra = {"scale": torch.tensor(0.3, dtype=F64)}
    return net_problem(dynamics, extra, num_steps=num_steps, step_terms=step_terms)


def assert_same(grads: TensorDict, expected: TensorDict, rtol: float = 1e-10) -> None:
    assert grads.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=rtol, atol=1e-13)


# The rules


@pytest.mark.parametrize("layers", [1, 2])
def test_the_cell_is_an_lstm(layers: int) -> None:
    rule = CoordinatewiseLSTM(hidden=4, layers=layers).double()
    cells = [nn.LSTMCell(2 if layer == 0 else 4, 4, dtype=F64) for layer in range(layers)]
    for gates, cell in zip(rule.gates, cells, strict=True):
        # PyTorch has the candidate third and the output gate last; its second bias is not needed.
        order = torch.cat([torch.arange(0, 8), torch.arange(12, 16), torch.arange(8, 12)])
        with torch.no_grad():
            cell.weight_ih.copy_(gates.weight[order, :-4])
            cell.weight_hh.copy_(gates.weight[order, -4:])
            cell.bias_ih.copy_(gates.bias[order])
            cell.bias_hh.zero_()
    state = rule.initial_state(torch.zeros(5, dtype=F64))
    states = [(torch.zeros(5, 4, dtype=F64), torch.zeros(5, 4, dtype=F64)) for _ in cells]
    for step in range(3):
        gradient = normal(5, seed=step)
        update, state = rule(gradient, state)
        signal = log_and_sign(gradient)
        for layer, cell in enumerate(cells):
            states[layer] = cell(signal, states[layer])
            signal = states[layer][0]
            torch.testing.assert_close(state[f"hidden{layer}"], states[layer][0], rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(state[f"cell{layer}"], states[layer][1], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(update, rule.output(signal)[:, 0], rtol=1e-13, atol=1e-15)


def test_the_forget_gate_starts_open() -> None:
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden=50)
    for gates in rule.gates:
        enter, keep, leave, candidate = gates.bias.chunk(4)
        assert keep.mean() > 0.9
        assert all(abs(part.mean()) < 0.1 for part in (enter, leave, candidate))


def test_the_network_keeps_running_averages() -> None:
    rule = made("MLP")
    first, second = normal(2, seed=1), normal(2, seed=2)
    _, state = rule(first, rule.initial_state(first))
    _, state = rule(second, state)
    for position, decay in enumerate((0.5, 0.9)):
        expected = decay * (1 - decay) * first + (1 - decay) * second
        torch.testing.assert_close(state[f"average{position}"], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("p", [1.0, 10.0])
def test_features_follow_the_formula(p: float) -> None:
    edge = math.exp(-p)
    values = torch.tensor([3.0, -0.7, 2 * edge, -2 * edge, 0.5 * edge, -0.1 * edge, 0.0], dtype=F64)
    for value, (magnitude, sign) in zip(values.tolist(), log_and_sign(values, p).tolist(), strict=True):
        expected = (math.log(abs(value)) / p, math.copysign(1.0, value)) if abs(value) >= edge else (-1.0, value / edge)
        assert (magnitude, sign) == pytest.approx(expected, rel=1e-12)
    at_the_edge = torch.tensor([edge * (1 - 1e-9), edge * (1 + 1e-9)], dtype=F64)
    below, above = log_and_sign(at_the_edge, p)
    torch.testing.assert_close(below, above, rtol=1e-7, atol=0)


@FORWARD_MODE_WARNS
def test_features_have_finite_derivatives_at_zero() -> None:
    gradient = torch.zeros(3, dtype=F64, requires_grad=True)
    weights = normal(3, 2, seed=1)
    [first] = torch.autograd.grad((log_and_sign(gradient) * weights).sum(), gradient, create_graph=True)
    torch.testing.assert_close(first.detach(), math.exp(10.0) * weights[:, 1], rtol=1e-13, atol=0)
    [second] = torch.autograd.grad(first.square().sum() + 0.0 * gradient.sum(), gradient)
    assert second.tolist() == [0.0, 0.0, 0.0]
    tangent = torch.func.jvp(log_and_sign, (gradient.detach(),), (torch.ones(3, dtype=F64),))[1]
    torch.testing.assert_close(tangent[:, 1], torch.full((3,), math.exp(10.0), dtype=F64), rtol=1e-13, atol=0)
    assert tangent[:, 0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", RULES)
def test_coordinates_do_not_see_each_other(name: str) -> None:
    rule, gradient = made(name), normal(2, 3, 4, seed=1)
    state = rule.initial_state(gradient)
    assert all(value.shape[:3] == (2, 3, 4) for value in state.values())
    update, state = rule(gradient, state)
    update, state = rule(gradient + 1.0, state)
    alone = gradient[1, 2, 3]
    own_update, own = rule(alone, rule.initial_state(alone))
    own_update, own = rule(alone + 1.0, own)
    torch.testing.assert_close(update[1, 2, 3], own_update, rtol=1e-13, atol=1e-15)
    assert state.keys() == own.keys()
    for key, value in own.items():
        torch.testing.assert_close(state[key][1, 2, 3], value, rtol=1e-13, atol=1e-15)


@FORWARD_MODE_WARNS
@pytest.mark.parametrize("name", RULES)
def test_rules_work_under_transforms(name: str) -> None:
    rule, gradients = made(name), normal(3, 4, seed=1)

    def two_steps(gradient: Tensor) -> Tensor:
        update, state = rule(gradient, rule.initial_state(gradient))
        return rule(gradient * update, state)[0].sum()

    expected = torch.stack([torch.autograd.functional.jacobian(two_steps, gradient) for gradient in gradients])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(two_steps))(gradients), expected, rtol=1e-11, atol=1e-13)
    pushed = torch.func.jvp(two_steps, (gradients[0],), (gradients[1],))[1]
    torch.testing.assert_close(pushed, expected[0] @ gradients[1], rtol=1e-11, atol=1e-13)


class Plain(UpdateRule):
    """Gradient descent with a learnt step size, and heavy-ball momentum."""

    def __init__(self, lr: float = 0.2) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(lr, dtype=F64))

    def initial_state(self, like: Tensor) -> TensorDict:
        return {"velocity": torch.zeros_like(like)}

    def forward(self, gradient: Tensor, state: TensorDict) -> tuple[Tensor, TensorDict]:
        velocity = 0.5 * state["velocity"] + gradient
        return -self.lr * velocity, {"velocity": velocity}


def test_a_rule_written_by_hand_is_gradient_descent() -> None:
    """Also with dots in the names of the parameters."""
    inner = LambdaInner(
        lambda h: {"a.w": normal(3, seed=1), "b.w": normal(2, seed=2), "w": normal(2, seed=3)},
        lambda p, h, b: sum(value.cos().sum() * (position + 1) for position, value in enumerate(p.values())),
    )
    outer = LambdaOuter({}, lambda p, h, b: sum(value.sin().sum() for value in p.values()))
    learnt = ht.BilevelProblem(inner, outer, dynamics=LearnedUpdate(Plain(0.2), scale=0.3), num_steps=5)
    fixed_outer = LambdaOuter({"lr": torch.tensor(0.06, dtype=F64)}, outer.loss)
    fixed = ht.BilevelProblem(
        inner, fixed_outer, dynamics=ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.5), num_steps=5
    )
    a = ht.hypergradient(learnt, learnt.init_hparams(), backend=Reverse())
    b = ht.hypergradient(fixed, fixed.init_hparams(), backend=Reverse())
    assert_same(a.params, b.params, rtol=1e-13)
    torch.testing.assert_close(a.grads["update_rule.lr"], 0.3 * b.grads["lr"], rtol=1e-12, atol=0)


# Hypergradients


@pytest.mark.parametrize("step_terms", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_hypergradient_of_everything(name: str, step_terms: bool) -> None:
    problem = rule_problem(made(name), step_terms=step_terms)
    hparams = problem.init_hparams()
    # The logarithm of a small gradient bends sharply, hence the short step.
    check = ht.check_hypergradient(problem, hparams, Reverse(), step_size=2e-6)
    assert check.passed, str(check)
    assert {entry.name for entry in check.checks} == set(hparams)
    exact = ht.hypergradient(problem, hparams, backend=Reverse()).grads
    assert all(value.abs().max() > 0 for value in exact.values())
    for every in (1, 3):
        assert_same(ht.hypergradient(problem, hparams, backend=Reverse(checkpoint_every=every)).grads, exact)


@pytest.mark.parametrize("name", RULES)
def test_forward_mode_agrees(name: str) -> None:
    problem = rule_problem(made(name), num_steps=3)
    exact = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).grads
    assert_same(ht.hypergradient(problem, problem.init_hparams(), backend=Forward()).grads, exact)


@pytest.mark.parametrize("name", ["one layer", "MLP"])
@pytest.mark.parametrize("constant", [False, True])
def test_dual_numbers_agree(name: str, constant: bool) -> None:
    problem = quadratic_problem(made(name), constant=constant)
    exact = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).grads
    duals = ht.hypergradient(problem, problem.init_hparams(), backend=Forward(chunk_size=1)).grads
    assert_same(duals, exact)


def quadratic_problem(rule: UpdateRule, *, constant: bool = False) -> ht.BilevelProblem:
    """Three weights in a bowl; the first has no gradient at all."""
    curvature = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": h["w0"]}, lambda p, h, b: (curvature * p["w"].square()).sum()),
        LambdaOuter({"w0": normal(3, seed=1)}, lambda p, h, b: p["w"].sin().sum()),
        dynamics=LearnedUpdate(rule, gradient_is_constant=constant),
        num_steps=3,
    )


@pytest.mark.parametrize("name", RULES)
def test_a_weight_without_a_gradient(name: str) -> None:
    problem = quadratic_problem(made(name))
    for backend in (Reverse(), Forward()):
        check = ht.check_hypergradient(problem, problem.init_hparams(), backend, step_size=1e-5)
        assert check.passed, str(check)


@pytest.mark.parametrize("name", ["two layers", "MLP"])
def test_tasks_vectorised_equal_a_loop(name: str) -> None:
    results: dict[str, TensorDict] = {}
    for route in ("vmap", "loop"):
        torch.manual_seed(1)
        base = task_problem(nn.Linear(4, 3, dtype=F64), item=(4,))
        problem = ht.BilevelProblem(
            base.inner,
            base.outer,
            dynamics=LearnedUpdate(made(name), scale=ht.Hyper("lr")),
            num_steps=4,
            num_tasks=3,
        )
        results[route] = ht.hypergradient(
            problem, problem.init_hparams(), backend=Reverse(checkpoint_every=3), execution=ht.Execution(tasks=route)
        ).grads
    assert_same(results["vmap"], results["loop"], rtol=1e-11)


def test_the_state_is_carried_over_warm_starts() -> None:
    def problem(num_steps: int, warm_start: bool) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            LambdaInner(lambda h: {"w": normal(4, seed=1)}, lambda p, h, b: p["w"].square().sum()),
            LambdaOuter({}, lambda p, h, b: p["w"].sin().sum()),
            dynamics=LearnedUpdate(made("two layers")),
            num_steps=num_steps,
            warm_start=warm_start,
        )

    hparams = problem(7, False).init_hparams()
    whole = ht.unroll(problem(7, False), hparams).params["w"]
    first = ht.hypergradient(problem(3, True), hparams, backend=Reverse())
    assert {"dynamics.hidden0.w", "dynamics.cell1.w"} < set(first.carry)
    second = ht.hypergradient(problem(4, True), hparams, backend=Reverse(), carry=first.carry)
    torch.testing.assert_close(second.params["w"], whole, rtol=1e-13, atol=0)
    forgetful = {name: value * 0.0 if ".cell" in name else value for name, value in first.carry.items()}
    other = ht.hypergradient(problem(4, True), hparams, backend=Reverse(), carry=forgetful)
    assert (other.params["w"] - whole).abs().max() > 1e-4


# Gradients held constant


class DirectOuter(ht.OuterProblem):
    """Reads `log_l2` of the inner loss as well."""

    def init_hparams(self) -> TensorDict:
        return {"w0": normal(3, seed=2), "log_l2": torch.tensor(-1.0, dtype=F64)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return params["w"].sin().sum() + 0.1 * hparams["log_l2"]


def penalised(rule: UpdateRule, *, constant: bool) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        LambdaInner(
            lambda h: {"w": h["w0"]},
            lambda p, h, b: (p["w"].cos() + h["log_l2"].exp() * p["w"].square()).sum(),
        ),
        DirectOuter(),
        dynamics=LearnedUpdate(rule, gradient_is_constant=constant),
        num_steps=4,
    )


@pytest.mark.parametrize("name", ["two layers", "MLP"])
def test_constant_gradients_are_those_of_the_first_order_backend(name: str) -> None:
    problem = rule_problem(made(name), constant=True)
    exact = rule_problem(made(name))
    # Nothing but the gradient reads these.
    problem, exact = (
        ht.BilevelProblem(
            entry.inner, entry.outer, dynamics=entry.dynamics, num_steps=entry.num_steps, allow_unused=("weights",)
        )
        for entry in (problem, exact)
    )
    hparams = problem.init_hparams()
    first_order = ht.hypergradient(exact, hparams, backend=ht.hypergradients.FirstOrder()).grads
    for backend in (Reverse(), Reverse(checkpoint_every=2), ht.hypergradients.FirstOrder()):
        assert_same(ht.hypergradient(problem, hparams, backend=backend).grads, first_order)
    everything = ht.hypergradient(exact, hparams, backend=Reverse()).grads
    assert (everything["update_rule.output.weight"] - first_order["update_rule.output.weight"]).abs().max() > 1e-6


def test_constant_gradients_drop_what_the_docstring_says() -> None:
    grads = ht.hypergradient(
        penalised(made("one layer"), constant=True), hparams_of_penalised(), backend=Reverse()
    ).grads
    assert float(grads["log_l2"]) == pytest.approx(0.1, rel=1e-13)
    last = ht.unroll(penalised(made("one layer"), constant=True), hparams_of_penalised()).params["w"]
    torch.testing.assert_close(grads["w0"], last.cos(), rtol=1e-12, atol=0)
    whole = ht.hypergradient(penalised(made("one layer"), constant=False), hparams_of_penalised(), backend=Reverse())
    assert abs(float(whole.grads["log_l2"]) - 0.1) > 1e-4


def hparams_of_penalised() -> TensorDict:
    return penalised(made("one layer"), constant=False).init_hparams()


def test_a_hyperparameter_that_only_a_constant_gradient_reads_is_refused() -> None:
    problem = rule_problem(made("one layer"), constant=True)
    with pytest.raises(DetachedHyperparameterError, match="weights"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


# Weights as outer variables


def test_the_module_is_never_changed() -> None:
    rule = made("two layers")
    before = copy.deepcopy(rule.state_dict())
    problem = rule_problem(rule)
    hparams = problem.init_hparams()
    ht.hypergradient(problem, hparams, backend=Reverse())
    for name, value in hparams.items():
        if name.startswith("update_rule."):
            value.zero_()
    moved = ht.unroll(problem, hparams).params["first"]
    torch.testing.assert_close(moved, hparams["init.first"], rtol=0, atol=0)
    for name, value in rule.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        assert value.grad is None


def test_weights_are_named_and_frozen_ones_stay() -> None:
    rule = made("one layer")
    rule.output.bias.requires_grad_(False)  # type: ignore[union-attr]
    owned = LearnedUpdate(rule, name="my_rule").init_hparams()
    assert set(owned) == {"my_rule.gates.0.weight", "my_rule.gates.0.bias", "my_rule.output.weight"}
    torch.testing.assert_close(owned["my_rule.output.weight"], rule.output.weight.detach())  # type: ignore[union-attr]


def test_two_rules_train_two_parts() -> None:
    dynamics = ht.dynamics.Groups(
        {"first": LearnedUpdate(made("one layer"), name="a"), "*": LearnedUpdate(made("MLP"), name="b")}
    )
    problem = net_problem(dynamics, {}, num_steps=3)
    assert any(name.startswith("a.gates") for name in problem.init_hparams())
    check = ht.check_hypergradient(problem, problem.init_hparams(), Reverse(), num_directions=1, step_size=1e-5)
    assert check.passed, str(check)


def test_the_scale_may_be_any_setting() -> None:
    fixed = net_problem(LearnedUpdate(made("one layer"), scale=[0.3, 0.2, 0.1]), {}, num_steps=3)
    learnt = net_problem(
        LearnedUpdate(made("one layer"), scale=ht.Hyper("scale", per="step")),
        {"scale": torch.tensor([0.3, 0.2, 0.1], dtype=F64)},
        num_steps=3,
    )
    check = ht.check_hypergradient(learnt, learnt.init_hparams(), Reverse(), num_directions=1, step_size=1e-5)
    assert check.passed, str(check)
    torch.testing.assert_close(
        ht.unroll(fixed, fixed.init_hparams()).outer_loss,
        ht.unroll(learnt, learnt.init_hparams()).outer_loss,
        rtol=1e-14,
        atol=0,
    )
    constraints = LearnedUpdate(made("one layer"), scale=ht.Hyper("scale")).constraints()
    assert constraints["scale"].project(torch.tensor(-1.0)) > 0


@pytest.mark.parametrize("name", RULES)
def test_the_state_follows_the_device_of_the_params(name: str) -> None:
    """On a device without values, which also shows that no step looks at one."""
    dynamics = LearnedUpdate(RULES[name]().to("meta"))
    hparams, params = dynamics.init_hparams(), {"w": torch.empty(3, device="meta")}
    state = dynamics.init(params, hparams)
    for index in range(2):
        params, state = dynamics.update(params, params, state, hparams, index)
    assert all(value.device.type == "meta" for value in [*params.values(), *state.values()])


# Refusals


class Wide(UpdateRule):
    """Forgets to drop its axis of features, or names its state badly."""

    def __init__(self, entry: str = "memory") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=F64))
        self.entry = entry

    def initial_state(self, like: Tensor) -> TensorDict:
        return {self.entry: torch.zeros_like(like)}

    def forward(self, gradient: Tensor, state: TensorDict) -> tuple[Tensor, TensorDict]:
        return gradient.unsqueeze(-1) * self.weight, state


def test_an_update_of_another_shape_is_refused() -> None:
    problem = net_problem(LearnedUpdate(Wide()), {})
    with pytest.raises(
        ValueError, match=r"`Wide` returned an update of shape \(4, 6, 1\) for `first` of shape \(4, 6\)"
    ):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


def test_a_dot_in_the_state_is_refused() -> None:
    problem = net_problem(LearnedUpdate(Wide("memory.long")), {})
    with pytest.raises(ValueError, match="`Wide.initial_state` names an entry `memory.long`.*without one"):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())


def test_missing_weights_are_refused() -> None:
    problem = rule_problem(made("one layer"))
    hparams = problem.init_hparams()
    del hparams["update_rule.output.bias"]
    message = r"`hparams` lacks `update_rule.output.bias`, a weight of the `LearnedUpdate` named 'update_rule'"
    with pytest.raises(ValueError, match=message):
        ht.hypergradient(problem, hparams, backend=Reverse())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LearnedUpdate(nn.Linear(1, 1)), TypeError, "`rule` is a Linear, not an `UpdateRule`"),  # type: ignore[arg-type]
        (lambda: LearnedUpdate(CoordinatewiseLSTM(), scale=-1.0), ValueError, "`scale` of `LearnedUpdate` is -1.0"),
        (lambda: CoordinatewiseLSTM(hidden=0), ValueError, "`hidden` of `CoordinatewiseLSTM` is 0"),
        (lambda: CoordinatewiseLSTM(layers=0), ValueError, "`layers` of `CoordinatewiseLSTM` is 0"),
        (lambda: CoordinatewiseLSTM(preprocess=0.0), ValueError, r"`preprocess` of .* is 0.0, outside \(0, 80\]"),
        (lambda: CoordinatewiseMLP(preprocess=100.0), ValueError, "`preprocess` of `CoordinatewiseMLP` is 100.0"),
        (lambda: CoordinatewiseMLP(hidden=2.5), ValueError, "`hidden` of `CoordinatewiseMLP` is 2.5"),  # type: ignore[arg-type]
        (lambda: CoordinatewiseMLP(decays=(0.5, 1.0)), ValueError, r"`decays` of .* holds 1.0, outside \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_explained(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# Learning to learn


@dataclass(frozen=True, kw_only=True, eq=False)
class Bowls(ht.ProblemSource):
    """Quadratic bowls `sum_i a_i (w_i - c_i)^2 / 2`, sixteen at an outer step, whose curvatures differ by up to 100.

    The outer loss is that of the bowl, summed over all inner steps unless `last_only`.
    """

    dynamics: ht.Dynamics
    num_tasks: int = 16
    last_only: bool = False

    def init_hparams(self) -> TensorDict:
        return self.dynamics.init_hparams()

    def at(self, outer_step: int) -> ht.BilevelProblem:
        generator = torch.Generator().manual_seed(10_000 + outer_step)
        curvature = 10.0 ** (2.0 * torch.rand(self.num_tasks, 6, generator=generator, dtype=F64) - 1.0)
        bowls = (curvature, torch.randn(self.num_tasks, 6, generator=generator, dtype=F64))
        return ht.BilevelProblem(
            BowlInner(bowls=bowls),
            LastBowl(bowls=bowls) if self.last_only else AllBowls(bowls=bowls),
            dynamics=self.dynamics,
            num_steps=10,
            num_tasks=self.num_tasks,
        )


def bowl(params: TensorDict, batch: Batch) -> Tensor:
    return (batch[0] * (params["w"] - batch[1]).square()).sum() / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class BowlInner(ht.InnerProblem):
    bowls: tuple[Tensor, Tensor]

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"w": torch.zeros(6, dtype=F64)}

    def batch(self, step: int) -> Batch:
        return self.bowls

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return bowl(params, batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class LastBowl(ht.OuterProblem):
    bowls: tuple[Tensor, Tensor]

    def init_hparams(self) -> TensorDict:
        return {}

    def batch(self, outer_step: int) -> Batch:
        return self.bowls

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return bowl(params, batch)


@dataclass(frozen=True, kw_only=True, eq=False)
class AllBowls(LastBowl):
    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return bowl(params, batch)


def loss_on_new_bowls(dynamics: ht.Dynamics, hparams: TensorDict) -> float:
    problem = Bowls(dynamics=dynamics, num_tasks=200, last_only=True).at(-1)
    idle = {"idle": torch.zeros((), dtype=F64)}
    return float(ht.unroll(problem, {**hparams, **idle}).outer_loss.mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_learnt_rule_beats_tuned_gradient_descent(seed: int) -> None:
    torch.manual_seed(seed)
    dynamics = LearnedUpdate(CoordinatewiseLSTM(hidden=8, layers=1).double(), scale=1.0)
    source = Bowls(dynamics=dynamics)
    untrained = loss_on_new_bowls(dynamics, source.init_hparams())
    loop = ht.OuterLoop(source, optimizer=partial(torch.optim.Adam, lr=0.01), backend=Reverse(), clip_norm=1.0)
    trained = loop.run(num_outer_steps=100)
    learnt = loss_on_new_bowls(dynamics, trained.hparams)
    # 0.2 is about the largest step size that is stable at a curvature of 10.
    tuned = min(loss_on_new_bowls(ht.dynamics.SGD(lr=lr), {}) for lr in (0.05, 0.1, 0.13, 0.15, 0.17, 0.19, 0.2))
    assert learnt < 1e-2 * untrained
    assert learnt < 0.3 * tuned
