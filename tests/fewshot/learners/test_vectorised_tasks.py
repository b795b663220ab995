"""Every learner under every exact backend: tasks together, in chunks and one by one give the same hypergradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import hypertorch as ht
from hypertorch import fewshot
from hypertorch.fewshot import (
    ANIL,
    IMAML,
    MAML,
    MLP,
    R2D2,
    Augmentation,
    Conv4,
    Episode,
    EpisodeSampler,
    EpisodeSource,
    Examples,
    HyperRepresentation,
    ImageClasses,
    Learner,
    MetaSGD,
    NetworkLearner,
    ProtoNet,
    Reptile,
)
from hypertorch.types import TensorDict
from tests.fewshot.learners.test_learners import Blobs, with_smooth_activations
from tests.helpers.leaves import learner_of, leaves

F64 = torch.float64
backends = ht.hypergradients
dynamics = ht.dynamics
Made = Callable[[ht.Dynamics, torch.dtype], Learner]
NUM_STEPS = 4
NUM_TASKS = 3  # with chunks of 2 the last chunk is smaller
WAY = 3
# Relative to the largest entry: of each outer variable in double precision, of the whole hypergradient in single
# precision, in which small entries are differences of large ones.
TOLERANCE = {F64: 1e-12, torch.float32: 1e-6}


class NoisyMAML(NetworkLearner):
    """Draws noise for its inputs in `batch`, for all tasks at once."""

    def problem(self, episode: Episode, num_tasks: int | None) -> ht.BilevelProblem:
        inner = self.support_problem(episode, minibatch=self.noisy)
        return self.bilevel(inner, self.query_problem(episode), num_tasks)

    def noisy(self, support: Examples, step: int) -> Examples:
        generator = torch.Generator(support.inputs.device).manual_seed(step)
        noise = torch.randn(support.inputs.shape, generator=generator, dtype=support.inputs.dtype)
        return Examples(support.inputs + 0.2 * noise, support.targets)


def mlp(way: int | None, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return with_smooth_activations(MLP(in_features=4, hidden=(3,), out_features=way)).to(dtype)


LEARNERS: dict[str, Made] = {
    "MAML": lambda rule, dtype: MAML(mlp(WAY, dtype), dynamics=rule, num_steps=NUM_STEPS, learn_lr="step"),
    "noise in `batch`": lambda rule, dtype: NoisyMAML(mlp(WAY, dtype), dynamics=rule, num_steps=NUM_STEPS),
    "MetaSGD": lambda rule, dtype: MetaSGD(mlp(WAY, dtype), dynamics=rule, num_steps=NUM_STEPS),
    "IMAML": lambda rule, dtype: IMAML(mlp(WAY, dtype), dynamics=rule, num_steps=NUM_STEPS),
    "Reptile": lambda rule, dtype: Reptile(mlp(WAY, dtype), dynamics=rule, num_steps=NUM_STEPS, batch_size=4),
    "HyperRepresentation": lambda rule, dtype: HyperRepresentation(
        mlp(None, dtype), way=WAY, dynamics=rule, num_steps=NUM_STEPS
    ),
    "ANIL": lambda rule, dtype: ANIL(mlp(None, dtype), way=WAY, dynamics=rule, num_steps=NUM_STEPS, learn_lr="one"),
    "ProtoNet": lambda rule, dtype: ProtoNet(mlp(None, dtype), way=WAY),
    "R2D2": lambda rule, dtype: R2D2(mlp(None, dtype), way=WAY, ridge=0.5),
}
# A new learner is made by the arguments that it takes.
LEARNERS |= {
    name: partial(learner_of, leaf, 4, WAY)
    for name, leaf in leaves(fewshot, Learner).items()
    if leaf not in {type(make(dynamics.SGD(lr=0.1), F64)) for make in LEARNERS.values()}
}
EXACT: dict[str, ht.Hypergradient] = {
    "whole graph": backends.Reverse(),
    "step-wise": backends.Reverse(checkpoint_every=1),
    "sqrt": backends.Reverse(checkpoint_every="sqrt"),
    "snapshots": backends.Reverse(snapshots=2),
    "budget": backends.Reverse(memory_budget="1GiB"),
    "full window": backends.Truncated(window=NUM_STEPS),
    "forward": backends.Forward(),
    "reversible": backends.Reversible(),
}
# Not exact before the inner solution, but a function of each task alone, as the others are.
ESTIMATES: dict[tuple[str, str], ht.Hypergradient] = {
    ("MAML", "first order"): backends.FirstOrder(),
    ("Reptile", "first order"): backends.FirstOrder(),
    ("IMAML", "implicit, dense"): backends.Implicit(
        solver=ht.linear_solvers.Dense(), stationarity_tolerance=None
    ),
    ("IMAML", "implicit, conjugate gradients"): backends.Implicit(
        solver=ht.linear_solvers.ConjugateGradient(max_iterations=3, tolerance=0.0),
        residual_tolerance=None,
        stationarity_tolerance=None,
    ),
    ("HyperRepresentation", "implicit, dense"): backends.Implicit(
        solver=ht.linear_solvers.Dense(damping=0.5), residual_tolerance=None, stationarity_tolerance=None
    ),
}  # fmt: skip
PAIRS = [*((learner, backend) for learner in LEARNERS for backend in EXACT), *ESTIMATES]


def backend_of(learner: str, backend: str) -> ht.Hypergradient:
    return ESTIMATES.get((learner, backend)) or EXACT[backend]


def source_of(learner: str, backend: str, dtype: torch.dtype) -> ht.ProblemSource:
    rule = (
        dynamics.ReversibleMomentum(lr=0.3, momentum=0.6)
        if backend == "reversible"
        else dynamics.SGD(lr=0.2, momentum=0.5)
    )
    return LEARNERS[learner](rule, dtype).on(InDtype(Blobs(num_tasks=NUM_TASKS, way=WAY, item=(4,)), dtype))


@dataclasses.dataclass(frozen=True)
class InDtype(EpisodeSource):
    """The same episodes in another precision."""

    episodes: EpisodeSource
    dtype: torch.dtype

    @property
    def num_tasks(self) -> int:  # type: ignore[override]
        return self.episodes.num_tasks

    def at(self, step: int) -> Episode:
        parts = (Examples(part.inputs.to(self.dtype), part.targets) for part in self.episodes.at(step))
        return Episode(*parts)


def largest_error(actual: TensorDict, expected: TensorDict, *, over_all: bool) -> float:
    """Returns the largest difference of an entry, relative to the largest of its tensor or of all tensors."""
    assert actual.keys() == expected.keys()
    top = max(float(value.abs().max()) for value in expected.values())
    # What is zero but for rounding (R2-D2's shift, which softmax undoes) is judged by the others.
    sizes = {name: float(value.abs().max()) for name, value in expected.items()}
    scale = {name: top if over_all or size < 1e-12 * top else size for name, size in sizes.items()}
    return max(float((actual[name] - value).abs().max()) / scale[name] for name, value in expected.items())


def assert_routes_agree(
    problem: ht.BilevelProblem, hparams: TensorDict, backend: ht.Hypergradient, *, exact: TensorDict | None = None
) -> None:
    """Fails if the routes differ by more than the tolerance, or than the loop's own distance from `exact` explains."""
    dtype = next(iter(hparams.values())).dtype
    loop = ht.hypergradient(problem, hparams, backend=backend, execution=ht.Execution(tasks="loop"))
    tolerance = TOLERANCE[dtype]
    if exact is not None:
        rounded = {name: value.to(F64) for name, value in loop.grads.items()}
        tolerance += 3.0 * largest_error(rounded, exact, over_all=True)
    for chunk in (None, 2):
        together = dataclasses.replace(problem)
        result = ht.hypergradient(together, hparams, backend=backend, execution=ht.Execution(tasks="vmap", chunk=chunk))
        assert result.outer_loss.dtype == dtype
        assert largest_error(result.grads, loop.grads, over_all=dtype != F64) <= tolerance
        assert largest_error({"": result.outer_loss}, {"": loop.outer_loss}, over_all=True) <= tolerance
        assert largest_error(result.params, loop.params, over_all=True) <= tolerance


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize(("learner", "backend"), PAIRS)
def test_tasks_together_in_chunks_and_one_by_one_agree(learner: str, backend: str, dtype: torch.dtype) -> None:
    source = source_of(learner, backend, dtype)
    assert_routes_agree(source.at(2), source.init_hparams(), backend_of(learner, backend))


