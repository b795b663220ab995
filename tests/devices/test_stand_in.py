"""Every backend, dynamics and learner on a device that is not the host, without one: see `tests/helpers/stand_in.py`.

Each run is counted at a horizon and at twice that: what grows with the horizon is a wait in every inner step. The
numbers must be those of the host, bit for bit, since the kernels are the host's.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from hypertorch import fewshot
from hypertorch.errors import IncompatibleBackendError, NonFiniteError, NonFiniteWarning, ReplayError
from hypertorch.hypergradients.guards.examination import SOUND
from hypertorch.inner import memo
from hypertorch.types import Batch, TensorDict
from tests.conformance.test_matrix import CASES, EXACT, NUM_STEPS, REVERSIBLE
from tests.fewshot.learners.test_learners import Blobs
from tests.helpers.leaves import learner_of, leaves
from tests.helpers.problems import normal
from tests.helpers.stand_in import StandIn

F64 = torch.float64
STEPS = 2
backends = ht.hypergradients
Run = Callable[[int], Any]

BACKENDS: dict[str, Callable[[int], ht.Hypergradient]] = {
    **{name: partial(lambda backend, _: backend, backend) for name, backend in EXACT.items()},
    "every 4": lambda _: backends.Reverse(checkpoint_every=2),
    "spilled": lambda _: backends.Reverse(checkpoint_every=1, spill_to=tempfile.gettempdir()),
    "spilled snapshots": lambda _: backends.Reverse(snapshots=2, spill_to=tempfile.gettempdir()),
    "full window": lambda num_steps: backends.Truncated(window=num_steps),
    "forward in chunks": lambda _: backends.Forward(chunk_size=4),
    "mixed": lambda _: backends.Reverse(derivative="mixed"),
    "mixed or not": lambda _: backends.Reverse(derivative="auto"),
    "Truncated": lambda _: backends.Truncated(window=2),
    "Implicit": lambda _: backends.Implicit(solver=ht.linear_solvers.Neumann(num_terms=3)),
    "Implicit, conjugate gradients": lambda _: backends.Implicit(
        solver=ht.linear_solvers.ConjugateGradient(max_iterations=3, tolerance=0.0)
    ),
    "FirstOrder": lambda _: backends.FirstOrder(),
    "OneStep": lambda _: backends.OneStep(),
    "OneStep by differences": lambda _: backends.OneStep(finite_difference=True),
    "ForwardGradient": lambda _: backends.ForwardGradient(num_samples=2),
    "ForwardGradient one by one": lambda _: backends.ForwardGradient(num_samples=2, chunk_size=1),
    "EvoGrad": lambda _: backends.EvoGrad(),
    "EvolutionStrategies": lambda _: backends.EvolutionStrategies(num_pairs=2, sigma=1e-4),
    **{name: partial(lambda backend, _: backend, backend) for name, backend in REVERSIBLE.items()},
}
SPILLED = ("spilled", "spilled snapshots")
# A single step has no momentum.
ALL_PATHS = {*EXACT, *REVERSIBLE, *SPILLED, "mixed", "mixed or not"} - {"forward by duals"}
# Reads of a hypergradient, whatever the horizon: one look at NaN at the end, and what is named here.
MORE_READS = {
    # Where steps were run again, whether they arrived at the same state.
    **dict.fromkeys(("step-wise", "every 4", "sqrt", "revolve", *SPILLED), 1),
    # And which hyperparameters have a zero derivative, in mixed mode and forward.
    **dict.fromkeys(("mixed", "forward in chunks"), 2),
    "forward": 1,
    "forward by duals": 1,
    # Where the gradient was taken.
    "OneStep by differences": 1,
    "ForwardGradient one by one": 1,
    # Two figures, and whether the solution is finite.
    "Implicit": 3,
    "Implicit, conjugate gradients": 3,
    # The momentum's range, that of the integers, and the state that the run must end at, with nothing left over.
    "reversible": 3,
}


class Inner(ht.InnerProblem):
    """A two-layer net with example weights, dropout and minibatches that lie on the device."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.inputs, self.labels = normal(4, 4, seed=10), torch.tensor([0, 1, 2, 0])
        self.batches = [torch.tensor(rows) for rows in ([0, 1, 2], [1, 2, 3], [3, 0, 1])]
        self.start = {"first": 0.5 * normal(4, 6, seed=30), "second": 0.5 * normal(6, 3, seed=31)}
        self.dropout = dropout

    def init_params(self, hparams: TensorDict) -> TensorDict:
        return {"first": self.start["first"], "second": self.start["second"] * hparams["scale"]}

    def batch(self, step: int) -> Batch:
        return self.batches[step % len(self.batches)]

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Tensor) -> Tensor:
        hidden = F.dropout(torch.tanh(self.inputs[batch] @ params["first"]), self.dropout)
        losses = F.cross_entropy(hidden @ params["second"], self.labels[batch], reduction="none")
        penalty = params["first"].square().sum() + params["second"].square().sum()
        return (hparams["weights"][batch].sigmoid() * losses).mean() + hparams["log_l2"].exp() * penalty


