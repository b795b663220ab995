"""PyTorch's own database of optimisers: every one with every configuration is served as PyTorch runs it, or refused.

Each configuration is tried by the dynamics of that name and by `TorchOptim`. What is served takes PyTorch's steps to
round-off, and its hypergradients equal central differences; what is not is refused by the name of the class or option.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, optim

import hypertorch as ht
from hypertorch.dynamics import TorchOptim
from hypertorch.dynamics.torch_optim_options import DIFFERENTIABILITY
from hypertorch.types import TensorDict
from tests.dynamics.leaves import F64, double_counters
from tests.helpers.problems import net_problem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what else PyTorch's helpers import
    from torch.testing._internal.common_optimizers import optim_db

Kwargs = dict[str, Any]
NUM_STEPS = 8  # RAdam divides by a root from the sixth on
KERNELS = ("foreach", "fused", "capturable", "differentiable")
OPTIMIZERS: dict[str, type[optim.Optimizer]] = {info.name: info.optim_cls for info in optim_db}
CASES: list[tuple[str, Kwargs]] = [
    (info.name, entry.kwargs) for info in optim_db for entry in info.optim_inputs_func(device="cpu")
]
# Numbers and names that PyTorch refuses. Tensors apart: one of two numbers is a step size for each of two weights here.
ERRORS: list[tuple[str, Kwargs]] = [
    (info.name, error.optimizer_error_input.kwargs)
    for info in optim_db
    for error in info.optim_error_inputs_func(device="cpu", dtype=F64)
    if error.optimizer_error_input.kwargs and "tensor" not in str(error.optimizer_error_input.kwargs)
]
# Classes that have no dynamics of their own, with what `TorchOptim` says of those that it does not take either.
NOT_OURS: dict[str, str | None] = {
    "Adadelta": None,
    "Adafactor": "`optimizer` is Adafactor, of which the library `higher` has no differentiable form",
    "Adamax": None,
    "ASGD": None,
    "LBFGS": "`optimizer` is LBFGS, of which",
    "Rprop": "`optimizer` is Rprop, which moves by the sign of the gradient alone",
    "SparseAdam": "`optimizer` is SparseAdam, of which",
}
# Classes that have one and that `TorchOptim` sends there.
ONLY_OURS = ("AdamW", "Muon", "NAdam", "RAdam")
WHAT_IT_IS_CALLED = {"betas": ("beta1", "beta2"), "ns_coefficients": ("ns_a", "ns_b", "ns_c")}


def named(optimizer: str, kwargs: Kwargs) -> Kwargs:
    """PyTorch's arguments under the names of our settings; the step size always, since ours may have no default."""
    settings = {"lr": inspect.signature(OPTIMIZERS[optimizer]).parameters["lr"].default}
    for name, value in kwargs.items():
        settings.update(
            zip(WHAT_IT_IS_CALLED.get(name, (name,)), value if isinstance(value, tuple) else (value,), strict=True)
        )
    return settings


def ours(optimizer: str, settings: Kwargs) -> ht.Dynamics:
    return getattr(ht.dynamics, optimizer)(**settings)


def by_torch_optim(optimizer: str, kwargs: Kwargs) -> ht.Dynamics:
    return TorchOptim(OPTIMIZERS[optimizer], options=kwargs)


def refusal(optimizer: str, kwargs: Kwargs) -> str | None:
    """What `TorchOptim` says of a configuration that it does not serve."""
    if optimizer in ONLY_OURS:
        return f"`optimizer` is {optimizer}, of which .* no differentiable form. Use `ht.dynamics.{optimizer}`"
    if NOT_OURS.get(optimizer) is not None:
        return NOT_OURS[optimizer]
    return rf"`maximize` of `TorchOptim\({optimizer}\)` is True, which .* ignores" if "maximize" in kwargs else None


def trained_by_torch(optimizer: str, kwargs: Kwargs) -> TensorDict:
    problem = net_problem(ht.dynamics.SGD(lr=0.1), {})
    hparams = problem.init_hparams()
    params = {name: value.clone().requires_grad_() for name, value in problem.inner.init_params(hparams).items()}
    # But for its rounding to bfloat16, Muon runs PyTorch's own code; the other counters are in the default dtype.
    with double_counters(), mock.patch.object(Tensor, "bfloat16", Tensor.clone):
        steps = OPTIMIZERS[optimizer](list(params.values()), **kwargs)
        for step in range(NUM_STEPS):
            steps.zero_grad()
            problem.inner.loss(params, hparams, problem.inner.batch(step)).backward()  # type: ignore[union-attr]
            steps.step()
    return {name: value.detach() for name, value in params.items()}


