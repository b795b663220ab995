"""A measurement of task routes that finds another one for every backend, and a model whose noise tells them apart."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import nn

from hypertorch.inner import tasks
from tests.helpers.memo import set_aside


def routes_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the measured routes "vmap" and "loop" by turns, as on a busy machine."""
    turns = cycle(("vmap", "loop"))
    set_aside(monkeypatch, tasks.TASKS)
    monkeypatch.setattr(tasks, "_faster_route", lambda *_: next(turns))


def noisy_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
