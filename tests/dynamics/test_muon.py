"""Muon against PyTorch's own code in double precision, and against central differences in every setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hypertorch as ht
from hypertorch.types import Batch, TensorDict
from tests.dynamics.leaves import F64
from tests.helpers.problems import LambdaInner, LambdaOuter, net_problem, normal, task_problem

Muon, Hyper = ht.dynamics.Muon, ht.Hyper
backends = ht.hypergradients
Reverse = backends.Reverse
START = {"wide": normal(4, 6, seed=2), "tall": normal(6, 2, seed=3), "unused": normal(3, 3, seed=4)}


def loss_of(params: TensorDict) -> Tensor:
    return (torch.tanh(normal(8, 4, seed=1) @ params["wide"]) @ params["tall"]).square().mean()


def trained_by_us(rule: ht.Dynamics, num_steps: int = 20) -> TensorDict:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: START, lambda p, h, b: loss_of(p)),
        LambdaOuter({"idle": torch.zeros((), dtype=F64)}, lambda p, h, b: p["wide"].sum()),
        dynamics=rule,
        num_steps=num_steps,
    )
    return ht.unroll(problem, problem.init_hparams()).params


def trained_by_torch(
    settings: dict, *, groups: Sequence[tuple[Sequence[str], dict]] = (), schedule: Sequence[float] = ()
) -> TensorDict:
    params = {name: value.clone().requires_grad_() for name, value in START.items()}
    parts = [{"params": [params[name] for name in names], **own} for names, own in groups]
    optimizer = torch.optim.Muon(parts or list(params.values()), **settings)
    for step in range(len(schedule) or 20):
        for group in optimizer.param_groups:
            group["lr"] = schedule[step] if schedule else group["lr"]
        optimizer.zero_grad()
        (loss_of(params) + 0.0 * params["unused"].sum()).backward()
        optimizer.step()
    return {name: value.detach() for name, value in params.items()}


@pytest.fixture
def _in_double() -> object:
    """PyTorch's own code, but for its rounding to bfloat16."""
    with mock.patch.object(Tensor, "bfloat16", Tensor.clone):
        yield


def assert_same(ours: TensorDict, theirs: TensorDict) -> None:
    for name in START:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


