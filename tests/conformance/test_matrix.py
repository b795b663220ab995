"""Every exact backend x every dynamics x every kind of hyperparameter: against each other and central differences.

One problem holds every kind at once: a learnt initialisation, example weights and L2 in the inner loss, a direct term
in the outer loss, and every float setting of the dynamics, as one value, per step, per parameter, or both. Minibatches
are drawn by step; noise, terms at inner steps, tasks and context have tests of their own below.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

import hypertorch as ht
from hypertorch.hypergradients.reverse_mode.compiled import not_compilable
from hypertorch.hypergradients.reverse_mode.compiled.looped_steps import UNLOOPED
from hypertorch.inner import memo
from hypertorch.types import TensorDict
from tests.helpers.leaves import first_values, leaves, rules
from tests.helpers.problems import net_problem, normal, task_problem

F64 = torch.float64
Hyper = ht.Hyper
dynamics = ht.dynamics
backends = ht.hypergradients

NUM_STEPS = 6
EXACT: dict[str, ht.Hypergradient] = {
    "whole graph": backends.Reverse(),
    "step-wise": backends.Reverse(checkpoint_every=1),
    "every 4": backends.Reverse(checkpoint_every=4),
    "sqrt": backends.Reverse(checkpoint_every="sqrt"),
    "budget": backends.Reverse(memory_budget="1GiB"),
    "revolve": backends.Reverse(snapshots=2),
    "full window": backends.Truncated(window=NUM_STEPS),
    "forward": backends.Forward(),
    "forward in chunks": backends.Forward(chunk_size=16),
    "forward by duals": backends.Forward(chunk_size=1),
}
# Six steps of which every state is kept are one program, with the loop inside, segments two, and single steps two.
COMPILED = {
    "whole": backends.Reverse(compile=True),
    "every 4": backends.Reverse(compile=True, checkpoint_every=4),
    "revolve": backends.Reverse(compile=True, snapshots=2),
}
# PyTorch's compiler cannot follow its own optimisers.
NOT_COMPILED = {
    (case, backend) for case in ("TorchOptim", "TorchOptim, Adadelta", "TorchOptim, ASGD") for backend in COMPILED
}
REVERSIBLE = {"reversible": backends.Reversible()}
# Not exact by design, each proven in the file named.
ESTIMATES: dict[type[ht.Hypergradient], str] = {
    backends.Implicit: "tests/hypergradients/test_implicit.py",
    backends.FirstOrder: "tests/hypergradients/test_first_order.py",
    backends.OneStep: "tests/hypergradients/test_one_step.py",
    backends.ForwardGradient: "tests/hypergradients/test_forward_gradient.py",
    backends.EvoGrad: "tests/hypergradients/test_evo_grad.py",
    backends.EvolutionStrategies: "tests/hypergradients/test_evolution_strategies.py",
}
# A new backend is held to be exact, unless it is named above.
_LISTED = {*map(type, [*EXACT.values(), *REVERSIBLE.values()]), *ESTIMATES}
EXACT |= {name: leaf() for name, leaf in leaves(backends, ht.Hypergradient).items() if leaf not in _LISTED}

OF_A_MATRIX = {"ns_a", "ns_b", "ns_c"}  # of Muon: numbers that act on a matrix as a whole


def scalars(**values: float) -> TensorDict:
    return {name: torch.tensor(value, dtype=F64) for name, value in values.items()}


def learnt(leaf: Callable[..., ht.Dynamics], **values: float) -> tuple[ht.Dynamics, TensorDict]:
    """Every setting as one outer variable."""
    return leaf(**{name: Hyper(name) for name in values}), scalars(**values)


def scheduled(leaf: Callable[..., ht.Dynamics], **values: float) -> tuple[ht.Dynamics, TensorDict]:
    """Every setting as a schedule."""
    wobble = 1.0 - 0.2 * normal(NUM_STEPS, seed=50).sigmoid()
    return leaf(**{name: Hyper(name, per="step") for name in values}), {
        name: value * wobble for name, value in values.items()
    }


def per_parameter(leaf: Callable[..., ht.Dynamics], **values: float) -> tuple[ht.Dynamics, TensorDict]:
    """Every setting with a value for each weight, the first one with a value for each weight and step."""
    shapes = {"first": (4, 6), "second": (6, 3)}
    settings, entries = {}, {}
    for position, (name, value) in enumerate(values.items()):
        settings[name] = Hyper(name, per="parameter" if position else "step,parameter")
        for parameter, shape in shapes.items():
            shape = (1, 1) if name in OF_A_MATRIX else shape
            full = shape if position else (NUM_STEPS, *shape)
            entries[f"{name}.{parameter}"] = value * (1.0 - 0.2 * normal(*full, seed=60 + position).sigmoid())
    return leaf(**settings), entries


FLOATS: dict[str, tuple[Callable[..., ht.Dynamics], dict[str, float]]] = {
    "SGD": (dynamics.SGD, {"lr": 0.3, "momentum": 0.6, "dampening": 0.2, "weight_decay": 0.03}),
    "Nesterov": (
        lambda **settings: dynamics.SGD(nesterov=True, **settings),
        {"lr": 0.3, "momentum": 0.6, "weight_decay": 0.03},
    ),
    "Adam": (dynamics.Adam, {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.03}),
    "AMSGrad": (
        lambda **settings: dynamics.Adam(amsgrad=True, **settings),
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.03},
    ),
    "AdamW": (dynamics.AdamW, {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1}),
    "RMSprop": (
        lambda **settings: dynamics.RMSprop(centered=True, **settings),
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-2, "momentum": 0.5, "weight_decay": 0.03},
    ),
    "Adagrad": (
        dynamics.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.03, "initial_accumulator_value": 0.1},
    ),
    "NAdam": (
        dynamics.NAdam,
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.03, "momentum_decay": 0.2},
    ),
    # Rectified in the last step.
    "RAdam": (dynamics.RAdam, {"lr": 0.05, "beta1": 0.8, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.03}),
    "Lion": (dynamics.Lion, {"lr": 0.02, "weight_decay": 0.3}),
    "Muon": (
        dynamics.Muon,
        {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.2, "ns_a": 3.0, "ns_b": -3.2, "ns_c": 1.2},
    ),
    "ReversibleMomentum": (dynamics.ReversibleMomentum, {"lr": 0.3, "momentum": 0.7}),
}
# A new rule that is made of declared settings alone is taken in with all of them.
FLOATS |= {name: (leaf, first_values(leaf)) for name, leaf in rules().items() if name not in FLOATS}
# Refused where they are to be learnt: their hypergradient is zero by nature.
NEVER_LEARNT = {"Lion": {"beta1", "beta2"}, "Muon": {"eps"}}
# Outer variables that act through the gradient alone, of which nothing depends smoothly.
WITHOUT_PATH = {"Lion": ("weights",)}
NOT_PER_STEP = {"initial_accumulator_value"}  # read once, when the buffers are made


def _composites() -> dict[str, tuple[ht.Dynamics, TensorDict]]:
    """Dynamics made of others, or with outer variables of their own."""
    rule = dynamics.LearnedUpdate(dynamics.CoordinatewiseLSTM(hidden=3).double())
    buffers = {
        f"buffers.momentum.{name}": 0.1 * normal(*shape, seed=70)
        for name, shape in {"first": (4, 6), "second": (6, 3)}.items()
    }
    return {
        "Groups": (
            dynamics.Groups(
                {
                    "first": dynamics.SGD(lr=Hyper("lr"), momentum=0.5),
                    "*": dynamics.Adam(lr=Hyper("adam_lr"), beta2=Hyper("beta2"), eps=1e-3),
                }
            ),
            scalars(lr=0.3, adam_lr=0.05, beta2=0.95),
        ),
        "parameter groups": (
            dynamics.SGD(lr={"first": Hyper("lr"), "*": 0.1}, momentum={"first": 0.3, "second": Hyper("momentum")}),
            scalars(lr=0.3, momentum=0.6),
        ),
        "LearnedBuffers": (
            dynamics.LearnedBuffers(dynamics.SGD(lr=Hyper("lr"), momentum=0.6)),
            {**scalars(lr=0.3), **buffers},
        ),
        "LearnedUpdate": (rule, {}),
        "TorchOptim": (dynamics.TorchOptim(torch.optim.Adamax, options={"lr": Hyper("lr")}), scalars(lr=0.05)),
        "TorchOptim, Adadelta": (
            dynamics.TorchOptim(
                torch.optim.Adadelta,
                options={name: Hyper(name) for name in ("lr", "rho", "eps", "weight_decay")},
            ),
            scalars(lr=0.5, rho=0.8, eps=1e-2, weight_decay=0.03),
        ),
        "TorchOptim, ASGD": (
            dynamics.TorchOptim(torch.optim.ASGD, options={"lr": 0.3, "weight_decay": Hyper("weight_decay")}),
            scalars(weight_decay=0.03),
        ),
        "Clipped, norm": (
            dynamics.Clipped(dynamics.SGD(lr=Hyper("lr"), momentum=0.6), max_norm=Hyper("max_norm", per="step")),
            {**scalars(lr=0.3), "max_norm": 0.2 * (1.0 - 0.2 * normal(NUM_STEPS, seed=71).sigmoid())},
        ),
        "Clipped, value": (
            dynamics.Clipped(dynamics.Adam(lr=Hyper("lr"), eps=1e-3), max_value=Hyper("max_value"), max_norm=0.2),
            scalars(lr=0.05, max_value=0.04),
        ),
    }


def _cases() -> dict[str, tuple[ht.Dynamics, TensorDict]]:
    cases: dict[str, tuple[ht.Dynamics, TensorDict]] = {}
    for name, (leaf, values) in FLOATS.items():
        steppable = {key: value for key, value in values.items() if key not in NOT_PER_STEP}
        cases[name] = learnt(leaf, **values)
        cases[f"{name}, schedules"] = scheduled(leaf, **steppable)
        cases[f"{name}, per parameter"] = per_parameter(leaf, **values)
    return {**cases, **_composites()}


CASES = _cases()
# Hundreds of tangents one by one take minutes, above all with rules that are much like Adam or take many products.
LONG_BY_DUALS = ("LearnedUpdate", "NAdam", "RAdam", "Muon")
SLOW = {(case, "forward by duals") for case in CASES if ", " in case or case.startswith(LONG_BY_DUALS)}
SLOW |= {(f"{leaf}, per parameter", "forward in chunks") for leaf in ("NAdam", "RAdam", "Muon")}
PAIRS = [
    pytest.param(case, backend, marks=pytest.mark.slow if (case, backend) in SLOW else ())
    for case in CASES
    for backend in [*EXACT, *(REVERSIBLE if case.startswith("ReversibleMomentum") else ())]
]


def problem_of(case: str) -> ht.BilevelProblem:
    rule, extra = CASES[case]
    without_path = WITHOUT_PATH.get(case.split(",", maxsplit=1)[0], ())
    return replace(net_problem(rule, extra, num_steps=NUM_STEPS), allow_unused=without_path)


@cache
def reference(case: str) -> tuple[TensorDict, TensorDict]:
    """The outer variables and the whole graph's hypergradient."""
    problem = problem_of(case)
    torch.manual_seed(0)
    hparams = problem.init_hparams()
    return hparams, ht.hypergradient(problem, hparams, backend=backends.Reverse()).grads