def last_params(rule: ht.Dynamics) -> TensorDict:
    problem = net_problem(rule, {}, num_steps=NUM_STEPS)
    return ht.unroll(problem, problem.init_hparams()).params


def assert_takes_the_steps_of_torch(rule: ht.Dynamics, optimizer: str, kwargs: Kwargs) -> None:
    expected, start = trained_by_torch(optimizer, kwargs), net_problem(rule, {}).init_hparams()
    for name, value in last_params(rule).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13)
        assert not torch.equal(value, start[f"init.{name}"])


def assert_hypergradients_are_differences(make: Any, values: dict[str, float]) -> None:
    """Of the outer loss in every one of the values, which `make` makes a rule of."""
    entries = {name: torch.tensor(value, dtype=F64) for name, value in values.items()}
    problem = net_problem(make({name: ht.Hyper(name) for name in values}), entries, num_steps=NUM_STEPS)
    hparams = problem.init_hparams()
    grads = ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse()).grads
    for name, value in values.items():
        move = 2e-5 * max(abs(value), 0.05)
        ahead, behind = (
            problem.outer.loss(ht.unroll(problem, {**hparams, name: hparams[name] + sign * move}).params, hparams, None)
            for sign in (1.0, -1.0)
        )
        torch.testing.assert_close(grads[name], (ahead - behind) / (2.0 * move), rtol=1e-5, atol=1e-12)


def learnt(settings: Kwargs) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in settings.items()
        if isinstance(value, (float, Tensor)) and not isinstance(value, bool)
    }


def test_the_database_is_what_it_was() -> None:
    """A class that a later PyTorch adds is to be served or to be refused."""
    assert {name for name in OPTIMIZERS if not hasattr(ht.dynamics, name)} == set(NOT_OURS)
    assert {name for name in OPTIMIZERS if refusal(name, {}) is None} == {kind.__name__ for kind in DIFFERENTIABILITY}
    assert len(CASES) >= 89 and len(ERRORS) >= 16


@pytest.mark.parametrize(("optimizer", "kwargs"), [case for case in CASES if case[0] not in NOT_OURS], ids=str)
def test_our_own(optimizer: str, kwargs: Kwargs) -> None:
    settings = named(optimizer, kwargs)
    assert_takes_the_steps_of_torch(ours(optimizer, settings), optimizer, kwargs)
    values = learnt(settings)
    assert_hypergradients_are_differences(lambda hypers: ours(optimizer, {**settings, **hypers}), values)


@pytest.mark.parametrize(("optimizer", "kwargs"), CASES, ids=str)
def test_through_higher(optimizer: str, kwargs: Kwargs) -> None:
    message = refusal(optimizer, kwargs)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            by_torch_optim(optimizer, kwargs)
        return
    assert_takes_the_steps_of_torch(by_torch_optim(optimizer, kwargs), optimizer, kwargs)
    exact = DIFFERENTIABILITY[OPTIMIZERS[optimizer]].exact
    values = {name: value for name, value in learnt(named(optimizer, kwargs)).items() if name in exact}
    assert_hypergradients_are_differences(lambda hypers: by_torch_optim(optimizer, {**kwargs, **hypers}), values)
    assert values or optimizer == "ASGD"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_choice_of_kernel_is_refused(optimizer: str, kernel: str) -> None:
    if optimizer not in NOT_OURS:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{kernel}'"):
            ours(optimizer, {"lr": 0.1, kernel: True})
    with pytest.raises(ValueError, match=refusal(optimizer, {}) or f"`{kernel}` of .*no effect|{kernel!r}, which the"):
        by_torch_optim(optimizer, {kernel: True})


@pytest.mark.parametrize(("optimizer", "kwargs"), ERRORS, ids=str)
def test_what_torch_refuses_is_refused(optimizer: str, kwargs: Kwargs) -> None:
    if optimizer not in NOT_OURS:
        wrong = next(name for name in WHAT_IT_IS_CALLED.get(list(kwargs)[-1], (list(kwargs)[-1],)))
        with pytest.raises(ValueError, match=f"`{wrong}` of `{optimizer}` is"):
            ours(optimizer, named(optimizer, kwargs))
    with pytest.raises(ValueError, match=refusal(optimizer, {}) or "which PyTorch refuses"):
        by_torch_optim(optimizer, kwargs)