SETTINGS: list[dict] = [
    {},
    {"lr": 0.05},
    {"lr": 0.05, "nesterov": False},
    {"lr": 0.05, "momentum": 0.0},
    {"lr": 0.05, "momentum": 0.6, "weight_decay": 0.5},
    {"lr": 0.05, "weight_decay": 0.0, "ns_steps": 3},
    {"lr": 0.05, "eps": 10.0},
    {"lr": 0.05, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": 0.05, "ns_a": 3.0, "ns_b": -3.2, "ns_c": 1.2},
]


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_values_equal_torch_optim_over_20_steps(settings: dict) -> None:
    theirs = {name: value for name, value in settings.items() if name not in ("ns_a", "ns_b", "ns_c")}
    if "ns_a" in settings:
        theirs["ns_coefficients"] = (settings["ns_a"], settings["ns_b"], settings["ns_c"])
    assert_same(trained_by_us(Muon(**settings)), trained_by_torch(theirs))


@pytest.mark.usefixtures("_in_double")
def test_mappings_and_schedules_are_torchs_groups() -> None:
    groups = [(["tall"], {"lr": 0.03, "weight_decay": 0.2}), (["wide", "unused"], {"lr": 0.05, "weight_decay": 0.0})]
    ours = Muon(lr={"tall": 0.03, "*": 0.05}, weight_decay={"tall": 0.2, "*": 0.0})
    assert_same(trained_by_us(ours), trained_by_torch({}, groups=groups))
    schedule = [0.1, 0.03, 0.07, 0.02]
    assert_same(trained_by_us(Muon(lr=schedule), 4), trained_by_torch({"lr": 1.0}, schedule=schedule))


@pytest.mark.parametrize("settings", [{"lr": 0.05}, {"lr": 0.05, "nesterov": False, "momentum": 0.6}], ids=str)
def test_all_else_that_differs_from_torch_is_its_rounding_to_bfloat16(settings: dict) -> None:
    ours = trained_by_us(Muon(**settings), 5)
    theirs = trained_by_torch(settings, schedule=[settings["lr"]] * 5)
    for name, start in START.items():
        assert float((ours[name] - theirs[name]).norm()) < 0.03 * float((ours[name] - start).norm())


@pytest.mark.parametrize("shape", [(4, 24), (24, 4)])
def test_the_smaller_of_the_two_gram_matrices_is_multiplied(shape: tuple[int, int]) -> None:
    """By hand: `X X'` and `P X` take `2 r r n` operations each, the square of the Gram matrix `2 r^3`."""
    rule, grads = Muon(lr=0.1, ns_steps=3), {"w": normal(*shape, seed=5)}
    state = rule.init(grads, {})
    with FlopCounterMode(display=False) as counted:
        rule.update(grads, grads, state, {}, 0)
    assert counted.get_total_flops() == 3 * (2 * 2 * 4 * 4 * 24 + 2 * 4**3)


def scalars(**values: float) -> TensorDict:
    return {name: torch.tensor(value, dtype=F64) for name, value in values.items()}


VALUES = {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.2, "ns_a": 3.0, "ns_b": -3.2, "ns_c": 1.2}


def per_step() -> tuple[ht.Dynamics, TensorDict]:
    entries = {name: value * (1.0 - 0.2 * normal(6, seed=5).sigmoid()) for name, value in VALUES.items()}
    return Muon(**{name: Hyper(name, per="step") for name in VALUES}), entries


def per_matrix() -> tuple[ht.Dynamics, TensorDict]:
    """A value for each weight where that has a meaning, else one for each matrix, and one of these at each step."""
    entries: TensorDict = {}
    settings: dict[str, Hyper] = {}
    for position, (name, value) in enumerate(VALUES.items()):
        stepwise = name in ("lr", "ns_b")
        settings[name] = Hyper(name, per="step,parameter" if stepwise else "parameter")
        for parameter, shape in {"first": (4, 6), "second": (6, 3)}.items():
            whole = (*((6,) if stepwise else ()), *((1, 1) if name.startswith("ns") else shape))
            entries[f"{name}.{parameter}"] = value * (1.0 - 0.2 * normal(*whole, seed=20 + position).sigmoid())
    return Muon(**settings), entries


LEARNT: dict[str, tuple[ht.Dynamics, TensorDict]] = {
    "every setting": (Muon(**{name: Hyper(name) for name in VALUES}), scalars(**VALUES)),
    "schedules": per_step(),
    "for each matrix": per_matrix(),
    "without nesterov": (
        Muon(lr=Hyper("lr"), momentum=Hyper("m"), nesterov=False, adjust_lr_fn="match_rms_adamw"),
        scalars(lr=0.1, m=0.6),
    ),
    "one coefficient": (Muon(lr=0.05, ns_b=Hyper("b"), weight_decay=Hyper("d")), scalars(b=-4.7, d=0.0)),
    "groups": (Muon(lr={"first": Hyper("a"), "*": Hyper("b")}, momentum=0.5), scalars(a=0.05, b=0.1)),
}


@pytest.mark.parametrize("case", LEARNT)
@pytest.mark.parametrize("backend", [Reverse(), Reverse(checkpoint_every=2)], ids=repr)
def test_hypergradients_equal_central_differences(case: str, backend: ht.Hypergradient) -> None:
    problem = net_problem(*LEARNT[case], num_steps=6)
    check = ht.check_hypergradient(problem, problem.init_hparams(), backend, step_size=1e-5, num_directions=1)
    assert check.passed, str(check)


class PartlyUsed(ht.InnerProblem):
    """A slope in matrices that a step uses: always, never, from the second step on."""

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return dict.fromkeys(("always", "never", "later"), hparams["start"])

    def batch(self, step: int) -> Tensor:
        return torch.tensor([1.0, 0.0, float(step > 0)], dtype=F64)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        assert isinstance(batch, Tensor)
        slopes = torch.stack([(value - hparams["target"]).cos().sum() for value in params.values()])
        return (batch * slopes).sum()


def partly_used(rule: ht.Dynamics, extra: TensorDict) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        PartlyUsed(),
        LambdaOuter(
            {"start": normal(2, 3, seed=1), "target": normal(2, 3, seed=2), **extra},
            lambda p, h, b: sum((value * normal(2, 3, seed=3)).sum() for value in p.values()),  # type: ignore[return-value]
        ),
        dynamics=rule,
        num_steps=4,
    )


