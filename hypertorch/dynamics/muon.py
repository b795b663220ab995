"""Muon, as `torch.optim.Muon` defines it: descent along an orthogonalised momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hypertorch.dynamics.base import GradientDynamics, zero_buffers
from hypertorch.dynamics.declared import MEAN_DECAY, NON_NEGATIVE, STEP_SIZE, WEIGHT_DECAY, Range, setting
from hypertorch.dynamics.elementwise import descend, running_mean
from hypertorch.dynamics.settings import Setting, resolve
from hypertorch.types import TensorDict, TensorMapping

_COEFFICIENT = Range(-math.inf, math.inf, None, "A coefficient is a number.")
_EPS = Range(0.0, math.inf, NON_NEGATIVE, "It keeps the norm in the denominator away from 0.")
_OF_A_MATRIX = ("ns_a", "ns_b", "ns_c", "eps")


@dataclass(frozen=True, kw_only=True, eq=False)
class Muon(GradientDynamics):
    """Descent along a momentum whose singular values are pushed towards 1; for matrices alone.

    With `g` the gradient of the inner loss in a matrix of shape `(rows, columns)`, and the momentum `b`, zero at first:

        b = momentum * b + (1 - momentum) * g
        u = momentum * b + (1 - momentum) * g  if nesterov else  b
        x = u / max(|u|, eps)                                             with the Frobenius norm
        x = ns_a * x + (ns_b * x x' + ns_c * (x x')^2) x                  `ns_steps` times (Newton-Schulz)
        w = w - lr * weight_decay * w - lr * s * x

    with `s = sqrt(max(1, rows / columns))`, or `0.2 * sqrt(max(rows, columns))` for `adjust_lr_fn="match_rms_adamw"`.

    `torch.optim.Muon` takes the Newton-Schulz steps in bfloat16, whatever the dtype of the params: its rounding has no
    derivative. Here they are taken in the dtype of the params, so that runs differ from PyTorch's by that rounding (in
    relative terms some 1e-2 of a step) and by nothing else.

    The orthogonalised matrix does not depend on the scale of `u`: an outer variable that only scales the inner loss
    has a hypergradient of zero, which is right. Where `|u|` passes `eps` the map bends; the hypergradient is finite at
    a gradient of zero.

    Cost: one gradient per step, and `3 * ns_steps` products of matrices; state of the size of the parameters.

    Args:
        lr: step size, at least 0.
        momentum: what the running mean of the gradient keeps at each step, in [0, 1).
        weight_decay: part of the parameter taken off at each step, in units of the step size, at least 0.
        ns_a: coefficient of the polynomial, one number for a matrix.
        ns_b: the next.
        ns_c: the last. (In `torch.optim` these three are the tuple `ns_coefficients`.)
        eps: least norm that `u` is divided by, at least 0; it cannot be learnt.
        ns_steps: Newton-Schulz steps, from 0 to 99.
        nesterov: look ahead along the momentum.
        adjust_lr_fn: "original" or "match_rms_adamw", the factor `s`.

    Raises:
        ValueError: if a number is out of its range, `eps` is a `Hyper`, or `adjust_lr_fn` is unknown; (from a run) if a
            parameter is no matrix, or a coefficient has several numbers for one.
        TypeError: if a setting is of no known kind.

    References:
        Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks; Liu et al. (2025), Muon is
        scalable for LLM training (`match_rms_adamw`).
    """

    separate_params: ClassVar[bool] = True

    lr: Setting = setting(STEP_SIZE, 1e-3)
    momentum: Setting = setting(MEAN_DECAY, 0.95)
    weight_decay: Setting = setting(WEIGHT_DECAY, 0.1)
    ns_a: Setting = setting(_COEFFICIENT, 3.4445)
    ns_b: Setting = setting(_COEFFICIENT, -4.7750)
    ns_c: Setting = setting(_COEFFICIENT, 2.0315)
    eps: Setting = setting(_EPS, 1e-7, never_learnt="no step depends on it, unless a matrix has a norm below it")
    ns_steps: int = 5
    nesterov: bool = True
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.ns_steps, bool) or not isinstance(self.ns_steps, int) or not 0 <= self.ns_steps < 100:
            raise ValueError(
                f"`ns_steps` of `Muon` is {self.ns_steps!r}: the Newton-Schulz iteration takes a whole number of "
                "steps, from 0 to 99. 5 is usual."
            )
        if self.adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(
                f"`adjust_lr_fn` of `Muon` is {self.adjust_lr_fn!r}, which names no factor of the step size. Use "
                "'original' or 'match_rms_adamw'."
            )

    def check(self, params: TensorMapping, hparams: TensorMapping, num_steps: int) -> None:
        """Raises `ValueError` if a parameter is no matrix, or the settings do not fit."""
        for name, param in params.items():
            if param.dim() != 2:
                raise ValueError(
                    f"`Muon` got the inner parameter `{name}` of shape {tuple(param.shape)}: it orthogonalises "
                    "matrices, of two axes. Give biases, kernels of convolutions and all else a rule of their own, as "
                    "in `Groups({'*.weight': Muon(), '*': AdamW()})`, where a name or pattern covers matrices alone."
                )
        super().check(params, hparams, num_steps)
        # A schedule has no value at step 0 where there is no step.
        for own in _OF_A_MATRIX if num_steps else ():
            for name in params:
                value = resolve(self.settings()[own], hparams, name, 0)
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise ValueError(
                        f"`{own}` of `Muon` has shape {tuple(value.shape)} for the inner parameter `{name}`: it "
                        "acts on a matrix as a whole, so an entry of its own for each weight has no meaning. Give one "
                        "number for each matrix."
                    )

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the momenta, `momentum_buffer.{parameter}`, zero."""
        return zero_buffers(params, "momentum_buffer")

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and momenta after one step along `grads`; the last two axes are those of the matrix."""
        lr, momentum, weight_decay, ns_a, ns_b, ns_c, eps = self.values(params, hparams, index)
        new_params: TensorDict = {}
        new_state: TensorDict = {}
        for name, w in params.items():
            # A mean, as in PyTorch's own Muon: `momentum` scales the gradient too, unlike in `SGD`.
            b = running_mean(state[f"momentum_buffer.{name}"], grads[name], momentum[name])
            new_state[f"momentum_buffer.{name}"] = b
            u = running_mean(b, grads[name], momentum[name]) if self.nesterov else b
            if "weight_decay" in self.active:
                # With the step size itself, as in PyTorch: the factor for the shape is for the other part alone.
                w = (1.0 - lr[name] * weight_decay[name]) * w
            x = _orthogonalised(u, (ns_a[name], ns_b[name], ns_c[name]), eps[name], self.ns_steps)
            new_params[name] = descend(w, x, lr[name] * self._adjustment(w))
        return new_params, new_state

    def _adjustment(self, param: Tensor) -> float:
        """Returns the factor of the step size that makes steps of matrices of all shapes comparable."""
        # The last two: with tasks there is an axis in front.
        rows, columns = param.shape[-2:]
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))


def _orthogonalised(
    matrix: Tensor, coefficients: tuple[float | Tensor, ...], eps: float | Tensor, num_steps: int
) -> Tensor:
    """Returns the matrix with its singular values moved towards 1 by a quintic polynomial, applied again and again."""
    a, b, c = coefficients
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix  # the smaller of the two Gram matrices
    # Bounded before the root, whose derivative at zero is infinite.
    x = x / x.square().sum(dim=(-2, -1), keepdim=True).clamp(min=eps * eps).sqrt()
    for _ in range(num_steps):
        # One Gram matrix serves both terms of the quintic, as in the reference code.
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x
