"""PyTorch's optimisers as inner optimisers, made differentiable by the library `higher`."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hypertorch.constraints import Box, Constraint, Positive
from hypertorch.dynamics.base import GradientDynamics, by_parameter, flattened
from hypertorch.dynamics.declared import DECAY, NON_NEGATIVE, PROPORTION, natural_constraints
from hypertorch.dynamics.elementwise import decayed
from hypertorch.dynamics.settings import Setting, is_active, resolve
from hypertorch.dynamics.torch_optim_options import (
    DIFFERENTIABILITY,
    Numeric,
    Option,
    check_by_torch,
    check_class,
    flattened_settings,
    numeric_options,
    unsupported,
)
from hypertorch.types import TensorDict

with warnings.catch_warnings():
    # Python warns about the source of this library when it compiles it for the first time.
    warnings.simplefilter("ignore")
    import higher.optim

_NATURAL: dict[str, Positive | Box] = {
    "lr": Positive(),
    "eps": Positive(),
    "lr_decay": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "dampening": PROPORTION,
    "alpha": PROPORTION,
    "rho": PROPORTION,
    "betas[0]": DECAY,
    "betas[1]": DECAY,
}

# `higher` differentiates a loss, and asks what to make of the result: here, the gradient that is known already.
_NO_LOSS = torch.zeros((), requires_grad=True)


@dataclass(frozen=True, eq=False)
class TorchOptim(GradientDynamics):
    """Descent by a class of `torch.optim`, as the library `higher` differentiates it.

    Example: `TorchOptim(torch.optim.Adamax, options={"lr": ht.Hyper("lr"), "betas": (0.9, 0.999)})`.

    For Adadelta, Adamax and ASGD, and for classes registered with `higher.optim.register_optim`. SGD, Adam, Adagrad
    and RMSprop are taken as well, but our own dynamics of these names are faster, learn every setting, and have finite
    derivatives in every mode; so does AdamW, which `higher` does not know.

    Values are those of `torch.optim`, and hypergradients exact in reverse and forward mode, for the options that are
    accepted; what `higher` gets wrong is refused. Two things it gets wrong are set right here: the `eps` of its Adam
    is that of PyTorch, and a learnt weight decay keeps its derivative where it is exactly 0. Of classes that are
    registered, every option may be learnt: whether its derivative is right is shown by `ht.check_hypergradient`.

    Where a coordinate has had no gradient so far, the square roots of Adam, Adagrad and RMSprop have an infinite
    derivative. In reverse mode `higher` masks it, rightly; in forward mode, and of a centred RMSprop in any mode, the
    hypergradient is NaN and raises `NonFiniteError`: use our own dynamics, which are right there in every mode.
    Adadelta, Adamax and ASGD take no such root.

    ASGD takes its steps, but does not average: `higher` averages other points than PyTorch, and no step reads them.

    Cost: one gradient per step, and some microseconds for every parameter; state as the optimiser's, its step counter
    apart.

    Args:
        optimizer: the class, or a `functools.partial` of it with arguments by name, as a configuration makes one.
        options: its arguments by name. Numbers may be any setting (a schedule, a `Hyper`), also inside `betas`.

    Raises:
        TypeError: if `optimizer` is no class of optimisers, or an option is of a wrong kind.
        ValueError: if `higher` does not know the class, or an option is unknown, out of range, or one of which
            `higher` gets the value or the derivative wrong; (from a run) if a registered class keeps a state that
            cannot be carried.

    References:
        Grefenstette et al. (2019), Generalized inner loop meta-learning (the library `higher`).
    """

    optimizer: type[torch.optim.Optimizer]
    _: KW_ONLY
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: object = self.optimizer
        if isinstance(given, partial) and not given.args and isinstance(self.options, Mapping):
            object.__setattr__(self, "optimizer", given.func)
            object.__setattr__(self, "options", {**given.keywords, **self.options})
        check_class(self.optimizer)
        _ = self._template  # which checks the options

    def settings(self) -> Mapping[str, Setting]:
        """Returns the settings that may be outer variables, by name; those of a pair as `betas[0]` and `betas[1]`."""
        return flattened_settings(self._numeric)

    def constraints(self) -> dict[str, Constraint]:
        """Returns the natural ranges of settings learnt directly: lr and eps > 0, decay factors below 1, and so on."""
        return natural_constraints(self.settings(), _NATURAL)

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns the optimiser's buffers, `{buffer}.{parameter}`: zeros, but for the sum of Adagrad.

        A learnt first momentum of SGD with dampening, and learnt first buffers of a class that is registered, are not
        read: these make their state at the first step.

        Cost: one update of the params, which shows what buffers there are.
        """
        buffers: dict[str, TensorDict] = {}
        with torch.no_grad():
            for name, param in params.items():
                param = param.detach()
                made, options = self._made_state(param), self._resolved(hparams, name, 0)
                # With a gradient of zero and without a graph: only the names and shapes of what comes out are used.
                _, after = self._advance(param, torch.zeros_like(param), made, options, 0)
                self._check_state(after, param)
                buffers[name] = {key: torch.zeros_like(value) + made.get(key, 0) for key, value in after.items()}
        return flattened(buffers)

    def update(
        self, grads: TensorDict, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns params and the optimiser's buffers after one step along `grads`."""
        buffers = by_parameter(state)
        new_params: TensorDict = {}
        new_buffers: dict[str, TensorDict] = {}
        for name, param in params.items():
            own = self._made_state(param) if index == 0 and self._makes_state else buffers.get(name, {})
            options = self._resolved(hparams, name, index)
            new_params[name], new_buffers[name] = self._advance(param, grads[name], own, options, index)
        return new_params, flattened(new_buffers)

    def _resolved(self, hparams: TensorDict, parameter: str, index: int) -> dict[str, Any]:
        """Returns the values of the options at a step, for a parameter."""
        return {
            name: tuple(resolve(setting, hparams, parameter, index) for setting in option)
            if isinstance(option, tuple)
            else resolve(option, hparams, parameter, index)
            for name, option in self._numeric.items()
        }

    def _advance(
        self, param: Tensor, gradient: Tensor, buffers: TensorDict, options: dict[str, Any], index: int
    ) -> tuple[Tensor, TensorDict]:
        """Returns a parameter and its buffers after one step along `gradient`."""
        # `None` holds the place of the parameter, which `higher` fills in at each step.
        group = {**self._template.param_groups[0], **options, "params": [None]}
        if self._has_weight_decay:
            # `higher` would skip the term, derivative and all, where a learnt weight decay is exactly 0.
            gradient = decayed(gradient, param, group["weight_decay"])
            group["weight_decay"] = 0.0
        if self.optimizer is torch.optim.Adam:
            # `higher` adds eps before the bias correction of the second moment, PyTorch after it.
            group["eps"] = group["eps"] * (1.0 - group["betas"][1] ** (index + 1)) ** 0.5
        # A shallow copy: both attributes that a step changes are replaced, so the template stays as it was made.
        optimizer = copy.copy(self._template)
        optimizer.param_groups = [group]
        # Empty before the first step of a class without buffers: from that it knows to make its state.
        known = {**buffers, **self._counters(group, index)} if buffers or index else {}
        optimizer.state = [defaultdict(dict, {0: known})]
        [new_param] = optimizer.step(_NO_LOSS, [param], grad_callback=lambda _: [gradient])
        after = optimizer.state[0][0]
        return new_param, {name: value for name, value in after.items() if name not in self._counters(group, index)}

    def _counters(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        """Returns the entries of a parameter's state that are functions of the step alone, before a step."""
        if self.optimizer is torch.optim.ASGD:
            decay = (1 + group["lambd"] * group["lr"] * index) ** group["alpha"]
            # The last two are of the average of the params, which no step reads.
            return {"step": index, "eta": group["lr"] / decay, "mu": 1, "ax": 0.0}
        return {"step": index}

    def _made_state(self, param: Tensor) -> TensorDict:
        """Returns the buffers that the class makes before the first step, such as the sum of Adagrad."""
        made = self._template.state[0].get(0, {})
        return {name: value.to(param) for name, value in made.items() if name != "step"}

    def _check_state(self, buffers: Mapping[str, Any], param: Tensor) -> None:
        """Raises `ValueError` if the state of a registered class cannot be carried."""
        for name, value in buffers.items():
            if not isinstance(value, Tensor) or value.shape != param.shape:
                raise ValueError(
                    f"`{self.optimizer.__name__}` keeps `{name}` = {value!r} in its state, neither a tensor of the "
                    "parameter's shape nor the counter `step`: it could not be carried from step to step. Keep such "
                    "tensors alone, or write the rule as a `GradientDynamics`."
                )

    @cached_property
    def _numeric(self) -> dict[str, Numeric]:
        return numeric_options(self.optimizer, self.options)

    @cached_property
    def _makes_state(self) -> bool:
        """Whether the first step makes the state, instead of reading buffers that are zero.

        SGD takes its first direction as the buffer, undamped; of registered classes nothing is known.
        """
        dampens = self.optimizer is torch.optim.SGD and is_active(self.settings().get("dampening", 0.0))
        return dampens or self.optimizer not in DIFFERENTIABILITY

    @cached_property
    def _has_weight_decay(self) -> bool:
        """Whether there is a weight decay of the known kind, added to the gradient before all else."""
        return self.optimizer in DIFFERENTIABILITY and is_active(self.settings().get("weight_decay", 0.0))

    @cached_property
    def _template(self) -> higher.optim.DifferentiableOptimizer:
        """A differentiable optimiser of a single number, of which every step takes a copy and fills in the rest."""
        if not _is_known(self.optimizer):
            raise unsupported(self.optimizer)
        options = check_by_torch(self.optimizer, self.options, self._numeric)
        with warnings.catch_warnings():
            # It warns of RMSprop's derivatives, which are right wherever no gradient is exactly zero.
            warnings.simplefilter("ignore", UserWarning)
            one_number = torch.zeros((), dtype=torch.float64)  # so that what Adagrad starts from is not rounded
            return higher.optim.create_diff_optim(self.optimizer, options, params=[one_number])


def _is_known(optimizer: type[torch.optim.Optimizer]) -> bool:
    """Returns whether `higher` has a differentiable form of a class."""
    try:
        higher.optim.create_diff_optim(optimizer)  # never without params; but an unknown class is another error
    except ValueError as error:
        return "not supported" not in str(error)
    return True
