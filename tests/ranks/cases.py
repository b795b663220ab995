"""What is run on one process and on two, to be compared: each case returns what it found."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hypertorch as ht
from hypertorch import outer
from hypertorch.fewshot import (
    MAML,
    MLP,
    Conv4,
    EpisodeSampler,
    HyperRepresentation,
    Regression,
    Sinusoid,
    StrokeCharacters,
)
from hypertorch.hypergradients import api
from hypertorch.inner.tasks import TaskSlice
from hypertorch.types import Batch, TensorDict
from tests.helpers.problems import normal, task_problem
from tests.outer.problems import Inner, Quadratics
from tests.outer.runs import full_loop, make_loop, records

Found = dict[str, Any]
Case = Callable[["ht.Ranks | None", Path], Found]


def execution(ranks: ht.Ranks | None, **settings: Any) -> ht.Execution:
    return ht.Execution(**{"tasks": "loop", **settings}, ranks=ranks)


def outcome(trained: ht.Trained, memory: outer.MemoryLogger | None = None) -> Found:
    """The outcome of a run, without what measures time."""
    records = [] if memory is None else memory.records
    return {
        "hparams": trained.hparams,
        "best": (trained.best_hparams, trained.best_step, trained.best_value),
        "carry": trained.carry,
        "records": [{name: value for name, value in one.items() if name != "steps_per_second"} for one in records],
    }


def maml(ranks: ht.Ranks | None, folder: Path, *, dtype: torch.dtype = torch.float64, **how: Any) -> Found:
    """MAML on sine waves."""
    network, sgd = MLP(hidden=(20, 20)).to(dtype), ht.dynamics.SGD(lr=0.01)
    learner = MAML(network, dynamics=sgd, num_steps=2, objective=Regression())
    return few_shot(learner, Sinusoid(num_tasks=8, shot=5, num_queries=5, dtype=dtype), execution(ranks, **how))


def hyper_representation(ranks: ht.Ranks | None, folder: Path, *, dtype: torch.dtype = torch.float64) -> Found:
    """A representation of drawn characters."""
    learner = HyperRepresentation(
        Conv4(hidden=4, downsample="stride").to(dtype), dynamics=ht.dynamics.SGD(lr=1.0), num_steps=3
    )
    sampler = EpisodeSampler(
        StrokeCharacters(split="meta_train"), way=5, shot=1, num_queries=2, num_tasks=4, dtype=dtype
    )
    return few_shot(learner, sampler, execution(ranks))


def few_shot(learner: Any, sampler: Any, how: ht.Execution) -> Found:
    memory, source = outer.MemoryLogger(), learner.on(sampler)
    metric = "accuracy" if isinstance(sampler, EpisodeSampler) else "outer_loss"
    loop = ht.OuterLoop(
        source,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        backend=ht.hypergradients.Reverse(),
        validation=ht.Validation(source=source, every=2, num_episodes=11, metric=metric, mode="min"),
        loggers=[memory],
        log_every=2,
        execution=how,
    )
    return outcome(loop.run(6), memory)


def uneven(ranks: ht.Ranks | None, folder: Path) -> Found:
    memory = outer.MemoryLogger()
    loop = make_loop(Quadratics(num_tasks=5), loggers=[memory], execution=execution(ranks))
    return outcome(loop.run(6), memory)


@dataclass(frozen=True, kw_only=True)
class Noisy(ht.ProblemSource):
    """Tasks whose network drops units out, so that each task draws noise of its own."""

    warm_start: bool = False

    def init_hparams(self) -> TensorDict:
        return self.at(0).init_hparams()

    def at(self, outer_step: int) -> ht.BilevelProblem:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
        # A run that goes on leaves its start behind.
        unused = tuple(dict(net.named_parameters())) if self.warm_start else ()
        return task_problem(net, item=(1, 4, 4), num_tasks=4, warm_start=self.warm_start, allow_unused=unused)


def noise(ranks: ht.Ranks | None, folder: Path) -> Found:
    return outcome(make_loop(Noisy(), execution=execution(ranks)).run(4))


def warm_start(ranks: ht.Ranks | None, folder: Path) -> Found:
    loop = make_loop(
        Noisy(warm_start=True), execution=execution(ranks), checkpoints=outer.Checkpoints(folder / "warm", every=2)
    )
    loop.run(3)
    return outcome(loop.run(5, resume=True))


def everything(ranks: ht.Ranks | None, folder: Path) -> Found:
    """Optimizer, scheduler, clipping, constraints, validation, checkpoints: interrupted and gone on with."""
    loop = full_loop(folder / "full", execution=execution(ranks))
    loop.run(7)
    found = outcome(loop.run(12, resume=True))
    # Which the first process alone has.
    lines = folder / "full" / "metrics.jsonl"
    return {**found, "records": records(lines) if ranks is None or ranks.is_first else []}


def single(ranks: ht.Ranks | None, folder: Path, *, backend: ht.Hypergradient) -> Found:
    """Some hypergradients of one inner problem, without tasks."""
    problem = Quadratics(num_tasks=None).at(0)
    hparams, found = problem.init_hparams(), {}
    for step in range(3):
        result = ht.hypergradient(
            problem, hparams, backend=backend, outer_step=step, execution=ht.Execution(ranks=ranks)
        )
        found[str(step)] = {**result.grads, "outer_loss": result.outer_loss}
    return found


def evaluation(ranks: ht.Ranks | None, folder: Path, *, num_tasks: int | None, num_episodes: int) -> Found:
    source = Quadratics(num_tasks=num_tasks)
    report = ht.evaluate(
        source, source.init_hparams(), num_episodes=num_episodes, first_step=3, execution=execution(ranks)
    )
    return {name: vars(estimate) for name, estimate in report.metrics.items()}


class NotFinite(Inner):
    """The inner problem of quadratics, of whose last task the third step meets NaN."""

    def batch(self, step: int) -> Batch:
        factors = torch.ones(4, dtype=torch.float64)
        factors[3] = torch.nan if step == 2 else 1.0
        return factors

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return batch * super().loss(params, hparams, None)


@dataclass(frozen=True, kw_only=True)
class SometimesNotFinite(Quadratics):
    """Quadratics of which outer step 2 meets NaN in one task."""

    def at(self, outer_step: int) -> ht.BilevelProblem:
        problem = super().at(outer_step)
        return replace(problem, inner=NotFinite()) if outer_step == 2 else problem


def non_finite(ranks: ht.Ranks | None, folder: Path, *, policy: str) -> Found:
    loop = make_loop(SometimesNotFinite(), on_non_finite=policy, execution=execution(ranks))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = outcome(loop.run(5))
    return {**found, "warnings": [str(one.message) for one in caught]}


def out_of_memory(ranks: ht.Ranks | None, folder: Path) -> Found:
    """A run in which the last of the tasks does not fit among more than two, which one process alone meets."""
    original = api._Run.over

    def over(run: Any, item: TaskSlice, *args: Any) -> Any:
        if item.stop == 8 and item.stop - item.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(run, item, *args)

    checkpoints = outer.Checkpoints(folder / "memory", every=1)
    loop = make_loop(Quadratics(num_tasks=8), checkpoints=checkpoints, execution=execution(ranks, tasks="vmap"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.setattr(api._Run, "over", over)
        warnings.simplefilter("always")
        found = outcome(loop.run(3))
    newest = checkpoints.newest()
    kept = None if newest is None or (ranks and not ranks.is_first) else checkpoints.load(newest).chunk
    return {**found, "warnings": [str(one.message).split(":")[0] for one in caught], "chunk": kept}


def other_hparams(ranks: ht.Ranks | None, folder: Path) -> Found:
    """A hypergradient that is asked for at other outer variables on each process."""
    hparams = Quadratics().init_hparams()
    hparams["curvature"] = hparams["curvature"] + (0.0 if ranks is None else 1e-12 * ranks.rank)
    result = ht.hypergradient(
        Quadratics().at(0), hparams, backend=ht.hypergradients.Reverse(), execution=execution(ranks)
    )
    return dict(result.grads)


def other_evaluated(ranks: ht.Ranks | None, folder: Path) -> Found:
    hparams = Quadratics().init_hparams()
    hparams["start"] = hparams["start"] + (0.0 if ranks is None else 1e-12 * ranks.rank)
    ht.evaluate(Quadratics(), hparams, num_episodes=9, execution=execution(ranks))
    return {}


@dataclass(frozen=True, kw_only=True)
class OtherStart(Quadratics):
    """Quadratics that start elsewhere on every process, as a network that nobody seeded."""

    rank: int

    def init_hparams(self) -> TensorDict:
        return {name: value + self.rank for name, value in super().init_hparams().items()}


def other_start(ranks: ht.Ranks | None, folder: Path) -> Found:
    source = OtherStart(rank=0 if ranks is None else ranks.rank)
    return outcome(make_loop(source, execution=execution(ranks)).run(3))


def writing(ranks: ht.Ranks | None, folder: Path) -> Found:
    """What each process writes, into a folder of its own."""
    own = folder / f"written_by_{0 if ranks is None else ranks.rank}"
    snapshots = ht.Snapshots(every=1)
    memory = outer.MemoryLogger()
    loop = full_loop(own, loggers=[memory], snapshots=snapshots, execution=execution(ranks))
    loop.run(6)
    return {
        "files": sorted(str(path.relative_to(own)) for path in own.rglob("*") if path.is_file()),
        "records": len(memory.records),
        "tensors": len(memory.tensors),
    }


def route(ranks: ht.Ranks | None, folder: Path) -> Found:
    """The route that a run with `tasks="auto"` takes, where the processes measure different ones."""
    rank = 0 if ranks is None else ranks.rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypertorch.inner.tasks._faster_route", lambda *_: ("vmap", "loop")[rank])
        ht.memo.clear()
        loop = make_loop(execution=execution(ranks, tasks="auto"))
        taken: set[str] = set()
        patch.setattr(
            "hypertorch.outer.steps.step.hypergradient",
            lambda *args, **named: taken.add(named["execution"].tasks) or ht.hypergradient(*args, **named),
        )
        loop.run(2)
    return {"taken": sorted(taken)}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the collectives."""
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_gather_object", "all_reduce", "broadcast_object_list"):
            original = getattr(dist, name)

            def call(*args: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
                calls[_name] += 1
                return _original(*args, **named)

            patch.setattr(dist, name, call)
        yield calls


def collectives(ranks: ht.Ranks | None, folder: Path) -> Found:
    """How many collectives two more outer steps take, of which none or each is logged."""

    def calls(num_steps: int, log_every: int) -> dict[str, int]:
        with counted() as found:
            make_loop(log_every=log_every, loggers=[outer.MemoryLogger()], execution=execution(ranks)).run(num_steps)
        return dict(found)

    return {"3": calls(3, 100), "5": calls(5, 100), "3 logged": calls(3, 1), "5 logged": calls(5, 1)}


def refused(ranks: ht.Ranks | None, folder: Path, *, what: str) -> Found:
    """What several processes cannot share."""
    backends = {
        "Reverse": ht.hypergradients.Reverse(),
        "persistent": ht.hypergradients.EvolutionStrategies(num_pairs=4, sigma=0.1, persistent=True),
        "keep_tangents": ht.hypergradients.Forward(keep_tangents=True),
        "one sample": ht.hypergradients.ForwardGradient(),
    }
    if what == "too few tasks":
        make_loop(Quadratics(num_tasks=1), execution=execution(ranks)).run(1)
    elif what == "real time":
        ht.RealTime(
            Quadratics(num_tasks=None).at(0),
            every=1,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            execution=ht.Execution(ranks=ranks),
        ).run(1)
    elif what == "other numbers of tasks":
        source = ht.Problems(lambda step: Quadratics(num_tasks=4 if step == 0 else 3).at(step))
        ht.evaluate(source, Quadratics().init_hparams(), num_episodes=14, execution=execution(ranks))
    else:
        make_loop(Quadratics(num_tasks=None), backend=backends[what], execution=ht.Execution(ranks=ranks)).run(1)
    return {}


def dtypes(ranks: ht.Ranks | None, folder: Path) -> Found:
    """Tensors of many dtypes and shapes, gathered; those of each process carry its number."""
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    kinds = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float32, torch.complex128)
    own = {str(kind): (normal(3, 2, seed=rank) * 3).to(kind) for kind in kinds}
    own |= {"scalar": torch.tensor(rank + 0.5), "empty": torch.zeros(0, 3), "view": normal(4, 3, seed=rank).T[:, ::2]}
    rows = {"rows": normal(len(range(rank, 3, size)), 2, seed=rank)}  # 2 and 1 of 3
    if ranks is None:
        return {"own": own, **rows}
    found = ranks.gather(lambda: {**own, **rows}, {**own, **rows}, rows={"rows": 3})
    return {"own": own, **rows, "found": found}


