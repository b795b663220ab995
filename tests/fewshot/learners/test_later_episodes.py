"""What every learner says of a later batch of episodes that differs from the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hypertorch as ht
from hypertorch.errors import NonFiniteError
from hypertorch.fewshot import MAML, MLP, Classification, Episode, EpisodeSource, Examples, ProtoNet, Regression
from tests.fewshot.learners.test_learners import Blobs
from tests.fewshot.learners.test_methods import LEARNERS

Change = Callable[[Episode], Any]
STEP = 2


@dataclass(frozen=True)
class Turning(EpisodeSource):
    """Episodes of one kind, and from a step on of another."""

    change: Change
    num_tasks: int = 3

    def at(self, step: int) -> Episode:
        episode = Blobs().at(step)
        return episode if step < STEP else self.change(episode)


def on_both(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Change:
    return lambda episode: Episode(*(Examples(*change(*part)) for part in episode))


def relabelled(change: Callable[[Tensor], Tensor]) -> Change:
    return on_both(lambda inputs, labels: (inputs, change(labels)))


def query_label(label: int) -> Change:
    def change(episode: Episode) -> Episode:
        labels = episode.query.targets.clone()
        labels[-1, 0] = label
        return Episode(episode.support, Examples(episode.query.inputs, labels))

    return change


CHANGES: dict[str, tuple[Change, str]] = {
    "more classes": (relabelled(lambda labels: labels + (labels == 2)), "have labels 0 to 3.*for labels 0 to 2"),
    "fewer classes": (relabelled(lambda labels: labels.clamp(max=1)), "have labels 0 to 1.*has 3 outputs"),
    "labels below 0": (query_label(-100), "have labels -100 to 2.*from 0"),
    "one label too high": (query_label(7), "have labels 0 to 7"),
    "float labels": (relabelled(lambda labels: labels.double()), "(`targets` are of torch.float64|cannot work on)"),
    "int32 labels": (relabelled(lambda labels: labels.int()), "has labels of torch.int32.*`labels.long\\(\\)`"),
    "float32 inputs": (on_both(lambda x, y: (x.float(), y)), r"`support` has inputs of torch.float32.*float64"),
    "images as bytes": (on_both(lambda x, y: (x.byte(), y)), r"has inputs of torch.uint8.*`images.float\(\) / 255`"),
    "another size": (on_both(lambda x, y: (x[..., :3], y)), r"have inputs of shape \(6, 1, 4, 3\).*cannot work on"),
    "no tasks axis": (on_both(lambda x, y: (x[0], y[0])), r"shape \(6, 1, 4, 4\).*`num_tasks` = 3.*counts the tasks"),
    "fewer tasks": (on_both(lambda x, y: (x[:2], y[:2])), r"shape \(2, 6, 1, 4, 4\).*`num_tasks` = 3"),
    "a target too few": (on_both(lambda x, y: (x, y[:, 1:])), r"targets of shape \(3, 5\)"),
    "no example": (on_both(lambda x, y: (x[:, :0], y[:, :0])), r"shape \(3, 0, 1, 4, 4\).*at least one"),
    "no episode": (lambda episode: (episode.support, episode.query), "are a tuple that holds.*Return `Episode"),
    "no tensors": (on_both(lambda x, y: (x.numpy(), y)), "are a Episode that holds other things than tensors"),  # type: ignore[arg-type,return-value]
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("kind", CHANGES)
def test_another_kind_of_episode_is_named_with_its_outer_step(name: str, kind: str) -> None:
    change, message = CHANGES[kind]
    source = LEARNERS[name]().on(Turning(change))
    source.at(STEP - 1)
    with pytest.raises((ValueError, TypeError), match=f"`episodes` at outer step {STEP}.*({message})"):
        source.at(STEP)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_support_set_without_a_class(name: str) -> None:
    """A head per class cannot be fitted; a network learns what it is shown."""

    def change(episode: Episode) -> Episode:
        labels = episode.support.targets.clone()
        labels[1][labels[1] == 1] = 0
        return Episode(Examples(episode.support.inputs, labels), episode.query)

    learner = LEARNERS[name]()
    source = learner.on(Turning(change))
    if not learner.needs_every_class:
        source.at(STEP)
        return
    with pytest.raises(ValueError, match=f"at outer step {STEP} have a task whose support set lacks one of the 3"):
        source.at(STEP)


@pytest.mark.parametrize("name", LEARNERS)
def test_another_shot_is_no_other_kind(name: str) -> None:
    source = LEARNERS[name]().on(Turning(lambda _: Blobs(shot=5, num_queries=1).at(STEP)))
    result = ht.hypergradient(source.at(STEP), source.init_hparams(), backend=ht.hypergradients.Reverse())
    assert result.outer_loss.isfinite()


def test_outer_loop_and_evaluation_name_the_step() -> None:
    source = LEARNERS["ProtoNet"]().on(Turning(query_label(9)))
    loop = ht.OuterLoop(
        source, optimizer=partial(torch.optim.SGD, lr=0.1), backend=ht.hypergradients.Reverse(), log_every=1
    )
    with pytest.raises(ValueError, match=f"at outer step {STEP} have labels 0 to 9"):
        loop.run(5)
    with pytest.raises(ValueError, match=f"at outer step {STEP} have labels 0 to 9"):
        ht.evaluate(source, source.init_hparams(), num_episodes=9)


def test_targets_of_two_types_are_refused() -> None:
    def change(episode: Episode) -> Episode:
        return Episode(episode.support, Examples(episode.query.inputs, episode.query.targets.double()))

    source = LEARNERS["MAML"]().on(Turning(change))
    with pytest.raises(ValueError, match="`support` has targets of torch.int64, `query` of torch.float64"):
        source.at(STEP)


def test_a_fit_is_tried_once_for_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    adaptations: list[int] = []
    adapt = ProtoNet.adapt
    monkeypatch.setattr(
        ProtoNet, "adapt", lambda self, hparams, support: (adaptations.append(1), adapt(self, hparams, support))[1]
    )
    source = LEARNERS["ProtoNet"]().on(Turning(on_both(lambda x, y: (x.reshape(3, -1, 4, 4), y))))
    for step in (0, 1, STEP, STEP + 1, 0):
        source.at(step)
    assert len(adaptations) == 2


class Lines(EpisodeSource):
    """Regression, whose targets lose their axis at a later step."""

    num_tasks = 2

    def at(self, step: int) -> Episode:
        inputs = torch.linspace(0.0, 1.0, 8, dtype=torch.float64).reshape(2, 4, 1)
        examples = Examples(inputs, inputs if step < STEP else inputs.squeeze(-1))
        return Episode(examples, examples)


def test_regression_too() -> None:
    learner = MAML(MLP().double(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=1, objective=Regression())
    source = learner.on(Lines())
    with pytest.raises(ValueError, match=rf"outer step {STEP}: `outputs` have shape \(4, 1\) and `targets` \(4,\)"):
        source.at(STEP)


def test_a_network_that_ends_in_infinity_is_no_misfit() -> None:
    """What the check passes may still fail for its numbers, which the hypergradient says."""
    source = LEARNERS["MAML"]().on(Turning(on_both(lambda x, y: (x * torch.inf, y))))
    loop = ht.OuterLoop(source, optimizer=partial(torch.optim.SGD, lr=0.1), backend=ht.hypergradients.Reverse())
    with pytest.raises(NonFiniteError, match=f"outer step {STEP}"):
        loop.run(3)


@pytest.mark.parametrize("name", ["ProtoNet", "R2D2"])
def test_a_precision_of_the_inner_loss_is_refused_where_there_is_none(name: str) -> None:
    source = LEARNERS[name]().on(Blobs())
    execution = ht.Execution(inner_dtype=torch.bfloat16)
    message = "`inner_dtype` of the execution is torch.bfloat16, but the problem takes no inner step"
    with pytest.raises(ValueError, match=message):
        ht.evaluate(source, source.init_hparams(), num_episodes=1, execution=execution)
    with pytest.raises(ValueError, match=message):
        ht.hypergradient(source.at(0), source.init_hparams(), backend=ht.hypergradients.Reverse(), execution=execution)


def test_classification_needs_labels() -> None:
    learner = MAML(MLP(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=1, objective=Classification())

    class Floats(EpisodeSource):
        num_tasks = 1

        def at(self, step: int) -> Episode:
            examples = Examples(torch.rand(1, 4, 1), torch.rand(1, 4))
            return Episode(examples, examples)

    with pytest.raises(TypeError, match=r"`targets` are of torch.float32: .*`objective=Regression\(\)`"):
        learner.on(Floats())
