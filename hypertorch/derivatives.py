"""The derivatives that dynamics and backends use; the only place that knows how they are computed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
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
        watched = self._route == "leaf" and not torch.compiler.is_compiling()
        noise = generator_states(_device_of(params)) if watched else ()
        gradients = self._autograd_gradient(
            params, hparams, differentiable=torch.is_grad_enabled() and self._route == "differentiable"
        )
        if self._route == "leaf":
            gradients = tree.leaves_requiring_grad(gradients)
            self.evaluations.append((tree.detach(params), gradients))
            self.calls.append(GradientCall(params, hparams, gradients, noise))
        return gradients

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
        along = {name: _with_room(params[name]) for name in direction}
        tangent = {name: _with_room(value).to(params[name].dtype) for name, value in direction.items()}
        if torch.compiler.is_compiling():
            pushed: Any = torch.func.jvp(gradients, (along,), (tangent,), has_aux=True)
        else:
            _load_forward_mode()
            with torch.no_grad(), _noise_of(call):
                pushed = torch.func.jvp(gradients, (along,), (tangent,), has_aux=True)
        _, (of_params, of_hparams), value = pushed
        # PyTorch gives some tangents of a 0-dimensional tensor another precision.
        return MixedDerivative(
            {name: part.detach().to(params[name].dtype) for name, part in of_params.items()},
            {name: part.detach().to(hparams[name].dtype) for name, part in of_hparams.items()},
            value.detach(),
        )

    def _autograd_gradient(self, params: TensorDict, hparams: TensorDict, *, differentiable: bool) -> TensorDict:
        with torch.enable_grad():
            keep_path = differentiable or self._route == "dual"
            if self._separate_params and differentiable:
                variables = {name: value if value.requires_grad else _own(value) for name, value in params.items()}
            else:
                variables = {name: _own_view(value, keep_path) for name, value in params.items()}
            value, new_buffers = self._function({**variables, **self._buffers}, hparams, self._batch)
            total = value.sum() if value.dim() else value
            gradients = torch.autograd.grad(
                total if total.requires_grad else total.detach().requires_grad_(),
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


def generator_states(device: torch.device) -> tuple[Tensor, ...]:
    """Returns the states of torch's default generators that code on a device may draw from."""
    host = torch.default_generator.get_state()
    return (host, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (host,)


@contextmanager
def _noise_of(call: GradientCall) -> Iterator[None]:
    """Surrounds an evaluation that is made again, with the noise that it had, and leaves the generators as they are."""
    device = _device_of(call.params)
    now = generator_states(device)
    _set_generators(call.noise, device)
    try:
        yield
    finally:
        _set_generators(now, device)


def _set_generators(states: tuple[Tensor, ...], device: torch.device) -> None:
    torch.default_generator.set_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _device_of(params: TensorDict) -> torch.device:
    return next(iter(params.values())).device


def _own_view(param: Tensor, keep_path: bool) -> Tensor:
    """Returns a tensor of its own to differentiate in.

    The param's tensor may also be a hyperparameter that the loss reads, or another param; the gradient in that tensor
    would gather their paths too.
    """
    view = param.view_as(param) if keep_path else param.detach()
    return view if view.requires_grad else view.requires_grad_()


def _own(param: Tensor) -> Tensor:
    return param.detach().requires_grad_()


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


class Pushed(NamedTuple):
    """What a function returned, and its Jacobian times every tangent.

    Attributes:
        outputs: the function's outputs.
        tangents: for every output that depends on what was moved, its tangents, of shape `(tangents, *output)`.
        values: what else the function returned, not differentiated.
    """

    outputs: tuple[TensorDict, ...]
    tangents: tuple[TensorDict, ...]
    values: TensorDict


def jvps(
    function: Callable[..., tuple[tuple[TensorDict, ...], TensorDict]],
    primals: Sequence[TensorDict],
    tangents: Sequence[TensorDict],
    *,
    vectorised: bool,
) -> Pushed:
    """Returns a function's outputs and the product of its Jacobian with each of several tangents, by forward mode.

    Vectorised, the function is evaluated once and only the tangents have the further axis: noise is the same for all
    of them, and checks on values still see plain numbers. Else it is evaluated once for each tangent, on dual numbers.

    Args:
        function: `(*dictionaries) -> (dictionaries to differentiate, further values)`. It takes its gradients by
            the route "functional" if vectorised, else by "dual".
        primals: its arguments.
        tangents: for each argument, the entries that are moved: at least one in all, of shape `(tangents, *entry)`.
        vectorised: by `torch.func.vmap` of `torch.func.jvp`, not one by one.
    """
    _load_forward_mode()
    with torch.no_grad():
        pushed = (_jvps_at_once if vectorised else _jvps_one_by_one)(function, primals, tangents)
    # PyTorch gives the tangent of a 0-dimensional tensor times a Python number the number's precision.
    moved = tuple(
        {name: value.to(outputs[name].dtype) for name, value in part.items()}
        for outputs, part in zip(pushed.outputs, pushed.tangents, strict=True)
    )
    return pushed._replace(tangents=moved)


@cache
def _load_forward_mode() -> None:
    """Makes the first dual number of this process.

    PyTorch then compiles some formulas in a way that it warns of as deprecated, which is no fault of the user's.
    """
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _jvps_at_once(
    function: Callable[..., tuple[tuple[TensorDict, ...], TensorDict]],
    primals: Sequence[TensorDict],
    tangents: Sequence[TensorDict],
) -> Pushed:
    moving = tuple({name: whole[name] for name in part} for whole, part in zip(primals, tangents, strict=True))

    def at(*duals: TensorDict) -> tuple[tuple, tuple]:
        outputs, values = function(*({**whole, **part} for whole, part in zip(primals, duals, strict=True)))
        moved = tuple(
            {name: value for name, value in part.items() if forward_ad.unpack_dual(value).tangent is not None}
            for part in outputs
        )
        # `jvp` refuses a function without outputs, which one is whose outputs are all constant.
        return (moved, duals), (outputs, values)

    def push(*tangent: TensorDict) -> tuple[tuple[TensorDict, ...], tuple[TensorDict, ...], TensorDict]:
        pushed: Any = torch.func.jvp(at, moving, tangent, has_aux=True)
        _, (moved, _), (outputs, values) = pushed
        return moved, outputs, values

    # The outputs themselves do not depend on the tangent: None says so, and refuses what does.
    out_dims: Any = (0, None, None)
    moved, outputs, values = torch.func.vmap(push, out_dims=out_dims, randomness="same")(*tangents)
    return Pushed(outputs, moved, values)


def _jvps_one_by_one(
    function: Callable[..., tuple[tuple[TensorDict, ...], TensorDict]],
    primals: Sequence[TensorDict],
    tangents: Sequence[TensorDict],
) -> Pushed:
    count = len(next(value for part in tangents for value in part.values()))
    rows: list[tuple[TensorDict, ...]] = []
    for row in range(count):
        with forward_ad.dual_level():
            duals = (
                {**whole, **{name: _dual(whole[name], value[row]) for name, value in part.items()}}
                for whole, part in zip(primals, tangents, strict=True)
            )
            results, values = function(*duals)
            pairs = [{name: forward_ad.unpack_dual(value) for name, value in part.items()} for part in results]
            # A buffer computed beside the loss has its graph.
            outputs = tuple({name: pair.primal.detach() for name, pair in part.items()} for part in pairs)
            values = {name: forward_ad.unpack_dual(value).primal.detach() for name, value in values.items()}
            rows.append(
                tuple(
                    {name: pair.tangent.detach() for name, pair in part.items() if pair.tangent is not None}
                    for part in pairs
                )
            )
    moved = [{name for row in rows for name in row[position]} for position in range(len(outputs))]
    stacked = tuple(
        {
            name: torch.stack([row[position].get(name, torch.zeros_like(value)) for row in rows])
            for name, value in part.items()
            if name in moved[position]
        }
        for position, part in enumerate(outputs)
    )
    return Pushed(outputs, stacked, values)


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    # A tangent takes the memory layout of its value, and there must be room for every entry of it.
    return forward_ad.make_dual(_with_room(value), tangent)


def _with_room(value: Tensor) -> Tensor:
    """Returns the same values with memory for every entry, unlike an expanded tensor's."""
    return value.contiguous() if 0 in value.stride() else value


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


class NotVectorisableError(IncompatibleBackendError, RuntimeError):
    """An operation cannot be vectorised over tangents.

    It is a `RuntimeError` too, as PyTorch's own is: who can run the tasks one by one instead then does so.
    """


_NO_FORWARD_DERIVATIVE = re.compile(
    r"forward AD with ([\w:]+) that does not support it|must implement the jvp function for custom (autograd.Function)"
)
_NOT_VECTORISED = re.compile(
    r"vmap|batching rule|functorch|torch\.func|saved tensor hooks|mutate a captured Tensor|access data pointer",
    flags=re.IGNORECASE,
)


@contextmanager
def forward_mode(one_by_one: str | None) -> Iterator[None]:
    """Explains what cannot be differentiated in forward mode, or not for several tangents at once.

    Args:
        one_by_one: how the user asks for one tangent at a time; None if that is what is done.

    Raises:
        IncompatibleBackendError: instead of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        advice = _forward_mode_advice(str(error), vectorised=one_by_one is not None)
        if advice is not None:
            raise IncompatibleBackendError(f"{advice}, or use reverse mode, for example `Reverse()`.") from error
        if one_by_one is not None and _NOT_VECTORISED.search(str(error)):
            raise NotVectorisableError(
                "the inner problem cannot be vectorised (by vmap) over several tangents. PyTorch says: "
                f"{str(error).splitlines()[0]} Push one at a time with `{one_by_one}`, or use reverse mode, for "
                "example `Reverse()`."
            ) from error
        raise


def _forward_mode_advice(text: str, *, vectorised: bool) -> str | None:
    """Returns what PyTorch's error means for forward mode and what to do; None if it is of another kind."""
    operation = _NO_FORWARD_DERIVATIVE.search(text)
    if operation is not None:
        return (
            f"the inner problem uses `{operation.group(1) or operation.group(2)}`, which has no forward derivative in "
            "PyTorch: no tangent can be pushed through it. Write it out of simpler operations"
            # PyTorch takes some operations apart to vectorise them, such as group norm.
            + ("" if vectorised else ", try several tangents at once (a `chunk_size` above 1)")
            # PyTorch has another implementation, with a forward derivative, of what oneDNN does (an LSTM).
            + (", switch oneDNN off (`torch.backends.mkldnn.flags(enabled=False)`)" if "mkldnn" in operation[0] else "")
        )
    if "ZeroTensors are immutable" in text:
        return (
            f"the inner problem uses an operation that cannot push a tangent past a constant argument ({text}). "
            "`mse_loss` with a mean is one: write it as `(outputs - targets).square().mean()`"
        )
    if "Nested forward mode AD" in text:
        return (
            "the inner problem takes forward derivatives of its own, which PyTorch cannot nest into dual numbers. Push "
            "several tangents at once (a `chunk_size` above 1)"
        )
    return None
