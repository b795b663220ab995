"""Objectives: the number by hand, and targets that do not fit their outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch.fewshot import (
    MAML,
    Classification,
    Episode,
    EpisodeSource,
    Examples,
    HyperRepresentation,
    Learner,
    Regression,
)
from tests.helpers.problems import normal

SGD = ht.dynamics.SGD
LOGITS, VALUES = normal(4, 3, seed=1), normal(4, 1, seed=2)
LABELS = torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classification_by_hand(smoothing: float) -> None:
    objective = Classification(label_smoothing=smoothing)
    log_shares = LOGITS - LOGITS.exp().sum(1, keepdim=True).log()
    wanted = torch.full((4, 3), smoothing / 3, dtype=torch.float64)
    wanted[torch.arange(4), LABELS] += 1.0 - smoothing
    torch.testing.assert_close(objective.loss(LOGITS, LABELS), -(wanted * log_shares).sum(1).mean())
    right = sum(int(row.argmax()) == int(label) for row, label in zip(LOGITS, LABELS, strict=True))
    assert float(objective.metrics(LOGITS, LABELS)["accuracy"]) == right / 4


def test_regression_by_hand() -> None:
    targets = normal(4, 1, seed=3)
    expected = sum((float(a) - float(b)) ** 2 for a, b in zip(VALUES, targets, strict=True)) / 4
    assert float(Regression().loss(VALUES, targets)) == pytest.approx(expected, rel=1e-14)
    assert float(Regression().metrics(VALUES, targets)["mse"]) == pytest.approx(expected, rel=1e-14)


MISFITS: list[tuple[Any, Tensor, Tensor, type[Exception], str]] = [
    (
        Regression(),
        VALUES,
        VALUES[:, 0],
        ValueError,
        r"shape \(4, 1\) and `targets` \(4,\): .*`targets.unsqueeze\(-1\)`",
    ),
    (Regression(), VALUES[:, 0], VALUES, ValueError, r"shape \(4,\) and `targets` \(4, 1\).*the same shape"),
    (Regression(), VALUES, LOGITS, ValueError, r"shape \(4, 1\) and `targets` \(4, 3\).*as many outputs"),
    (Regression(), VALUES, torch.tensor(0.5), ValueError, r"shape \(4, 1\) and `targets` \(\)"),
    (Regression(), VALUES, VALUES.long(), TypeError, r"`targets` are of torch.int64: .*`targets.to\(torch.float64\)`"),
    (
        Classification(),
        LOGITS,
        LABELS[:, None],
        ValueError,
        r"shape \(4, 3\) for labels of shape \(4, 1\).*`\(batch,\)`",
    ),
    (Classification(), LOGITS[:, 0], LABELS, ValueError, r"shape \(4,\) for labels of shape \(4,\).*`way` outputs"),
    (Classification(), LOGITS, LABELS[:1], ValueError, r"shape \(4, 3\) for labels of shape \(1,\)"),
    (
        Classification(),
        LOGITS,
        LOGITS.softmax(1),
        ValueError,
        r"`targets` have the shape \(4, 3\) of the logits: .*shares",
    ),
    (
        Classification(),
        LOGITS,
        LABELS.double(),
        TypeError,
        r"`targets` are of torch.float64.*`objective=Regression\(\)`",
    ),
    (Classification(), LOGITS, LABELS.int(), TypeError, r"`targets` are of torch.int32.*`labels.long\(\)`"),
]


@pytest.mark.parametrize(("objective", "outputs", "targets", "error", "message"), MISFITS)
def test_targets_that_do_not_fit_the_outputs_are_refused(
    objective: Any, outputs: Tensor, targets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        objective.loss(outputs, targets)
    with pytest.raises(error, match=message):
        objective.metrics(outputs, targets)


class Lines(EpisodeSource):
    """Straight lines whose targets lack the axis of the values."""

    num_tasks = 2

    def at(self, step: int) -> Episode:
        inputs = normal(2, 6, 1, seed=step)
        examples = Examples(inputs, 2.0 * inputs.squeeze(-1))
        return Episode(examples, examples)


def regressors() -> dict[str, Learner]:
    line = nn.Linear(1, 1).double()
    settings: dict[str, Any] = {"dynamics": SGD(lr=0.1), "num_steps": 2, "objective": Regression()}
    return {"MAML": MAML(line, **settings), "HyperRepresentation": HyperRepresentation(line, way=1, **settings)}


@pytest.mark.parametrize("name", ["MAML", "HyperRepresentation"])
def test_a_learner_does_not_learn_the_mean_of_targets_without_an_axis(name: str) -> None:
    with pytest.raises(ValueError, match=r"`outputs` have shape \(6, 1\) and `targets` \(6,\)"):
        regressors()[name].on(Lines())


@pytest.mark.parametrize("objective", [3, "accuracy", Classification])
@pytest.mark.parametrize("learner", [MAML, HyperRepresentation])
def test_what_is_no_objective_is_refused(learner: type[Learner], objective: Any) -> None:
    options: dict[str, Any] = {"dynamics": SGD(lr=0.1), "num_steps": 1, "objective": objective}
    if learner is HyperRepresentation:
        options["way"] = 3
    with pytest.raises(TypeError, match=r"`objective` is .*, not an `Objective`.*Pass `Classification\(\)`"):
        learner(nn.Linear(2, 3), **options)
