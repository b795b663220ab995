"""Running the outer loop in tests, and comparing runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hypertorch as ht
from hypertorch import outer
from tests.outer.problems import Quadratics

TIMING = ("steps_per_second",)


def make_loop(source: ht.ProblemSource | None = None, **options: Any) -> outer.OuterLoop:
    """An outer loop over quadratics, with gradient descent unless told otherwise."""
    settings: dict[str, Any] = {
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "backend": ht.hypergradients.Reverse(),
        "log_every": 1,
        "execution": ht.Execution(tasks="vmap"),
        **options,
    }
    return outer.OuterLoop(source or Quadratics(), **settings)


def full_loop(folder: Path, source: ht.ProblemSource | None = None, **options: Any) -> outer.OuterLoop:
    """An outer loop with everything that a resumed run must bring back."""
    settings: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=0.05),
        "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.7),
        "clip_norm": 1.0,
        "constraints": {"curvature": ht.constraints.Box(lower=0.5, upper=2.05)},
        "validation": outer.Validation(source=Quadratics(offset=500), every=6, num_episodes=10, metric="distance"),
        "loggers": [outer.JsonLinesLogger(folder / "metrics.jsonl")],
        "log_every": 2,
        "checkpoints": outer.Checkpoints(folder / "checkpoints", every=5),
        **options,
    }
    return make_loop(source, **settings)


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a run without the figures that measure time."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def assert_same_run(first: outer.Trained, second: outer.Trained) -> None:
    """Every outer variable agrees bit for bit."""
    assert (first.best_step, first.best_value, first.num_outer_steps) == (
        second.best_step,
        second.best_value,
        second.num_outer_steps,
    )
    for ours, theirs in ((first.hparams, second.hparams), (first.best_hparams, second.best_hparams)):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Two checkpoints hold the same bits, time apart."""
    left, right = (outer.Checkpoints(path.parent).load(path) for path in (first, second))
    _assert_equal({**vars(left), "seconds": 0}, {**vars(right), "seconds": 0})


def _assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            _assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for ours, theirs in zip(left, right, strict=True):
            _assert_equal(ours, theirs)
    else:
        assert left == right
