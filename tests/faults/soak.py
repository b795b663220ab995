"""Long runs of every kind of backend: the memory of the process, and the number of tensors and objects, stay flat."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import hypertorch as ht
from hypertorch.fewshot import MAML, Regression, Sinusoid
from tests.faults import kills
from tests.helpers.problems import net_problem, scalars
from tests.outer.problems import Quadratics

backends, solvers = ht.hypergradients, ht.linear_solvers
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SGD = partial(torch.optim.SGD, lr=1e-4)
Loop = Callable[..., "ht.OuterLoop | ht.RealTime"]


def _net(backend: ht.Hypergradient, dynamics: ht.Dynamics | None = None, **changes: object) -> Loop:
    def loop(**options: object) -> ht.OuterLoop:
        rule = dynamics or ht.dynamics.SGD(lr=ht.Hyper("lr"))
        learnt = {} if dynamics else scalars(lr=0.1)
        problem = replace(net_problem(rule, learnt, num_steps=3), **changes)  # type: ignore[arg-type]
        return ht.OuterLoop(problem, optimizer=_SGD, backend=backend, **options)  # type: ignore[arg-type]

    return loop


def _few(backend: ht.Hypergradient, **changes: object) -> Loop:
    """For backends that cost a run for each entry of the outer variables."""

    def loop(**options: object) -> ht.OuterLoop:
        problem = replace(Quadratics(num_tasks=None).at(0), **changes)  # type: ignore[arg-type]
        return ht.OuterLoop(problem, optimizer=_SGD, backend=backend, **options)  # type: ignore[arg-type]

    return loop


def _few_shot(tasks: str) -> Loop:
    def loop(**options: object) -> ht.OuterLoop:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        learner = MAML(network, dynamics=ht.dynamics.SGD(lr=0.01), num_steps=2, objective=Regression())
        source = learner.on(Sinusoid(num_tasks=4, shot=5, num_queries=5, dtype=torch.float64))
        execution = ht.Execution(tasks=tasks)  # type: ignore[arg-type]
        return ht.OuterLoop(source, optimizer=_SGD, backend=backends.Reverse(), execution=execution, **options)  # type: ignore[arg-type]

    return loop


def _implicit(**settings: object) -> Loop:
    backend = backends.Implicit(residual_tolerance=None, stationarity_tolerance=None, **settings)  # type: ignore[arg-type]
    # By the gradient the solution does not depend on the step size.
    unused = ("init.first", "init.second", *(() if "map" in settings else ("lr",)))
    return _net(backend, allow_unused=unused)


def _real_time(**options: object) -> ht.RealTime:
    problem = replace(Quadratics(num_tasks=None).at(0), allow_unused=("start",))
    return ht.RealTime(problem, optimizer=_SGD, every=2, **options)  # type: ignore[arg-type]


_HEAVY_BALL = ht.dynamics.ReversibleMomentum(lr=0.1)
_FOLDER = tempfile.gettempdir()
FAMILIES: Mapping[str, Loop] = {
    "`Reverse()`": _net(backends.Reverse()),
    "`Reverse(checkpoint_every=1)`": _net(backends.Reverse(checkpoint_every=1)),
    '`Reverse(checkpoint_every="sqrt")`': _net(backends.Reverse(checkpoint_every="sqrt")),
    "`Reverse(snapshots=1)`": _net(backends.Reverse(snapshots=1)),
    '`Reverse(memory_budget="1GiB")`': _net(backends.Reverse(memory_budget="1GiB")),
    '`Reverse(derivative="mixed")`': _net(backends.Reverse(derivative="mixed", checkpoint_every=1)),
    '`Reverse(derivative="auto")`': _net(backends.Reverse(derivative="auto")),
    "`Reverse(checkpoint_every=1, spill_to=folder)`": _net(backends.Reverse(checkpoint_every=1, spill_to=_FOLDER)),
    "`Reverse(snapshots=2, spill_to=folder)`": _net(backends.Reverse(snapshots=2, spill_to=_FOLDER)),
    "`Truncated(window=2)`": _net(backends.Truncated(window=2), allow_unused=("init.first", "init.second")),
    "`FirstOrder()`": _net(backends.FirstOrder(), allow_unused=("lr", "weights", "log_l2")),
    "`OneStep()`": _net(backends.OneStep(), allow_unused=("init.first", "init.second")),
    "`OneStep(finite_difference=True)`": _net(
        backends.OneStep(finite_difference=True), allow_unused=("init.first", "init.second", "lr")
    ),
    "`Implicit(solver=ConjugateGradient())`": _implicit(),
    "`Implicit(solver=Neumann())`": _implicit(solver=solvers.Neumann(step_size=0.1)),
    "`Implicit(solver=FixedPoint())`": _implicit(solver=solvers.FixedPoint(step_size=0.1)),
    "`Implicit(solver=Nystrom())`": _implicit(solver=solvers.Nystrom(rank=4)),
    "`Implicit(solver=Dense())`": _implicit(solver=solvers.Dense(damping=1.0)),
    '`Implicit(map="step")`': _implicit(map="step"),
    "`Forward()`": _few(backends.Forward()),
    "`Forward(chunk_size=1)`": _few(backends.Forward(chunk_size=1)),
    "`Forward(keep_tangents=True)`": _few(
        backends.Forward(keep_tangents=True), warm_start=True, allow_unused=("start",)
    ),
    "`ForwardGradient()`": _net(backends.ForwardGradient()),
    '`ForwardGradient(num_samples=2, distribution="rademacher", chunk_size=1)`': _net(
        backends.ForwardGradient(num_samples=2, distribution="rademacher", chunk_size=1)
    ),
    "`EvolutionStrategies()`": _net(backends.EvolutionStrategies(num_pairs=2, sigma=0.1)),
    "`EvolutionStrategies(persistent=True)`": _net(
        backends.EvolutionStrategies(num_pairs=2, sigma=0.1, persistent=True, horizon=6), warm_start=True
    ),
    "`EvoGrad()`": _net(backends.EvoGrad(), allow_unused=("init.first", "init.second", "lr")),
    '`EvoGrad(noise="sign")`': _net(backends.EvoGrad(noise="sign"), allow_unused=("init.first", "init.second", "lr")),
    "`Reversible()`": _net(backends.Reversible(), _HEAVY_BALL),
    "`Reverse()`, `warm_start`": _net(backends.Reverse(), warm_start=True, allow_unused=("init.first", "init.second")),
    "`RealTime`": _real_time,
    "few-shot, tasks by `vmap`": _few_shot("vmap"),
    "few-shot, tasks by `loop`": _few_shot("loop"),
}
# In the long form alone: each is compiled first, which takes longer than a short run.
COMPILED: Mapping[str, Loop] = {
    "`Reverse(compile=True)`": _net(backends.Reverse(compile=True)),
    "`Reverse(compile=True)`, 9 steps": _net(backends.Reverse(compile=True), num_steps=9),
    "`Reverse(checkpoint_every=1, compile=True, spill_to=folder)`": _net(
        backends.Reverse(checkpoint_every=1, compile=True, spill_to=_FOLDER)
    ),
    '`Reverse(compile="auto")`': _net(backends.Reverse(compile="auto")),
    "`Reversible(compile=True)`": _net(backends.Reversible(compile=True), _HEAVY_BALL),
}


@dataclass(frozen=True)
class Growth:
    """What grew in the second half of a run, per outer step.

    Attributes:
        bytes: resident memory; the slope of a straight line by least squares.
        tensors: tensors alive.
        objects: objects that Python's collector knows, in all of the second half.
    """

    bytes: float
    tensors: int
    objects: int


class _Watch(ht.Logger):
    """Notes memory and numbers of objects after every so many outer steps."""

    def __init__(self, num_steps: int) -> None:
        self._half, self._last, self._every = num_steps // 2, num_steps, max(num_steps // 20, 1)
        self.memory: list[tuple[int, int]] = []
        self.tensors: list[int] = []
        self.objects: list[int] = []

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if step < self._half:
            return
        with Path("/proc/self/statm").open() as file:
            self.memory.append((step, int(file.read().split()[1]) * _PAGE))
        if step in (self._half, self._last):
            gc.collect()
            alive = gc.get_objects()
            self.tensors.append(sum(isinstance(one, torch.Tensor) for one in alive))
            self.objects.append(len(alive))

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass

    def growth(self) -> Growth:
        steps, sizes = (torch.tensor(column, dtype=torch.float64) for column in zip(*self.memory, strict=True))
        centred = steps - steps.mean()
        slope = float((centred * (sizes - sizes.mean())).sum() / centred.square().sum())
        (tensors, objects) = (last - first for first, last in (self.tensors, self.objects))
        return Growth(slope, tensors, objects)


def soak(loop: Loop, num_steps: int, folder: Path) -> Growth:
    """Returns the growth in the second half of a run, with checkpoints."""
    watch = _Watch(num_steps)
    made = loop(
        loggers=[watch], log_every=max(num_steps // 100, 1), checkpoints=ht.Checkpoints(folder, every=num_steps // 8)
    )
    made.run(num_steps * (made.every if isinstance(made, ht.RealTime) else 1))
    return watch.growth()


def soak_alone(name: str, num_steps: int, folder: Path) -> Growth:
    """Returns the same of a process of its own, whose memory nothing else has touched."""
    folder.mkdir(parents=True, exist_ok=True)
    loop = {**FAMILIES, **COMPILED}[name]

    def go_on(here: Path) -> None:
        (here / "growth.json").write_text(json.dumps(vars(soak(loop, num_steps, here / "checkpoints"))))

    code = kills.exit_code(kills.start(go_on, folder, folder / "log"))
    if code:
        raise RuntimeError(f"{name}: exit code {code}: {(folder / 'log').read_text()[-2000:]}")
    return Growth(**json.loads((folder / "growth.json").read_text()))