class Outer(ht.OuterProblem):
    """Cross-entropy on other data, with a direct term."""

    def __init__(self, extra: TensorDict) -> None:
        self.inputs, self.labels = normal(5, 4, seed=20), torch.arange(5) % 3
        self.values = {
            "scale": torch.tensor(1.1, dtype=F64),
            "weights": 0.1 * normal(4, seed=32),
            "log_l2": torch.tensor(-3.0, dtype=F64),
            **extra,
        }

    def init_hparams(self) -> TensorDict:
        return dict(self.values)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        logits = torch.tanh(self.inputs @ params["first"]) @ params["second"]
        return F.cross_entropy(logits, self.labels) + 0.01 * hparams["log_l2"] ** 2


class OuterWithSteps(Outer):
    """The same with a term at every inner step."""

    def step_loss(self, params: TensorDict, hparams: TensorDict, batch: Batch, index: int) -> Tensor:
        return 0.1 * (index + 1) * params["first"].square().sum() + hparams["weights"].sum()


def problem_of(
    case: str, num_steps: int, *, dropout: float = 0.0, outer: type[Outer] = Outer, **options: Any
) -> ht.BilevelProblem:
    rule, extra = CASES[case]
    # A schedule of the matrix has its own length.
    scheduled = {
        setting.name for setting in rule.settings().values() if isinstance(setting, ht.Hyper) and "step" in setting.per
    }
    cycle = torch.arange(num_steps) % NUM_STEPS
    extra = {name: value[cycle] if name.split(".")[0] in scheduled else value for name, value in extra.items()}
    return ht.BilevelProblem(Inner(dropout), outer(extra), dynamics=rule, num_steps=num_steps, **options)


def hypergradient(problem: ht.BilevelProblem, backend: ht.Hypergradient, hparams: TensorDict, **options: Any) -> Any:
    with warnings.catch_warnings():
        # Far from a solution, where `Implicit` says so.
        warnings.simplefilter("ignore", ht.errors.LinearSolveWarning)
        return ht.hypergradient(problem, hparams, backend=backend, **options)


def counted(problem: ht.BilevelProblem, backend: ht.Hypergradient, **options: Any) -> tuple[Counter, Counter]:
    """Runs a hypergradient on the stand-in; returns its reads and uploads, and asserts that it is the host's."""
    with StandIn() as device:
        there, hparams = device.put(problem), device.put(problem.init_hparams())
        # What is found out once for a kind of problem is no part of a hypergradient.
        hypergradient(there, backend, hparams, **options)
        device.reset()
        found = hypergradient(there, backend, hparams, **options)
        reads, uploads = device.reads.copy(), device.uploads.copy()
        tensors = [*found.grads.values(), *found.params.values(), found.outer_loss]
        assert {tensor.device.type for tensor in tensors} == {device.device.type}
        grads = {name: value.cpu() for name, value in found.grads.items()}
    expected = hypergradient(problem, backend, problem.init_hparams(), **options)
    if getattr(backend, "derivative", None) != "auto":  # which a clock chooses
        assert found.stats == expected.stats, "the device takes another route, such as tangents one by one"
    # Generators of two devices have not one state, and neither has what is drawn from them.
    if not isinstance(backend, (backends.ForwardGradient, backends.EvolutionStrategies, backends.EvoGrad)):
        for name, value in expected.grads.items():
            torch.testing.assert_close(grads[name], value, rtol=1e-12, atol=1e-14)
    return reads, uploads


