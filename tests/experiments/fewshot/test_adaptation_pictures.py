"""The numbers behind the pictures of an adaptation."""

from __future__ import annotations

import pytest

import hypertorch as ht
from experiments.fewshot.adaptation_pictures import figures_after_steps, shown_steps
from hypertorch.fewshot import MAML, MLP
from tests.fewshot.learners.test_learners import Blobs

LOOP = ht.Execution(tasks="loop")


def test_the_curve_ends_where_the_evaluation_does_and_begins_unadapted() -> None:
    network = MLP(in_features=16, hidden=(6,), out_features=3).double()

    def source(num_steps: int) -> ht.ProblemSource:
        return MAML(network, dynamics=ht.dynamics.SGD(lr=0.5), num_steps=num_steps).on(Blobs())

    hparams = source(3).init_hparams()
    curve = figures_after_steps(source(3), hparams, metric="accuracy", steps=[0, 2, 3], num_episodes=4, execution=LOOP)
    count = curve[0].count
    assert count >= 4
    for steps, point in zip((0, 2, 3), curve, strict=True):
        expected = ht.evaluate(source(steps), hparams, num_episodes=count, execution=LOOP).metrics["accuracy"]
        assert (point.mean, point.half_width) == pytest.approx((expected.mean, expected.half_width), rel=1e-6)
    assert curve[0].mean != curve[-1].mean


def test_long_runs_are_shown_at_growing_distances() -> None:
    assert shown_steps(5) == [0, 1, 2, 3, 4, 5]
    long = shown_steps(50)
    assert (long[0], long[1], long[-1]) == (0, 1, 50)
    assert len(long) <= 17 and long == sorted(set(long))
