"""Every dynamics against `torch.optim` on values and against central differences on every setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.dynamics.leaves import F64, LEARNT, OWN_TESTS, SGD, TORCH_OPTIM, Learnt, double_counters, in_torch
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

Reverse = ht.hypergradients.Reverse
ROOT = Path(__file__).resolve().parents[2]
NET_SHAPES = {"first": (4, 6), "second": (6, 3)}

CASES = [(leaf, settings) for leaf, (_, choices) in TORCH_OPTIM.items() for settings in choices]
each_learnt = pytest.mark.parametrize("learnt", LEARNT, ids=str)


def exported_leaves() -> set[type]:
    exported = {getattr(ht.dynamics, name) for name in ht.dynamics.__all__}
    return {
        item
        for item in exported
        if isinstance(item, type) and issubclass(item, ht.Dynamics) and not getattr(item, "__abstractmethods__", None)
    }


def test_every_leaf_is_listed() -> None:
    listed = {leaf.__name__ for leaf in TORCH_OPTIM} | set(OWN_TESTS)
    assert {leaf.__name__ for leaf in exported_leaves()} == listed
    assert {learnt.leaf for learnt in LEARNT} == set(TORCH_OPTIM)
    assert [file for file in OWN_TESTS.values() if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("leaf", TORCH_OPTIM)
def test_every_setting_is_learnt_somewhere(leaf: type[ht.Dynamics]) -> None:
    settings = set(leaf(lr=0.1).settings())  # type: ignore[call-arg]
    # What a leaf has fixed, such as the decoupled decay of AdamW, is none of its arguments.
    arguments = [field for field in fields(leaf) if field.init]  # type: ignore[arg-type]
    flags = {field.name for field in arguments if field.type == "bool"}
    assert settings | flags == {field.name for field in arguments}
    tried = [learnt for learnt in LEARNT if learnt.leaf is leaf]
    assert settings == {name for learnt in tried for name in learnt.values}
    assert flags == {name for learnt in tried for name in learnt.fixed}


def loss_of(params: TensorDict) -> Tensor:
    inputs = normal(8, 4, seed=1)
    hidden = torch.tanh(inputs @ params["first"])
    return (hidden @ params["second"]).square().mean() + params["second"].sum().sin()


START = {"first": normal(4, 5, seed=2), "second": normal(5, 2, seed=3), "unused": normal(3, seed=4)}


def trained_by_torch(
    optimizer: type[torch.optim.Optimizer],
    settings: dict,
    *,
    groups: Sequence[tuple[Sequence[str], dict]] = (),
    schedules: dict[str, Sequence[float]] | None = None,
    num_steps: int = 20,
) -> TensorDict:
    params = {name: value.clone().requires_grad_() for name, value in START.items()}
    parts = [{"params": [params[name] for name in names], **own} for names, own in groups]
    optim = optimizer(parts or list(params.values()), **settings)
    with double_counters():
        for step in range(num_steps):
            for group in optim.param_groups:
                group.update({name: values[step] for name, values in (schedules or {}).items()})
            optim.zero_grad()
            (loss_of(params) + 0.0 * params["unused"].sum()).backward()
            optim.step()
    return {name: value.detach() for name, value in params.items()}


def trained_by_us(dynamics: ht.Dynamics, num_steps: int = 20) -> TensorDict:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: START, lambda p, h, b: loss_of(p)),
        LambdaOuter({"idle": torch.zeros((), dtype=F64)}, lambda p, h, b: p["first"].sum()),
        dynamics=dynamics,
        num_steps=num_steps,
    )
    return ht.unroll(problem, problem.init_hparams()).params


def assert_same(ours: TensorDict, theirs: TensorDict) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("leaf", "settings"), CASES, ids=str)
def test_values_equal_torch_optim_over_20_steps(leaf: type[ht.Dynamics], settings: dict) -> None:
    settings = settings or ({"lr": 1e-3} if leaf is SGD else {})
    theirs = trained_by_torch(TORCH_OPTIM[leaf][0], in_torch(settings))
    assert_same(trained_by_us(leaf(**settings)), theirs)


@pytest.mark.parametrize("leaf", TORCH_OPTIM)
def test_mappings_are_torchs_parameter_groups(leaf: type[ht.Dynamics]) -> None:
    shared = TORCH_OPTIM[leaf][1][-1]
    groups = [(["second"], {"lr": 0.03, "weight_decay": 0.2}), (["first", "unused"], {"lr": 0.05, "weight_decay": 0.0})]
    theirs = trained_by_torch(TORCH_OPTIM[leaf][0], in_torch(shared), groups=groups)
    ours = leaf(**{**shared, "lr": {"sec*": 0.03, "*": 0.05}, "weight_decay": {"*s*d": 0.2, "unused": 0, "*": 0.0}})
    assert_same(trained_by_us(ours), theirs)


@pytest.mark.parametrize("leaf", TORCH_OPTIM)
def test_tensors_are_the_numbers_they_hold(leaf: type[ht.Dynamics]) -> None:
    settings = TORCH_OPTIM[leaf][1][-2]
    ours = {
        name: {"first": torch.full((5,), value, dtype=F64), "*": torch.tensor(value, dtype=F64)}
        for name, value in settings.items()
        if not isinstance(value, bool)
    }
    assert_same(trained_by_us(leaf(**{**settings, **ours})), trained_by_us(leaf(**settings)))


@pytest.mark.parametrize("leaf", TORCH_OPTIM)
def test_schedules_are_torchs_groups_changed_at_every_step(leaf: type[ht.Dynamics]) -> None:
    schedules = {"lr": [0.1, 0.03, 0.07, 0.02], "weight_decay": [0.0, 0.1, 0.3, 0.01]}
    theirs = trained_by_torch(TORCH_OPTIM[leaf][0], {"lr": 1.0}, schedules=schedules, num_steps=4)
    assert_same(trained_by_us(leaf(**schedules), num_steps=4), theirs)


@pytest.mark.sampled(2)
@each_learnt
@pytest.mark.parametrize("every", [None, 2])
def test_hypergradient_of_every_setting(learnt: Learnt, every: int | None) -> None:
    problem = net_problem(*learnt.rule())
    check = ht.check_hypergradient(
        problem,
        problem.init_hparams(),
        Reverse(checkpoint_every=every),
        step_size=learnt.step_size,
        num_directions=1,
        seed=0 if every is None else 1,
    )
    assert check.passed, str(check)


@each_learnt
def test_hypergradient_of_schedules_and_per_parameter_settings(learnt: Learnt) -> None:
    problem = net_problem(*learnt.detailed_rule(NET_SHAPES, 5), num_steps=5)
    check = ht.check_hypergradient(
        problem, problem.init_hparams(), Reverse(), step_size=learnt.step_size, num_directions=1
    )
    assert check.passed, str(check)


@each_learnt
def test_hypergradient_of_groups(learnt: Learnt) -> None:
    settings = {name: {"first": ht.Hyper(f"{name}_a"), "s*": ht.Hyper(f"{name}_b")} for name in learnt.values}
    extra = {
        f"{name}_{part}": torch.tensor(factor * value, dtype=F64)
        for name, value in learnt.values.items()
        for part, factor in (("a", 1.0), ("b", 0.8))
    }
    problem = net_problem(learnt.leaf(**settings, **learnt.fixed), extra, num_steps=4)
    check = ht.check_hypergradient(
        problem, problem.init_hparams(), Reverse(), step_size=learnt.step_size, num_directions=1
    )
    assert check.passed, str(check)
    assert {entry.name for entry in check.checks} == set(problem.init_hparams())


def test_a_float_schedule_equals_the_same_schedule_learnt() -> None:
    schedule = [0.3, 0.1, 0.2, 0.05]
    fixed = net_problem(SGD(lr=schedule), {}, num_steps=4)
    learnt = net_problem(SGD(lr=ht.Hyper("lr", per="step")), {"lr": torch.tensor(schedule, dtype=F64)}, num_steps=4)
    a = ht.hypergradient(fixed, fixed.init_hparams(), backend=Reverse())
    b = ht.hypergradient(learnt, learnt.init_hparams(), backend=Reverse())
    for name in a.grads:
        torch.testing.assert_close(a.grads[name], b.grads[name], rtol=1e-12, atol=1e-15)


@each_learnt
def test_vectorised_tasks_equal_a_loop_over_tasks(learnt: Learnt) -> None:
    module = nn.Linear(3, 2).double()
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    dynamics, extra = learnt.detailed_rule(shapes, 3)
    # As many tasks as the weights have rows: a setting that broadcast along the tasks would go unnoticed.
    problem = task_problem(module, item=(3,), num_tasks=2, num_steps=3, way=2)
    problem = dataclasses.replace(problem, dynamics=dynamics)
    hparams = {name: value for name, value in problem.init_hparams().items() if name != "lr"} | extra
    vectorised = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="vmap"))
    looped = ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks="loop"))
    for name in hparams:
        torch.testing.assert_close(vectorised.grads[name], looped.grads[name], rtol=1e-10, atol=1e-13)


def run_by_hand(dynamics: ht.GradientDynamics, params: TensorDict, hparams: TensorDict, num_steps: int = 3) -> Tensor:
    """Returns a figure of the params after steps along the gradient of a quartic, written out: no autograd inside."""
    state = dynamics.init(params, hparams)
    for index in range(num_steps):
        grads = {name: value**3 - 0.3 * (index + 1) for name, value in params.items()}
        params, state = dynamics.update(grads, params, state, hparams, index)
    return sum((value.sin().sum() for value in params.values()), torch.zeros((), dtype=F64))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own, in jvp
@each_learnt
def test_rules_can_be_transformed(learnt: Learnt) -> None:
    """By `torch.func`: forward mode, vectorised, twice; inputs stay as they were."""
    dynamics, hparams = learnt.rule()
    params = {"a": normal(3, seed=1), "b": normal(2, 2, seed=2)}
    before = {name: value.clone() for name, value in params.items()}

    def figure(p: TensorDict, h: TensorDict) -> Tensor:
        return run_by_hand(dynamics, p, h)  # type: ignore[arg-type]

    tangents = ({name: normal(*value.shape, seed=3) for name, value in params.items()}, {
        name: normal(1, seed=4 + position)[0] for position, name in enumerate(hparams)
    })  # fmt: skip
    _, forward = torch.func.jvp(figure, (params, hparams), tangents)
    gradients = torch.func.grad(figure, (0, 1))(params, hparams)
    pairs = [(gradient[name], own[name]) for gradient, own in zip(gradients, tangents, strict=True) for name in own]
    torch.testing.assert_close(forward, sum((g * t).sum() for g, t in pairs), rtol=1e-12, atol=1e-14)

    stacked = {name: torch.stack([value, 0.5 * value]) for name, value in params.items()}
    both = torch.func.vmap(figure, in_dims=(0, None))(stacked, hparams)
    alone = [figure({name: value[row] for name, value in stacked.items()}, hparams) for row in range(2)]
    torch.testing.assert_close(both, torch.stack(alone), rtol=1e-12, atol=1e-14)

    move = 1e-5
    ahead, behind = (
        torch.func.grad(figure, (0, 1))(
            *({name: value + sign * move * t[name] for name, value in own.items()} for own, t in zip(
                (params, hparams), tangents, strict=True
            ))
        )
        for sign in (1, -1)
    )  # fmt: skip
    _, second = torch.func.jvp(torch.func.grad(figure, (0, 1)), (params, hparams), tangents)
    for part in range(2):
        for name, value in second[part].items():
            expected = (ahead[part][name] - behind[part][name]) / (2 * move)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()) + 1e-7)
    assert all(torch.equal(before[name], params[name]) for name in params)


@each_learnt
def test_single_precision_stays_single(learnt: Learnt) -> None:
    """One learnt value in double precision does not promote what it multiplies."""
    dynamics, hparams = learnt.rule()
    params = {"a": normal(3, seed=1).float()}
    state = dynamics.init(params, hparams)
    new_params, new_state = dynamics.update(params, params, state, hparams, 0)  # type: ignore[attr-defined]
    assert {value.dtype for value in (*new_params.values(), *new_state.values())} == {torch.float32}
    assert new_state.keys() == state.keys()


@each_learnt
@pytest.mark.parametrize("tasks", [(), (3,)], ids=["one task", "tasks"])
def test_buffers_keep_their_shapes_and_their_tasks(learnt: Learnt, tasks: tuple[int, ...]) -> None:
    dynamics, hparams = learnt.detailed_rule({"a": (2, 4), "b": (5,)}, 3)
    params = {"a": normal(*tasks, 2, 4, seed=1), "b": normal(*tasks, 5, seed=2)}
    state = dynamics.init(params, hparams)
    shapes = {name: value.shape for name, value in state.items()}
    assert all(shape[: len(tasks)] == tasks for shape in shapes.values())
    for index in range(3):
        params, state = dynamics.update(params, params, state, hparams, index)  # type: ignore[attr-defined]
        assert {name: value.shape for name, value in state.items()} == shapes


class Careless(ht.GradientDynamics):
    """Gradient descent that returns its buffers in another order than it was given them, or under another name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        return {"a": torch.zeros(2, dtype=F64), "b": torch.ones(2, dtype=F64)}

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        new = {name: value - 0.1 * grads[name] * state["b"].mean() + state["a"].sum() for name, value in params.items()}
        return new, {self.name: 0.5 * state["b"] + hparams["c"], "a": 0.9 * state["a"] + 0.01 * hparams["c"]}


def careless_problem(name: str) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones(3, dtype=F64)}, lambda p, h, b: p["w"].square().sum()),
        LambdaOuter({"c": torch.tensor(0.3, dtype=F64)}, lambda p, h, b: p["w"].sin().sum()),
        dynamics=Careless(name),
        num_steps=4,
    )


@pytest.mark.parametrize(
    "backend",
    [Reverse(), Reverse(checkpoint_every=1), Reverse(checkpoint_every=2), ht.hypergradients.Forward()],
    ids=repr,
)
def test_buffers_may_come_back_in_another_order(backend: ht.Hypergradient) -> None:
    problem = careless_problem("b")
    check = ht.check_hypergradient(problem, problem.init_hparams(), backend)
    assert check.passed, str(check)


def test_buffers_may_not_change_their_names() -> None:
    problem = careless_problem("c")
    with pytest.raises(ValueError, match=r"`Careless.step` returned the entries \['a', 'c'\] for .*\['a', 'b'\]"):
        ht.unroll(problem, problem.init_hparams())