def assert_equal(actual: TensorDict, expected: TensorDict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = float((actual[name] - value).norm() / value.norm().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: relative error {error:.2g}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_exact_backends_agree(case: str, backend: str) -> None:
    hparams, expected = reference(case)
    chosen = {**EXACT, **REVERSIBLE}[backend]
    result = ht.hypergradient(problem_of(case), hparams, backend=chosen)
    assert_equal(result.grads, expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("case", CASES)
def test_compilation_changes_no_number(case: str, backend: str) -> None:
    hparams, expected = reference(case)
    for topic in (UNLOOPED, not_compilable.REFUSED, not_compilable.ATTEMPTS, not_compilable.WARNED):
        memo.clear(topic)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = ht.hypergradient(problem_of(case), hparams, backend=COMPILED[backend])
    assert_equal(result.grads, expected, 1e-10)
    # What runs without compilation after all shows nothing.
    is_compiled = (case, backend) not in NOT_COMPILED
    assert bool(said) is not is_compiled, [str(warning.message) for warning in said]
    if backend != "revolve":  # whose steps are called one by one
        assert bool(memo.entries(UNLOOPED)) is not is_compiled, memo.entries(UNLOOPED)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_central_differences(case: str) -> None:
    hparams, _ = reference(case)
    # A step of the size of Adam's `eps` would be too coarse; Lion jumps where a sign changes.
    step_size = 1e-7 if case.startswith("Lion") else 1e-5
    check = ht.check_hypergradient(problem_of(case), hparams, backends.Reverse(), num_directions=1, step_size=step_size)
    assert check.passed, str(check)
    assert {entry.name for entry in check.checks} == set(hparams)


NOISY = [
    pytest.param(case, backend, marks=pytest.mark.slow if case != "SGD" and backend == "forward by duals" else ())
    for case in ("SGD", "Adam", "ReversibleMomentum")
    for backend in EXACT
]
NOISY += [pytest.param("ReversibleMomentum", backend) for backend in REVERSIBLE]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("case", "backend"), NOISY)
@pytest.mark.parametrize("step_terms", [False, True])
def test_exact_backends_agree_with_dropout_and_terms_at_inner_steps(case: str, backend: str, step_terms: bool) -> None:
    rule, extra = CASES[case]
    problem = net_problem(rule, extra, num_steps=NUM_STEPS, dropout=0.4, step_terms=step_terms)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=backends.Reverse()).grads
    result = ht.hypergradient(problem, hparams, backend={**EXACT, **REVERSIBLE}[backend])
    assert_equal(result.grads, expected, 1e-10)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_exact_backends_agree_on_tasks(backend: str, route: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()
    problem = task_problem(module, item=(2,), num_steps=NUM_STEPS)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=backends.Reverse(), execution=ht.Execution(tasks="loop"))
    found = ht.hypergradient(problem, hparams, backend=EXACT[backend], execution=ht.Execution(tasks=route))
    assert_equal(found.grads, expected.grads, 1e-10)


@pytest.mark.parametrize("backend", EXACT)
def test_exact_backends_agree_on_a_context(backend: str) -> None:
    rule, extra = CASES["SGD"]
    plain = net_problem(rule, extra, num_steps=NUM_STEPS)

    def context(hparams: TensorDict, batch: object) -> TensorDict:
        """The example weights, computed once from those that are learnt."""
        return {"weights": hparams["raw"].square() + hparams["log_l2"], "label": torch.arange(3)}

    class Outer(type(plain.outer)):  # type: ignore[misc]
        def init_hparams(self) -> TensorDict:
            values = super().init_hparams()
            values["raw"] = values.pop("weights")
            return values

    problem = ht.BilevelProblem(plain.inner, Outer(extra), dynamics=rule, num_steps=NUM_STEPS, context=context)
    hparams = problem.init_hparams()
    expected = ht.hypergradient(problem, hparams, backend=backends.Reverse())
    check = ht.check_hypergradient(problem, hparams, backends.Reverse(), num_directions=1)
    assert check.passed, str(check)
    assert_equal(ht.hypergradient(problem, hparams, backend=EXACT[backend]).grads, expected.grads, 1e-10)


def test_every_backend_and_every_dynamics_is_in_the_matrix() -> None:
    exact = {type(backend) for backend in [*EXACT.values(), *REVERSIBLE.values()]}
    assert set(leaves(backends, ht.Hypergradient).values()) == exact | set(ESTIMATES)
    assert set(leaves(dynamics, ht.Dynamics).values()) == {type(rule) for rule, _ in CASES.values()}


def test_every_float_setting_is_in_the_matrix() -> None:
    for name, (leaf, values) in FLOATS.items():
        never = NEVER_LEARNT.get(name, set())
        assert set(leaf(**values).settings()) - never <= set(values) | {"nesterov", "dampening"}
        for setting in never:
            with pytest.raises(ValueError, match=f"`{setting}` of .*its hypergradient is exactly zero"):
                leaf(**{setting: Hyper("learnt")})
