"""The public interface is what is recorded, and every dataclass of the library is frozen."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from difflib import unified_diff
from pathlib import Path

import pytest

import hypertorch
from tests.helpers.interface import described

RECORD = Path(__file__).with_name("interface.txt")
# Filled while something runs.
MUTABLE = ("Cost",)
BY_PLACE = {
    "BilevelProblem": ("inner", "outer"),
    "Checkpoints": ("directory",),
    "Clipped": ("rule",),
    "Cost": ("steps", "vjps", "jvps", "stored_states", "graph_steps"),
    "EpisodeSampler": ("dataset",),
    "Groups": ("members",),
    "Hyper": ("name", "transform", "per"),
    "LearnedBuffers": ("rule",),
    "LearnedUpdate": ("rule",),
    "LearnerOnEpisodes": ("learner", "episodes", "check"),
    "Minibatches": ("dataset", "batch_size", "seed"),
    "OuterLoop": ("source",),
    "Range": ("lower", "upper", "natural", "reason"),
    "RealTime": ("problem",),
    "TorchOptim": ("optimizer",),
    "_Fitted": ("network", "params"),
}
# Those without tensors, which compare by their fields.
COMPARED = [
    "Accuracy",
    "Augmentation",
    "BackendComparison",
    "BackendFigures",
    "BoundedSum",
    "Box",
    "Bracket",
    "Checkpoints",
    "Classification",
    "ConjugateGradient",
    "Cost",
    "Dense",
    "Differentiability",
    "DirectionalCheck",
    "Estimate",
    "EvoGrad",
    "EvolutionStrategies",
    "FailedTrial",
    "FirstOrder",
    "FixedPoint",
    "Execution",
    "Checkpointing",
    "Forward",
    "ForwardGradient",
    "GeometricFit",
    "HorizonBias",
    "HorizonPoint",
    "Hyper",
    "HypergradientCheck",
    "Implicit",
    "LearnerOnEpisodes",
    "MemoryPlan",
    "Minibatches",
    "Neumann",
    "Normalisation",
    "Nystrom",
    "OmniglotPart",
    "OneStep",
    "PlanReasons",
    "Matern52",
    "Positive",
    "RBF",
    "Range",
    "Ranks",
    "Regression",
    "Report",
    "Reverse",
    "Reversible",
    "Simplex",
    "Sinusoid",
    "StepMemory",
    "TangentRoute",
    "TaskSlice",
    "TaskSpec",
    "Truncated",
    "_Declaration",
    "Metasmoothness",
]


def test_the_interface_is_what_is_recorded() -> None:
    recorded, now = RECORD.read_text().splitlines(), described()
    changes = "\n".join(unified_diff(recorded, now, "recorded", "now", lineterm="", n=0))
    assert not changes, (
        f"The public interface differs from {RECORD.name}:\n{changes}\n"
        "If that is meant, write it anew by `PYTHONPATH=. python tests/helpers/interface.py > tests/interface.txt`, "
        "and add a line to CHANGELOG."
    )


def dataclasses_of_the_library() -> list[type]:
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(hypertorch.__path__, "hypertorch."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and value.__module__.startswith("hypertorch"):
                found[value.__qualname__] = value
    return [value for _, value in sorted(found.items()) if "__dataclass_fields__" in vars(value)]


@pytest.mark.parametrize("kind", dataclasses_of_the_library(), ids=lambda kind: kind.__qualname__)
def test_dataclasses_are_frozen_and_their_settings_go_by_name(kind: type) -> None:
    parameters = inspect.signature(kind).parameters.values()
    by_place = tuple(parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY)
    assert by_place == BY_PLACE.get(kind.__qualname__, ())
    flags = vars(kind)["__dataclass_params__"]
    assert flags.frozen is (kind.__qualname__ not in MUTABLE)
    assert flags.eq is (kind.__qualname__ in COMPARED)