def check(case: str, backend: str, **options: Any) -> None:
    """Asserts that no inner step waits, and how often a hypergradient does."""
    # Their steps are run for each tangent.
    lengths = (1, 2) if backend == "forward by duals" else (STEPS, 2 * STEPS)
    # An estimate drops paths by design. A sign has no slope, and what acts through one has no path.
    if backend not in ALL_PATHS:
        options["allow_unused"] = tuple(problem_of(case, STEPS).init_hparams())
    elif case.startswith("Lion"):
        options["allow_unused"] = ("weights", "log_l2")
    counts = [counted(problem_of(case, steps, **options), BACKENDS[backend](steps)) for steps in lengths]
    assert counts[0] == counts[1], "the number of waits grows with the horizon"
    reads, uploads = counts[0]
    assert not uploads, "something is copied from the host"
    # Which of two it is, a clock has said.
    either = (backend,) if backend != "mixed or not" else ("whole graph", "mixed")
    assert reads.total() in {1 + MORE_READS.get(name, 0) for name in either}, reads


PLAIN = [case for case in CASES if ", schedules" not in case and ", per parameter" not in case]
PAIRS = [
    pytest.param(
        case,
        backend,
        marks=()
        if (case == "SGD" and backend not in (*REVERSIBLE, "forward by duals", "ForwardGradient one by one"))
        or (case == "ReversibleMomentum" and backend in REVERSIBLE)
        or (case in PLAIN and backend == "step-wise")
        else pytest.mark.slow,
    )
    for case in CASES
    for backend in (BACKENDS if case in PLAIN else ("step-wise", "mixed", "forward", "full window", "reversible"))
    if backend not in REVERSIBLE or case.startswith("ReversibleMomentum")
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_no_inner_step_waits_for_the_device(case: str, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", ["step-wise", "forward", "reversible", "EvolutionStrategies"])
def test_noise_of_the_device_is_drawn_again(backend: str) -> None:
    """Dropout draws from the device's generator, which is seeded and put back; and terms at inner steps."""
    case = "ReversibleMomentum" if backend == "reversible" else "SGD"
    with StandIn() as device:
        problem = device.put(problem_of(case, STEPS, dropout=0.4, outer=OuterWithSteps))
        hparams = problem.init_hparams()
        before = device.generator.get_state()
        # A step that is run again must arrive at the same state, or is refused.
        first, again = (hypergradient(problem, BACKENDS[backend](STEPS), hparams) for _ in range(2))
        assert all(torch.equal(value.cpu(), again.grads[name].cpu()) for name, value in first.grads.items())
        assert torch.equal(device.generator.get_state(), before)
        torch.rand(1, device=device.device)
        assert not torch.equal(device.generator.get_state(), before)


def test_what_is_found_out_once_works_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side effects, the comparisons of a new kind of problem, what reaches the outer loss: all of it looked at anew."""
    for backend in ("whole graph", "mixed or not", "forward", "EvolutionStrategies"):
        monkeypatch.setattr(memo, "_entries", {})
        with StandIn() as device:
            problem = device.put(problem_of("SGD", STEPS))
            result = hypergradient(problem, BACKENDS[backend](STEPS), problem.init_hparams())
            assert {value.device for value in result.grads.values()} == {device.device}
        assert memo.entries(SOUND)


def test_a_solver_reads_once_in_every_iteration() -> None:
    solver = ht.linear_solvers.ConjugateGradient(max_iterations=5, tolerance=1e-30)
    unused = tuple(problem_of("SGD", 1).init_hparams())
    reads, uploads = counted(problem_of("SGD", 3, allow_unused=unused), backends.Implicit(solver=solver))
    assert sum(count for place, count in reads.items() if "conjugate_gradient.py" in place) == 5
    assert (reads.total(), uploads.total()) == (5 + 4, 0)


class Kept(fewshot.EpisodeSource):
    """Episodes that lie on the device already."""

    def __init__(self, device: torch.device) -> None:
        self.num_tasks = 2
        self.episodes = [Blobs(num_tasks=2).to(device).at(step) for step in range(2)]

    def at(self, step: int) -> fewshot.Episode:
        return self.episodes[step % 2]


LEARNERS = leaves(fewshot, fewshot.Learner)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_no_learner_waits_in_a_step(name: str, route: str) -> None:
    solver = ht.linear_solvers.ConjugateGradient(max_iterations=3, tolerance=0.0)
    backend = backends.Implicit(solver=solver) if name == "IMAML" else backends.Reverse(checkpoint_every=1)
    counts = []
    for steps in (2, 4):
        made = learner_of(LEARNERS[name], 16, 3, ht.dynamics.SGD(lr=0.2), F64, num_steps=steps)
        execution = ht.Execution(tasks=route)  # type: ignore[arg-type]
        with StandIn() as device:
            source = device.put(made).on(Kept(device.device))
            problem, hparams = source.at(0), source.init_hparams()
            hypergradient(problem, backend, hparams, execution=execution)
            device.reset()
            grads = hypergradient(source.at(1), backend, hparams, outer_step=1, execution=execution).grads
            counts.append((device.reads.copy(), device.uploads.copy()))
            grads = {key: value.cpu() for key, value in grads.items()}
        there = made.on(Kept(torch.device("cpu")))
        expected = hypergradient(there.at(1), backend, there.init_hparams(), outer_step=1, execution=execution).grads
        for key, value in expected.items():
            torch.testing.assert_close(grads[key], value, rtol=1e-12, atol=1e-14)
    assert counts[0] == counts[1]
    # One for the labels of the episodes, one for NaN, and those of each run: tasks one by one are as many.
    runs = 2 if route == "loop" else 1
    assert not counts[0][1] and counts[0][0].total() <= 2 + runs * (3 if name == "IMAML" else 1), counts[0]


def test_the_dropout_kernel_of_an_accelerator_has_no_forward_derivative() -> None:
    """On a CPU dropout is a product, which mixed mode serves. PyTorch has a kernel for other devices, and no more."""
    with StandIn() as device:
        problem = device.put(problem_of("SGD", STEPS, dropout=0.4))
        with pytest.raises(IncompatibleBackendError, match="native_dropout_backward .*Use `derivative='reverse'`"):
            hypergradient(problem, BACKENDS["mixed"](STEPS), problem.init_hparams())
        hypergradient(problem, BACKENDS["mixed or not"](STEPS), problem.init_hparams())


IMAGES = fewshot.StrokeCharacters(split="meta_val", num_classes=6, drawings=6, image_size=8)


@pytest.mark.parametrize("augmentation", [None, fewshot.Augmentation(flip=True, crop_padding=1, brightness=0.2)])
def test_a_sampler_makes_its_episodes_on_the_device(augmentation: fewshot.Augmentation | None) -> None:
    sampler = fewshot.EpisodeSampler(IMAGES, way=3, shot=2, num_queries=3, num_tasks=2, augmentation=augmentation)
    with StandIn() as device:
        there = sampler.to(device.device)
        device.reset()
        episode = there.at(4)
        assert not device.reads and not device.uploads
        assert {part.device.type for examples in episode for part in examples} == {device.device.type}
        if augmentation is None:
            assert torch.equal(episode.query.inputs.cpu(), sampler.at(4).query.inputs)


def test_episodes_of_the_host_are_copied_without_a_wait() -> None:
    with StandIn() as device:
        episode = Blobs().to(device.device).at(1)
        assert not device.reads and not device.uploads
        assert torch.equal(episode.support.inputs.cpu(), Blobs().at(1).support.inputs)


def test_minibatches_of_data_on_the_device_are_taken_without_a_wait() -> None:
    data = torch.utils.data.TensorDataset(normal(12, 4, seed=10), torch.arange(12))
    with StandIn() as device:
        there = torch.utils.data.TensorDataset(*(device.put(tensor) for tensor in data.tensors))
        device.reset()
        inputs, labels = ht.Minibatches(there, batch_size=6, seed=3)(1)
        assert not device.reads and not device.uploads
        expected = ht.Minibatches(data, batch_size=6, seed=3)(1)
        assert torch.equal(inputs.cpu(), expected[0]) and torch.equal(labels.cpu(), expected[1])


class Settled(ht.ProblemSource):
    """The same problem at each outer step; its loss is not finite at those that are named."""

    def __init__(self, problem: ht.BilevelProblem, lost: tuple[int, ...] = ()) -> None:
        self.problem, self.lost = problem, lost

    def init_hparams(self) -> TensorDict:
        return self.problem.init_hparams()

    def at(self, outer_step: int) -> ht.BilevelProblem:
        return ht.BilevelProblem(
            self.problem.inner,
            Lost(self.problem.outer.values) if outer_step in self.lost else self.problem.outer,  # type: ignore[attr-defined]
            dynamics=self.problem.dynamics,
            num_steps=self.problem.num_steps,
            allow_unused=("momentum", "dampening"),  # of which one step knows nothing
        )


class Lost(Outer):
    """An outer loss that is infinite."""

    def __init__(self, values: TensorDict) -> None:
        super().__init__({})
        self.values = values
        self.inputs, self.labels = self.inputs.to(values["lr"].device), self.labels.to(values["lr"].device)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        return super().loss(params, hparams, batch) / 0.0


def test_an_outer_step_reads_what_a_hypergradient_reads() -> None:
    """With clipping, projection, a scheduler, and without a record: the optimizer adds no wait."""
    counts = []
    # The first run looks at what is new.
    for num_outer_steps in (8, 8, 12):
        with StandIn() as device:
            source = Settled(device.put(problem_of("SGD", STEPS)))
            loop = ht.OuterLoop(
                source,
                optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
                backend=backends.Reverse(checkpoint_every=1),
                clip_norm=0.1,
                constraints={"weights": ht.Box(lower=-0.05, upper=0.05)},
                log_every=100,
                progress=False,
            )
            trained = loop.run(num_outer_steps=num_outer_steps)
            assert float(trained.hparams["weights"].abs().max()) <= 0.05
            counts.append((device.reads.total(), device.uploads.total()))
    # Two for each outer step, as `MORE_READS` says of single steps.
    assert counts[2][0] - counts[1][0] == 2 * 4
    assert counts[2][1] == counts[1][1]


@pytest.mark.parametrize("policy", ["skip", "shorten"])
def test_a_step_that_is_not_finite_is_left_out_on_a_device(policy: str) -> None:
    with StandIn() as device, pytest.warns(NonFiniteWarning) if policy == "skip" else pytest.raises(NonFiniteError):
        loop = ht.OuterLoop(
            Settled(device.put(problem_of("SGD", STEPS)), lost=(1,)),
            optimizer=partial(torch.optim.Adam, lr=0.01),
            backend=backends.Reverse(),
            on_non_finite=policy,  # type: ignore[arg-type]
            progress=False,
        )
        trained = loop.run(num_outer_steps=3)
        assert trained.hparams["weights"].device.type == device.device.type


def test_an_evaluation_reads_once() -> None:
    with StandIn() as device:
        source = Settled(device.put(problem_of("SGD", STEPS)))
        hparams = source.init_hparams()
        counts = []
        for num_episodes in (2, 6):
            ht.evaluate(source, hparams, num_episodes=num_episodes)
            device.reset()
            ht.evaluate(source, hparams, num_episodes=num_episodes)
            counts.append((device.reads.total(), device.uploads.total()))
        assert counts[0] == counts[1] and counts[0][0] == 1, counts


class Drifting(Inner):
    """Data that is other data when it is asked for again."""

    asked = 0

    def batch(self, step: int) -> Batch:
        self.asked += 1
        return self.batches[(step + self.asked) % len(self.batches)]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("backend", ["step-wise", "every 4", "revolve", "mixed", "forward in chunks"])
def test_what_is_gathered_is_refused_before_it_is_returned(
    backend: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else the look at a new kind of problem finds it first.
    monkeypatch.setattr("hypertorch.hypergradients.api.examine", lambda *_, **__: None)
    monkeypatch.setattr("hypertorch.hypergradients.forward.serving_route", lambda _, __, asked: asked)
    monkeypatch.setattr("hypertorch.hypergradients.reverse.is_mixed", lambda *_, **__: True)
    plain = problem_of("SGD", 5)
    problem = ht.BilevelProblem(Drifting(), plain.outer, dynamics=plain.dynamics, num_steps=5)
    with StandIn() as device:
        problem = device.put(problem) if on_device else problem
        with pytest.raises(ReplayError, match=r"after inner step \d differs by .* when steps \d to \d are run again"):
            hypergradient(problem, BACKENDS[backend](5), problem.init_hparams())
