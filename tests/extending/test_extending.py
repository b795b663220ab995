"""Each of the five extensions, written outside of the package, passes what the library's own leaves pass."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import hypertorch as ht
from tests.conformance.checks import (
    check_backend,
    check_dynamics,
    check_episodes,
    check_learner,
    check_setting_ranges,
    check_solver,
)
from tests.extending.backend import WholeRun
from tests.extending.data_set import Lines
from tests.extending.dynamics import HeavyBall
from tests.extending.learner import CosineMeans
from tests.extending.linear_solver import MinimalResidual
from tests.fewshot.learners.test_learners import Blobs

F64 = torch.float64
HERE = Path(__file__).parent
EXTENSIONS = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("test_"))


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=F64) for name, value in values.items()}


def test_a_backend() -> None:
    check_backend(WholeRun())


def test_dynamics() -> None:
    check_dynamics(HeavyBall(lr=ht.Hyper("lr"), inertia=ht.Hyper("inertia")), scalars(lr=0.2, inertia=0.5))
    check_setting_ranges(HeavyBall, {"lr": 0.1})
    # Polyak's rule, written out for one number whose gradient is the number itself.
    rule, w, move = HeavyBall(lr=0.1, inertia=0.5), torch.ones(1), {"move.w": torch.zeros(1)}
    seen = []
    for index in range(3):
        params, move = rule.update({"w": w}, {"w": w}, move, {}, index)
        seen.append(float(w := params["w"]))
    assert seen == pytest.approx([0.9, 0.9 - 0.09 + 0.5 * -0.1, 0.76 - 0.076 + 0.5 * -0.14], rel=1e-6)


def test_a_linear_solver() -> None:
    check_solver(MinimalResidual())


def test_a_learner() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh()).double()
    check_learner(CosineMeans(backbone, way=3), Blobs())


def test_a_data_set() -> None:
    check_episodes(Lines())
    assert Lines().task_spec() == ht.fewshot.TaskSpec(item_shape=(1,), outputs=1, is_classification=False)
    # And it is learnt from, by a learner of the library.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    learner = ht.fewshot.MAML(network, dynamics=ht.dynamics.SGD(lr=0.1), num_steps=2, objective=ht.fewshot.Regression())
    check_learner(learner, Lines(dtype=F64))


def test_a_backend_serves_where_one_of_the_librarys_does() -> None:
    learner = CosineMeans(nn.Sequential(nn.Flatten(), nn.Linear(16, 6)).double(), way=3)
    loop = ht.OuterLoop(learner.on(Blobs()), optimizer=torch.optim.Adam, backend=WholeRun())
    assert loop.run(num_outer_steps=2).hparams.keys() == learner.init_hparams().keys()


@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda path: path.stem)
def test_an_extension_is_made_of_public_names(path: Path) -> None:
    """What is imported from the library, and read off its modules, is in an `__all__`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hypertorch"):
            module = importlib.import_module(node.module or "")
            assert {alias.name for alias in node.names} <= set(module.__all__)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr.startswith("__")
            if isinstance(node.value, ast.Name) and node.value.id == "ht":
                assert node.attr in ht.__all__
            elif ast.unparse(node.value).startswith("ht."):
                module = importlib.import_module(ast.unparse(node.value).replace("ht.", "hypertorch.", 1))
                assert node.attr in module.__all__
