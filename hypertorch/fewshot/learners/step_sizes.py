"""Learnt inner step sizes: a dynamics whose step size becomes an outer variable."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TypeAlias, get_args

import torch

from hypertorch.dynamics import Dynamics, Hyper
from hypertorch.dynamics.settings import Per
from hypertorch.types import TensorDict, TensorMapping

LearnLR: TypeAlias = Per | None
"""Whether a step size is learnt: None, or what its outer variable holds, in the words of `ht.Hyper`."""

LOG_LR = "log_lr"


def learnt_step_size(
    dynamics: Dynamics, learn: LearnLR, params: TensorMapping, num_steps: int
) -> tuple[Dynamics, TensorDict]:
    """Returns the dynamics with its step size read from the outer variables, and their first values.

    The logarithm is learnt, so that a step size stays positive and moves by factors.

    Args:
        dynamics: with a numeric field `lr`.
        learn: None for a step size that is not learnt; else `per` of the `Hyper` that takes its place: "one" for all,
            one per "step", one per "parameter" (Meta-SGD), or "step,parameter".
        params: the inner parameters, for their names and shapes.
        num_steps: the horizon (unit: steps).

    Raises:
        ValueError: if `learn` is unknown, or the dynamics has no positive number as its `lr`.
    """
    if learn is None:
        return dynamics, {}
    if learn not in get_args(Per):
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
    # `not start > 0` and not `start <= 0`, so that NaN is refused.
    if not isinstance(start, (int, float)) or not start > 0:
        raise ValueError(
            f"`lr` of the dynamics is {start!r}, but `learn_lr` is {learn!r}: learning starts from a positive number. "
            "Give one, or `learn_lr=None` to keep your own `Hyper` or schedule."
        )
    lr = Hyper(LOG_LR, torch.exp, learn)
    some = next(iter(params.values()))
    log = torch.tensor(float(start), dtype=some.dtype, device=some.device).log()
    steps = (num_steps,) if lr.per_step else ()
    shapes = {
        lr.entry_name(name): (*steps, *(value.shape if lr.per_parameter else ())) for name, value in params.items()
    }
    # Copies: the entries of an expanded tensor share memory, and an optimizer could not move them one by one.
    return replace(dynamics, lr=lr), {entry: log.expand(shape).clone() for entry, shape in shapes.items()}
