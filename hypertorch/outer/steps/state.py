"""What changes from outer step to outer step."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hypertorch.checks.values import check_hparams
from hypertorch.errors import CheckpointError, NonFiniteError
from hypertorch.outer.steps.patterns import check_each_wins, check_patterns, first_match
from hypertorch.outer.storage.checkpoints import Checkpoint
from hypertorch.types import TensorDict, TensorMapping

OptimizerFactory: TypeAlias = Callable[[Any], Optimizer]
"""Makes the outer optimizer, such as `partial(torch.optim.Adam, lr=1e-3)`, for the list of outer variables; for a list
of parameter groups where some have a learning rate of their own."""

SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler]
"""Makes the scheduler of an outer optimizer, such as `partial(torch.optim.lr_scheduler.StepLR, step_size=1000)`."""

# Entries of a scheduler's state that are no settings: they move with the steps, or are the optimizer's.
_MOVING = ("base_lrs", "last_epoch", "_last_lr", "_step_count", "_get_lr_called_within_step", "_is_initial")
# Entries of a parameter group that are no settings of the optimizer; a scheduler adds the last one.
_NO_SETTINGS = ("params", "names", "own_rate", "initial_lr")

# What is restored as it is.
_PLAIN = (
    "step",
    "task_route",
    "chunk",
    "non_finite_steps",
    "best_step",
    "best_value",
    "validated_step",
    "seconds",
)
_OWN_SETTINGS = ("optimizer", "learning_rates", "scheduler")


class OuterState:
    """The state of an outer run: outer variables, optimizer, scheduler, carry, and the best so far.

    Args:
        init_hparams: the outer variables to start from; they are copied.
        optimizer: makes the outer optimizer.
        scheduler: makes its scheduler; None for none.
        learning_rates: those of outer variables that have one of their own, by name or pattern.

    Raises:
        TypeError: if the factories return something else, or an optimizer or scheduler that cannot be driven.
        ValueError: if the optimizer holds other tensors than the outer variables, `init_hparams` is no set of
            outer variables, or a learning rate belongs to none of them or is not taken by the optimizer.
    """

    def __init__(
        self,
        init_hparams: TensorDict,
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        check_hparams(init_hparams)
        # A checkpoint restores contiguous tensors. Kernels may round differently on another layout, and then a resumed
        # run would not agree bit for bit.
        self.leaves = {
            name: value.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            for name, value in init_hparams.items()
        }
        groups = _groups(self.leaves, learning_rates or {})
        self.optimizer = optimizer(groups if learning_rates else list(self.leaves.values()))
        _check_optimizer(self.optimizer, self.leaves)
        _check_rates(self.optimizer, groups)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        if scheduler is not None and self.scheduler is None:
            raise TypeError(
                "`scheduler` returned None: the rates would stay as they are, without a word. Return the scheduler, or "
                "pass `scheduler=None` for none."
            )
        _check_scheduler(self.scheduler)
        _check_scaled(self.optimizer, self.scheduler)
        self.step = 0
        self.carry: TensorDict = {}
        self.task_route: Any = None
        self.chunk: int | None = None
        self.non_finite_steps = 0
        self.best_hparams: TensorDict = {}
        self.best_step: int | None = None
        self.best_value: float | None = None
        self.validated_step = 0
        self.seconds = 0.0
        self.settings: dict[str, str] = {}

    def first_settings(self) -> dict[str, object]:
        """Returns optimizer and scheduler with their settings, as they are before the first step."""
        groups = self.optimizer.param_groups
        rates = {name: group["own_rate"] for group in groups if _has_own_rate(group) for name in group["names"]}
        others = [
            {name: value for name, value in group.items() if name not in _NO_SETTINGS}
            for group in groups
            if not _has_own_rate(group)
        ]
        # One group is the rule, and its settings are named as they are written.
        own = others[0] if len(others) == 1 else {str(index): group for index, group in enumerate(others)}
        found: dict[str, object] = {
            "optimizer": {"class": type(self.optimizer), **own},
            "learning_rates": rates,
            "scheduler": None,
        }
        if self.scheduler is not None:
            state = self.scheduler.state_dict()
            fixed = {name: value for name, value in state.items() if name not in _MOVING}
            found["scheduler"] = {"class": type(self.scheduler), **fixed}
        return found

    @property
    def hparams(self) -> TensorDict:
        """The outer variables as plain tensors; an outer step changes them in place."""
        return {name: leaf.detach() for name, leaf in self.leaves.items()}

    def copy_hparams(self) -> TensorDict:
        """Returns the outer variables as they are now."""
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    def learning_rates(self, name: str) -> dict[str, float | Tensor]:
        """Returns the outer learning rate by `name`, or that of every parameter group by `name/position`."""
        rates = [group["lr"] for group in self.optimizer.param_groups if "lr" in group]
        # A scheduler changes a tensor in place, before the figures are read.
        rates = [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]
        if len(rates) == 1:
            return {name: rates[0]}
        return {f"{name}/{position}": rate for position, rate in enumerate(rates)}

    def descend(self, grads: TensorMapping, carry: TensorDict) -> None:
        """Takes one step of the optimizer and of the scheduler along a hypergradient.

        Raises:
            NonFiniteError: if a setting of the optimizer is out of the range of the outer variables' numbers.
        """
        for name, leaf in self.leaves.items():
            leaf.grad = grads[name]
        try:
            self.optimizer.step()
        except RuntimeError as error:
            too_large = self._settings_out_of_range()
            if not too_large:
                raise
            raise NonFiniteError(
                f"the outer optimizer has {too_large} after {self.step} outer steps, which the numbers of the outer "
                f"variables cannot hold ({error}): no step can be taken. Lower that setting, or what its schedule "
                "makes of it."
            ) from error
        for leaf in self.leaves.values():
            leaf.grad = None  # frees the hypergradient before the next one is computed
        if self.scheduler is not None:
            self.scheduler.step()
        self.carry = carry
        self.step += 1

    def skip(self) -> None:
        """Counts an outer step: a schedule moves on, the outer variables stay."""
        if self.scheduler is not None:
            with warnings.catch_warnings():
                # PyTorch warns of a scheduler that moves before its optimizer, as it does if the first step is skipped.
                warnings.simplefilter("ignore", UserWarning)
                self.scheduler.step()
        self.step += 1

    def _settings_out_of_range(self) -> str:
        """Returns the settings of the optimizer that no outer variable can hold, as text; empty if there are none."""
        # The least of all types: one setting acts on every variable.
        largest = min(torch.finfo(leaf.dtype).max for leaf in self.leaves.values())
        found = {
            name: float(value)
            for group in self.optimizer.param_groups
            for name, value in group.items()
            if isinstance(value, (int, float)) and not abs(value) <= largest
        }
        return ", ".join(f"`{name}` = {value:.4g}" for name, value in found.items())

    def own_carry(self, carry: TensorMapping) -> TensorDict:
        """Returns a carry that shares no memory with the outer variables, which are about to change in place."""
        # By storage, not by identity: a carry may be a view of an outer variable.
        storages = {leaf.untyped_storage().data_ptr() for leaf in self.leaves.values()}
        return {
            name: value.clone(memory_format=torch.contiguous_format)
            if value.untyped_storage().data_ptr() in storages
            else value.contiguous()
            for name, value in carry.items()
        }

    def capture(self) -> Checkpoint:
        """Returns the state as a checkpoint, which shares its tensors."""
        return Checkpoint(
            step=self.step,
            hparams=self.hparams,
            optimizer=self.optimizer.state_dict(),
            scheduler=None if self.scheduler is None else self.scheduler.state_dict(),
            carry=self.carry,
            carry_on_host=tuple(name for name, value in self.carry.items() if value.device.type == "cpu"),
            task_route=self.task_route,
            chunk=self.chunk,
            non_finite_steps=self.non_finite_steps,
            best_hparams=self.best_hparams,
            best_step=self.best_step,
            best_value=self.best_value,
            validated_step=self.validated_step,
            seconds=self.seconds,
            settings=self.settings,
        )

    def restore(self, checkpoint: Checkpoint, changed: Collection[str] = ()) -> None:
        """Goes back to a checkpoint of the same problem.

        Args:
            checkpoint: the checkpoint.
            changed: names of the settings that are to be as they are now, not as they were when it was made. An
                optimizer of another class, or of other groups, starts with an empty state; a scheduler is brought to
                where it would be, had it and its optimizer been so from the first step.

        Raises:
            CheckpointError: if its optimizer's state does not fit that of this run.
        """
        device = next(iter(self.leaves.values())).device
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                # In place: the optimizer holds these tensors.
                leaf.copy_(checkpoint.hparams[name])
        self._restore_optimizer(checkpoint, [name for name in changed if name.split(".")[0] in _OWN_SETTINGS])
        self.carry = {
            name: value if name in checkpoint.carry_on_host else value.to(device)
            for name, value in checkpoint.carry.items()
        }
        self.best_hparams = {name: value.to(device) for name, value in checkpoint.best_hparams.items()}
        for name in _PLAIN:
            setattr(self, name, getattr(checkpoint, name))

    def _restore_optimizer(self, checkpoint: Checkpoint, changed: Collection[str]) -> None:
        """Restores optimizer and scheduler, but for the settings that have changed."""
        if not changed:
            _load_optimizer(self.optimizer, checkpoint.optimizer)
            if self.scheduler is not None and checkpoint.scheduler is not None:
                self.scheduler.load_state_dict(checkpoint.scheduler)
            return
        present = [dict(group) for group in self.optimizer.param_groups]
        stored = [_members(group) for group in checkpoint.optimizer["param_groups"]]
        if "optimizer.class" not in changed and stored == [_members(group) for group in present]:
            _load_optimizer(self.optimizer, checkpoint.optimizer)
            for group, settings in zip(self.optimizer.param_groups, present, strict=True):
                group.update({name: value for name, value in settings.items() if name != "params"})
        if self.scheduler is not None:
            with warnings.catch_warnings():
                # PyTorch warns of a scheduler that moves before its optimizer, whose steps were taken earlier.
                warnings.simplefilter("ignore", UserWarning)
                for _ in range(checkpoint.step):
                    self.scheduler.step()


def _groups(leaves: TensorDict, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns parameter groups: the outer variables without a learning rate of their own, then those of each entry."""
    check_patterns("learning_rates", rates, leaves)
    check_each_wins("learning_rates", rates, leaves)
    grouped: dict[float | None, list[Tensor]] = {None: [], **{rate: [] for rate in rates.values()}}
    for name, leaf in leaves.items():
        grouped[first_match(name, rates)].append(leaf)
    names: dict[float | None, list[str]] = {rate: [] for rate in grouped}
    for name in leaves:
        names[first_match(name, rates)].append(name)
    # An optimizer keeps further entries of a group with its state: a checkpoint says whose rates they were.
    return [
        {"params": found, "names": names[rate], "own_rate": rate, **({} if rate is None else {"lr": rate})}
        for rate, found in grouped.items()
        if found
    ]


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(
            f"`optimizer` does not fit the state in the checkpoint ({error}): the run cannot go on with it. Resume "
            "with the settings that it was started with, or choose another folder."
        ) from error
    # PyTorch casts the state to the dtype of the variable; in another dtype the next steps would round differently.
    variables = [variable for group in optimizer.param_groups for variable in group["params"]]
    for position, entries in state["state"].items():
        current = optimizer.state[variables[position]]
        for name, value in entries.items():
            if isinstance(value, Tensor) and current[name].dtype != value.dtype:
                current[name] = value.to(current[name].device)


