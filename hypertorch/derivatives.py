"""The derivatives that dynamics and backends use; the only place that knows how they are computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypertorch import tree
from hypertorch.errors import IncompatibleBackendError
from hypertorch.types import Batch, TensorDict

LossFunction = Callable[[TensorDict, TensorDict, Batch], tuple[Tensor, TensorDict]]
"""`(params and buffers, hparams, batch) -> (loss per task or scalar, new values of the buffers)`."""


GradientRoute: TypeAlias = Literal["differentiable", "constant", "leaf", "functional", "dual"]
"""How the gradient of the inner loss enters the derivative of a step.

"differentiable": by autograd, with a graph where grad mode is on. "constant": its value only, as first-order methods
have it. "leaf": a leaf of the graph, so that what reaches the gradient can be read off it. "functional": by
`torch.func`, for a step that is itself transformed (forward mode, vectorised). "dual": by autograd on dual numbers
(forward mode, one tangent), without a graph.
"""


class InnerLoss:
    """The inner loss of one step, its data, buffers and task route bound.

    Under a tasks axis the loss is one number per task and params have a leading tasks axis; the tasks do not
    interact, so the gradient of the sum holds each task's own gradient.

    Args:
        function: the loss with the task route bound.
        buffers: untrained inner variables (running statistics), which dynamics never see.
        batch: this step's data.
        route: how its gradient enters the derivative of a step.

    Attributes:
        value: the loss at the first evaluation of its gradient, shape `()` or `(tasks,)`; None before.
        new_buffers: the buffers as that evaluation left them.
        tracked_buffers: names of the buffers whose new values have a derivative in the params. PyTorch's own norm
            layers update their statistics without one, and refuse to take statistics that ask for it.
        evaluations: where the gradient was evaluated and the leaves that were returned, in order; "leaf" only.
    """

    def __init__(
        self, function: LossFunction, buffers: TensorDict, batch: Batch, route: GradientRoute = "differentiable"
    ) -> None:
        self._function = function
        self._buffers = buffers
        self._batch = batch
        self._route = route
        self.value: Tensor | None = None
        self.new_buffers: TensorDict = buffers
        self.tracked_buffers: frozenset[str] = frozenset()
        self.evaluations: list[tuple[TensorDict, TensorDict]] = []

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
        gradients = self._autograd_gradient(
            params, hparams, differentiable=torch.is_grad_enabled() and self._route == "differentiable"
        )
        if self._route == "leaf":
            gradients = tree.leaves_requiring_grad(gradients)
            self.evaluations.append((tree.detach(params), gradients))
        return gradients

    def _autograd_gradient(self, params: TensorDict, hparams: TensorDict, *, differentiable: bool) -> TensorDict:
        with torch.enable_grad():
            keep_path = differentiable or self._route == "dual"
            variables = {name: _own_view(value, keep_path) for name, value in params.items()}
            value, new_buffers = self._function({**variables, **self._buffers}, hparams, self._batch)
            gradients = torch.autograd.grad(
                value.sum() if value.requires_grad else value.sum().requires_grad_(),
                list(variables.values()),
                create_graph=differentiable,
                allow_unused=True,
            )
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"`InnerProblem.loss` returned a value that depends on none of the params {sorted(params)}: it has no "
                "gradient to descend. Compute it from `params`, without `.detach()` or `torch.no_grad()`."
            )
        if self.value is None:
            self.value = value.detach()
            self.tracked_buffers = frozenset(name for name, buffer in new_buffers.items() if buffer.requires_grad)
            self.new_buffers = new_buffers if keep_path else tree.detach(new_buffers)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(variables.items(), gradients, strict=True)
        }

    def _functional_gradient(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        def total(variables: TensorDict) -> tuple[Tensor, tuple[Tensor, TensorDict]]:
            value, new_buffers = self._function({**variables, **self._buffers}, hparams, self._batch)
            return value.sum(), (value, new_buffers)

        gradients, (value, new_buffers) = torch.func.grad(total, has_aux=True)(params)
        if self.value is None:
            self.value, self.new_buffers = value, new_buffers
        return gradients


def _own_view(param: Tensor, keep_path: bool) -> Tensor:
    """Returns a tensor of its own to differentiate in.

    The param's tensor may also be a hyperparameter that the loss reads, or another param; the gradient in that tensor
    would gather their paths too.
    """
    view = param.view_as(param) if keep_path else param.detach()
    return view if view.requires_grad else view.requires_grad_()


def vjp(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    variables: Mapping[str, Tensor],
    *,
    retain_graph: bool = False,
) -> dict[str, Tensor | None]:
    """Returns the product of the cotangents with the Jacobian of `outputs` in `variables`, by reverse mode.

    None, unlike zeros, says that there is no path from a variable to the outputs: autograd's answer, which is how a
    hyperparameter that does nothing is noticed. Integer variables, and outputs without a graph, have no path.

    Args:
        outputs: tensors computed from `variables`.
        cotangents: one per output, of its shape; None where the output plays no role.
        variables: the leaves by name.
        retain_graph: keep the graph, for another product.
    """
    reached = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output.requires_grad and cotangent is not None
    ]
    leaves = {name: value for name, value in variables.items() if value.requires_grad}
    result: dict[str, Tensor | None] = dict.fromkeys(variables)
    if reached and leaves:
        gradients = torch.autograd.grad(
            [output for output, _ in reached],
            list(leaves.values()),
            grad_outputs=[cotangent for _, cotangent in reached],
            allow_unused=True,
            retain_graph=retain_graph,
        )
        result.update(zip(leaves, gradients, strict=True))
    return result


@contextmanager
def second_order() -> Iterator[None]:
    """Makes attention use its math kernel, the only one with a second derivative, and explains missing derivatives.

    Raises:
        IncompatibleBackendError: if an operation in the inner loss has no second derivative in PyTorch.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        operation = re.search(r"derivative for '?([\w:]+)'? is not implemented|([\w:]+) is not implemented", str(error))
        if operation is None:
            raise
        name = operation.group(1) or operation.group(2)
        raise IncompatibleBackendError(
            f"the inner loss uses `{name}`, which PyTorch cannot differentiate twice ({error}): the hypergradient of "
            "an unrolled gradient step needs that second derivative. Write the operation out of simpler ones."
        ) from error
