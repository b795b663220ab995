"""The implicit function theorem at a point, with its derivatives taken by differences of gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.databases.differences import Difference, central_difference

MOST_ENTRIES = 200
"""Whose Hessian is written out."""

_RESIDUAL = 1e-6
_STEP_SIZE = 1e-4


class NotSharpError(Exception):
    """The formula cannot be told at this point; the message says why."""


def implicit_hypergradient(problem: ht.BilevelProblem, params: TensorDict, names: list[str]) -> dict[str, Difference]:
    """Returns `dE/dh - q' d/dh dL/dw` with `d2L/dw2 q = dE/dw` at given params.

    A dense Hessian by autograd finds `q`, and is not trusted: differences of the gradient along `q` must give `dE/dw`.

    Args:
        problem: a single problem, whose outer loss reads the params alone.
        params: where to evaluate, with buffers.
        names: of the params that are trained.

    Raises:
        NotSharpError: if the Hessian is singular or the loss not smooth.
    """
    leaves = {name: params[name].detach().clone().requires_grad_() for name in names}
    hparams = problem.init_hparams()

    def gradient(at: TensorDict, hparams: TensorDict, *, create_graph: bool = False) -> Tensor:
        loss = problem.inner.loss({**params, **at}, hparams, None)
        value = loss[0] if isinstance(loss, tuple) else loss
        return _flat(torch.autograd.grad(value, list(at.values()), create_graph=create_graph))

    with sdpa_kernel(SDPBackend.MATH):
        wanted = _flat(torch.autograd.grad(problem.outer.loss(leaves, hparams, None), list(leaves.values())))
        slopes = gradient(leaves, hparams, create_graph=True)
        rows = [_flat(torch.autograd.grad(slope, list(leaves.values()), retain_graph=True)) for slope in slopes]
        solution, info = torch.linalg.solve_ex(torch.stack(rows), wanted)
        length = float(solution.norm())
        if bool(info) or not 0.0 < length < float("inf"):
            raise NotSharpError("the Hessian is singular here")

        def along(distance: float) -> Tensor:
            parts = (distance / length * solution).split([value.numel() for value in leaves.values()])
            moved = {
                name: (value.detach() + part.view(value.shape)).requires_grad_()
                for (name, value), part in zip(leaves.items(), parts, strict=True)
            }
            return gradient(moved, hparams)

        near, far = ((along(e) - along(-e)) / (2 * e) for e in (_STEP_SIZE, 2 * _STEP_SIZE))
        residual = float((length * (4 * near - far) / 3 - wanted).norm() / wanted.norm())
        if not residual <= _RESIDUAL:
            raise NotSharpError(f"differences of the gradient leave {residual:.0e} of the linear system")

        def in_hparam(name: str, distance: float) -> float:
            return -float(gradient(leaves, {**hparams, name: hparams[name] + distance}) @ solution)

        return {name: central_difference(lambda distance, name=name: in_hparam(name, distance)) for name in hparams}


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([value.flatten() for value in tensors])
