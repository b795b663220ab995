"""What is traced and compiled where the loop over the steps is inside the program: forward, back, and all of a run.

A loop is `scan` of one step, or of one step's vjp: one step is compiled, whatever the horizon is. The index of a step
is a tensor in it. A rule can count with it, and cannot branch on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from hypertorch.hypergradients.reverse_mode.compiled.single_steps import Program
from hypertorch.hypergradients.reverse_mode.compiled.step_data import Data
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


def forward(
    program: Program, state: InnerState, moving: TensorDict, fixed: TensorDict, data: Data, counters: Tensor
) -> tuple[InnerState, list[Tensor], Tensor]:
    """Returns the state after the steps, the states before each, and the inner losses before each."""
    variables = {**moving, **fixed}

    def body(now: list[Tensor], at: tuple[Any, dict[int, Tensor]]) -> tuple[list[Tensor], tuple[list[Tensor], Tensor]]:
        index, own = at
        loop = program.loop(lambda _: data.at(own))
        end, loss = loop.transition(state.replace_tensors(now), variables, index, route="functional")
        assert loss.value is not None
        return _carried(end.tensors(), index), (own_memory(now), loss.value.clone())

    last, (before, values) = scan(body, state.tensors(), (counters, data.stacked))
    return state.replace_tensors(last), before, values


def back(
    program: Program,
    end: InnerState,
    before: list[Tensor],
    moving: TensorDict,
    fixed: TensorDict,
    data: Data,
    counters: Tensor,
    seeds: list[Tensor],
) -> tuple[TensorDict, list[Tensor], Tensor | None, Tensor]:
    """Returns what the steps and their vjps give.

    Namely their part of the derivative in the variables, the cotangents of their start, the sum of their terms of the
    outer loss, and the inner losses before each.
    """

    def body(carry: tuple[list[Tensor], TensorDict, list[Tensor]], at: Any) -> Any:
        cotangents, grads, total = carry
        now, index, own = at
        loop = program.loop(lambda _: data.at(own))

        def step(tensors: list[Tensor], own_moving: TensorDict) -> tuple[list[Tensor], Tensor | None]:
            variables = {**own_moving, **fixed}
            after, loss = loop.transition(end.replace_tensors(tensors), variables, index, route="functional")
            term = loop.term(after, variables, index)
            return [*after.tensors(), *([] if term is None else [term])], loss.value

        pulled: Any = torch.func.vjp(step, now, moving, has_aux=True)
        outputs, pull, value = pulled
        terms = outputs[len(cotangents) :]
        earlier, part = pull([*cotangents, *(torch.ones_like(term) for term in terms)])
        sums = [sum_ + term for sum_, term in zip(total, terms, strict=True)]
        gathered = _carried([grads[name] + part[name] for name in grads], index)
        return (_carried(earlier, index), dict(zip(grads, gathered, strict=True)), sums), value.clone()

    zeros = {name: torch.zeros_like(value) for name, value in moving.items()}
    none = [torch.zeros((), dtype=seeds[0].dtype, device=seeds[0].device)] if program.has_terms else []
    start = (own_memory(seeds), zeros, none)
    (earlier, grads, total), values = scan(body, start, (before, counters, data.stacked), reverse=True)
    return grads, earlier, total[0] if total else None, values


def whole(
    program: Program, moving: TensorDict, fixed: TensorDict, data: Data, counters: Tensor
) -> tuple[TensorDict, Tensor, InnerState, Tensor]:
    """Returns the derivative of the outer loss in `moving`, the outer loss, the last state and the inner losses.

    From the initial state to the hypergradient in one program, with a loop forward and one back inside.
    """
    loop = program.loop(lambda _: data.first)
    first = loop.initial({**moving, **fixed})

    def start(own: TensorDict) -> list[Tensor]:
        return _own_with_path(loop.initial({**own, **fixed}).tensors())

    def outer(tensors: list[Tensor], own: TensorDict) -> Tensor:
        return loop.outer(first.replace_tensors(tensors).params, {**own, **fixed})

    begun: Any = torch.func.vjp(start, moving)
    tensors, pull_start = begun
    last, before, values = forward(program, first.replace_tensors(own_memory(tensors)), moving, fixed, data, counters)
    judged: Any = torch.func.vjp(outer, last.tensors(), moving)
    outer_loss, pull_outer = judged
    seeds, direct = pull_outer(torch.ones_like(outer_loss))
    grads, earlier, term, _ = back(program, last, before, moving, fixed, data, counters, seeds)
    (of_start,) = pull_start(earlier)
    total = {name: direct[name] + grads[name] + of_start[name] for name in moving}
    return total, outer_loss if term is None else outer_loss + term, last, values


def _carried(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    """Returns the tensors as new ones, for the next step of a loop in a program.

    PyTorch's compiler takes what a step hands on as it got it (a sum to which zero is added, a param without a
    gradient) for a tensor with memory of its own, and gives the memory that it shares to others. The factor is one,
    and the compiler does not know.
    """
    is_step = index >= 0
    return [(value * is_step).contiguous() for value in tensors]


def own_memory(tensors: list[Tensor]) -> list[Tensor]:
    """Returns tensors with memory of their own: the loop of a program writes each of its states to a place."""
    return _own_with_path([value.detach() for value in tensors])


def _own_with_path(tensors: list[Tensor]) -> list[Tensor]:
    return [value.clone(memory_format=torch.contiguous_format) for value in tensors]
