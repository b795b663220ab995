"""Outer variables that become NaN or infinite in an outer step: no checkpoint and no validation has them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hypertorch import outer
from hypertorch.errors import NonFiniteError
from tests.outer.problems import Quadratics
from tests.outer.runs import make_loop


class Leaping(torch.optim.SGD):
    """Descends, and puts one entry out of bounds in one of its steps."""

    def __init__(self, variables: list[Tensor], *, at: int, to: float) -> None:
        super().__init__(variables, lr=0.1)
        self._at, self._to, self._taken = at, to, 0

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self._taken += 1
        if self._taken == self._at:
            with torch.no_grad():
                self.param_groups[0]["params"][0][1] = self._to


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_last_step_that_leaves_the_numbers_is_refused(value: float, tmp_path: Path) -> None:
    checkpoints = outer.Checkpoints(tmp_path, every=2)
    optimizer = partial(Leaping, at=5, to=value)
    expected = r"`hparams\['start'\]` holds NaN or infinity after 5 outer steps: .*outer learning rate.*step_00000004"
    with pytest.raises(NonFiniteError, match=expected):
        make_loop(optimizer=optimizer, checkpoints=checkpoints).run(5)
    assert [path.name for path in checkpoints.paths()] == ["step_00000002.safetensors", "step_00000004.safetensors"]
    assert not (tmp_path / "hparams.safetensors").exists()
    with pytest.raises(NonFiniteError, match="after 5 outer steps"):
        make_loop(optimizer=optimizer).run(5)


def test_infinity_is_in_no_checkpoint_and_in_no_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validation = outer.Validation(source=Quadratics(), every=3, num_episodes=4, metric="distance")
    optimizer = partial(Leaping, at=3, to=math.inf)
    with pytest.raises(NonFiniteError, match="after 3 outer steps"):
        make_loop(optimizer=optimizer, checkpoints=outer.Checkpoints(tmp_path, every=3)).run(9)
    assert list(tmp_path.glob("*.safetensors")) == []
    with monkeypatch.context() as patched:
        validated: list[int] = []
        patched.setattr(outer.Validation, "figure", lambda *_: validated.append(1) or 0.0)
        with pytest.raises(NonFiniteError, match="after 3 outer steps"):
            make_loop(optimizer=optimizer, validation=validation).run(9)
        assert len(validated) == 1  # the look at its metric before the first step


def test_an_interrupt_saves_no_infinity(tmp_path: Path) -> None:
    checkpoints = outer.Checkpoints(tmp_path, every=2)
    source = Quadratics(fail_at=3, failure=KeyboardInterrupt())
    with pytest.raises(NonFiniteError, match="after 3 outer steps"):
        make_loop(source, optimizer=partial(Leaping, at=3, to=math.inf), checkpoints=checkpoints).run(9)
    assert [path.name for path in checkpoints.paths()] == ["step_00000002.safetensors"]


def test_the_check_for_infinity_is_no_work_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypertorch.outer import run as run_module

    asked: list[str] = []
    monkeypatch.setattr(run_module, "check_finite", lambda hparams, *, where, remedy: asked.append(where))
    make_loop(checkpoints=outer.Checkpoints(tmp_path, every=10)).run(20)
    assert asked == ["after 10 outer steps", "after 20 outer steps", "after 20 outer steps"]