@cache
def whole_graph(learner: str, rule: str) -> TensorDict:
    source = source_of(learner, rule, F64)
    return ht.hypergradient(
        source.at(0), source.init_hparams(), backend=backends.Reverse(), execution=ht.Execution(tasks="vmap")
    ).grads


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("learner", LEARNERS)
def test_exact_backends_agree_on_every_learner(learner: str, backend: str) -> None:
    source = source_of(learner, backend, F64)
    grads = ht.hypergradient(
        source.at(0), source.init_hparams(), backend=EXACT[backend], execution=ht.Execution(tasks="vmap")
    ).grads
    expected = whole_graph(learner, "reversible" if backend == "reversible" else "whole graph")
    assert largest_error(grads, expected, over_all=False) <= 1e-10


def augmented(size: int) -> EpisodeSampler:
    images = torch.randint(256, (4 * 5, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return EpisodeSampler(
        ImageClasses(images=images, counts=(5,) * 4, class_names=tuple("abcd")),
        way=WAY,
        shot=2,
        num_queries=3,
        num_tasks=NUM_TASKS,
        augmentation=Augmentation(crop_padding=1, flip=True, brightness=0.2, contrast=0.2),
    )


def conv4(way: int | None, dtype: torch.dtype, statistics: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    downsample = "stride" if size < 16 else "max_pool"
    network = Conv4(way=way, hidden=4, downsample=downsample, image_size=size, statistics=statistics)  # type: ignore[arg-type]
    return network.to(dtype)


CONVOLUTIONAL: dict[str, Callable[[Callable[[int | None], nn.Module]], Learner]] = {
    "MAML": lambda net: MAML(net(WAY), dynamics=dynamics.SGD(lr=0.1), num_steps=2, learn_lr="step"),
    "Reptile": lambda net: Reptile(net(WAY), dynamics=dynamics.SGD(lr=0.1), num_steps=2, batch_size=4),
    "HyperRepresentation": lambda net: HyperRepresentation(
        net(None), way=WAY, dynamics=dynamics.SGD(lr=0.1), num_steps=2
    ),
    "R2D2": lambda net: R2D2(net(None), way=WAY, ridge=0.5),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("statistics", "size"), [("episode", 8), ("running", 8), ("episode", 16)])
@pytest.mark.parametrize("learner", CONVOLUTIONAL)
def test_conv4_on_augmented_images(learner: str, statistics: str, size: int) -> None:
    """In single precision either route is a few millionths from the truth: four norm layers magnify rounding."""

    def source(dtype: torch.dtype) -> ht.ProblemSource:
        made = CONVOLUTIONAL[learner](lambda way: conv4(way, dtype, statistics, size))
        return made.on(InDtype(augmented(size), dtype))

    double, single = source(F64), source(torch.float32)
    hparams = single.init_hparams()
    in_double = {name: value.to(F64) for name, value in hparams.items()}
    assert_routes_agree(double.at(3), in_double, backends.Reverse())
    exact = ht.hypergradient(
        double.at(3), in_double, backend=backends.Reverse(), execution=ht.Execution(tasks="loop")
    ).grads
    assert_routes_agree(single.at(3), hparams, backends.Reverse(), exact=exact)


@pytest.mark.parametrize("learner", LEARNERS)
def test_all_tasks_of_a_step_run_at_once(learner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: the network is called as often for many tasks as for one, and `chunk` times less in chunks."""
    calls: list[int] = []
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, inputs: (calls.append(1), forward(self, inputs))[1])

    def counted(**execution: object) -> int:
        for _ in range(2):  # the first time the kind of problem is looked at, which calls the network, too
            calls.clear()
            ht.hypergradient(problem, hparams, backend=backends.Reverse(), execution=ht.Execution(**execution))  # type: ignore[arg-type]
        return len(calls)

    source = source_of(learner, "whole graph", F64)
    hparams, problem = source.init_hparams(), source.at(0)
    together = counted(tasks="vmap")
    assert together > 0
    assert counted(tasks="vmap", chunk=2) == 2 * together
    assert counted(tasks="loop") == NUM_TASKS * together


def test_the_noise_is_there() -> None:
    """A learner without it gives another hypergradient: the agreement above is not that of noise left out."""
    noisy = source_of("noise in `batch`", "whole graph", F64)
    plain = MAML(mlp(WAY, F64), dynamics=dynamics.SGD(lr=0.2, momentum=0.5), num_steps=NUM_STEPS)
    quiet = plain.on(Blobs(num_tasks=NUM_TASKS, way=WAY, item=(4,)))
    first, second = (
        ht.hypergradient(source.at(0), source.init_hparams(), backend=backends.Reverse()).grads
        for source in (noisy, quiet)
    )
    assert largest_error(first, second, over_all=False) > 1e-3


def test_every_learner_is_here() -> None:
    made = {type(make(dynamics.SGD(lr=0.1), F64)) for make in LEARNERS.values()}
    assert set(leaves(fewshot, Learner).values()) == made - {NoisyMAML}


def test_noise_must_be_used_as_a_tensor_of_all_tasks() -> None:
    noise: list[Tensor] = []

    class Recorded(NoisyMAML):
        def noisy(self, support: Examples, step: int) -> Examples:
            batch = super().noisy(support, step)
            noise.append(batch.inputs)
            return batch

    source = Recorded(mlp(WAY, F64), dynamics=dynamics.SGD(lr=0.2), num_steps=1).on(
        Blobs(num_tasks=NUM_TASKS, way=WAY, item=(4,))
    )
    for route in ("vmap", "loop"):
        noise.clear()
        ht.hypergradient(
            source.at(0), source.init_hparams(), backend=backends.Reverse(), execution=ht.Execution(tasks=route)
        )  # type: ignore[arg-type]
        assert {value.shape[0] for value in noise} == {NUM_TASKS}
