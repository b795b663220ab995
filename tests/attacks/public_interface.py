"""One argument of a public function or class is of another kind than it takes, or out of its range."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hypertorch as ht
from hypertorch import dynamics, fewshot
from hypertorch.dynamics import schedules
from tests.attacks.attack import Attack
from tests.attacks.public_calls import CALLS


class Stranger:
    """No argument takes it."""

    def __repr__(self) -> str:
        return "Stranger()"


# What is right for an argument although it looks wrong, or is told by another argument's name.
TAKEN: dict[tuple[Callable[..., Any], str], tuple[Any, ...]] = {
    (ht.Box, "lower"): (-1.0, -math.inf),
    (ht.Box, "upper"): (-1.0, math.inf),
    (ht.BoundedSum, "lower"): (-1.0,),
    (ht.BoundedSum, "total"): (-1.0,),
    (dynamics.Clipped, "max_norm"): (math.inf,),
    (schedules.cosine, "start"): (-1.0,),
    (schedules.cosine, "end"): (-1.0,),
    (schedules.cyclical, "start"): (-1.0,),
    (schedules.cyclical, "peak"): (-1.0,),
    (schedules.one_cycle, "peak"): (-1.0,),
    (schedules.one_cycle, "start"): (-1,),
    (schedules.one_cycle, "end"): (-1,),
    (ht.Minibatches, "dataset"): ("x",),
    (ht.hypergradients.Implicit, "residual_tolerance"): (math.inf,),
    (ht.hypergradients.Implicit, "stationarity_tolerance"): (math.inf,),
    (ht.search.minimise, "backend"): (None,),
    (fewshot.ANIL, "normalise"): (True,),
    (fewshot.HyperRepresentation, "normalise"): (True,),
    (fewshot.Conv4, "way"): (None,),
    (fewshot.ResNet12, "way"): (None,),
    (fewshot.MLP, "out_features"): (None,),
    (fewshot.StrokeCharacters, "num_classes"): (None,),
    (dynamics.Muon, "ns_a"): (-1.0,),
    (dynamics.Muon, "ns_b"): (-1.0,),
    (dynamics.Muon, "ns_c"): (-1.0,),
}
# What the message calls an argument that is handed on.
HANDED_ON = {
    (ht.compare_backends, "backends"): "backend",
    (fewshot.Conv4, "feature_length"): "length",
    (fewshot.MLP, "feature_length"): "length",
    (fewshot.ResNet12, "feature_length"): "length",
    (ht.search.DatasetDistance, "network"): "module",
}
# Checked where they are used, by the learner or the run, or whatever is handed over would do.
TUPLES = (fewshot.Examples, fewshot.Episode, fewshot.Embedding)
ELSEWHERE: set[tuple[Callable[..., Any], str]] = {
    *((call, name) for call in TUPLES for name in inspect.signature(call).parameters),
    (ht.load_hparams, "device"),
}
"""See `tests/attacks/callbacks.py`."""


def wrong_values(value: Any) -> Iterator[Any]:
    """Yields what does not do in place of a value of this kind."""
    yield Stranger()
    if isinstance(value, bool):
        yield from (2, "yes", None, torch.tensor(True))
    elif isinstance(value, int):
        yield from (math.nan, math.inf, True, "1", -1, 1.5, 1j, None, [1])
    elif isinstance(value, float):
        yield from (math.nan, math.inf, -math.inf, True, "1", -1.0, 1j, b"1")
    elif isinstance(value, str):
        yield from (3, None, ["a"])
    elif value is None:
        yield from (math.nan, True, -1)
    elif isinstance(value, Path):
        yield from (3, b"x", "a\0b", "\ud800", None, "")
    elif isinstance(value, Tensor):
        yield from (3.0, [1.0], value.to_sparse(), value.to(torch.complex64))
    elif isinstance(value, dict):
        yield from ([], {1: 1}, "x", None)
    elif isinstance(value, (tuple, list)):
        yield from (3, None, ({},))
    else:
        yield from (None, 3, "x")


def attacks() -> Iterator[Attack]:
    """Yields every argument with every value that does not do for it."""
    for call, given in CALLS.items():
        package = call.__module__.split(".")[1]
        for name, parameter in inspect.signature(call).parameters.items():
            if (call, name) in ELSEWHERE:
                continue
            usual = given.get(name, parameter.default)
            for value in wrong_values(usual):
                if any(value is one or value == one for one in TAKEN.get((call, name), ())):
                    continue
                yield Attack(
                    f"arguments of {package}",
                    f"{call.__name__}({name}={value!r:.40})",
                    lambda folder, call=call, given=given, name=name, value=value: call(**{**given, name: value}),
                    names=f"`[^`]*({name}|{HANDED_ON.get((call, name), name)})",
                )
