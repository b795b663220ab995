"""A function that the library calls returns what it should not, or a tensor is of another form than it should be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import fewshot
from hypertorch.outer.steps.step import _OWN_BEGINNINGS, _OWN_NAMES
from tests.attacks.attack import Attack
from tests.attacks.public_interface import Stranger

HPARAMS = {"start": torch.tensor([0.5, -1.0])}
ADAM = functools.partial(torch.optim.Adam, lr=0.1)


class Inner(ht.InnerProblem):
    """Descends `|w - 1|^2 / 2` from `start`; what one of its functions returns can be replaced."""

    def __init__(self, **replaced: Callable[[Any], Any]) -> None:
        self._replaced = replaced

    def _returned(self, name: str, value: Any) -> Any:
        return self._replaced.get(name, lambda value: value)(value)

    def init_params(self, hparams):
        return self._returned("init_params", {"w": hparams["start"] * 1.0})

    def loss(self, params, hparams, batch):
        return self._returned("loss", (params["w"] - 1.0).square().sum() / 2)


class Outer(ht.OuterProblem):
    """Judges by `|w|^2`; what one of its functions returns can be replaced."""

    def __init__(self, **replaced: Callable[[Any], Any]) -> None:
        self._replaced = replaced

    _returned = Inner._returned

    def init_hparams(self):
        return self._returned("init_hparams", {name: value.clone() for name, value in HPARAMS.items()})

    def loss(self, params, hparams, batch):
        return self._returned("loss", params["w"].square().sum())

    def metrics(self, params, hparams, batch):
        return self._returned("metrics", {"accuracy": params["w"].detach().sum()})


def problem(inner: Inner | None = None, outer: Outer | None = None, **settings: Any) -> ht.BilevelProblem:
    return ht.BilevelProblem(
        inner or Inner(), outer or Outer(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=2, **settings
    )


def one_hypergradient(of: ht.BilevelProblem) -> object:
    return ht.hypergradient(of, of.init_hparams(), backend=ht.hypergradients.Reverse())


def one_unroll(of: ht.BilevelProblem) -> object:
    return ht.unroll(of, of.init_hparams())


def one_run(of: Any, **settings: Any) -> object:
    return ht.OuterLoop(of, **{"optimizer": ADAM, "backend": ht.hypergradients.Reverse(), **settings}).run(2)


LOSSES: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda value: None,
    "a float": lambda value: float(value.detach()),
    "a list": lambda value: [value],
    "a generator": lambda value: (one for one in [value]),
    "text": lambda value: "loss",
    "a stranger": lambda value: Stranger(),
    "a vector": lambda value: value.expand(2),
    "one entry": lambda value: value[None],
    "no entry": lambda value: value.expand(0),
    "an integer": lambda value: value.detach().to(torch.int64),
    "a bool": lambda value: value > 0,
    "a complex number": lambda value: value.to(torch.complex64),
    "NaN": lambda value: value * math.nan,
    "infinity": lambda value: value + math.inf,
    "a dict": lambda value: {"loss": value},
    "three values": lambda value: (value, {}, {}),
    "a detached tensor": lambda value: value.detach(),
    "a tensor of another device": lambda value: value.to("meta"),
}
STATES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "nothing": lambda value: None,
    "a float": lambda value: 1.0,
    "a list": lambda value: list(value.values()),
    "a generator": lambda value: (item for item in value.items()),
    "a tensor": lambda value: next(iter(value.values())),
    "pairs": lambda value: list(value.items()),
    "an empty dict": lambda value: {},
    "floats": lambda value: dict.fromkeys(value, 1.0),
    "None in it": lambda value: dict.fromkeys(value),
    "lists in it": lambda value: {name: [1.0] for name in value},
    "integers": lambda value: {name: one.detach().to(torch.int64) for name, one in value.items()},
    "bools": lambda value: {name: one.detach() > 0 for name, one in value.items()},
    "complex numbers": lambda value: {name: one.detach().to(torch.complex64) for name, one in value.items()},
    "sparse tensors": lambda value: {name: one.detach().to_sparse() for name, one in value.items()},
    "tensors on meta": lambda value: {name: one.detach().to("meta") for name, one in value.items()},
    "NaN": lambda value: {name: one * math.nan for name, one in value.items()},
    "infinity": lambda value: {name: one + math.inf for name, one in value.items()},
    "a dict in it": lambda value: {"a": value},
}
METRICS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "nothing": lambda value: None,
    "a float": lambda value: 1.0,
    "a list": lambda value: list(value.values()),
    "a generator": lambda value: (item for item in value.items()),
    "floats": lambda value: dict.fromkeys(value, 1.0),
    "None in it": lambda value: dict.fromkeys(value),
    "vectors": lambda value: {"accuracy": torch.ones(3)},
    "a dict in it": lambda value: {"a": value},
    "numbers for names": lambda value: {1: torch.tensor(1.0)},
}


def returned() -> Iterator[Attack]:
    kind = "what functions return"
    for name, change in LOSSES.items():
        # The message names the loss and the inner step.
        names = "`|loss holds NaN or infinity"
        yield Attack(
            kind,
            f"{name} for the inner loss",
            lambda _, change=change: one_hypergradient(problem(Inner(loss=change))),
            names=names,
        )
        yield Attack(
            kind,
            f"{name} for the outer loss",
            lambda _, change=change: one_hypergradient(problem(outer=Outer(loss=change))),
            names=names,
        )
        if name != "a detached tensor":
            yield Attack(
                kind,
                f"{name} for the outer loss of a run",
                lambda _, change=change: one_run(problem(outer=Outer(loss=change))),
                names=names,
            )
    for name, change in STATES.items():
        yield Attack(
            kind,
            f"{name} for the first params",
            lambda _, change=change: one_hypergradient(problem(Inner(init_params=change))),
        )
        yield Attack(
            kind,
            f"{name} for the outer variables",
            lambda _, change=change: one_hypergradient(problem(outer=Outer(init_hparams=change))),
        )
        yield Attack(
            kind,
            f"{name} for the outer variables of a run",
            lambda _, change=change: one_run(problem(outer=Outer(init_hparams=change))),
        )
    for name, change in METRICS.items():
        yield Attack(
            kind, f"{name} for the metrics", lambda _, change=change: one_unroll(problem(outer=Outer(metrics=change)))
        )
        yield Attack(
            kind,
            f"{name} for the metrics of a run",
            lambda _, change=change: one_run(problem(outer=Outer(metrics=change))),
        )
    for name, value in {
        "nothing": None,
        "a number": 3,
        "text": "x",
        "a stranger": Stranger(),
        "a module": torch.nn.Linear(1, 1),
    }.items():
        yield Attack(
            kind, f"{name} for the optimizer", lambda _, value=value: one_run(problem(), optimizer=lambda given: value)
        )
        yield Attack(
            kind, f"{name} for the scheduler", lambda _, value=value: one_run(problem(), scheduler=lambda given: value)
        )
        yield Attack(
            kind, f"{name} for the problem of a step", lambda _, value=value: one_run(ht.Problems(lambda step: value))
        )
        yield Attack(
            kind,
            f"{name} for the context",
            lambda _, value=value: one_hypergradient(problem(context=lambda hparams, batch: value)),
        )
        if value is not None:
            yield Attack(
                kind,
                f"{name} for snapshots",
                lambda _, value=value: one_run(
                    problem(),
                    loggers=[ht.MemoryLogger()],
                    snapshots=ht.Snapshots(every=1, tensors=lambda hparams: value),
                ),
            )


def names_of_the_loop() -> Iterator[Attack]:
    kind = "metrics called like the loop's own"
    for name in sorted({*_OWN_NAMES, *(f"{start}x" for start in _OWN_BEGINNINGS)}):
        change = functools.partial(lambda name, value: {name: value["accuracy"]}, name)
        yield Attack(
            kind,
            f"{name} in a run",
            lambda _, change=change: one_run(
                problem(outer=Outer(metrics=change)), loggers=[ht.MemoryLogger()], log_every=1
            ),
            names=f"`[^`]*{name}",
        )
    change = functools.partial(lambda value: {"outer_loss": value["accuracy"]})
    yield Attack(
        kind,
        "outer_loss in an evaluation",
        lambda _: ht.evaluate(problem(outer=Outer(metrics=change)), HPARAMS, num_episodes=1),
        names="`[^`]*outer_loss",
    )


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda value: value.to(torch.int64),
    "bools": lambda value: value > 0,
    "bytes": lambda value: value.to(torch.uint8),
    "complex numbers": lambda value: value.to(torch.complex64),
    "sparse": Tensor.to_sparse,
    "on meta": lambda value: value.to("meta"),
    "NaN": lambda value: value * math.nan,
    "infinity": lambda value: value + math.inf,
    "a list": Tensor.tolist,
    "an array": Tensor.numpy,
    "a float": lambda value: 1.0,
    "nothing": lambda value: None,
    "eight bits": lambda value: value.to(torch.float8_e4m3fn),
}


def tensors() -> Iterator[Attack]:
    kind = "forms of tensors"
    backends = {
        "Reverse": ht.hypergradients.Reverse(),
        "Forward": ht.hypergradients.Forward(),
        "EvoGrad": ht.hypergradients.EvolutionStrategies(num_pairs=1, sigma=0.1),
    }
    for name, change in TENSORS.items():
        hparams = {"start": change(HPARAMS["start"])}
        for label, backend in backends.items():
            yield Attack(
                kind,
                f"{name} for {label}",
                lambda _, hparams=hparams, backend=backend: ht.hypergradient(problem(), hparams, backend=backend),
            )
        yield Attack(
            kind,
            f"{name} for a start",
            lambda _, hparams=hparams: ht.OuterLoop(problem(), optimizer=ADAM, backend=ht.hypergradients.Reverse()).run(
                1, start_from=hparams
            ),
        )
        # An inner run may diverge: the report of an evaluation says so by NaN.
        if name not in ("NaN", "infinity"):
            yield Attack(
                kind,
                f"{name} for an evaluation",
                lambda _, hparams=hparams: ht.evaluate(problem(), hparams, num_episodes=1),
            )
    for name, hparams in {
        "no entry": {},
        "another name": {"other": HPARAMS["start"]},
        "a number for a name": {1: HPARAMS["start"]},
        "another shape": {"start": torch.zeros(2, 2, 2)},
        "a dict in it": {"start": HPARAMS},
        "a list": [HPARAMS["start"]],
        "nothing": None,
        "a tensor": HPARAMS["start"],
    }.items():
        if name not in ("another shape", "another name"):
            yield Attack(
                kind,
                f"{name} for the outer variables",
                lambda _, hparams=hparams: ht.hypergradient(problem(), hparams, backend=ht.hypergradients.Reverse()),
            )
        yield Attack(
            kind,
            f"{name} for a start",
            lambda _, hparams=hparams: (
                ht.OuterLoop(problem(), optimizer=ADAM, backend=ht.hypergradients.Reverse()).run(1, start_from=hparams)
                if hparams is not None
                else ht.evaluate(problem(), hparams, num_episodes=1)
            ),
        )


class Episodes(fewshot.EpisodeSource):
    """One batch of one episode."""

    num_tasks = 1

    def __init__(self, inputs: Any, targets: Any) -> None:
        self._support = fewshot.Examples(inputs, targets)

    def at(self, step: int) -> fewshot.Episode:
        return fewshot.Episode(self._support, fewshot.Examples(INPUTS, LABELS))


INPUTS, LABELS = torch.rand(1, 4, 3), torch.tensor([[0, 1, 0, 1]])
EPISODES = {
    "a list of inputs": (INPUTS.tolist(), LABELS),
    "no inputs": (None, LABELS),
    "inputs without tasks": (INPUTS[0], LABELS[0]),
    "labels out of range": (INPUTS, LABELS + 2),
    "negative labels": (INPUTS, LABELS - 1),
    "no labels": (INPUTS, None),
    "labels of floats": (INPUTS, LABELS.float()),
    "labels of bools": (INPUTS, LABELS.bool()),
    "fewer labels": (INPUTS, LABELS[:, :3]),
    "labels of another task": (INPUTS, LABELS.expand(2, 4)),
}


def episodes() -> Iterator[Attack]:
    network = fewshot.MLP(in_features=3, hidden=(4,), out_features=2)
    learner = fewshot.MAML(network, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=1)
    for name, (inputs, targets) in EPISODES.items():
        yield Attack(
            "episodes",
            name,
            lambda _, inputs=inputs, targets=targets: one_hypergradient(learner.on(Episodes(inputs, targets)).at(0)),
        )


def attacks() -> Iterator[Attack]:
    """Yields every function that returns what it should not, and every tensor of another form."""
    yield from returned()
    yield from names_of_the_loop()
    yield from tensors()
    yield from episodes()
