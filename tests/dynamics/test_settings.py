"""Kinds of settings: how each is read, and what is refused, when it is made and when a run starts."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import nn

import hypertorch as ht
from hypertorch.constraints import Box, Positive
from hypertorch.dynamics.declared import intersections
from hypertorch.dynamics.settings import is_active, is_schedule, resolve
from hypertorch.types import TensorDict
from tests.helpers.problems import net_problem, normal, task_problem

F64 = torch.float64
Hyper = ht.Hyper
SGD, Adam, AdamW = ht.dynamics.SGD, ht.dynamics.Adam, ht.dynamics.AdamW
RMSprop, Adagrad = ht.dynamics.RMSprop, ht.dynamics.Adagrad
NAdam, RAdam, Lion = ht.dynamics.NAdam, ht.dynamics.RAdam, ht.dynamics.Lion
Reverse = ht.hypergradients.Reverse


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


def test_every_kind_is_resolved() -> None:
    hparams = {"a": scalar(2.0), "b": normal(4, seed=1), "c.w": normal(3, seed=2), "d.w": normal(4, 3, seed=3)}
    tensor = normal(3, seed=4)

    def value(setting: object, index: int = 2) -> object:
        return resolve(setting, hparams, "w", index)  # type: ignore[arg-type]

    assert value(0.5) == 0.5 and isinstance(value(0.5), float)
    assert value(1) == 1
    assert value([1.0, 2.0, 3.0]) == 3.0
    assert value(tensor) is tensor
    assert value(Hyper("a")) is hparams["a"]
    assert torch.equal(value(Hyper("a", torch.exp)), hparams["a"].exp())
    assert torch.equal(value(Hyper("b", per="step")), hparams["b"][2])
    assert value(Hyper("c", per="parameter")) is hparams["c.w"]
    assert torch.equal(value(Hyper("d", per="step,parameter")), hparams["d.w"][2])
    assert value({"v": 0.1, "*": Hyper("a")}) is hparams["a"]
    assert value({"*": 0.1, "w": [0.2, 0.3, 0.4]}) == 0.4
    with pytest.raises(KeyError, match="no entry of .* matches the inner parameter `w`"):
        value({"v": 0.1})


@pytest.mark.parametrize(
    ("setting", "active", "schedule"),
    [
        (0.0, False, False),
        (0, False, False),
        (0.1, True, False),
        ([0.0, 0.0], False, True),
        ((0.0, 0.1), True, True),
        (torch.tensor(0.1), True, False),
        (Hyper("a"), True, False),
        (Hyper("a", per="parameter"), True, False),
        (Hyper("a", per="step"), True, True),
        (Hyper("a", per="step,parameter"), True, True),
        ({"w": 0.0, "*": 0.0}, False, False),
        ({"w": 0.0, "*": 0.1}, True, False),
        ({"w": 0.0, "*": [0.0, 0.0]}, False, True),
        ({"w": 0.0, "*": Hyper("a", per="step")}, True, True),
    ],
)
def test_activity_and_schedules_are_seen_in_groups_too(setting: object, active: bool, schedule: bool) -> None:
    assert is_active(setting) is active  # type: ignore[arg-type]
    assert is_schedule(setting) is schedule  # type: ignore[arg-type]


RANGES = [
    (SGD, {"lr": -0.1}, r"`lr` of `SGD` is -0.1, outside \[0.0, inf\]"),
    (SGD, {"lr": float("nan")}, "`lr` of `SGD` is nan"),
    (SGD, {"lr": [0.1, -0.1]}, "`lr` of `SGD` is -0.1"),
    (SGD, {"lr": torch.tensor([0.5, -0.5, 0.1])}, "`lr` of `SGD` is -0.5"),
    (SGD, {"lr": torch.tensor(float("nan"))}, "`lr` of `SGD` is nan"),
    (SGD, {"lr": {"a": 0.1, "b*": -0.2}}, r"`lr\['b\*'\]` of `SGD` is -0.2"),
    (SGD, {"lr": {"a": [0.1, -0.3]}}, r"`lr\['a'\]` of `SGD` is -0.3"),
    (SGD, {"lr": {"a": torch.tensor(-1.0)}}, r"`lr\['a'\]` of `SGD` is -1.0"),
    (SGD, {"lr": {}}, "`lr` of `SGD` is an empty mapping.*or pass one number"),
    (SGD, {"lr": torch.tensor(0.1, requires_grad=True)}, "`lr` of `SGD` is a tensor that requires grad.*ht.Hyper"),
    (SGD, {"lr": nn.Parameter(torch.tensor(0.1))}, "`lr` of `SGD` is a tensor that requires grad"),
    (SGD, {"lr": 0.1, "momentum": 1.5}, r"`momentum` of `SGD` is 1.5, outside \[0.0, 1.0\]"),
    (SGD, {"lr": 0.1, "dampening": -1.0}, "`dampening` of `SGD` is -1.0"),
    (SGD, {"lr": 0.1, "weight_decay": -1.0}, "`weight_decay` of `SGD` is -1.0"),
    (SGD, {"lr": 0.1, "nesterov": True}, "`nesterov` is True with momentum 0.0"),
    (SGD, {"lr": 0.1, "nesterov": True, "momentum": {"*": 0.0}}, "`nesterov` is True with momentum"),
    (SGD, {"lr": 0.1, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, "undamped"),
    (Adam, {"lr": -0.1}, "`lr` of `Adam` is -0.1"),
    (AdamW, {"lr": -0.1}, "`lr` of `AdamW` is -0.1"),
    (Adam, {"beta1": 1.0}, r"`beta1` of `Adam` is 1.0, outside \[0.0, 0.99.*never learns"),
    (Adam, {"beta2": -0.1}, "`beta2` of `Adam` is -0.1"),
    (Adam, {"beta2": [0.9, 1.0]}, "`beta2` of `Adam` is 1.0"),
    (Adam, {"eps": -1e-8}, "`eps` of `Adam` is -1e-08"),
    (Adam, {"weight_decay": -0.1}, "`weight_decay` of `Adam` is -0.1"),
    (NAdam, {"lr": -0.1}, "`lr` of `NAdam` is -0.1"),
    (NAdam, {"beta1": 1.0}, "`beta1` of `NAdam` is 1.0"),
    (NAdam, {"beta2": 1.0}, "`beta2` of `NAdam` is 1.0"),
    (NAdam, {"eps": -0.1}, "`eps` of `NAdam` is -0.1"),
    (NAdam, {"weight_decay": -0.1}, "`weight_decay` of `NAdam` is -0.1"),
    (NAdam, {"momentum_decay": -0.1}, "`momentum_decay` of `NAdam` is -0.1"),
    (RAdam, {"lr": -0.1}, "`lr` of `RAdam` is -0.1"),
    (RAdam, {"beta1": 1.0}, "`beta1` of `RAdam` is 1.0"),
    (RAdam, {"beta2": 1.0}, "`beta2` of `RAdam` is 1.0"),
    (RAdam, {"eps": -0.1}, "`eps` of `RAdam` is -0.1"),
    (RAdam, {"weight_decay": -0.1}, "`weight_decay` of `RAdam` is -0.1"),
    (Lion, {"lr": -0.1}, "`lr` of `Lion` is -0.1"),
    (Lion, {"beta1": 1.1}, "`beta1` of `Lion` is 1.1"),
    (Lion, {"beta2": -0.1}, "`beta2` of `Lion` is -0.1"),
    (Lion, {"weight_decay": -0.1}, "`weight_decay` of `Lion` is -0.1"),
    (RMSprop, {"lr": -0.1}, "`lr` of `RMSprop` is -0.1"),
    (RMSprop, {"alpha": 1.1}, "`alpha` of `RMSprop` is 1.1"),
    (RMSprop, {"eps": -1.0}, "`eps` of `RMSprop` is -1.0"),
    (RMSprop, {"momentum": -0.1}, "`momentum` of `RMSprop` is -0.1"),
    (RMSprop, {"weight_decay": -0.1}, "`weight_decay` of `RMSprop` is -0.1"),
    (Adagrad, {"lr": -0.1}, "`lr` of `Adagrad` is -0.1"),
    (Adagrad, {"lr_decay": -0.1}, "`lr_decay` of `Adagrad` is -0.1"),
    (Adagrad, {"weight_decay": -0.1}, "`weight_decay` of `Adagrad` is -0.1"),
    (Adagrad, {"initial_accumulator_value": -0.1}, "`initial_accumulator_value` of `Adagrad` is -0.1"),
    (Adagrad, {"eps": -0.1}, "`eps` of `Adagrad` is -0.1"),
    (Adagrad, {"initial_accumulator_value": [0.1, 0.2]}, "is .*a schedule over steps: it is read once.*Give one"),
    (Adagrad, {"initial_accumulator_value": {"*": Hyper("a", per="step")}}, "a schedule over steps"),
]
KINDS = [
    (SGD, {"lr": "0.1"}, "`lr` of `SGD` is '0.1', which is neither a number"),
    (SGD, {"lr": None}, "`lr` of `SGD` is None, which is neither"),
    (SGD, {"lr": torch.tensor([1, 2])}, "`lr` of `SGD` is a tensor of dtype torch.int64.*Convert it"),
    (SGD, {"lr": {"a": "0.1"}}, r"`lr\['a'\]` of `SGD` is '0.1', which is neither"),
    (SGD, {"lr": {"a": {"b": 0.1}}}, r"`lr\['a'\]` of `SGD` is \{'b': 0.1\}, which is neither"),
]


@pytest.mark.parametrize(("leaf", "settings", "message"), RANGES, ids=str)
def test_numbers_out_of_range_are_explained(leaf: type[ht.Dynamics], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leaf(**settings)


@pytest.mark.parametrize(("leaf", "settings", "message"), KINDS, ids=str)
def test_settings_of_no_known_kind_are_explained(leaf: type[ht.Dynamics], settings: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        leaf(**settings)


def test_an_unknown_kind_of_hyper_is_explained() -> None:
    with pytest.raises(ValueError, match=r"`per` of `Hyper\('lr'\)` is 'layer'.*Use 'one'"):
        ht.Hyper("lr", per="layer")  # type: ignore[arg-type]


# The net has the parameters `first` of shape (4, 6) and `second` of shape (6, 3), and takes 3 steps.
MISFITS: list[tuple[ht.Dynamics, TensorDict, str]] = [
    (SGD(lr=Hyper("lr")), {}, "`lr` of `SGD` reads the outer variable `lr`, which is not among"),
    (SGD(lr=[0.1, 0.2]), {}, "`lr` of `SGD` is a schedule of 2 values, but .*`num_steps` = 3"),
    (SGD(lr={"first": [0.1, 0.2], "*": 0.1}), {}, r"`lr\['first'\]` of `SGD` is a schedule of 2 values"),
    (SGD(lr=Hyper("lr")), {"lr": normal(3, seed=0)}, r"`lr` has shape \(3,\).*one value. Pass `per='step'`"),
    (
        SGD(lr=Hyper("lr", per="step")),
        {"lr": normal(2, seed=0)},
        r"`lr` has shape \(2,\).*schedule over `num_steps` = 3",
    ),
    (
        SGD(lr=Hyper("lr", per="step")),
        {"lr": normal(3, 4, seed=0)},
        r"`lr` has shape \(3, 4\).*one value per step. Pass",
    ),
    (
        SGD(lr=Hyper("lr", per="parameter")),
        {"lr.first": scalar(0.1)},
        "`lr` of `SGD` reads the outer variable `lr.second`, which is not among",
    ),
    (
        SGD(lr=Hyper("lr", per="parameter")),
        {"lr.first": normal(4, seed=0), "lr.second": scalar(0.1)},
        r"`lr.first`, read by `lr` of `SGD`, has shape \(4,\), .*against the inner parameter `first` of shape \(4, 6\)",
    ),
    (
        SGD(lr=Hyper("lr", per="parameter")),
        {"lr.first": normal(1, 4, 6, seed=0), "lr.second": scalar(0.1)},
        r"`lr.first`, read by `lr` of `SGD`, has shape \(1, 4, 6\)",
    ),
    (
        SGD(lr=Hyper("lr", per="step,parameter")),
        {"lr.first": normal(3, 4, 5, seed=0), "lr.second": normal(3, seed=0)},
        r"`lr.first`, read by `lr` of `SGD`, has shape \(4, 5\)",
    ),
    (SGD(lr={"first": 0.1}), {}, r"`lr` of `SGD` has the entries \['first'\], none of which matches .*`second`"),
    (SGD(lr={"third": 0.1, "*": 0.1}), {}, "`lr` of `SGD` has the entry 'third', which matches none"),
    (SGD(lr={"*": 0.1, "f*": 0.1}), {}, r"`lr` of `SGD` has the entry 'f\*', but every inner parameter"),
    (
        SGD(lr={"first": Hyper("lr", per="parameter"), "*": 0.1}),
        {"lr.second": scalar(0.1)},
        r"`lr\['first'\]` of `SGD` reads the outer variable `lr.first`, which is not among",
    ),
    (SGD(lr=torch.ones(6, dtype=F64)), {}, r"`lr` of `SGD` has shape \(6,\), .*`second` of shape \(6, 3\)"),
    (
        SGD(lr={"first": torch.ones(4, 1, 1, dtype=F64), "*": 0.1}),
        {},
        r"`lr\['first'\]` of `SGD` has shape \(4, 1, 1\), which does not broadcast",
    ),
    (Adam(eps=torch.ones(5, dtype=F64)), {}, r"`eps` of `Adam` has shape \(5,\)"),
]


@pytest.mark.parametrize(("dynamics", "extra", "message"), MISFITS, ids=[message for *_, message in MISFITS])
def test_settings_that_do_not_fit_the_problem_are_explained(
    dynamics: ht.Dynamics, extra: TensorDict, message: str
) -> None:
    problem = net_problem(dynamics, extra, num_steps=3)
    with pytest.raises(ValueError, match=message):
        ht.hypergradient(problem, problem.init_hparams(), backend=Reverse())
    with pytest.raises(ValueError, match=message):
        ht.unroll(problem, problem.init_hparams())


def test_settings_that_would_change_the_dtype_are_explained() -> None:
    params = {"w": torch.zeros(3)}
    SGD(lr=torch.tensor(0.1, dtype=F64)).check(params, {}, 3)
    SGD(lr=Hyper("lr", torch.Tensor.float, per="parameter")).check(params, {"lr.w": normal(3, seed=0)}, 3)
    with pytest.raises(ValueError, match=r"`lr` of `SGD` .* dtype torch.float64, but .*`w` has torch.float32.*Convert"):
        SGD(lr=torch.full((3,), 0.1, dtype=F64)).check(params, {}, 3)
    with pytest.raises(ValueError, match="`lr` of `SGD` is read from a tensor of dtype torch.float64"):
        SGD(lr=Hyper("lr", per="parameter")).check(params, {"lr.w": normal(3, seed=0)}, 3)


@pytest.mark.parametrize(
    "lr",
    [
        torch.full((4, 6), 0.1, dtype=F64),
        torch.full((6,), 0.1, dtype=F64),
        torch.full((4, 1), 0.1, dtype=F64),
        torch.full((1, 1), 0.1, dtype=F64),
        torch.full((1,), 0.1, dtype=F64),
    ],
)
def test_tensors_broadcast_against_a_parameter(lr: torch.Tensor) -> None:
    problem = net_problem(SGD(lr={"first": lr, "*": 0.1}), {}, num_steps=3)
    same = net_problem(SGD(lr=0.1), {}, num_steps=3)
    actual = ht.unroll(problem, problem.init_hparams()).params
    for name, value in ht.unroll(same, same.init_hparams()).params.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_shapes_are_those_of_one_task(num_tasks: int) -> None:
    """The weight of each task has shape (2, 3); a setting is shared by all tasks, however many there are."""

    def run(lr: torch.Tensor, route: str) -> TensorDict:
        torch.manual_seed(0)
        module = nn.Linear(3, 2).double()
        problem = task_problem(module, item=(3,), num_tasks=num_tasks, way=2)
        problem = dataclasses.replace(problem, dynamics=SGD(lr={"weight": lr, "bias": 0.1}), allow_unused=("lr",))
        return ht.unroll(problem, problem.init_hparams(), execution=ht.Execution(tasks=route)).params

    fitting = normal(2, 3, seed=0).abs()
    vectorised, looped = run(fitting, "vmap"), run(fitting, "loop")
    for name in looped:
        torch.testing.assert_close(vectorised[name], looped[name], rtol=1e-12, atol=1e-14)
    for shape in [(num_tasks, 2, 3), (num_tasks, 1, 1), (2,)]:
        for route in ("vmap", "loop"):
            with pytest.raises(ValueError, match=r"`lr\['weight'\]` of `SGD` has shape .* does not broadcast"):
                run(torch.ones(shape, dtype=F64), route)


def test_warm_starts_refuse_schedules_in_groups_too() -> None:
    with pytest.raises(ValueError, match="`lr` of the dynamics is a schedule over the horizon"):
        dataclasses.replace(net_problem(SGD(lr={"first": [0.1], "*": 0.1}), {}, num_steps=1), warm_start=True)
    with pytest.raises(ValueError, match="`momentum` of the dynamics is a schedule over the horizon"):
        dataclasses.replace(
            net_problem(SGD(lr=0.1, momentum={"*": Hyper("m", per="step")}), {}, num_steps=1), warm_start=True
        )


def test_a_problem_without_steps_reads_no_setting() -> None:
    SGD(lr={"head.*": 0.1}).check({}, {}, 0)


def test_natural_constraints_cover_settings_learnt_directly() -> None:
    dynamics = SGD(
        lr=Hyper("lr", per="parameter"),
        momentum={"first": Hyper("m"), "*": Hyper("n")},
        weight_decay={"first": Hyper("d", transform=torch.exp), "*": 0.1},
    )
    constraints = dynamics.constraints()
    assert set(constraints) == {"lr.*", "m", "n"}
    assert constraints["m"].project(torch.tensor(1.3)) < 1.0
    assert constraints["lr.*"].project(torch.tensor(-1.0)) > 0.0


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (SGD, {"lr": (0, 1.3), "momentum": (0, 1), "dampening": (0, 1), "weight_decay": (0, 1.3)}),
        (Adam, {"lr": (0, 1.3), "beta1": (0, 1), "beta2": (0, 1), "eps": (0, 1.3), "weight_decay": (0, 1.3)}),
        (AdamW, {"lr": (0, 1.3), "beta1": (0, 1), "beta2": (0, 1), "eps": (0, 1.3), "weight_decay": (0, 1.3)}),
        (RMSprop, {"lr": (0, 1.3), "alpha": (0, 1), "eps": (0, 1.3), "weight_decay": (0, 1.3), "momentum": (0, 1)}),
        (
            NAdam,
            {
                **dict.fromkeys(("lr", "eps", "weight_decay", "momentum_decay"), (0, 1.3)),
                "beta1": (0, 1),
                "beta2": (0, 1),
            },
        ),
        (RAdam, {"lr": (0, 1.3), "beta1": (0, 1), "beta2": (0, 1), "eps": (0, 1.3), "weight_decay": (0, 1.3)}),
        (
            Adagrad,
            dict.fromkeys(("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"), (0, 1.3)),
        ),
    ],
)
def test_natural_constraints_of_every_setting(leaf: type[ht.Dynamics], expected: dict) -> None:
    rule = leaf(**{name: Hyper(name) for name in expected})
    constraints = rule.constraints()
    assert set(constraints) == set(rule.settings()) == set(expected)
    for name, (lower, upper) in expected.items():
        least, most = constraints[name].project(torch.tensor([-0.3, 1.3], dtype=F64)).tolist()
        assert least == pytest.approx(lower, abs=1e-9)
        assert most == pytest.approx(upper, abs=1e-5)
        # What the constraint lets through is a setting that the rule accepts.
        leaf(**{"lr": 0.1, name: most})


def test_a_variable_that_serves_two_settings_is_kept_in_both_ranges() -> None:
    both = Hyper("beta")
    constraint = SGD(lr=0.1, momentum=both, dampening=both).constraints()["beta"]
    assert constraint == Box(lower=0.0, upper=1.0 - 1e-6)
    constraint = SGD(lr=both, momentum=both).constraints()["beta"]
    assert constraint == Box(lower=Positive().minimum, upper=1.0 - 1e-6)


@pytest.mark.parametrize("second", [Box(lower=2.0), ht.Simplex()])
def test_constraints_with_nothing_in_common_are_explained(second: ht.Constraint) -> None:
    with pytest.raises(ValueError, match="the outer variable `a` has two constraints, Box.*Let two settings"):
        intersections([{"a": Box(upper=1.0)}, {"a": second}])
    assert intersections([{"a": second}, {"a": second}]) == {"a": second}


def test_rules_with_tensors_and_groups_can_be_hashed_compared_and_pickled() -> None:
    rule = SGD(lr={"first": torch.ones(4, 6), "*": Hyper("lr")}, momentum=torch.tensor(0.5))
    assert rule == rule
    assert len({rule, SGD(lr=0.1)}) == 2
    again = pickle.loads(pickle.dumps(rule))
    assert torch.equal(again.lr["first"], rule.lr["first"]) and again.lr["*"] == Hyper("lr")  # type: ignore[index]
    assert "Hyper(name='lr'" in repr(rule)
