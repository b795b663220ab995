"""Learnt inner step sizes: a dynamics whose step size becomes an outer variable."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Literal, TypeAlias

import torch

from hypertorch.dynamics import Dynamics, Hyper
from hypertorch.types import TensorDict, TensorMapping

LearnLR: TypeAlias = Literal["one", "step", "parameter", "step,parameter"] | None
LOG_LR = "log_lr"


def learnt_step_size(
    dynamics: Dynamics, learn: LearnLR, params: TensorMapping, num_steps: int
) -> tuple[Dynamics, TensorDict]:
    """Returns the dynamics with its step size read from the outer variables, and their first values.

    The logarithm is learnt, so that a step size stays positive and moves by factors.

    Args:
        dynamics: with a numeric field `lr`.
        learn: None, not learnt; "one" for all; "step", one per inner step; "parameter", one per weight (Meta-SGD);
            "step,parameter", both.
        params: the inner parameters, for their names and shapes.
        num_steps: the horizon (unit: steps).

    Raises:
        ValueError: if `learn` is unknown, or the dynamics has no positive number as its `lr`.
    """
    if learn is None:
        return dynamics, {}
    if learn not in ("one", "step", "parameter", "step,parameter"):
        raise ValueError(
            f"`learn_lr` is {learn!r}, which names no way to learn a step size. Use None, 'one', 'step', 'parameter' "
            "or 'step,parameter'."
        )
    if not is_dataclass(dynamics) or "lr" not in {entry.name for entry in fields(dynamics)}:
        raise ValueError(
            f"`learn_lr` is {learn!r}, but `{type(dynamics).__name__}` has no field `lr` to learn. Use a dynamics with "
            "a step size, or `learn_lr=None`."
        )
    start = getattr(dynamics, "lr")  # noqa: B009 (a field of a dataclass known by name only)
    if not isinstance(start, (int, float)) or not start > 0:
        raise ValueError(
            f"`lr` of the dynamics is {start!r}, but `learn_lr` is {learn!r}: learning starts from a positive number. "
            "Give one, or `learn_lr=None` to keep your own `Hyper` or schedule."
        )
    per = None if learn == "one" else learn
    return replace(dynamics, lr=Hyper(LOG_LR, torch.exp, per)), _log_values(float(start), per, params, num_steps)


def _log_values(start: float, per: str | None, params: TensorMapping, num_steps: int) -> TensorDict:
    some = next(iter(params.values()))
    log = torch.tensor(start, dtype=some.dtype, device=some.device).log()
    if per is None:
        return {LOG_LR: log}
    if per == "step":
        return {LOG_LR: log.expand(num_steps).clone()}
    axes = (num_steps,) if per == "step,parameter" else ()
    return {f"{LOG_LR}.{name}": log.expand(*axes, *value.shape).clone() for name, value in params.items()}
