"""What learners show of an episode before and after adaptation."""

from __future__ import annotations

import torch
from torch import nn

import hypertorch as ht
from hypertorch.fewshot import MAML, MLP, Embedding, Episode, Examples, HyperRepresentation, Learner, ProtoNet
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict

SGD = ht.dynamics.SGD


def episode() -> Episode:
    torch.manual_seed(1)
    labels = torch.arange(3)
    return Episode(Examples(torch.rand(3, 16), labels), Examples(torch.rand(6, 16), labels.repeat(2)))


def test_a_network_is_shown_by_what_enters_its_last_layer() -> None:
    torch.manual_seed(0)
    network = MLP(in_features=16, hidden=(6,), out_features=3)
    learner, shown = MAML(network, dynamics=SGD(lr=0.5), num_steps=2), episode()
    hparams = learner.init_hparams()
    before, after = learner.embed(hparams, shown)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    by_hand = torch.relu(layers[0](shown.query.inputs)).detach()
    torch.testing.assert_close(before, by_hand)
    fitted = ht.unroll(learner.problem(shown, None), hparams).params
    weight, bias = (fitted[name] for name in hparams if fitted[name].shape[0] == 6)
    torch.testing.assert_close(after, torch.relu(shown.query.inputs @ weight.T + bias))


def test_a_network_without_a_linear_layer_is_shown_by_its_outputs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return (inputs * self.scale)[:, :3]

    learner, shown = MAML(Scaled(), dynamics=SGD(lr=0.5), num_steps=1), episode()
    before, after = learner.embed(learner.init_hparams(), shown)
    torch.testing.assert_close(before, shown.query.inputs[:, :3])
    assert not torch.equal(before, after)


def test_a_head_is_shown_by_features_and_outputs() -> None:
    torch.manual_seed(0)
    backbone = MLP(in_features=16, hidden=(), out_features=5)
    shown = episode()
    for learner in (
        ProtoNet(backbone, way=3),
        HyperRepresentation(backbone, way=3, dynamics=SGD(lr=1.0), num_steps=2),
    ):
        hparams = learner.init_hparams()
        before, after = learner.embed(hparams, shown)
        assert before.shape == (6, 5) and not before.requires_grad
        torch.testing.assert_close(after, learner.adapt(hparams, shown.support)(shown.query.inputs))
    torch.testing.assert_close(
        ProtoNet(backbone, way=3).embed(hparams, shown).before, backbone(shown.query.inputs).detach()
    )


def test_any_other_learner_is_shown_by_inputs_and_outputs() -> None:
    class Constant(Learner):
        def init_hparams(self) -> TensorDict:
            return {"level": torch.ones(())}

        def problem(self, episode: Episode, num_tasks: int | None) -> BilevelProblem:
            raise AssertionError("not asked for")

        def adapt(self, hparams: TensorDict, support: Examples) -> object:
            return lambda inputs: hparams["level"].expand(len(inputs), 3)

    shown = episode()
    embedding = Constant().embed({"level": torch.tensor(2.0)}, shown)
    assert isinstance(embedding, Embedding)
    torch.testing.assert_close(embedding.before, shown.query.inputs)
    torch.testing.assert_close(embedding.after, torch.full((6, 3), 2.0))
