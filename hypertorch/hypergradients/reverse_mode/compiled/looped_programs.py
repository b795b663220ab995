"""What is traced and compiled where the loop over the steps is inside the program: forward, back, and all of a run.

A loop is `scan` of one step, or of one step's vjp: one step is compiled, whatever the horizon is. The index of a step
is a tensor in it. A rule can count with it, and cannot branch on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from hypertorch.hypergradients.reverse_mode.compiled.single_steps import Program
from hypertorch.hypergradients.reverse_mode.compiled.step_data import Data
from hypertorch.hypergradients.reverse_mode.compiled.step_index import as_number
from hypertorch.inner.state import InnerState
from hypertorch.types import TensorDict


def forward(
    program: Program, state: InnerState, moving: TensorDict, fixed: TensorDict, data: Data, counters: Tensor
) -> tuple[InnerState, list[Tensor], Tensor]:
    """Returns the state after the steps, the states before each, and the inner losses before each."""
    variables = {**moving, **fixed}

    def body(now: list[Tensor], counter: Tensor, *own: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        loop, index = program.loop(lambda _: data.at(own)), as_number(counter)
        end, loss = loop.transition(state.replace_tensors(now), variables, index, route="functional")
        assert loss.value is not None
        return _carried(end.tensors(), counter), [*own_memory(now), loss.value.clone()]

    last, (*before, values) = _scan(body, state.tensors(), [counters, *data.stacked.values()])
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
    num_tensors, names = len(seeds), list(moving)

    def body(carry: list[Tensor], counter: Tensor, *rest: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        cotangents, sums, total = _split(carry, num_tensors, len(names))
        now, own = rest[:num_tensors], rest[num_tensors:]
        loop, index = program.loop(lambda _: data.at(own)), as_number(counter)

        def step(tensors: list[Tensor], own_moving: TensorDict) -> tuple[list[Tensor], Tensor | None]:
            variables = {**own_moving, **fixed}
            after, loss = loop.transition(end.replace_tensors(tensors), variables, index, route="functional")
            term = loop.term(after, variables, index)
            return [*after.tensors(), *([] if term is None else [term])], loss.value

        pulled: Any = torch.func.vjp(step, [*now], moving, has_aux=True)
        outputs, pull, value = pulled
        terms = outputs[num_tensors:]
        earlier, part = pull([*cotangents, *(torch.ones_like(term) for term in terms)])
        gathered = [sum_ + part[name] for sum_, name in zip(sums, names, strict=True)]
        total = [sum_ + term for sum_, term in zip(total, terms, strict=True)]
        return [*_carried([*earlier, *gathered], counter), *total], [value.clone()]

    zeros = [torch.zeros_like(value) for value in moving.values()]
    none = [torch.zeros((), dtype=seeds[0].dtype, device=seeds[0].device)] if program.has_terms else []
    # From the last step to the first.
    turned = [value.flip(0) for value in (counters, *before, *data.stacked.values())]
    last, (values,) = _scan(body, [*own_memory(seeds), *zeros, *none], turned)
    earlier, grads, total = _split(last, num_tensors, len(names))
    return dict(zip(names, grads, strict=True)), earlier, total[0] if total else None, values.flip(0)


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


def _scan(
    body: Callable[..., tuple[list[Tensor], list[Tensor]]], start: list[Tensor], each: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what steps carry in the end, and what each of them gives, stacked.

    PyTorch's `scan` without what it does for nested arguments, which takes a fifth of the time of tracing.

    Args:
        body: of what is carried, as one list, and of the entries of a step; it returns what is carried, and more.
        start: what the first step is given.
        each: the tensors whose entries along the first axis belong to a step.
    """

    def flat(*tensors: Tensor, combine_fn: Callable[..., Any]) -> Any:
        return combine_fn([*tensors[: len(start)]], *tensors[len(start) :])

    last, given = scan_op(partial(flat, combine_fn=body), start, each, ())
    return last, given


def _split(tensors: list[Tensor], *lengths: int) -> list[list[Tensor]]:
    """Returns a list in parts of these lengths, and the rest."""
    parts = []
    for length in lengths:
        parts.append(tensors[:length])
        tensors = tensors[length:]
    return [*parts, tensors]


def _carried(tensors: list[Tensor], counter: Tensor) -> list[Tensor]:
    """Returns the tensors as new ones, for the next step of a loop in a program.

    PyTorch's compiler takes what a step hands on as it got it (a sum to which zero is added, a param without a
    gradient) for a tensor with memory of its own, and gives the memory that it shares to others. The factor is one,
    and the compiler does not know.
    """
    is_step = counter >= 0
    return [(value * is_step).contiguous() for value in tensors]


def own_memory(tensors: list[Tensor]) -> list[Tensor]:
    """Returns tensors with memory of their own: the loop of a program writes each of its states to a place."""
    return _own_with_path([value.detach() for value in tensors])


def _own_with_path(tensors: list[Tensor]) -> list[Tensor]:
    return [value.clone(memory_format=torch.contiguous_format) for value in tensors]
