"""The inner loss of one step and its gradient; the only place that knows how the gradient is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.noise import generator_states, preserved_generators, set_generators
from hypertorch.autodiff.products import load_forward_mode, with_room
from hypertorch.autodiff.recomputation import saving_nothing
from hypertorch.types import Batch, TensorDict

LossFunction = Callable[[TensorDict, TensorDict, Batch], tuple[Tensor, TensorDict]]
"""`(params and buffers, hparams, batch) -> (loss per task or scalar, new values of the buffers)`."""


GradientRoute: TypeAlias = Literal["differentiable", "constant", "leaf", "functional", "dual"]
"""How the gradient of the inner loss enters the derivative of a step.

"differentiable": by autograd, with a graph where grad mode is on. "constant": its value only, as first-order methods
have it. "leaf": a leaf of the graph, so that what reaches the gradient can be read off it. "functional": by
`torch.func`, for a step that is itself transformed (forward mode, vectorised). "dual": by autograd on dual numbers
(forward mode, one tangent), with a graph of the gradient that keeps no tensor and is never gone through.
"""


class GradientCall(NamedTuple):
    """One evaluation of the gradient by the route "leaf".

    Attributes:
        params: where it was evaluated, with what graph they have.
        hparams: the outer variables that it was evaluated with.
        gradient: the leaves that were returned.
        noise: the states of torch's generators before it; empty while a function is compiled, which draws no noise.
    """

    params: TensorDict
    hparams: TensorDict
    gradient: TensorDict
    noise: tuple[Tensor, ...]


class MixedDerivative(NamedTuple):
    """The derivative of `<gradient, direction>` at one evaluation of the gradient.

    Attributes:
        params: its part in the params.
        hparams: its part in the hparams that ask for a derivative.
        value: the loss there, shape `()` or `(tasks,)`.
    """

    params: TensorDict
    hparams: TensorDict
    value: Tensor


class InnerLoss:
    """The inner loss of one step, its data, buffers and task route bound.

    Under a tasks axis the loss is one number per task and params have a leading tasks axis; the tasks do not
    interact, so the gradient of the sum holds each task's own gradient.

    Args:
        function: the loss with the task route bound.
        buffers: untrained inner variables (running statistics), which dynamics never see.
        batch: this step's data.
        route: how its gradient enters the derivative of a step.
        separate_params: whether the params are tensors of their own, none computed from another or part of the hparams.

    Attributes:
        value: the loss at the first evaluation of its gradient, shape `()` or `(tasks,)`; None before.
        new_buffers: the buffers as that evaluation left them.
        tracked_buffers: names of the buffers whose new values have a derivative in the params. PyTorch's own norm
            layers update their statistics without one, and refuse to take statistics that ask for it.
        evaluations: where the gradient was evaluated and the leaves that were returned, in order; "leaf" only.
        calls: the same evaluations with their graphs and noise; "leaf" only.
    """

    def __init__(
        self,
        function: LossFunction,
        buffers: TensorDict,
        batch: Batch,
        route: GradientRoute = "differentiable",
        *,
        separate_params: bool = False,
    ) -> None:
        self._function = function
        self._buffers = buffers
        self._batch = batch
        self._route = route
        self._separate_params = separate_params
        self.value: Tensor | None = None
        self.new_buffers: TensorDict = buffers
        self.tracked_buffers: frozenset[str] = frozenset()
        self.evaluations: list[tuple[TensorDict, TensorDict]] = []
        self.calls: list[GradientCall] = []

    @property
    def is_functional(self) -> bool:
        """Whether `torch.func` transforms the step, in which `torch.autograd` sees no graph."""
        return self._route == "functional"

    def __call__(self, params: TensorDict, hparams: TensorDict) -> Tensor:
        """Returns the loss, shape `()` or `(tasks,)`."""
        value, _ = self._function({**params, **self._buffers}, hparams, self._batch)
        return value

    def gradient(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the gradient in `params`, differentiable once more where grad mode is on.

        A parameter that the loss does not use gets zeros. The value and the new buffers of the first call are kept.

        Raises:
            ValueError: if the loss depends on no parameter.
        """
        if self._route == "functional":
            return self._functional_gradient(params, hparams)
        # A step that is run again needs its noise again. A traced function draws none, and cannot read a generator.
        watched = self._route == "leaf" and not torch.compiler.is_compiling()
        noise = generator_states(_device_of(params)) if watched else ()
        differentiable = torch.is_grad_enabled() and self._route == "differentiable"
        # Also under `no_grad`: the value of a gradient takes a graph of the loss.
        with torch.enable_grad():
            keep_path = differentiable or self._route == "dual"
            # Written out in three: every inner step pays for a call.
            if not keep_path:
                variables = {name: value.detach().requires_grad_() for name, value in params.items()}
            elif self._separate_params and differentiable:
                variables = {
                    name: value if value.requires_grad else value.detach().requires_grad_()
                    for name, value in params.items()
                }
            else:
                variables = {name: _own_view(value) for name, value in params.items()}
            value, new_buffers = self._function({**variables, **self._buffers}, hparams, self._batch)
            total = value.sum() if value.dim() else value
            # Without a graph PyTorch takes shorter formulas for some gradients (of determinants and linear solves among
            # them), which dual numbers go through with a wrong tangent, with none, or not at all.
            take = _gradient_saving_nothing if self._route == "dual" else torch.autograd.grad
            # `torch.autograd` and not `torch.func`, which takes twice as long in a plain loop.
            # A loss without a graph is handed over as a leaf and a param without a path is
            # allowed, so that the error below is raised, not PyTorch's.
            gradients = take(
                total if total.requires_grad else total.detach().requires_grad_(),
                list(variables.values()),
                create_graph=keep_path,
                allow_unused=True,
            )
        found: TensorDict = {}
        depends = False
        for (name, value_at), gradient in zip(variables.items(), gradients, strict=True):
            depends = depends or gradient is not None
            found[name] = torch.zeros_like(value_at) if gradient is None else gradient
        if not depends:
            raise ValueError(
                f"`InnerProblem.loss` returned a value that depends on none of the params {sorted(params)}: it has no "
                "gradient to descend. Compute it from `params`, without `.detach()` or `torch.no_grad()`."
            )
        if self.value is None:
            # A rule may take several gradients in a step: the loss of the step is that of the first.
            self.value = value.detach()
            if new_buffers:
                self.tracked_buffers = frozenset(name for name, buffer in new_buffers.items() if buffer.requires_grad)
                self.new_buffers = new_buffers if keep_path else tree.detach(new_buffers)
        if self._route == "leaf":
            # The rule goes on from leaves: their cotangent is what reaches the gradient, without what lies behind it.
            found = tree.leaves_requiring_grad(found)
            self.evaluations.append((tree.detach(params), found))
            self.calls.append(GradientCall(params, hparams, found, noise))
        return found

    def mixed_derivative(self, call: GradientCall, direction: TensorDict) -> MixedDerivative:
        """Returns the derivative of `<gradient, direction>` in the params and in the hparams of an evaluation.

        By symmetry it is the gradient in both, moved along the direction: forward over reverse, in one pass.

            d<grad_w L, a>/dw = H a = d/de grad_w L(w + e a, h),   d<grad_w L, a>/dh = d/de grad_h L(w + e a, h)

        Zeros where there is no path. Dual numbers under autograd would tell, but keep a graph of the tangents too.

        Cost: two to three gradients; memory of one gradient's graph, with its tangents.

        Args:
            call: the evaluation.
            direction: the cotangent of the gradient; entries that are missing are zero.
        """
        # Values alone: what lies behind the point is differentiated later, from the cotangents that are returned.
        params, hparams = tree.detach(call.params), tree.detach(call.hparams)
        moving = {name: hparams[name] for name, value in call.hparams.items() if value.requires_grad}

        def total(at: TensorDict, own: TensorDict) -> tuple[Tensor, Tensor]:
            value, _ = self._function({**at, **self._buffers}, {**hparams, **own}, self._batch)
            return value.sum(), value

        def gradients(along: TensorDict) -> tuple[tuple[TensorDict, TensorDict], Tensor]:
            pulled: Any = torch.func.vjp(total, {**params, **along}, moving, has_aux=True)
            joint, pull, value = pulled
            one = torch.ones_like(joint)
            if torch.compiler.is_compiling():
                return pull(one), value
            # `torch.func.grad` would make a graph of the backward pass, and hold twice as much.
            return pull(one, retain_graph=False, create_graph=False), value

        # A tangent takes the memory layout of its value, and there must be room for every entry of it.
        along = {name: with_room(params[name]) for name in direction}
        tangent = {name: with_room(value).to(params[name].dtype) for name, value in direction.items()}
        if torch.compiler.is_compiling():
            pushed: Any = torch.func.jvp(gradients, (along,), (tangent,), has_aux=True)
        else:
            load_forward_mode()
            device = _device_of(params)
            with torch.no_grad(), preserved_generators(device):
                set_generators(call.noise, device)  # an evaluation that is made again has the noise that it had
                pushed = torch.func.jvp(gradients, (along,), (tangent,), has_aux=True)
        _, (of_params, of_hparams), value = pushed
        # PyTorch gives some tangents of a 0-dimensional tensor another precision.
        return MixedDerivative(
            {name: part.detach().to(params[name].dtype) for name, part in of_params.items()},
            {name: part.detach().to(hparams[name].dtype) for name, part in of_hparams.items()},
            value.detach(),
        )

    def _functional_gradient(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        def total(variables: TensorDict) -> tuple[Tensor, tuple[Tensor, TensorDict]]:
            value, new_buffers = self._function({**variables, **self._buffers}, hparams, self._batch)
            return value.sum(), (value, new_buffers)

        # Inside a transform of `torch.func`, `torch.autograd.grad` sees no
        # graph. An unused param gets zeros by itself here.
        gradients, (value, new_buffers) = torch.func.grad(total, has_aux=True)(params)
        if self.value is None:
            self.value, self.new_buffers = value, new_buffers
        return gradients


def _device_of(params: TensorDict) -> torch.device:
    return next(iter(params.values())).device


def _own_view(param: Tensor) -> Tensor:
    """Returns a tensor of its own to differentiate in, with a path to the param.

    The param's tensor may also be a hyperparameter that the loss reads, or another param; the gradient in that tensor
    would gather their paths too.
    """
    view = param.view_as(param)
    return view if view.requires_grad else view.requires_grad_()


def _gradient_saving_nothing(output: Tensor, inputs: list[Tensor], **options: Any) -> tuple[Tensor | None, ...]:
    """Returns what `torch.autograd.grad` does; a graph that it makes keeps no tensor, and cannot be gone through."""
    with saving_nothing():
        return torch.autograd.grad(output, inputs, **options)
