"""Another way to differentiate a step, compared once with the plain one for every kind of problem.

Forward mode and compilation both rest on formulas of PyTorch that are silently wrong for some operations: backward
passes that cannot be differentiated forwards (determinants, linear solves), and gradients that a hook changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.hypergradients.step_by_step import Steps
from hypertorch.inner_loop import InnerLoop


def disagreement(loop: InnerLoop, plain: Steps, other: Callable[[], Steps], *, runs: int) -> str | None:
    """Returns how the vjps of a step by two ways differ, in words; None if they agree up to rounding.

    The step is the second where there is one: what starts at zero has moved.

    Cost: three steps and two vjps, or as many more as `runs` says.

    Args:
        loop: a loop of at least one step.
        plain: the steps to compare with, by reverse over reverse without compilation.
        other: makes those that are judged.
        runs: vjps by them until it is the one to be judged; the first of compiled steps is not compiled.
    """
    step = min(1, loop.num_steps - 1)
    departure = plain.initial()
    for earlier in range(step):
        departure = plain.advance(departure, earlier)
    arrival = plain.advance(departure, step)
    cotangents = [_spread(value) if tree.is_differentiable(value) else None for value in arrival.tensors()]
    expected = plain.pull_back(departure, cotangents, step, arrival)
    judged = other()
    judged.initial()
    judged.advance(departure, step)
    found = expected
    for _ in range(runs):
        found = judged.pull_back(departure, cotangents, step, arrival)
    names = departure.names()
    error, name = max(
        _difference(found.grads, expected.grads),
        _difference(
            dict(zip(names, found.cotangents, strict=True)), dict(zip(names, expected.cotangents, strict=True))
        ),
    )
    eps = [torch.finfo(value.dtype).eps for value in arrival.tensors() if tree.is_differentiable(value)]
    if error <= min(10.0 * max([loop.inner_eps, *eps]) ** 0.5, 0.1):
        return None
    return f"the derivative of a step in `{name}` differs by {error:.1e}, relative, from that of reverse over reverse"


def _difference(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> tuple[float, str]:
    """Returns the largest relative difference and its name; what is small beside the others counts by their size.

    What is infinite or NaN to begin with is not judged: a run says more of it.
    """
    sizes = {name: float(_exact(value).norm()) for name, value in expected.items()}
    least = max([1e-3 * size for size in sizes.values() if math.isfinite(size)] + [1e-30])
    worst = (0.0, "")
    for name, size in sizes.items():
        if math.isfinite(size):
            gap = float((_exact(found.get(name)) - _exact(expected[name])).norm())
            worst = max(worst, (gap / max(size, least) if math.isfinite(gap) else math.inf, name))
    return worst


def _exact(value: Tensor | None) -> Tensor:
    """Returns a derivative in a precision of which nothing is lost; zero for none."""
    return torch.zeros(()) if value is None else value.detach().cpu().to(torch.complex128)


def _spread(value: Tensor) -> Tensor:
    """Returns a direction in which no sum is zero by symmetry, unlike that of ones."""
    return torch.arange(1, value.numel() + 1, device=value.device).cos().to(value.dtype).reshape(value.shape)
