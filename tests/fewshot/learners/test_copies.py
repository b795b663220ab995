"""Learners and fitted learners are values: they can be copied and pickled, and so can what they are made of."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.fewshot import MAML, Examples, Learner, ProtoNet
from hypertorch.fewshot.learners.module_copy import copy_module
from tests.fewshot.learners.test_learners import Blobs
from tests.fewshot.learners.test_methods import LEARNERS

F64 = torch.float64
SGD = ht.dynamics.SGD


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_copy_answers_as_the_original(name: str, copied: Callable[[Any], Any]) -> None:
    learner: Learner = LEARNERS[name]()
    hparams = learner.init_hparams()
    episode = Blobs(num_tasks=1).at(3)
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in episode)
    fitted = learner.adapt(hparams, support)
    expected = fitted(query.inputs)
    assert torch.equal(copied(learner).adapt(hparams, support)(query.inputs), expected)
    assert torch.equal(copied(fitted)(query.inputs), expected)
    source = learner.on(Blobs())
    with_copy = ht.hypergradient(copied(source).at(1), hparams, backend=ht.hypergradients.Reverse())
    original = ht.hypergradient(source.at(1), hparams, backend=ht.hypergradients.Reverse())
    assert torch.equal(with_copy.outer_loss, original.outer_loss)


class Locked(nn.Module):
    """A linear layer beside what cannot be copied: a lock, also inside a list of layers, and an output kept."""

    def __init__(self, size: int = 16, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(size, outputs, dtype=F64)
        self.layer.lock = threading.Lock()
        self.layers = [self.layer]
        self.options = {"lock": threading.Lock(), "scale": 2.0}
        self.kept = self.layer(torch.ones(1, size, dtype=F64))
        self.register_buffer("shift", torch.full((outputs,), 0.5, dtype=F64))

    def forward(self, inputs: Tensor) -> Tensor:
        with self.options["lock"]:
            self.kept = self.options["scale"] * self.layers[0](inputs.flatten(1)) + self.shift
        return self.kept


def test_what_cannot_be_copied_is_shared_and_all_else_is_not() -> None:
    module = Locked()
    made = copy_module(module)
    assert made.layer is not module.layer and made.layer.weight is not module.layer.weight
    assert made.layers[0] is made.layer  # a list of layers holds the copies
    assert made.shift is not module.shift
    assert made.layer.lock is module.layer.lock and made.options["lock"] is module.options["lock"]
    assert made.options is not module.options
    with torch.no_grad():
        made.layer.weight.zero_()
    assert bool(module.layer.weight.any())
    assert torch.equal(made.eval()(torch.ones(1, 16, dtype=F64)), 2.0 * made.layer.bias[None] + 0.5)
    assert module.training


@pytest.mark.parametrize(
    "around",
    [
        lambda layer: [layer],
        lambda layer: (layer, 1),
        lambda layer: {layer},
        lambda layer: {"a": layer},
        lambda layer: {layer: "a"},
    ],
    ids=["list", "tuple", "set", "dict", "key of a dict"],
)
def test_a_layer_with_a_lock_is_copied_wherever_it_is_held(around: Callable[[nn.Module], Any]) -> None:
    layer = nn.Linear(2, 2)
    layer.lock = threading.Lock()
    module = nn.Module()
    module.held = around(layer)
    held = copy_module(module).held
    assert type(held) is type(module.held)
    parts = (*held, *held.values()) if isinstance(held, dict) else held
    made = next(part for part in parts if isinstance(part, nn.Module))
    assert made is not layer and made.weight is not layer.weight and made.lock is layer.lock


def test_a_module_is_copied_as_a_whole_where_it_can_be() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    made = copy_module(tied)
    assert made[1].weight is made[0].weight is not tied[0].weight


def test_a_module_with_a_lock_is_learnt_from() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, dtype=F64))
    plain[1].load_state_dict(Locked().layer.state_dict())

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = plain

        def forward(self, inputs: Tensor) -> Tensor:
            return 2.0 * self.plain(inputs) + 0.5

    def outcome(network: nn.Module, kind: str) -> ht.HypergradientResult:
        learner = MAML(network, dynamics=SGD(lr=0.1), num_steps=2) if kind == "maml" else ProtoNet(network, way=3)
        source = learner.on(Blobs())
        backend, execution = ht.hypergradients.Reverse(), ht.Execution(tasks="loop")
        return ht.hypergradient(source.at(0), source.init_hparams(), backend=backend, execution=execution)

    for kind in ("maml", "proto_net"):
        ours, expected = outcome(Locked(), kind), outcome(Doubled(), kind)
        torch.testing.assert_close(ours.outer_loss, expected.outer_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.grads["layer.weight"], expected.grads["plain.1.weight"], rtol=1e-10, atol=1e-13)