def _has_own_rate(group: Mapping[str, Any]) -> bool:
    return group.get("own_rate") is not None


def _members(group: Mapping[str, Any]) -> tuple[object, int]:
    """Returns whose group it is: the names of its outer variables where `learning_rates` made it, and how many."""
    return group.get("names"), len(group["params"])


def _check_optimizer(optimizer: Any, leaves: Mapping[str, Tensor]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` returned a {type(optimizer).__name__}, not a `torch.optim.Optimizer`: it is called with the "
            "list of outer variables. Pass for example `functools.partial(torch.optim.Adam, lr=1e-3)`."
        )
    # L-BFGS, for one: it would fail at its first step only, after a whole hypergradient.
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"`optimizer` returned `{type(optimizer).__name__}`, whose `step` needs a closure to evaluate the outer "
            "loss again and again: each evaluation here is a whole inner run, and it is done once per outer step. Use "
            "an optimizer of one gradient per step, such as Adam or SGD."
        )
    # By identity: `in` would compare values, and two equal tensors are not the same variable.
    held = {id(variable) for group in optimizer.param_groups for variable in group["params"]}
    forgotten = [name for name, leaf in leaves.items() if id(leaf) not in held]
    if forgotten or len(held) != len(leaves):
        detail = f"lacks {forgotten}" if forgotten else "holds tensors that are no outer variables"
        raise ValueError(
            f"`optimizer` returned an optimizer that {detail}: it must update the outer variables, all of them and "
            "nothing else. Hand the list that it is called with to the optimizer as it is."
        )


def _check_rates(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    wanted = {id(leaf): group["lr"] for group in groups if "lr" in group for leaf in group["params"]}
    taken = {id(leaf): group.get("lr") for group in optimizer.param_groups for leaf in group["params"]}
    if ("lr" not in optimizer.defaults and wanted) or any(taken[leaf] != rate for leaf, rate in wanted.items()):
        raise ValueError(
            f"`learning_rates` are not taken by the {type(optimizer).__name__} that `optimizer` returned: the outer "
            "variables would move at other rates. Hand the list that `optimizer` is called with to an optimizer of "
            "`torch.optim` that has `lr`, or leave `learning_rates` out."
        )


def _check_scaled(optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Raises if a scheduler sets learning rates of its own instead of scaling those that it finds."""
    if scheduler is None:
        return
    scales = []
    for group in optimizer.param_groups:
        if "own_rate" in group:  # there is one where `learning_rates` are given
            rate = optimizer.defaults["lr"] if group["own_rate"] is None else group["own_rate"]
            scales += [float(group["lr"]) / rate] if rate else [math.inf] * bool(group["lr"])
    if scales and max(scales) > (1.0 + 1e-6) * min(scales):
        raise ValueError(
            f"`scheduler` returned a {type(scheduler).__name__} that sets learning rates itself: `learning_rates` "
            "would not be taken. Use one that scales them, such as `CosineAnnealingLR` or `StepLR`, or leave "
            "`learning_rates` out."
        )


def _check_scheduler(scheduler: Any) -> None:
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"`scheduler` returned a {type(scheduler).__name__}, not a `torch.optim.lr_scheduler.LRScheduler`: it is "
            "called with the outer optimizer. Pass for example `functools.partial(StepLR, step_size=1000)`."
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "`scheduler` returned a `ReduceLROnPlateau`, whose step needs a figure of merit: it is stepped here after "
            "every outer step, where there is none. Use a schedule in the number of steps, such as "
            "`CosineAnnealingLR`."
        )
