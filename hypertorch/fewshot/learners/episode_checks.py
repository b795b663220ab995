"""What a learner can work on: outer variables, the examples of one task, and batches of episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hypertorch.fewshot.episodes import Episode, Examples
from hypertorch.types import TensorDict

_INTEGERS = (torch.int64, torch.int32)  # what an embedding takes


class _Adapting(Protocol):
    """What is asked of a learner here."""

    needs_every_class: bool

    def init_hparams(self) -> TensorDict: ...

    def adapt(self, hparams: TensorDict, support: Examples) -> Callable[[Tensor], Tensor]: ...


class _Kind(NamedTuple):
    """What the examples of a task are, apart from how many there are.

    Attributes:
        item: shape of one input.
        inputs: type of the inputs.
        target: shape of one target.
        targets: type of the targets.
        device: where they lie.
    """

    item: torch.Size
    inputs: torch.dtype
    target: torch.Size
    targets: torch.dtype
    device: torch.device


class EpisodeCheck:
    """Checks that batches of episodes are what a learner was built for, and names a later batch that is not.

    An adaptation is tried for every kind of episode, once; labels are looked at in every batch.

    Args:
        learner: the learner.
        num_tasks: episodes in a batch.
    """

    def __init__(self, learner: _Adapting, num_tasks: int) -> None:
        self._learner = learner
        self._num_tasks = num_tasks
        self._way: int | None = None
        self._known: set[tuple[_Kind, _Kind]] = set()

    def __call__(self, batch: Episode, step: int) -> None:
        """Raises if a batch is not what the learner can work on.

        Cost: a few small operations on the labels, and one wait for the device.

        Args:
            batch: the batch of episodes.
            step: its number, for the message.

        Raises:
            TypeError: if it is no `Episode` of tensors, or labels are of another type than int64.
            ValueError: if shapes, labels or classes are none that the learner was built for.
        """
        where = "`episodes`" if step == 0 else f"`episodes` at outer step {step}"
        _check_batch(batch, self._num_tasks, where)
        kinds = _kind(batch.support), _kind(batch.query)
        # Sizes of support and query are no part of a kind: another shot needs no other network.
        if kinds not in self._known:
            way = _fit(self._learner, batch, where)
            # A later kind that has another number of classes fails the check below.
            self._way = way if not self._known else self._way
            self._known.add(kinds)
        if self._way is not None:
            _check_classes(batch, self._way, where, needs_every_class=self._learner.needs_every_class)


def _check_batch(batch: Episode, num_tasks: int, where: str) -> None:
    if not isinstance(batch, Episode) or not all(isinstance(value, Tensor) for part in batch for value in part):
        raise TypeError(
            f"{where} are a {type(batch).__name__} that holds other things than tensors: a learner takes a support and "
            "a query set of each task. Return `Episode(Examples(inputs, targets), Examples(inputs, targets))`."
        )
    for role, (inputs, targets) in zip(("support", "query"), batch, strict=True):
        counted = inputs.dim() >= 3 and targets.dim() >= 2 and inputs.shape[:2] == targets.shape[:2]
        if not counted or len(inputs) != num_tasks or not inputs.shape[1]:
            raise ValueError(
                f"{where} have a {role} set with inputs of shape {tuple(inputs.shape)} and targets of shape "
                f"{tuple(targets.shape)}, but `num_tasks` = {num_tasks}: the first axis counts the tasks, the second "
                "their examples, at least one, and each example has inputs and a target. Stack the tasks that way."
            )


def _kind(examples: Examples) -> _Kind:
    inputs, targets = examples
    return _Kind(inputs.shape[2:], inputs.dtype, targets.shape[2:], targets.dtype, inputs.device)


def _fit(learner: _Adapting, batch: Episode, where: str) -> int | None:
    """Returns the outputs of a learner on the first task of a batch; None if targets are values.

    Raises:
        ValueError: if the learner cannot work on it.
    """
    # One task is enough: all tasks of a batch have one shape.
    support, query = (Examples(part.inputs[0], part.targets[0]) for part in batch)
    what = f"inputs of shape {tuple(support.inputs.shape)} and {support.inputs.dtype}"
    is_classification = not query.targets.is_floating_point()
    # Each class has a query, so the largest label says how many there are.
    way = int(query.targets.max()) + 1 if is_classification else None
    try:
        if support.targets.dtype != query.targets.dtype:
            raise ValueError(
                f"`support` has targets of {support.targets.dtype}, `query` of {query.targets.dtype}: one learner "
                "cannot be judged by both. Give both the same type."
            )
        check_examples(query, "query")
        outputs = learner.adapt(learner.init_hparams(), support)(query.inputs)
    except (TypeError, ValueError) as error:
        # An error of the first batch as it is; of a later batch with its outer step, which nothing else names.
        if where == "`episodes`":
            raise
        raise type(error)(f"{where}: {error}") from error
    # PyTorch's words for shapes that do not fit, and for a label beyond the outputs.
    except (RuntimeError, IndexError) as error:
        labels = f" and labels 0 to {way - 1}" if way is not None else ""
        raise ValueError(
            f"{where} have {what}{labels}, which the learner cannot work on ({str(error).splitlines()[0]}): its "
            "network was built for others. Match the network's input shape, dtype, device and outputs to the episodes."
        ) from error
    if way is not None and outputs.shape[-1] != way:
        raise ValueError(
            f"{where} have {way} classes, but the learner has {outputs.shape[-1]} outputs: each class needs one. "
            f"Build it with `way={way}` (a network for MAML as well), or change the `way` of the episodes."
        )
    return way


def _check_classes(batch: Episode, way: int, where: str, *, needs_every_class: bool) -> None:
    """Raises `ValueError` if a batch has other classes than the learner has outputs for."""
    support, query = batch.support.targets, batch.query.targets
    # Collected on the device and read at once: one wait, not one for each figure.
    figures = [*torch.aminmax(support), *torch.aminmax(query)]
    if needs_every_class:
        # Compared to every class, per task: (tasks, examples, way) to (tasks, way).
        shown = (support[:, :, None] == torch.arange(way, device=support.device)).any(dim=1)
        figures.append(shown.all().to(support.dtype))
    first, last, query_first, query_last, *complete = torch.stack(figures).tolist()
    lowest, highest = min(first, query_first), max(last, query_last)
    # Below 0 as well: cross-entropy silently leaves a label of -100 out of its mean.
    if lowest < 0 or highest != way - 1:
        raise ValueError(
            f"{where} have labels {lowest} to {highest}, but the learner has {way} outputs, for labels 0 to {way - 1}: "
            f"it was built for episodes of {way} classes. Number the classes of each task from 0, and draw as many "
            "in every episode."
        )
    # A head would divide by the number of examples of the class, and answer NaN.
    if complete == [0]:
        raise ValueError(
            f"{where} have a task whose support set lacks one of the {way} classes: nothing would be known of it. Give "
            "each class of a task at least one support example."
        )


@contextmanager
def integers_explained(inputs: Tensor, role: str) -> Iterator[None]:
    """Raises `ValueError` in place of PyTorch's error where a network cannot compute with integers.

    Args:
        inputs: what enters the network.
        role: what they are, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if inputs.is_floating_point():
            raise
        raise ValueError(
            f"`{role}` has inputs of {inputs.dtype}, which the network cannot compute with "
            f"({str(error).splitlines()[0]}): integers are for a network that looks them up, such as an embedding. "
            "Convert other inputs to floating point."
        ) from error


