"""An inner optimiser of one's own: Polyak's heavy ball, whose two settings can be learnt."""

from dataclasses import dataclass

import torch

import hypertorch as ht
from hypertorch.dynamics import Range, Setting, setting


@dataclass(frozen=True, kw_only=True, eq=False)
class HeavyBall(ht.GradientDynamics):
    """`w_{t+1} = w_t - lr g_t + inertia (w_t - w_{t-1})`."""

    # Declared once: the numbers allowed, what keeps a learnt one among them, and what the message says.
    lr: Setting = setting(Range(0.0, float("inf"), ht.Positive(), "A step size is positive."))
    inertia: Setting = setting(Range(0.0, 1.0, ht.Box(lower=0.0, upper=0.999), "At 1 the ball never stops."), 0.9)

    def init(self, params, hparams):
        # A buffer is called `{buffer}.{parameter}`; here it is the last move, at first none.
        return {f"move.{name}": torch.zeros_like(value) for name, value in params.items()}

    def update(self, grads, params, state, hparams, index):
        # A number, a schedule, a tensor or an outer variable: `values` reads each, for every parameter.
        lr, inertia = self.values(params, hparams, index)
        moves = {name: inertia[name] * state[f"move.{name}"] - lr[name] * grads[name] for name in params}
        return (
            {name: value + moves[name] for name, value in params.items()},
            {f"move.{name}": move for name, move in moves.items()},
        )
