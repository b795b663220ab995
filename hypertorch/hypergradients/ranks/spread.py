"""A hypergradient that several processes compute together: each computes a share, and all get the sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.hypergradients.base import Hypergradient
from hypertorch.hypergradients.reverse_mode.sweep import Grads
from hypertorch.inner.ranks import Ranks, arguments, check_same_arguments
from hypertorch.problem import BilevelProblem
from hypertorch.types import TensorDict, TensorMapping

_LOSS, _PATHS, _ARGUMENTS = "outer loss", "paths", "arguments"
_NO_TASKS_AXIS = ("index", "shared.")


def check_spread(problem: BilevelProblem, backend: Hypergradient, hparams: TensorMapping, ranks: Ranks) -> None:
    """Raises `IncompatibleBackendError` if the work does not suffice for a share of it for every process."""
    if problem.num_tasks is not None:
        if problem.num_tasks < ranks.size:
            raise IncompatibleBackendError(
                f"`num_tasks` is {problem.num_tasks}, but {ranks.size} processes share the tasks: some would have "
                f"none. Start at most {problem.num_tasks} of them by `torchrun --nproc-per-node`, or raise `num_tasks`."
            )
        return
    parts = backend.num_parts(hparams)
    if parts < ranks.size:
        work = "in one piece" if parts == 1 else f"in at most {parts} parts"
        raise IncompatibleBackendError(
            f"`{type(backend).__name__}` differentiates a single inner problem {work}, but {ranks.size} processes "
            "would share it: some would have nothing to do. Start fewer of them by `torchrun --nproc-per-node`; or use "
            "a problem with tasks, or `Forward`, `ForwardGradient` or `EvolutionStrategies` with as many entries, "
            "samples or pairs."
        )


def sum_of_ranks(
    ranks: Ranks,
    compute: Callable[[], tuple[Grads, Tensor]],
    hparams: TensorMapping,
    outer_step: int,
    *,
    has_tasks: bool,
) -> tuple[Grads, Tensor]:
    """Returns the sum of what every process computes: the same bits on every one.

    The order of the sum is that of the ranks, in pairs. An error on one process is raised on all of them.

    Cost: one collective, and memory for one hypergradient per process.

    Args:
        ranks: the processes.
        compute: returns this process's part of the hypergradient, and of the outer loss.
        hparams: the outer variables.
        outer_step: the outer step.
        has_tasks: whether the outer losses of the processes add up; else each has the whole of it.

    Raises:
        ValueError: if the processes do not have the same outer variables.
    """
    loss_like = widest = torch.zeros((), dtype=torch.float64)

    def own() -> TensorDict:
        nonlocal loss_like
        grads, loss_like = compute()
        parts = {name: torch.zeros_like(hparams[name]) if grad is None else grad for name, grad in grads.items()}
        return {
            **tree.with_prefix("grads", parts),
            _LOSS: loss_like.to(widest),
            _PATHS: torch.tensor([grad is not None for grad in grads.values()], dtype=torch.uint8),
            _ARGUMENTS: arguments(hparams, outer_step),
        }

    like = {
        **tree.with_prefix("grads", {name: torch.empty_like(value) for name, value in hparams.items()}),
        _LOSS: widest,
        _PATHS: torch.zeros(len(hparams), dtype=torch.uint8),
        _ARGUMENTS: torch.zeros(1 + len(hparams), dtype=torch.int64),
    }
    found = ranks.gather(own, like)
    check_same_arguments([one[_ARGUMENTS] for one in found], list(hparams))
    total, losses = tree.PairwiseSum(), tree.PairwiseSum()
    for one in found:
        paths = dict(zip(hparams, one[_PATHS].tolist(), strict=True))
        parts = tree.without_prefix("grads", one)
        total.add({name: parts[name] if paths[name] else None for name in hparams})
        losses.add({_LOSS: one[_LOSS].to(loss_like.device, loss_like.dtype)})
    outer_loss = losses.total()[_LOSS] if has_tasks else found[0][_LOSS].to(loss_like.device, loss_like.dtype)
    assert outer_loss is not None
    return total.total(), outer_loss


def carry_of_ranks(ranks: Ranks, carry: TensorDict, num_tasks: int) -> TensorDict:
    """Returns the carry of all tasks from those of this process's tasks.

    Cost: one collective, where there is a carry.
    """
    own = {name: value for name, value in carry.items() if not name.startswith(_NO_TASKS_AXIS)}
    found = ranks.gather(lambda: own, own, rows=dict.fromkeys(own, num_tasks)) if own else []
    return {**carry, **(tree.concatenate(found) if found else {})}
