"""What a problem's functions do beside what they return: noticed once for each kind of problem, under every backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.autodiff.parameter_slots import watching
from hypertorch.errors import IncompatibleBackendError, ReplayError
from hypertorch.hypergradients.guards.running_statistics import refuse_dropped_buffers
from hypertorch.inner import memo
from hypertorch.inner.bound_problem import BoundProblem
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.inner.tasks import TaskSlice
from hypertorch.types import Batch, TensorDict

_TOLERANCE = 100.0  # in units of machine epsilon, relative to the largest entry: some kernels differ in the last bits

CLEAN = "problems without side effects"
KEPT = "problems that leave their arguments as they are"


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstTask:
    """The first task of a problem, which is looked at for all.

    Attributes:
        bound: the problem.
        hparams: the outer variables.
        item: the tasks that its context is computed with, by itself or together; None for a problem without tasks.
    """

    bound: BoundProblem
    hparams: TensorDict
    item: TaskSlice | None

    def key(self, kind: Hashable) -> Hashable:
        """Returns what is the same for problems of which this task tells as much."""
        return kind, self.bound.problem.num_steps > 0, tuple(self.hparams)

    def loop(self) -> tuple[InnerLoop, TensorDict]:
        """Returns its loop and variables, with the outer data drawn and the context computed anew."""
        bound, item = self.bound.drawn_again(self.hparams), self.item
        leaves = tree.leaves_requiring_grad(self.hparams)
        # Copies: PyTorch would object to a change of leaves in words of its own.
        given = {name: value.clone() for name, value in leaves.items()}
        with arguments_kept("context", hparams=given):
            context = bound.context(given, item)
        if item is not None and not item.squeeze:
            own = context.keys() - set(bound.problem.shared_context)
            context = {name: value[0] if name in own else value for name, value in context.items()}
        task = None if item is None else replace(item, stop=item.start + 1, squeeze=True, whole=False)
        return bound.loop(task, context), {**leaves, **tree.leaves_requiring_grad(context)}


def refuse_changed_arguments(kind: Hashable, first: FirstTask) -> None:
    """Raises if a function of a problem changes the dicts or the tensors that it is handed.

    Cost: nothing for a kind of problem that was found to change none. Else, on the first task, one evaluation of each.

    Args:
        kind: what is the same for problems that run the same code.
        first: the first task.

    Raises:
        ReplayError: naming the function and the argument.
    """
    memo.recall(KEPT, first.key(kind), lambda: _refuse_changed_arguments(*first.loop()))


def refuse_side_effects(kind: Hashable, first: FirstTask, *, by_values: bool) -> None:
    """Raises if functions of a problem are not functions of their arguments, or do what a derivative misses.

    Cost: nothing for a kind of problem that was found to have none. Else, on the first task: one evaluation of each
    loss; two steps and outer losses, which must agree; and unless the backend works by values alone two inner
    gradients, and eight evaluations of losses with four derivatives of them.

    Args:
        kind: what is the same for problems that run the same code.
        first: the first task.
        by_values: whether the backend takes no derivative, which then can miss nothing.

    Raises:
        ReplayError: if something differs when it is evaluated again, or a function changes its arguments.
        IncompatibleBackendError: if a derivative would miss a path.
    """
    refuse_changed_arguments(kind, first)
    memo.recall(CLEAN, (first.key(kind), by_values), lambda: _look(first, by_values=by_values))


def _look(first: FirstTask, *, by_values: bool) -> None:
    # The loop is made twice, with data drawn and context computed anew: a counter in either of them shows.
    once = _results(*first.loop())
    loop, variables = first.loop()
    _refuse_difference(_results(loop, variables), once, loop.inner_eps)
    if not by_values:
        _refuse_late_reads(loop, variables)
        refuse_dropped_buffers(loop, variables)


def _refuse_changed_arguments(loop: InnerLoop, variables: TensorDict) -> None:
    """Raises if `init_params`, `dynamics.step` or a loss changes the dicts or the tensors that it is handed."""
    hparams = _copies(variables)
    with arguments_kept("InnerProblem.init_params", hparams=hparams):
        state = loop.initial(hparams).detached()
    params = {**state.params, **_copies(loop.trained(state.params))}
    if loop.num_steps:
        batch = loop.draw(loop.first_index)
        buffers = {name: state.params[name] for name in loop.problem.inner.buffers}
        loss = InnerLoss(loop.functions.inner, buffers, batch)
        loop.seed(loop.first_index)
        with arguments_kept("InnerProblem.loss", params=params, hparams=hparams, batch=_named(batch)):
            loss(loop.trained(params), hparams)
        trained, values = loop.trained(state.params), tree.detach(hparams)
        with torch.no_grad(), arguments_kept("dynamics.step", params=trained, state=state.dynamics, hparams=values):
            loop.dynamics.step(loss, trained, state.dynamics, values, loop.first_index)
        if loop.has_terms:
            with arguments_kept("OuterProblem.step_loss", params=params, hparams=hparams):
                loop.terms(InnerState(params, {}), hparams, 0)
    with arguments_kept("OuterProblem.loss", params=params, hparams=hparams, batch=_named(loop.outer_batch)):
        loop.outer(params, hparams)


def _copies(values: TensorDict) -> TensorDict:
    """Returns copies that ask for a derivative, and that PyTorch lets a function change in place."""
    return {name: value.clone() for name, value in tree.leaves_requiring_grad(values).items()}


def _named(batch: Batch) -> TensorDict:
    return {str(position): value for position, value in enumerate(tree.batch_tensors(batch))}


@contextmanager
def arguments_kept(function: str, **arguments: TensorDict) -> Iterator[None]:
    """Raises `ReplayError` at the end if a function has changed its arguments: the run would go on with what it left.

    Args:
        function: its name, for the message.
        arguments: the dicts that it is handed, by the names of its arguments.
    """
    before = {
        which: {name: (value, value.detach().clone()) for name, value in arguments[which].items()}
        for which in arguments
    }
    yield
    for which, entries in arguments.items():
        for name in {**before[which], **entries}:
            if not _is_kept(entries, name, before[which]):
                raise ReplayError(
                    f"`{function}` changes its argument `{which}[{name!r}]`: the run would go on with the changed "
                    "value, and steps that are run again would start from it. Leave arguments as they are: make a new "
                    f"dict, such as `{{**{which}, {name!r}: ...}}`, and new tensors, by operations that do not work "
                    "in place (no `clamp_`, no `.data`, no assignment to an index); or change a copy (`.clone()`)."
                )


def _is_kept(entries: TensorDict, name: str, before: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    # By identity first: a new tensor in the caller's dict is a change, whatever it holds.
    if name not in entries or name not in before or entries[name] is not before[name][0]:
        return False
    value, kept = entries[name].detach(), before[name][1]
    return bool(((value == kept) | ((value != value) & (kept != kept))).all())  # NaN is kept where it was


def _results(loop: InnerLoop, variables: TensorDict) -> dict[str, list[Tensor]]:
    """Returns what the functions of a problem return in a first step, by their names."""
    with torch.no_grad():
        constants = tree.detach(variables)
        state = loop.initial(constants)
        results = {"context": list(constants.values()), "InnerProblem.init_params": state.tensors()}
        if loop.num_steps:
            state, loss = loop.transition(state, constants, 0)
            results["InnerProblem.loss"] = [] if loss.value is None else [loss.value]
            results["InnerProblem.loss` or its gradient, or `dynamics.step"] = state.tensors()
            term = loop.term(state, constants, 0)
            results["OuterProblem.step_loss"] = [] if term is None else [term]
        return {**results, "OuterProblem.loss": [loop.outer(state.params, constants)]}


def _refuse_difference(again: dict[str, list[Tensor]], first: dict[str, list[Tensor]], inner_eps: float) -> None:
    for name, values in again.items():
        gap = _gap(values, first[name], inner_eps=inner_eps)
        if gap > 0.0:
            raise ReplayError(
                f"`{name}` differs by {gap:.3g} when it is evaluated again on the same arguments, with torch's "
                "generators seeded alike: a hypergradient would belong to neither. Let `batch`, `loss`, `init_params` "
                "and `context` depend on their arguments only (no iterator, no counter, no generator of your own, none "
                "of numpy's or Python's). What a module keeps from one pass to the next must be a buffer: register it, "
                "return its new value from the inner loss, and name it in `InnerProblem.buffers`."
            )


def _gap(again: list[Tensor], first: list[Tensor], *, inner_eps: float) -> float:
    """Returns how far results differ by more than rounding; 0 if they do not."""
    # What is infinite or NaN to begin with is not judged: a run says more of it.
    if len(again) != len(first) or any(
        left.shape != right.shape or left.dtype != right.dtype for left, right in zip(again, first, strict=True)
    ):
        return float("inf")
    numbers = [right for right in first if tree.is_differentiable(right) and right.numel()]
    if not all(bool(torch.isfinite(value).all()) for value in numbers):
        return 0.0
    size = max((float(value.abs().max()) for value in numbers), default=0.0)
    worst = 0.0
    for left, right in zip(again, first, strict=True):
        if not torch.equal(left, right):
            gap = float((left - right).abs().max()) if tree.is_differentiable(right) else 1.0
            eps = torch.finfo(right.dtype).eps if tree.is_differentiable(right) else 0.0
            worst = max(worst, gap if not gap <= _TOLERANCE * max(eps, inner_eps) * size else 0.0)
    return worst


def _refuse_late_reads(loop: InnerLoop, variables: TensorDict) -> None:
    """Raises if a module reads its weights at backward time, by other ways than hooks on saved tensors.

    Its call is over then, and it would find its own weights in place of those that it was called with. So these are
    exchanged for others between a loss and its derivative, which must not notice.
    """
    constants = tree.detach(variables)
    with torch.no_grad():
        state = loop.initial(constants).detached()
    losses: dict[str, Callable[[TensorDict], Tensor]] = {"outer": lambda params: loop.outer(params, constants)}
    if loop.num_steps:
        losses["inner"] = lambda params: loop.loss_at(state, 0)(loop.trained(params), constants)
    for which, loss in losses.items():
        # PyTorch's norm layers refuse to take statistics that ask for a derivative.
        leaves = tree.leaves_requiring_grad(loop.trained(state.params))
        asked = [value for value in leaves.values() if value.requires_grad]
        with torch.enable_grad(), watching() as watch:
            value = loss({**state.params, **leaves})
        if not watch.calls or not value.requires_grad:
            continue
        # The same graph is gone through twice, with other weights in the module in between.
        expected = torch.autograd.grad(value, asked, retain_graph=True, allow_unused=True)
        with ExitStack() as stack:
            for slots, names in {id(slots): (slots, names) for slots, names in watch.calls}.values():
                stack.enter_context(slots.holding_others(names))
            found = torch.autograd.grad(value, asked, allow_unused=True)
        if any(not _same(left, right) for left, right in zip(found, expected, strict=True)):
            kinds = sorted({type(slots.module).__name__ for slots, _ in watch.calls})
            raise IncompatibleBackendError(
                f"a module of the {which} loss ({', '.join(kinds)}) reads its weights at backward time, in a "
                "`torch.autograd.Function` or in a hook: it would find its own there, not those that it was called "
                "with. Hand the weights to the function as arguments and keep them by `ctx.save_for_backward`; in a "
                "hook, use tensors of the forward pass."
            )


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    close = torch.finfo(expected.dtype).eps ** 0.5
    return torch.allclose(found, expected, rtol=close, atol=close * float(expected.abs().max()), equal_nan=True)