@pytest.mark.parametrize(
    "backend", [Reverse(), Reverse(derivative="mixed"), backends.Forward(), backends.Forward(chunk_size=1)], ids=repr
)
def test_hypergradients_are_right_where_gradients_are_exactly_zero(backend: ht.Hypergradient) -> None:
    problem = partly_used(*LEARNT["every setting"])
    check = ht.check_hypergradient(problem, problem.init_hparams(), backend, step_size=1e-5)
    assert check.passed, str(check)
    still = partly_used(Muon(weight_decay=0.0), {})
    params = ht.unroll(still, still.init_hparams()).params
    assert torch.equal(params["never"], normal(2, 3, seed=1)) and not torch.equal(params["later"], params["never"])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own, in jvp
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["a gradient", "no gradient"])
def test_the_rule_can_be_transformed(scale: float) -> None:
    rule, settings = LEARNT["every setting"]
    params = {"a": normal(2, 3, seed=1), "b": normal(3, 2, seed=2)}

    def figure(params: TensorDict, settings: TensorDict) -> Tensor:
        state = rule.init(params, settings)
        for index in range(3):
            grads = {name: scale * value**3 for name, value in params.items()}
            params, state = rule.update(grads, params, state, settings, index)  # type: ignore[attr-defined]
        return sum((value.sin().sum() for value in params.values()), torch.zeros((), dtype=F64))

    gradient = torch.func.grad(figure, (0, 1))
    along = tuple({name: torch.ones_like(value) for name, value in own.items()} for own in (params, settings))
    _, forward = torch.func.jvp(figure, (params, settings), along)
    total = sum(value.sum() for part in gradient(params, settings) for value in part.values())
    torch.testing.assert_close(forward, total, rtol=1e-12, atol=1e-13)
    _, second = torch.func.jvp(gradient, (params, settings), along)
    ahead, behind = (
        gradient(*({name: value + move for name, value in own.items()} for own in (params, settings)))
        for move in (1e-6, -1e-6)
    )
    for part in range(2):
        for name, value in second[part].items():
            expected = (ahead[part][name] - behind[part][name]) / 2e-6
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()) + 1e-7)
    stacked = {name: torch.stack([value, 0.5 * value]) for name, value in params.items()}
    both = torch.func.vmap(figure, in_dims=(0, None))(stacked, settings)
    alone = [figure({name: value[row] for name, value in stacked.items()}, settings) for row in range(2)]
    torch.testing.assert_close(both, torch.stack(alone), rtol=1e-12, atol=1e-14)


class TwoMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def test_vectorised_tasks_equal_a_loop_over_tasks() -> None:
    problem = task_problem(TwoMatrices().double(), item=(3,), num_tasks=2, num_steps=3, way=2)
    problem = replace(problem, dynamics=Muon(lr=Hyper("lr"), ns_a={"head*": 3.0, "*": torch.full((1, 1), 3.2)}))
    hparams = problem.init_hparams()
    vectorised, looped = (
        ht.hypergradient(problem, hparams, backend=Reverse(), execution=ht.Execution(tasks=route)).grads
        for route in ("vmap", "loop")
    )
    for name in hparams:
        torch.testing.assert_close(vectorised[name], looped[name], rtol=1e-10, atol=1e-13)


