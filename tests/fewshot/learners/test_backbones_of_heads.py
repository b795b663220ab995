"""Which modules can be the representation of a head learner, and what is said of those that cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import hypertorch as ht
from hypertorch.fewshot import ANIL, MAML, MLP, R2D2, Examples, HyperRepresentation, Learner, ProtoNet
from tests.fewshot.learners.test_learners import Blobs

SGD = ht.dynamics.SGD
HEADS: dict[str, Callable[[nn.Module], Learner]] = {
    "ANIL": lambda backbone: ANIL(backbone, way=3, dynamics=SGD(lr=0.1), num_steps=2),
    "HyperRepresentation": lambda backbone: HyperRepresentation(backbone, way=3, dynamics=SGD(lr=0.1), num_steps=2),
    "ProtoNet": lambda backbone: ProtoNet(backbone, way=3),
    "R2D2": lambda backbone: R2D2(backbone, way=3),
}


def features(*layers: nn.Module) -> nn.Module:
    backbone = nn.Sequential(nn.Flatten(), *layers).double()
    backbone.num_features = 5  # type: ignore[assignment]
    return backbone


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "layers",
    [
        (nn.Dropout(0.5), nn.Linear(16, 5)),
        *((nn.Linear(16, 5), kind(0.1)) for kind in (nn.AlphaDropout, nn.FeatureAlphaDropout)),
        *((nn.Linear(16, 5), kind(0.1)) for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)),
        (nn.Linear(16, 5), nn.TransformerEncoderLayer(5, 1, 4, dropout=0.2)),
    ],
)
def test_dropout_is_refused_as_it_would_stay_on_in_prediction(head: str, layers: tuple[nn.Module, ...]) -> None:
    with pytest.raises(ValueError, match="`backbone` has dropout in .*when the trained learner predicts"):
        HEADS[head](features(*layers))


def test_dropout_that_drops_nothing_and_dropout_of_a_network_are_taken() -> None:
    ProtoNet(features(nn.Dropout(0.0), nn.Linear(16, 5)), way=3)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    learner = MAML(network, dynamics=SGD(lr=0.1), num_steps=0)
    images = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    predict = learner.adapt(learner.init_hparams(), Examples(images, torch.arange(3)))
    torch.testing.assert_close(predict(images), predict(images), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("head", HEADS)
def test_a_module_without_parameters_is_refused(head: str) -> None:
    with pytest.raises(ValueError, match="`backbone` is a Sequential without parameters"):
        HEADS[head](features())


@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_representation_needs_an_outer_variable_beside_it(head: str) -> None:
    backbone = features(nn.Linear(16, 5)).requires_grad_(False)
    if head in ("ANIL", "R2D2"):
        source = HEADS[head](backbone).on(Blobs())
        result = ht.hypergradient(source.at(0), source.init_hparams(), backend=ht.hypergradients.Reverse())
        assert all(grad.isfinite().all() for grad in result.grads.values())
        return
    with pytest.raises(ValueError, match=f"all its parameters frozen, and {head} has no outer variable"):
        HEADS[head](backbone)


def test_anil_says_how_to_give_it_the_number_of_features() -> None:
    with pytest.raises(ValueError, match="whose `num_features` is None.*`backbone.num_features = 64`"):
        HEADS["ANIL"](nn.Sequential(nn.Flatten(), nn.Linear(16, 5)))


@pytest.mark.parametrize("learn_lr", ["one", "step"])
def test_a_parameter_called_as_a_step_size_is_refused(learn_lr: str) -> None:
    network = MLP(in_features=16, hidden=(4,), out_features=3).double()
    network.log_lr = nn.Parameter(torch.ones(3))
    MAML(network, dynamics=SGD(lr=0.1), num_steps=2)
    with pytest.raises(ValueError, match=r"`network` has parameters called \['log_lr'\].*Rename"):
        MAML(network, dynamics=SGD(lr=0.1), num_steps=2, learn_lr=learn_lr)  # type: ignore[arg-type]
