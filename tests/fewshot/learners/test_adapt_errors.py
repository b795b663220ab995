"""What a learner says of a support set that it cannot fit, and how its tasks are run."""

from __future__ import annotations

import pytest
import torch

import hypertorch as ht
from hypertorch.fewshot import MAML, MLP, Examples, Learner, ProtoNet, StrokeCharacters

SGD = ht.dynamics.SGD


def maml() -> Learner:
    return MAML(MLP(in_features=16, hidden=(6,), out_features=3).double(), dynamics=SGD(lr=0.1), num_steps=1)


def proto_net() -> Learner:
    return ProtoNet(MLP(in_features=16, hidden=(6,), out_features=None).double(), way=3)


IMAGES = torch.rand(3, 1, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 1], r"no example of the classes \[2\], of 3.*smaller `way`"),
        ([0, 2, 2], r"no example of the classes \[1\], of 3"),
        ([1, 2, 3], r"labels \[1, 2, 3\], but classes count from 0 to 2"),
        ([0, 1, -100], r"labels \[-100, 0, 1\], but classes count from 0"),
    ],
)
def test_labels_that_a_head_cannot_have_are_refused(labels: list[int], message: str) -> None:
    learner = proto_net()
    with pytest.raises(ValueError, match=message):
        learner.adapt(learner.init_hparams(), Examples(IMAGES, torch.tensor(labels)))


def test_a_network_may_lack_classes_but_not_count_below_zero() -> None:
    learner = maml()
    answers = learner.adapt(learner.init_hparams(), Examples(IMAGES, torch.tensor([0, 1, 1])))(IMAGES)
    assert answers.isfinite().all()
    with pytest.raises(ValueError, match="classes count from 0"):
        learner.adapt(learner.init_hparams(), Examples(IMAGES, torch.tensor([0, 1, -100])))


@pytest.mark.parametrize("make", [maml, proto_net])
def test_what_is_no_support_set_is_refused(make: object) -> None:
    learner: Learner = make()  # type: ignore[operator]
    hparams = learner.init_hparams()
    with pytest.raises(TypeError, match=r"labels of torch.int32.*`labels.long\(\)`"):
        learner.adapt(hparams, Examples(IMAGES, torch.arange(3, dtype=torch.int32)))
    for inputs, targets in (
        (IMAGES[:, 0, 0, 0], torch.arange(3)),
        (IMAGES, torch.tensor(0)),
        (IMAGES, torch.arange(4)),
    ):
        with pytest.raises(ValueError, match=r"a task needs one row of inputs per example, and one target for each"):
            learner.adapt(hparams, Examples(inputs, targets))
    with pytest.raises(ValueError, match="`support` is empty"):
        learner.adapt(hparams, Examples(IMAGES[:0], torch.arange(0)))
    with pytest.raises(TypeError, match="`support` has inputs of type ndarray"):
        learner.adapt(hparams, Examples(IMAGES.numpy(), torch.arange(3)))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [maml, proto_net])
def test_inputs_of_another_precision_are_refused(make: object) -> None:
    learner: Learner = make()  # type: ignore[operator]
    hparams, labels = learner.init_hparams(), torch.arange(3)
    with pytest.raises(ValueError, match=r"`support` has inputs of torch.float32.*`inputs.to\(torch.float64\)`"):
        learner.adapt(hparams, Examples(IMAGES.float(), labels))
    with pytest.raises(ValueError, match=r"`inputs` has inputs of torch.float32"):
        learner.adapt(hparams, Examples(IMAGES, labels))(IMAGES.float())


def test_a_data_set_in_place_of_episodes_is_refused() -> None:
    with pytest.raises(TypeError, match="`episodes` is a ImageClasses, which draws no episodes.*`EpisodeSampler"):
        maml().on(StrokeCharacters(split="meta_val"))  # type: ignore[arg-type]


def test_a_label_without_an_output_is_refused() -> None:
    learner = maml()
    with pytest.raises(ValueError, match="labels up to 3, but the network has 3 outputs.*`way=4`"):
        learner.adapt(learner.init_hparams(), Examples(IMAGES, torch.tensor([0, 1, 3])))