def test_all_else_is_served_by_groups() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = task_problem(module, item=(3,), num_tasks=2, num_steps=3, way=2)
    rule = ht.dynamics.Groups({"*.weight": Muon(lr=Hyper("lr")), "*": ht.dynamics.AdamW(lr=0.05, eps=1e-3)})
    problem = replace(problem, dynamics=rule)
    check = ht.check_hypergradient(
        problem,
        problem.init_hparams(),
        Reverse(),
        step_size=1e-5,
        num_directions=1,
        execution=ht.Execution(tasks="vmap"),
    )
    assert check.passed, str(check)


def test_a_scale_of_the_loss_has_no_hypergradient() -> None:
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {"w": normal(2, 3, seed=1)}, lambda p, h, b: h["scale"] * p["w"].cos().sum()),
        LambdaOuter(scalars(scale=2.0), lambda p, h, b: p["w"].square().sum()),
        dynamics=Muon(lr=0.1),
        num_steps=3,
    )
    grads = ht.hypergradient(problem, problem.init_hparams(), backend=Reverse()).grads
    torch.testing.assert_close(grads["scale"], torch.zeros((), dtype=F64), rtol=0, atol=1e-12)


def one_param(shape: tuple[int, ...], rule: ht.Dynamics) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        LambdaInner(lambda h: {"w": torch.ones(shape, dtype=F64)}, lambda p, h, b: p["w"].square().sum()),
        LambdaOuter({"a": torch.ones(2, 3, dtype=F64)}, lambda p, h, b: p["w"].sum()),
        dynamics=rule,
        num_steps=2,
    )


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 3, 1, 1)])
def test_params_that_are_no_matrices_are_refused(shape: tuple[int, ...]) -> None:
    problem = one_param(shape, Muon())
    message = rf"`Muon` got the inner parameter `w` of shape \({', '.join(map(str, shape))},?\).*Groups\(\{{'\*.weight'"
    with pytest.raises(ValueError, match=message):
        ht.unroll(problem, problem.init_hparams())


@pytest.mark.parametrize("setting", [Hyper("a", torch.mean), torch.ones(2, 3, dtype=F64)], ids=["mean", "tensor"])
def test_a_coefficient_is_one_number_for_a_matrix(setting: object) -> None:
    if isinstance(setting, Tensor):
        problem = one_param((2, 3), Muon(ns_c=setting))
        with pytest.raises(ValueError, match=r"`ns_c` of `Muon` has shape \(2, 3\) for the inner parameter `w`.*one"):
            ht.unroll(problem, problem.init_hparams())
    else:
        problem = one_param((2, 3), Muon(ns_c=Hyper("a")))
        with pytest.raises(ValueError, match=r"`a` has shape \(2, 3\), but `ns_c` of `Muon` reads it as one value"):
            ht.unroll(problem, problem.init_hparams())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "`lr` of `Muon` is -0.1"),
        ({"momentum": 1.0}, "`momentum` of `Muon` is 1.0.*never learns"),
        ({"weight_decay": -0.1}, "`weight_decay` of `Muon` is -0.1"),
        ({"ns_b": float("nan")}, "`ns_b` of `Muon` is nan"),
        ({"eps": -1.0}, "`eps` of `Muon` is -1.0"),
        ({"eps": Hyper("eps")}, "`eps` of `Muon` is Hyper.*hypergradient is exactly zero: no step depends on it"),
        ({"ns_steps": 100}, "`ns_steps` of `Muon` is 100: .*from 0 to 99"),
        ({"ns_steps": 2.0}, "`ns_steps` of `Muon` is 2.0"),
        ({"adjust_lr_fn": "none"}, "`adjust_lr_fn` of `Muon` is 'none'.*Use 'original'"),
    ],
    ids=str,
)
def test_settings_that_have_no_meaning_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(**settings)


def test_natural_constraints() -> None:
    constraints = Muon(**{name: Hyper(name) for name in VALUES}).constraints()
    assert set(constraints) == {"lr", "momentum", "weight_decay"}
    assert float(constraints["momentum"].project(torch.tensor(1.2, dtype=F64))) == pytest.approx(1.0, abs=1e-5)
