"""Inputs that are integers: every learner takes tokens that its network looks up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.fewshot import (
    ANIL,
    IMAML,
    MAML,
    R2D2,
    EpisodeSampler,
    Examples,
    HyperRepresentation,
    Learner,
    MetaSGD,
    ProtoNet,
    Reptile,
    TensorClasses,
)
from tests.fewshot.learners.test_methods import LEARNERS

F64 = torch.float64
SGD = ht.dynamics.SGD
WAY, WORDS, LENGTH = 3, 11, 5


class BagOfWords(nn.Module):
    """The mean embedding of a sentence, and a linear layer."""

    num_features = 4

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, 3)
        self.layer = nn.Linear(3, outputs)
        self.double()

    def forward(self, sentences: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.words(sentences).mean(-2)))


def sentences(dtype: torch.dtype = torch.int64) -> TensorClasses:
    tokens = torch.randint(0, WORDS, (4, 6, LENGTH), generator=torch.Generator().manual_seed(0))
    return TensorClasses.of({f"topic {number}": part.to(dtype) for number, part in enumerate(tokens)})


def episodes(dtype: torch.dtype = torch.int64) -> EpisodeSampler:
    return EpisodeSampler(sentences(dtype), way=WAY, shot=2, num_queries=3, num_tasks=2)


TOKEN_LEARNERS: dict[str, Callable[[], Learner]] = {
    "MAML": lambda: MAML(BagOfWords(WAY), dynamics=SGD(lr=0.3), num_steps=2),
    "MetaSGD": lambda: MetaSGD(BagOfWords(WAY), dynamics=SGD(lr=0.3), num_steps=2),
    "IMAML": lambda: IMAML(BagOfWords(WAY), dynamics=SGD(lr=0.3), num_steps=2),
    "Reptile": lambda: Reptile(BagOfWords(WAY), dynamics=SGD(lr=0.3), num_steps=2, batch_size=3),
    "HyperRepresentation": lambda: HyperRepresentation(BagOfWords(4), way=WAY, dynamics=SGD(lr=0.3), num_steps=2),
    "ANIL": lambda: ANIL(BagOfWords(4), way=WAY, dynamics=SGD(lr=0.3), num_steps=2),
    "ProtoNet": lambda: ProtoNet(BagOfWords(4), way=WAY),
    "R2D2": lambda: R2D2(BagOfWords(4), way=WAY),
}


def test_every_learner_is_listed() -> None:
    assert TOKEN_LEARNERS.keys() == LEARNERS.keys()


@pytest.mark.parametrize("name", sorted(set(TOKEN_LEARNERS) - {"Reptile"}))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_hypergradients_equal_central_differences(name: str, dtype: torch.dtype) -> None:
    source = TOKEN_LEARNERS[name]().on(episodes(dtype))
    check = ht.check_hypergradient(
        source.at(0), source.init_hparams(), ht.hypergradients.Reverse(), num_directions=1, step_size=1e-4
    )
    assert check.passed, str(check)


@pytest.mark.parametrize("name", TOKEN_LEARNERS)
def test_adapted_learners_answer_for_tokens(name: str) -> None:
    learner, episode = TOKEN_LEARNERS[name](), episodes().at(1)
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in episode)
    hparams = learner.init_hparams()
    logits = learner.adapt(hparams, support)(query.inputs)
    result = ht.unroll(learner.problem(episode, 2), hparams, execution=ht.Execution(tasks="loop"))
    accuracy = (logits.argmax(-1) == query.targets).double().mean()
    torch.testing.assert_close(result.metrics["accuracy"][0], accuracy)


def test_what_no_embedding_takes_is_refused() -> None:
    learner = TOKEN_LEARNERS["MAML"]()
    support = Examples(episodes().at(0).support.inputs[0], torch.arange(6) % WAY)
    for dtype in (torch.uint8, torch.int16, torch.bool):
        with pytest.raises(ValueError, match=rf"`support` has inputs of {dtype}: .*convert tokens with `\.long\(\)`"):
            learner.adapt(learner.init_hparams(), Examples(support.inputs.to(dtype), support.targets))


@pytest.mark.parametrize("name", ["MAML", "ProtoNet"])
def test_a_network_that_computes_with_its_inputs_refuses_integers(name: str) -> None:
    learner = LEARNERS[name]()
    hparams, images = learner.init_hparams(), torch.ones(3, 1, 4, 4, dtype=F64)
    with pytest.raises(
        ValueError, match=r"has inputs of torch.int64, which the network cannot compute with .*embedding"
    ):
        learner.adapt(hparams, Examples(images.long(), torch.arange(3)))(images.long())
    if name == "MAML":
        with pytest.raises(ValueError, match=r"`inputs` has inputs of torch.int64, which the network cannot"):
            learner.adapt(hparams, Examples(images, torch.arange(3)))(images.long())