def check_hparams_of(learner: str, hparams: TensorDict, expected: TensorDict) -> None:
    """Raises `ValueError` if outer variables are not those of a learner.

    Args:
        learner: its name, for the message.
        hparams: what was handed in.
        expected: the learner's own, for their names and shapes.
    """
    missing = [name for name in expected if name not in hparams]
    if missing:
        raise ValueError(
            f"`hparams` of {learner} lacks {missing}: these weights would be missing from the model. Pass all entries "
            "of `learner.init_hparams()`, or those of a run with the same learner and network."
        )
    for name, value in expected.items():
        if hparams[name].shape != value.shape:
            raise ValueError(
                f"`hparams[{name!r}]` of {learner} has shape {tuple(hparams[name].shape)}, but the model has "
                f"{tuple(value.shape)} there: it was trained with another network. Build the learner as it was then."
            )


def check_examples(examples: Examples, role: str, *, way: int | None = None) -> None:
    """Raises if examples of one task are not what a learner can fit.

    Args:
        examples: inputs and targets, without a tasks axis.
        role: "support" or "query", for the message.
        way: classes of which each needs an example; None if targets are values, or some classes may be missing.

    Raises:
        TypeError: if inputs or targets are no tensors, or labels are of another type than int64.
        ValueError: if there is not one target per input, there are none, or a label or class cannot be.
    """
    inputs, targets = examples
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`{role}` has {name} of type {type(value).__name__}: learners work on tensors. Pass "
                "`Examples(inputs, targets)` of two tensors, for instance by `torch.as_tensor`."
            )
    if inputs.dim() < 2 or targets.dim() < 1 or len(inputs) != len(targets):
        raise ValueError(
            f"`{role}` has inputs of shape {tuple(inputs.shape)} ({inputs.dtype}) and targets of shape "
            f"{tuple(targets.shape)}: a task needs one row of inputs per example, and one target for each. Drop a "
            "tasks axis with `[0]`."
        )
    if not inputs.is_floating_point() and inputs.dtype not in _INTEGERS:
        raise ValueError(
            f"`{role}` has inputs of {inputs.dtype}: a network computes with floating-point numbers, or looks up int64 "
            "or int32 tokens. Scale images to floats in [0, 1], `images.float() / 255`; convert tokens with `.long()`."
        )
    if len(inputs) == 0:
        raise ValueError(f"`{role}` is empty: there is nothing to learn from. Give it an example of every class.")
    if not targets.is_floating_point():
        _check_labels(targets, role, way)


