"""Modules as functions: buffers, frozen, shared and parametrised weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import hypertorch as ht
from hypertorch.errors import IncompatibleBackendError
from tests.helpers.problems import LambdaInner, LambdaOuter, normal


def test_returns_new_buffers_and_leaves_all_inputs_alone() -> None:
    module = nn.BatchNorm1d(3).double()
    net = ht.FunctionalModule(module)
    params = net.init_params()
    before = {name: value.clone() for name, value in params.items()}
    _, buffers = net.with_buffers(params, normal(5, 3, seed=0))
    assert set(buffers) == set(net.buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    assert not torch.equal(buffers["running_mean"], before["running_mean"])
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert torch.equal(module.running_mean, before["running_mean"])


def test_frozen_parameters_stay_in_the_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    net = ht.FunctionalModule(module)
    assert set(net.init_params()) == {"1.weight", "1.bias"}
    assert net(net.init_params(), torch.ones(1, 2)).shape == (1, 1)


def test_shared_parameters_have_one_entry() -> None:
    layer = nn.Linear(3, 3, bias=False)
    net = ht.FunctionalModule(nn.Sequential(layer, nn.Tanh(), layer))
    params = net.init_params()
    assert list(params) == ["0.weight"]
    doubled = {"0.weight": torch.eye(3) * 2.0}
    expected = 2.0 * torch.tanh(2.0 * torch.ones(1, 3))
    torch.testing.assert_close(net(doubled, torch.ones(1, 3)), expected)


def check(module: nn.Module, *inputs: torch.Tensor) -> ht.HypergradientCheck:
    """Trains the module from a learnt initialisation and checks the hypergradient."""
    net = ht.FunctionalModule(module.double())
    start = {name: value for name, value in net.init_params().items() if name in net.trained_names()}
    problem = ht.BilevelProblem(
        LambdaInner(lambda h: {name: h[name] for name in start}, lambda p, h, b: net(p, *inputs).square().mean()),
        LambdaOuter(start, lambda p, h, b: net(p, *inputs).sin().mean()),
        dynamics=ht.dynamics.SGD(lr=0.1, momentum=0.5),
        num_steps=3,
    )
    return ht.check_hypergradient(problem, problem.init_hparams(), ht.hypergradients.Reverse(checkpoint_every=2))


def test_shared_weights_have_the_right_hypergradient() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    verdict = check(nn.Sequential(layer, nn.Tanh(), layer), normal(4, 3, seed=0))
    assert verdict.passed, str(verdict)


class PlainWeightNorm(nn.Module):
    """Weight normalisation written out of differentiable pieces."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.length = nn.Parameter(weight.detach().norm(dim=1, keepdim=True))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.length * weight / weight.norm(dim=1, keepdim=True)


def test_weight_norm_written_out_has_the_right_hypergradient() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(layer, "weight", PlainWeightNorm(layer.weight))
    verdict = check(layer, normal(4, 3, seed=0))
    assert verdict.passed, str(verdict)


def test_fused_weight_norm_is_refused() -> None:
    module = nn.Sequential(nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(IncompatibleBackendError, match="at `1.parametrizations.weight.0`.*Remove it, or write"):
        ht.FunctionalModule(module)


def test_the_reason_for_refusing_it_is_still_there() -> None:
    """Documents why. A torch that mends the second derivative fails here: then stop refusing."""
    torch.manual_seed(0)
    v, g = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    arguments = (v.requires_grad_(), g.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, g: torch._weight_norm(v, g, 0), arguments)
    assert not torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), arguments, raise_exception=False)


def test_dropout_has_the_right_hypergradient() -> None:
    torch.manual_seed(0)
    verdict = check(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)), normal(4, 3, seed=0))
    assert verdict.passed, str(verdict)


def test_needs_a_module() -> None:
    with pytest.raises(TypeError, match="`module` is a function, not a `torch.nn.Module`"):
        ht.FunctionalModule(lambda x: x)  # type: ignore[arg-type]


def test_a_sub_module_exchanged_after_wrapping_is_the_one_called() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh())
    net = ht.FunctionalModule(module)
    weights = {"0.weight": torch.eye(2)}
    ones = torch.ones(1, 2)
    net(weights, ones)
    module[1] = nn.Sigmoid()
    torch.testing.assert_close(net(weights, ones), ones.sigmoid())
    module[0] = nn.Linear(2, 2, bias=False)
    torch.testing.assert_close(net(weights, ones), ones.sigmoid())


def test_weights_tied_and_untied_after_wrapping_are_seen() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net = ht.FunctionalModule(module)
    ones = torch.ones(1, 2)
    own = module[1].weight
    torch.testing.assert_close(net({"0.weight": 2.0 * torch.eye(2), "1.weight": torch.eye(2)}, ones), 2.0 * ones)
    module[1].weight = module[0].weight
    torch.testing.assert_close(net({"0.weight": 2.0 * torch.eye(2)}, ones), 4.0 * ones)
    module[1].weight = own
    torch.testing.assert_close(net({"0.weight": 2.0 * torch.eye(2), "1.weight": torch.eye(2)}, ones), 2.0 * ones)


def test_copies_call_their_own_module() -> None:
    net = ht.FunctionalModule(nn.Linear(2, 1))
    net(net.init_params(), torch.ones(1, 2))
    for other in (copy.deepcopy(net), copy.copy(net), pickle.loads(pickle.dumps(net))):
        other.module = nn.Linear(2, 1, bias=False)
        weights = {"weight": torch.ones(1, 2)}
        assert other(weights, torch.ones(1, 2)).item() == 2.0
    assert net({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, torch.ones(1, 2)).item() == 3.0


def test_a_module_that_raises_keeps_its_weights() -> None:
    module = nn.Linear(2, 1)
    before = module.weight
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ht.FunctionalModule(module)({"weight": torch.zeros(1, 2)}, torch.ones(1, 3))
    assert module.weight is before


def test_an_unknown_name_is_pytorchs_to_judge() -> None:
    layer = nn.Linear(2, 2, bias=False)
    net = ht.FunctionalModule(nn.Sequential(layer, layer))
    # The second name of a shared weight.
    torch.testing.assert_close(net({"1.weight": 2.0 * torch.eye(2)}, torch.ones(1, 2)), 4.0 * torch.ones(1, 2))
    with pytest.raises(AttributeError):
        net({"2.weight": torch.eye(2)}, torch.ones(1, 2))
