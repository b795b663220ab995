"""The entries of PyTorch's own databases of operations and modules, as functions of tensors with values for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hypertorch as ht
from hypertorch.types import TensorDict
from tests.helpers.problems import normal

F64 = torch.float64
Function = Callable[[TensorDict], tuple[Any, TensorDict]]
"""`values of tensors and buffers -> (outputs, new values of the buffers)`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A function of tensors and a point to differentiate it at.

    Attributes:
        name: database, operation and number of the sample, such as `operators/det/0`.
        start: the tensors that the function is differentiated in, in float64.
        buffers: tensors that are carried along.
        undefined: why it has no derivative; empty if it has one.
        function: returns outputs of any structure, and the new values of the buffers.
    """

    name: str
    start: TensorDict
    function: Function
    buffers: TensorDict = field(default_factory=dict)
    undefined: str = ""

    @property
    def is_random(self) -> bool:
        """Whether it draws noise, be it seeded by itself."""
        return self._watch.saw_noise

    @property
    def rounds(self) -> bool:
        """Whether it computes in a lower precision than float64: it is constant in small pieces."""
        return self._watch.saw_rounding

    @cached_property
    def _watch(self) -> _Watch:
        watch = _Watch()
        values = {name: value.clone() for name, value in {**self.start, **self.buffers}.items()}
        with torch.no_grad(), torch.random.fork_rng(devices=[]), watch:
            self.function(values)
        return watch

    @property
    def num_entries(self) -> int:
        """How many numbers the function is differentiated in."""
        return sum(value.numel() for value in self.start.values())

    def moved(self, seed: int) -> Sample:
        """Returns the same function at a point nearby: away from ties, zeros and other kinks."""
        return replace(
            self,
            start={
                name: value + 0.03 * normal(*value.shape, seed=seed + place)
                for place, (name, value) in enumerate(self.start.items())
            },
        )


OPERATIONS: dict[str, OpInfo] = {
    info.full_name: info for info in op_db if info.supports_gradgrad and info.supports_dtype(F64, "cpu")
}
"""Every operation that PyTorch says has a second derivative, by name."""

UNDEFINED: dict[str, str] = dict.fromkeys(
    ("nn.functional.max_unpool1d", "nn.functional.max_unpool2d", "nn.functional.max_unpool3d"),
    "no function of its inputs where an index occurs twice; PyTorch's own tests differentiate the samples of `.grad`",
)
"""Operations whose samples in the database have no defined derivative, and why."""

MODULES: dict[str, ModuleInfo] = {info.name: info for info in module_db if F64 in info.dtypes}
"""Every module of PyTorch's database, by name."""


def operation_samples(name: str, most: int) -> list[Sample]:
    """Returns the first samples of an operation that hold numbers; none if no dense input has a derivative."""
    info = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = enumerate(info.sample_inputs("cpu", F64, requires_grad=True))
    found = (_operation_sample(f"operators/{name}/{number}", info, sample) for number, sample in inputs)
    return list(islice((sample for sample in found if sample.num_entries), most))


def operation_sample(name: str, number: int) -> Sample:
    """Returns a sample of an operation by its number in the database."""
    info = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = info.sample_inputs("cpu", F64, requires_grad=True)
    return _operation_sample(f"operators/{name}/{number}", info, next(islice(inputs, number, None)))


def _operation_sample(name: str, info: OpInfo, sample: SampleInput) -> Sample:
    leaves, structure = pytree.tree_flatten((sample.input, sample.args, dict(sample.kwargs)))
    places = [
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dtype == F64 and leaf.layout == torch.strided
    ]
    constants = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def function(values: TensorDict) -> tuple[Any, TensorDict]:
        arguments = list(constants)
        for place in places:
            arguments[place] = values[f"input{place}"]
        first, rest, options = pytree.tree_unflatten(arguments, structure)
        # What PyTorch's own checks of derivatives do: symmetric matrices are made symmetric, noise is seeded.
        outputs = info.gradcheck_wrapper(info.get_op(), first, *rest, **options)
        return sample.output_process_fn_grad(outputs), {}

    start = {f"input{place}": leaves[place].detach().clone() for place in places}
    return Sample(name=name, start=start, function=function, undefined=UNDEFINED.get(info.full_name, ""))


def module_samples(name: str, most: int) -> list[Sample]:
    """Returns the first samples of a module, in training and in evaluation mode."""
    found = [sample for training in (True, False) for sample in _module_samples(MODULES[name], training, most)]
    return [sample for sample in found if sample.num_entries]


def _module_samples(info: ModuleInfo, training: bool, most: int) -> list[Sample]:
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device="cpu", dtype=F64, requires_grad=True, training=training)
    found: list[Sample] = []
    for number, module_input in enumerate(inputs[:most]):
        made, given = module_input.constructor_input, module_input.forward_input
        torch.manual_seed(number)
        module: nn.Module = info.module_cls(*made.args, **made.kwargs).to(F64).train(training)
        if info.is_lazy:
            with torch.no_grad():
                module(*given.args, **given.kwargs)
        mode = "train" if training else "eval"
        found.append(_module_sample(f"modules/{info.name}/{mode}/{number}", module, given.args, given.kwargs))
    return found


def _module_sample(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Sample:
    net = ht.FunctionalModule(module)
    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.dtype == F64 and leaf.requires_grad
    ]
    constants = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def function(values: TensorDict) -> tuple[Any, TensorDict]:
        arguments = list(constants)
        for place in places:
            arguments[place] = values[f"input{place}"]
        inputs, options = pytree.tree_unflatten(arguments, structure)
        return net.with_buffers({name: values[name] for name in own}, *inputs, **options)

    own = net.init_params()
    buffers = {buffer: own[buffer] for buffer in net.buffers}
    start = {param: own[param] for param in net.trained_names()}
    start.update({f"input{place}": leaves[place].detach().clone() for place in places})
    return Sample(name=name, start=start, function=function, buffers=buffers)


class _Watch(TorchDispatchMode):
    """Looks out for operations that draw noise, or round to a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.saw_noise = self.saw_rounding = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.saw_noise |= torch.Tag.nondeterministic_seeded in func.tags
        self.saw_rounding |= any(_is_coarse(value) for value in pytree.tree_leaves(outputs))
        return outputs


def _is_coarse(value: Any) -> bool:
    inexact = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return inexact and torch.finfo(value.dtype).eps > torch.finfo(F64).eps