def check_dtype(inputs: Tensor, role: str, hparams: TensorDict) -> None:
    """Raises `ValueError` if inputs are of another floating-point type than the outer variables; integers pass.

    Args:
        inputs: of one task.
        role: what they are, for the message.
        hparams: the outer variables.
    """
    # A learner without outer variables takes any.
    dtype = next((value.dtype for value in hparams.values()), inputs.dtype)
    if inputs.dtype != dtype and inputs.dtype not in _INTEGERS:
        raise ValueError(
            f"`{role}` has inputs of {inputs.dtype}, but the learner's weights are {dtype}: PyTorch multiplies none by "
            f"the other. Convert them: `inputs.to({dtype})`."
        )


def _check_labels(labels: Tensor, role: str, way: int | None) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(
            f"`{role}` has labels of {labels.dtype}, which the losses of classification do not take. Convert them: "
            "`labels.long()`."
        )
    present = set(labels.flatten().tolist())
    allowed = range(way) if way is not None else range(max(present) + 1)
    if not present <= set(allowed):
        raise ValueError(
            f"`{role}` has labels {sorted(present)}, but classes count from 0"
            f"{'' if way is None else f' to {way - 1}'}. Number the classes of the task anew"
            f"{'' if way is None else f', or build the learner with `way={max(present) + 1}`'}."
        )
    # A network learns what it is shown, and may be shown a part; a head per class cannot.
    missing = [] if way is None else sorted(set(allowed) - present)
    if missing:
        raise ValueError(
            f"`{role}` has no example of the classes {missing}, of {way}: nothing would be known of them. Give one of "
            "each, or build the learner with a smaller `way`."
        )
