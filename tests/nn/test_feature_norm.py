"""FeatureNorm: its formula and its rules, the curvature it bounds, and an inner loop that it keeps stable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.fewshot import IMAML, MAML, MLP, Conv4, FeatureNorm, Learner, ResNet12
from tests.fewshot.learners.test_learners import Blobs, with_smooth_activations
from tests.helpers.problems import normal

F64 = torch.float64
WAY = 3


def test_features_are_centred_and_their_root_mean_square_length_is_the_given_one() -> None:
    features = normal(7, 5, seed=0) * 30.0 + 4.0
    centred = features - features.mean(dim=0)
    out = FeatureNorm(5, length=8.0)(features)
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(5, dtype=F64), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(out.norm(dim=1).square().mean().sqrt().item(), 8.0, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(out, out[0, 0] / centred[0, 0] * centred, rtol=1e-12, atol=1e-12)


def test_neither_shift_nor_scale_of_the_features_shows() -> None:
    features, norm = normal(6, 4, seed=1), FeatureNorm(4, length=2.0)
    torch.testing.assert_close(norm(features), norm(50.0 * features - 3.0), rtol=1e-10, atol=1e-10)


def test_running_statistics_are_those_of_the_last_call_in_training() -> None:
    norm = FeatureNorm(4, length=3.0, statistics="running").double()
    earlier, support, query = normal(5, 4, seed=2), normal(6, 4, seed=3) * 2.0 + 1.0, normal(2, 4, seed=4)
    with torch.no_grad():
        norm(earlier)
        in_training = norm(support)
        together, alone = norm.eval()(query), norm(query[:1])
    torch.testing.assert_close(in_training, FeatureNorm(4, length=3.0)(support))
    torch.testing.assert_close(together[:1], alone)  # a query does not depend on its companions
    mean = support.mean(dim=0)
    spread = (support - mean).square().sum(dim=1).mean().sqrt()
    torch.testing.assert_close(together, 3.0 * (query - mean) / spread, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_a_plain_training_loop_goes_back_through_each_call_alone(statistics: str) -> None:
    norm = FeatureNorm(4, length=3.0, statistics=statistics).double()  # type: ignore[arg-type]
    weight = torch.ones(4, dtype=F64, requires_grad=True)
    for step in range(3):
        norm(normal(5, 4, seed=step) * weight)[0].sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize("items", [1, 4])
def test_equal_features_become_zero_with_finite_first_and_second_derivatives(items: int) -> None:
    features = torch.full((items, 3), 2.0, dtype=F64, requires_grad=True)
    out = FeatureNorm(3, length=10.0)(features)
    assert out.abs().max() == 0.0
    (grad,) = torch.autograd.grad((out * normal(items, 3, seed=5)).sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), features)
    assert grad.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_the_curvature_of_a_classifier_is_bounded_whatever_the_features_are(size: float) -> None:
    features, targets = normal(WAY * 2, 4, seed=6).abs() * size, torch.arange(WAY).repeat(2)
    weight = normal(WAY, 4, seed=7) * 0.01

    def curvature(inputs: Tensor) -> float:
        hessian = torch.autograd.functional.hessian(lambda w: F.cross_entropy(inputs @ w.T, targets), weight)
        return torch.linalg.eigvalsh(hessian.reshape(weight.numel(), -1))[-1].item()

    assert curvature(FeatureNorm(4, length=5.0)(features)) <= 5.0**2 / 2
    if size > 1.0:
        assert curvature(features) > 5.0**2 / 2


@pytest.mark.parametrize("length", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_length_that_nothing_can_have(length: float) -> None:
    with pytest.raises(ValueError, match="`length` is .*finite number above 0"):
        FeatureNorm(3, length=length)


def test_refuses_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="`statistics` is 'batch'.*'episode'.*'running'"):
        FeatureNorm(3, length=1.0, statistics="batch")  # type: ignore[arg-type]


@pytest.mark.parametrize("statistics", ["episode", "running"])
@pytest.mark.parametrize("made", [Conv4, ResNet12])
def test_backbones_normalise_before_the_classifier(made: type[Conv4] | type[ResNet12], statistics: str) -> None:
    options = {"channels": (2, 2, 2, 2)} if made is ResNet12 else {"hidden": 2}
    torch.manual_seed(0)
    plain = made(in_channels=1, **options).double()  # type: ignore[arg-type]
    torch.manual_seed(0)
    network = made(in_channels=1, way=WAY, feature_length=7.0, statistics=statistics, **options).double()  # type: ignore[arg-type]
    assert [n for n, _ in network.named_parameters() if not n.startswith("classifier")] == [
        n for n, _ in plain.named_parameters()
    ]
    images = normal(6, 1, 28, 28, seed=8)
    features = FeatureNorm(plain.num_features, length=7.0)(plain(images))
    assert isinstance(network.classifier, nn.Linear)
    torch.testing.assert_close(network(images), network.classifier(features), rtol=1e-10, atol=1e-10)


def learner(kind: str, statistics: str, *, length: float = 4.0) -> Learner:
    torch.manual_seed(0)
    network = Conv4(
        way=WAY,
        hidden=3,
        image_size=4,
        downsample="stride",
        feature_length=length,
        statistics=statistics,  # type: ignore[arg-type]
    )
    network = with_smooth_activations(network).double()
    if kind == "maml":
        return MAML(network, dynamics=ht.dynamics.SGD(lr=0.2), num_steps=3)
    return IMAML(network, dynamics=ht.dynamics.SGD(lr=0.2), num_steps=3, proximity=0.5)


@pytest.mark.parametrize("kind", ["maml", "imaml"])
@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_hypergradients_through_it_equal_central_differences(kind: str, statistics: str) -> None:
    source = learner(kind, statistics).on(Blobs())
    check = ht.check_hypergradient(
        source.at(0), source.init_hparams(), ht.hypergradients.Reverse(), num_directions=1, step_size=1e-5
    )
    assert check.passed, str(check)


@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_tasks_together_equal_tasks_one_by_one(statistics: str) -> None:
    source = learner("imaml", statistics).on(Blobs())
    together, alone = (
        ht.hypergradient(
            source.at(0),  # type: ignore[arg-type]
            source.init_hparams(),
            backend=ht.hypergradients.Reverse(),
            execution=ht.Execution(tasks=route),
        ).grads
        for route in ("vmap", "loop")
    )
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-12)


def test_an_mlp_normalises_before_its_last_layer() -> None:
    torch.manual_seed(0)
    network = MLP(in_features=3, hidden=(4,), out_features=2, feature_length=6.0).double()
    inputs = normal(5, 3, seed=9)
    features = FeatureNorm(4, length=6.0)(network.layers[:-2](inputs))
    torch.testing.assert_close(network(inputs), network.layers[-1](features), rtol=1e-12, atol=1e-12)


class Magnified(nn.Module):
    """What the network before a classifier becomes when outer training lets its features grow."""

    def forward(self, features: Tensor) -> Tensor:
        return 40.0 * features


def test_an_inner_loop_of_a_fixed_step_size_converges_however_large_the_features_have_grown() -> None:
    def last_change(norm: nn.Module) -> float:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), Magnified(), norm, nn.Linear(16, WAY)).double()
        learner = IMAML(network, dynamics=ht.dynamics.SGD(lr=0.3), num_steps=40, proximity=0.5)
        losses = ht.unroll(learner.on(Blobs()).at(0), learner.init_hparams()).inner_losses
        return losses[:, -2:].diff(dim=1).abs().max().item()

    assert last_change(FeatureNorm(16, length=4.0)) < 1e-3
    assert last_change(nn.Identity()) > 0.1
