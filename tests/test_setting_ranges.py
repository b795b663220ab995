"""Every public number: taken at the end of its documented range, refused one beyond it, and where it is no number."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hypertorch as ht
from hypertorch import fewshot, hypergradients, linear_solvers
from hypertorch.dynamics import Clipped, CoordinatewiseLSTM, CoordinatewiseMLP, LearnedUpdate, Muon
from tests.helpers.problems import Ridge

Make = Callable[[Any], object]
RIDGE = Ridge().problem(4)
HPARAMS = RIDGE.init_hparams()
SGD = ht.dynamics.SGD(lr=0.1)
NETWORK = fewshot.MLP(in_features=1, hidden=(4,), out_features=1)
Adam = functools.partial(torch.optim.Adam, lr=0.1)


def bilevel(**settings: Any) -> ht.BilevelProblem:
    return ht.BilevelProblem(RIDGE.inner, RIDGE.outer, **{"dynamics": SGD, "num_steps": 4, **settings})


def loop(**settings: Any) -> ht.OuterLoop:
    return ht.OuterLoop(RIDGE, optimizer=Adam, backend=hypergradients.Reverse(), **settings)


def real_time(**settings: Any) -> ht.RealTime:
    return ht.RealTime(RIDGE, optimizer=Adam, **{"every": 2, **settings})


def sinusoid(**settings: Any) -> fewshot.Sinusoid:
    return fewshot.Sinusoid(**settings)


def sampler(**settings: Any) -> fewshot.EpisodeSampler:
    data = fewshot.TensorClasses.of({name: torch.rand(4, 3) for name in "abcd"})
    given = {"way": 2, "shot": 1, "num_queries": 1, "num_tasks": 1, **settings}
    return fewshot.EpisodeSampler(data, **given)


# What makes something of a whole number, and the smallest that it takes.
WHOLE: dict[str, tuple[Make, int]] = {
    "BilevelProblem.num_steps": (lambda n: bilevel(num_steps=n), 0),
    "BilevelProblem.num_tasks": (lambda n: bilevel(num_tasks=n), 1),
    "Execution.chunk": (lambda n: ht.Execution(chunk=n), 1),
    "Minibatches.batch_size": (lambda n: ht.Minibatches(range(5), n), 1),
    "OuterLoop.log_every": (lambda n: loop(log_every=n), 1),
    "OuterLoop.run": (lambda n: loop().run(n), 1),
    "RealTime.every": (lambda n: real_time(every=n), 1),
    "RealTime.log_every": (lambda n: real_time(log_every=n), 1),
    "RealTime.run": (lambda n: real_time(every=1).run(n), 1),
    "RealTime.chunk_size": (lambda n: real_time(chunk_size=n), 1),
    "Validation.every": (lambda n: ht.Validation(source=RIDGE, every=n, num_episodes=1), 1),
    "Validation.num_episodes": (lambda n: ht.Validation(source=RIDGE, every=1, num_episodes=n), 1),
    "Checkpoints.every": (lambda n: ht.Checkpoints(Path("unused"), every=n), 1),
    "Checkpoints.keep": (lambda n: ht.Checkpoints(Path("unused"), keep=n), 1),
    "evaluate.num_episodes": (lambda n: ht.evaluate(RIDGE, HPARAMS, num_episodes=n), 1),
    "evaluate.first_step": (lambda n: ht.evaluate(RIDGE, HPARAMS, num_episodes=1, first_step=n), 0),
    "Reverse.checkpoint_every": (lambda n: hypergradients.Reverse(checkpoint_every=n), 1),
    "Reverse.snapshots": (lambda n: hypergradients.Reverse(snapshots=n), 1),
    "Forward.chunk_size": (lambda n: hypergradients.Forward(chunk_size=n), 1),
    "ForwardGradient.num_samples": (lambda n: hypergradients.ForwardGradient(num_samples=n), 1),
    "ForwardGradient.chunk_size": (lambda n: hypergradients.ForwardGradient(chunk_size=n), 1),
    "Truncated.window": (lambda n: hypergradients.Truncated(window=n), 1),
    "EvoGrad.num_copies": (lambda n: hypergradients.EvoGrad(num_copies=n), 2),
    "EvolutionStrategies.num_pairs": (lambda n: hypergradients.EvolutionStrategies(num_pairs=n, sigma=0.1), 1),
    "EvolutionStrategies.horizon": (
        lambda n: hypergradients.EvolutionStrategies(num_pairs=1, sigma=0.1, persistent=True, horizon=n),
        1,
    ),
    "ConjugateGradient.max_iterations": (lambda n: linear_solvers.ConjugateGradient(max_iterations=n), 1),
    "FixedPoint.max_iterations": (lambda n: linear_solvers.FixedPoint(max_iterations=n), 1),
    "Neumann.num_terms": (lambda n: linear_solvers.Neumann(num_terms=n), 1),
    "Nystrom.rank": (lambda n: linear_solvers.Nystrom(rank=n, damping=0.1), 1),
    "Dense.max_entries": (lambda n: linear_solvers.Dense(max_entries=n), 1),
    "Muon.ns_steps": (lambda n: Muon(ns_steps=n), 0),
    "CoordinatewiseMLP.hidden": (lambda n: CoordinatewiseMLP(hidden=n), 1),
    "CoordinatewiseLSTM.hidden": (lambda n: CoordinatewiseLSTM(hidden=n), 1),
    "CoordinatewiseLSTM.layers": (lambda n: CoordinatewiseLSTM(layers=n), 1),
    "check_hypergradient.num_directions": (
        lambda n: ht.check_hypergradient(RIDGE, HPARAMS, hypergradients.Reverse(), num_directions=n),
        1,
    ),
    "compare_backends.repeats": (
        lambda n: ht.compare_backends(RIDGE, HPARAMS, {"one": hypergradients.Reverse()}, repeats=n),
        1,
    ),
    "spectral_radius.dimension": (lambda n: ht.spectral_radius(RIDGE, HPARAMS, dimension=n), 4),
    "spectral_radius.max_restarts": (lambda n: ht.spectral_radius(RIDGE, HPARAMS, max_restarts=n), 0),
    "spectral_radius.step": (lambda n: ht.spectral_radius(RIDGE, HPARAMS, step=n), 0),
    "Sinusoid.shot": (lambda n: sinusoid(shot=n), 1),
    "Sinusoid.num_queries": (lambda n: sinusoid(num_queries=n), 1),
    "Sinusoid.num_tasks": (lambda n: sinusoid(num_tasks=n), 1),
    "Sinusoid.seed": (lambda n: sinusoid(seed=n), 0),
    "Sinusoid.at": (lambda n: sinusoid().at(n), 0),
    "EpisodeSampler.way": (lambda n: sampler(way=n), 2),
    "EpisodeSampler.shot": (lambda n: sampler(shot=n), 1),
    "EpisodeSampler.num_queries": (lambda n: sampler(num_queries=n), 1),
    "EpisodeSampler.num_tasks": (lambda n: sampler(num_tasks=n), 1),
    "EpisodeSampler.seed": (lambda n: sampler(seed=n), 0),
    "EpisodeSampler.at": (lambda n: sampler().at(n), 0),
    "Augmentation.crop_padding": (lambda n: fewshot.Augmentation(crop_padding=n), 0),
    "MLP.hidden": (lambda n: fewshot.MLP(hidden=(n,)), 1),
    "MLP.in_features": (lambda n: fewshot.MLP(in_features=n), 1),
    "MLP.out_features": (lambda n: fewshot.MLP(out_features=n), 1),
    "Conv4.way": (lambda n: fewshot.Conv4(way=n, hidden=2), 1),
    "Conv4.hidden": (lambda n: fewshot.Conv4(way=2, hidden=n), 1),
    "Conv4.in_channels": (lambda n: fewshot.Conv4(way=2, hidden=2, in_channels=n), 1),
    "Conv4.image_size": (lambda n: fewshot.Conv4(way=2, hidden=2, image_size=n), 16),
    "ResNet12.channels": (lambda n: fewshot.ResNet12(way=2, channels=(n, 1, 1, 1)), 1),
    "ResNet12.in_channels": (lambda n: fewshot.ResNet12(way=2, channels=(1, 1, 1, 1), in_channels=n), 1),
    "ResNet12.way": (lambda n: fewshot.ResNet12(way=n, channels=(1, 1, 1, 1)), 1),
    "ProtoNet.way": (lambda n: fewshot.ProtoNet(NETWORK, way=n), 1),
    "Reptile.batch_size": (lambda n: fewshot.Reptile(NETWORK, dynamics=SGD, num_steps=1, batch_size=n), 1),
    "StrokeCharacters.num_classes": (
        lambda n: fewshot.StrokeCharacters(split="meta_train", num_classes=n, drawings=1, image_size=8),
        1,
    ),
}

ABOVE_ZERO = ((1e-300, 1e300), (0.0, -1e-300, math.nan, math.inf))
FROM_ZERO = ((0.0, 1e300), (-1e-300, math.nan, math.inf))
# What makes something of a number, what it takes, and what it refuses.
NUMBERS: dict[str, tuple[Make, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "OuterLoop.clip_norm": (lambda x: loop(clip_norm=x), ABOVE_ZERO),
    "Positive.minimum": (lambda x: ht.Positive(minimum=x), ABOVE_ZERO),
    "Simplex.total": (lambda x: ht.Simplex(total=x), ABOVE_ZERO),
    "EvoGrad.sigma": (lambda x: hypergradients.EvoGrad(sigma=x), ABOVE_ZERO),
    "EvoGrad.temperature": (lambda x: hypergradients.EvoGrad(temperature=x), ABOVE_ZERO),
    "EvolutionStrategies.sigma": (lambda x: hypergradients.EvolutionStrategies(num_pairs=1, sigma=x), ABOVE_ZERO),
    "OneStep.epsilon": (lambda x: hypergradients.OneStep(finite_difference=True, epsilon=x), ABOVE_ZERO),
    "Implicit.residual_tolerance": (
        lambda x: hypergradients.Implicit(solver=linear_solvers.Dense(), residual_tolerance=x),
        ((0.0, math.inf), (-1e-300, math.nan)),
    ),
    "Implicit.stationarity_tolerance": (
        lambda x: hypergradients.Implicit(solver=linear_solvers.Dense(), stationarity_tolerance=x),
        ((0.0, math.inf), (-1e-300, math.nan)),
    ),
    "ConjugateGradient.tolerance": (lambda x: linear_solvers.ConjugateGradient(tolerance=x), FROM_ZERO),
    "ConjugateGradient.damping": (lambda x: linear_solvers.ConjugateGradient(damping=x), FROM_ZERO),
    "FixedPoint.tolerance": (lambda x: linear_solvers.FixedPoint(tolerance=x), FROM_ZERO),
    "FixedPoint.step_size": (lambda x: linear_solvers.FixedPoint(step_size=x), ABOVE_ZERO),
    "Neumann.step_size": (lambda x: linear_solvers.Neumann(step_size=x), ABOVE_ZERO),
    "Nystrom.damping": (lambda x: linear_solvers.Nystrom(damping=x), ABOVE_ZERO),
    "Dense.damping": (lambda x: linear_solvers.Dense(damping=x), FROM_ZERO),
    "CoordinatewiseMLP.decays": (
        lambda x: CoordinatewiseMLP(decays=(x,)),
        ((0.0, 0.999), (-1e-300, 1.0, math.nan)),
    ),
    "CoordinatewiseMLP.preprocess": (
        lambda x: CoordinatewiseMLP(preprocess=x),
        ((1e-300, 80.0), (0.0, 80.1, math.nan)),
    ),
    "CoordinatewiseLSTM.preprocess": (
        lambda x: CoordinatewiseLSTM(preprocess=x),
        ((1e-300, 80.0), (0.0, 80.1, math.nan)),
    ),
    "Clipped.max_norm": (lambda x: Clipped(SGD, max_norm=x), ((0.0, 1e300), (-1e-300, math.nan))),
    "Clipped.max_value": (lambda x: Clipped(SGD, max_value=x), ((0.0, 1e300), (-1e-300, math.nan))),
    "LearnedUpdate.scale": (lambda x: LearnedUpdate(CoordinatewiseMLP(), scale=x), ((0.0, 1e300), (-1e-300, math.nan))),
    "check_hypergradient.step_size": (
        lambda x: ht.check_hypergradient(RIDGE, HPARAMS, hypergradients.Reverse(), num_directions=1, step_size=x),
        ((1e-3,), (0.0, -1e-3, math.nan, math.inf)),
    ),
    "check_hypergradient.tolerance": (
        lambda x: ht.check_hypergradient(RIDGE, HPARAMS, hypergradients.Reverse(), num_directions=1, tolerance=x),
        ((0.0, 1.0), (-1e-300, math.nan)),
    ),
    "Augmentation.brightness": (
        lambda x: fewshot.Augmentation(brightness=x),
        ((0.0, 0.999), (-1e-300, 1.0, math.nan)),
    ),
    "Augmentation.contrast": (lambda x: fewshot.Augmentation(contrast=x), ((0.0, 0.999), (-1e-300, 1.0, math.nan))),
    "Normalisation.std": (
        lambda x: fewshot.Normalisation(mean=(0.0,), std=(x,)),
        ((1e-300,), (0.0, -1.0, math.nan, math.inf)),
    ),
    "Normalisation.mean": (
        lambda x: fewshot.Normalisation(mean=(x,), std=(1.0,)),
        ((0.0, -1.0), (math.nan, math.inf, -math.inf)),
    ),
    "FeatureNorm.length": (lambda x: fewshot.FeatureNorm(2, length=x), ABOVE_ZERO),
    "IMAML.proximity": (lambda x: fewshot.IMAML(NETWORK, dynamics=SGD, num_steps=1, proximity=x), ABOVE_ZERO),
    "R2D2.ridge": (lambda x: fewshot.R2D2(NETWORK, way=2, ridge=x), ((1e-30, 1e30), (0.0, -1.0, math.nan, math.inf))),
    "R2D2.scale": (lambda x: fewshot.R2D2(NETWORK, way=2, scale=x), ((1e-30, 1e30), (0.0, -1.0, math.nan, math.inf))),
    "MAML.learn_lr": (
        lambda x: fewshot.MAML(NETWORK, dynamics=ht.dynamics.SGD(lr=x), num_steps=1, learn_lr="one"),
        ((1e-30,), (0.0, -1.0, math.nan)),
    ),
    "Classification.label_smoothing": (
        lambda x: fewshot.Classification(label_smoothing=x),
        ((0.0, 0.999), (-1e-300, 1.0, math.nan)),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_taken_from_the_smallest_on(name: str) -> None:
    make, smallest = WHOLE[name]
    make(smallest)
    for refused in (smallest - 1, True, float(smallest + 1), "1x"):
        with pytest.raises((TypeError, ValueError), match=r"(?s)`.*"):
            make(refused)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_taken_within_their_range(name: str) -> None:
    make, (taken, refused) = NUMBERS[name]
    for value in taken:
        make(value)
    for value in refused:
        with pytest.raises(ValueError, match=r"(?s)`.*"):
            make(value)
