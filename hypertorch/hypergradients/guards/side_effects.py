"""What a problem's functions do beside what they return: noticed on the first task, under every backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import BackwardHook

from hypertorch import tree
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.autodiff.parameter_slots import watching
from hypertorch.errors import IncompatibleBackendError, ReplayError
from hypertorch.hypergradients.guards.first_task import FirstTask, arguments_kept
from hypertorch.hypergradients.guards.running_statistics import refuse_dropped_buffers
from hypertorch.inner.loop import InnerLoop
from hypertorch.inner.state import InnerState
from hypertorch.types import Batch, TensorDict

_TOLERANCE = 100.0  # in units of machine epsilon, relative to the largest entry: some kernels differ in the last bits


def refuse_side_effects(first: FirstTask, use: Literal["values", "first", "second"]) -> None:
    """Raises if functions of a problem are not functions of their arguments, or do what a derivative misses.

    Cost: on the first task, two steps and outer losses, which must agree; and unless the backend works by values alone
    two inner gradients, and eight evaluations of losses with four derivatives of them.

    Args:
        first: the first task.
        use: what the backend takes of the inner loss beside its gradient. By values alone it can miss nothing.

    Raises:
        ReplayError: if something differs when it is evaluated again.
        IncompatibleBackendError: if a derivative would miss a path.
    """
    # The loop is made twice, with data drawn and context computed anew: a counter in either of them shows.
    once = _results(*first.loop())
    loop, variables = first.loop()
    with _WatchingHooks() as hooks:
        again = _results(loop, variables)
    _refuse_difference(again, once, loop.inner_eps)
    if use != "values":
        _refuse_late_reads(loop, variables)
        refuse_dropped_buffers(loop, variables)
    if use == "second" and hooks.change_gradients:
        raise IncompatibleBackendError(
            "the inner problem registers a hook on a tensor, which changes the inner gradient (or a backward hook of a "
            "module does): the same hook would change the derivatives of that gradient, and the hypergradient would be "
            "wrong. Leave the hook out. Change "
            "gradients in the dynamics (`ht.dynamics.Clipped`, or an `update` of your own), or write the change into "
            "the loss."
        )


class _WatchingHooks(TorchFunctionMode):
    """Notices hooks on tensors, and full backward hooks of modules, that return another gradient.

    Attributes:
        change_gradients: whether one did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.change_gradients = False

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.Tensor.register_hook:
            return func(*args, **(kwargs or {}))
        tensor, hook = inspect.signature(func).bind(*args, **(kwargs or {})).args
        return func(tensor, self._watched(hook))

    def __enter__(self) -> _WatchingHooks:
        made = self._made = BackwardHook.__init__

        def watched(own: BackwardHook, module: nn.Module, hooks: Iterable[Any], before: Iterable[Any]) -> None:
            made(own, module, [*map(self._watched, hooks)], [*map(self._watched, before)])

        # A module's hooks are handed to this class, and to no function that a mode would see.
        BackwardHook.__init__ = watched  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        BackwardHook.__init__ = self._made  # type: ignore[method-assign]
        super().__exit__(*error)

    def _watched(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*gradients: Any) -> Any:
            changed = hook(*gradients)
            self.change_gradients |= changed is not None
            return changed

        return call


def refuse_changed_arguments(loop: InnerLoop, variables: TensorDict) -> None:
    """Raises if `init_params`, `dynamics.step` or a loss changes the dicts or the tensors that it is handed.

    Cost: one evaluation of each.

    Raises:
        ReplayError: naming the function and the argument.
    """
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
        with arguments_kept("OuterProblem.step_loss", params=params, hparams=hparams):
            loop.term(InnerState(params, {}), hparams, 0)
    with arguments_kept("OuterProblem.loss", params=params, hparams=hparams, batch=_named(loop.outer_batch)):
        loop.outer(params, hparams)


def _copies(values: TensorDict) -> TensorDict:
    """Returns copies that ask for a derivative, and that PyTorch lets a function change in place."""
    return {name: value.clone() for name, value in tree.leaves_requiring_grad(values).items()}


def _named(batch: Batch) -> TensorDict:
    return {str(position): value for position, value in enumerate(tree.batch_tensors(batch))}


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
        results["OuterProblem.loss"] = [loop.outer(state.params, constants)]
    # What is handed out as it is (a module's own parameter) asks for its gradient under `no_grad`, too.
    return {name: [value.detach() for value in values] for name, values in results.items()}


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
    # Of NaN and infinity a run says more: they must be at the same places, and are no measure of rounding.
    finite = expected[expected.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(found, expected, rtol=close, atol=close * size, equal_nan=True)
