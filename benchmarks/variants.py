"""The contestants by name: the one place that says how each library's variants are asked for."""

from __future__ import annotations

from functools import partial

from benchmarks.contestant import Contestant
from benchmarks.higher_unroll import Higher
from benchmarks.jax_unroll import InJax
from benchmarks.ours import Ours
from benchmarks.plain_training import PlainTraining
from benchmarks.torchopt_unroll import TorchOptFunctional, TorchOptMeta, TorchOptVectorised
from hypertorch.hypergradients import Forward, Reverse

PLAIN = "plain training"
EAGER = "whole graph"
COMPILED = "whole graph, compiled"
STEP_WISE = "step-wise"
STEP_WISE_COMPILED = "step-wise, compiled"
SQRT = "sqrt(T)"
SQRT_COMPILED = "sqrt(T), compiled"
MIXED = "mixed mode"
MIXED_COMPILED = "mixed mode, compiled"
MIXED_SQRT_COMPILED = "mixed mode, sqrt(T), compiled"
FORWARD = "forward"
HIGHER = "higher"
TORCHOPT = "TorchOpt"
TORCHOPT_FUNCTIONAL = "TorchOpt, functional"
TORCHOPT_VECTORISED = "TorchOpt, vectorised"
JAX = "JAX"
JAX_REMAT = "JAX, rematerialised"
JAX_IN_TURN = "JAX, unrolled, tasks in turn"

VARIANTS: dict[str, Contestant] = {
    PLAIN: PlainTraining(),
    HIGHER: Higher(),
    TORCHOPT: TorchOptMeta(),
    TORCHOPT_FUNCTIONAL: TorchOptFunctional(),
    TORCHOPT_VECTORISED: TorchOptVectorised(),
    EAGER: Ours(backend=Reverse),
    COMPILED: Ours(backend=partial(Reverse, compile=True), compiles=True),
    STEP_WISE: Ours(backend=partial(Reverse, checkpoint_every=1)),
    STEP_WISE_COMPILED: Ours(backend=partial(Reverse, checkpoint_every=1, compile=True), compiles=True),
    SQRT: Ours(backend=partial(Reverse, checkpoint_every="sqrt")),
    SQRT_COMPILED: Ours(backend=partial(Reverse, checkpoint_every="sqrt", compile=True), compiles=True),
    MIXED: Ours(backend=partial(Reverse, derivative="mixed")),
    MIXED_COMPILED: Ours(backend=partial(Reverse, derivative="mixed", compile=True), compiles=True),
    MIXED_SQRT_COMPILED: Ours(
        backend=partial(Reverse, checkpoint_every="sqrt", derivative="mixed", compile=True), compiles=True
    ),
    FORWARD: Ours(backend=Forward),
    JAX: InJax(),
    JAX_REMAT: InJax(remat=True),
    JAX_IN_TURN: InJax(unroll=True, tasks="in turn"),
}

PEERS = (HIGHER, TORCHOPT, TORCHOPT_FUNCTIONAL)
IN_JAX = (JAX, JAX_REMAT)


def chosen(*names: str) -> dict[str, Contestant]:
    """Returns contestants by name, in this order: the first that is measured is the reference of the others."""
    return {name: VARIANTS[name] for name in names}