@dataclass(frozen=True, kw_only=True)
class Dying(Quadratics):
    """Quadratics whose last process is killed when the problem of a step is asked for."""

    rank: int
    step: int

    def at(self, outer_step: int) -> ht.BilevelProblem:
        if self.rank == 1 and outer_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().at(outer_step)


def lost(ranks: ht.Ranks, folder: Path) -> Found:
    """What is left of a run of which a process is killed between two checkpoints."""
    loop = full_loop(folder / "lost", Dying(rank=ranks.rank, step=8), execution=execution(ranks))
    start = time.monotonic()
    try:
        loop.run(12)
    except ht.errors.LostRankError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}
    return {}


CASES: dict[str, Case] = {
    "maml by loop": maml,
    "maml by vmap": partial(maml, tasks="vmap", chunk=4),
    "maml in single precision": partial(maml, dtype=torch.float32, tasks="vmap"),
    "hyper-representation": hyper_representation,
    "hyper-representation in single precision": partial(hyper_representation, dtype=torch.float32),
    "uneven shares": uneven,
    "noise": noise,
    "warm start": warm_start,
    "everything": everything,
    "forward": partial(single, backend=ht.hypergradients.Forward()),
    "forward in chunks": partial(single, backend=ht.hypergradients.Forward(chunk_size=1)),
    "forward gradient": partial(single, backend=ht.hypergradients.ForwardGradient(num_samples=4, chunk_size=2)),
    "forward gradient one by one": partial(
        single, backend=ht.hypergradients.ForwardGradient(num_samples=8, chunk_size=1, distribution="rademacher")
    ),
    "evolution": partial(single, backend=ht.hypergradients.EvolutionStrategies(num_pairs=4, sigma=0.1)),
    "evaluation": partial(evaluation, num_tasks=3, num_episodes=14),
    "evaluation of a single problem": partial(evaluation, num_tasks=4, num_episodes=3),
    "evaluation without tasks": partial(evaluation, num_tasks=None, num_episodes=5),
    "NaN raises": partial(non_finite, policy="raise"),
    "NaN is skipped": partial(non_finite, policy="skip"),
    "NaN shortens": partial(non_finite, policy="shorten"),
    "out of memory": out_of_memory,
    "other hparams": other_hparams,
    "other hparams evaluated": other_evaluated,
    "other start": other_start,
    "writing": writing,
    "route": route,
    "collectives": collectives,
    "dtypes": dtypes,
    **{
        f"refused: {what}": partial(refused, what=what)
        for what in (
            "Reverse", "persistent", "keep_tangents", "one sample", "too few tasks", "real time",
            "other numbers of tasks",
        )
    },
}  # fmt: skip


def run(name: str, ranks: ht.Ranks | None, folder: Path) -> Found:
    """What a case finds, or the error that it raises."""
    torch.manual_seed(0)
    try:
        return CASES[name](ranks, folder)
    except (ht.errors.HypertorchError, ValueError, TypeError) as error:
        return {"error": (type(error).__name__, str(error))}
