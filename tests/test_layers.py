"""Imports point one way: checked on the syntax trees, so that no import order can hide a cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hypertorch"

# Lowest first; modules of one layer may import each other, but for those kept apart below.
LAYERS = (
    ("types", "errors", "checks", "tree", "constraints"),
    ("autodiff", "nn"),
    ("dynamics", "linear_solvers"),
    ("problem",),
    ("inner",),
    ("hypergradients",),
    ("unroll",),
    ("diagnostics", "outer"),
    ("search",),
)
BELOW = (*LAYERS[0], *LAYERS[1])
BESIDE = {
    "minibatches": BELOW,
    "fewshot.episodes": BELOW,
    "fewshot.sampler": BELOW,
    "fewshot.datasets": BELOW,
    "fewshot.backbones": BELOW,
    "fewshot.augmentation": BELOW,
    "fewshot._checks": BELOW,
    "fewshot._random": BELOW,
    "fewshot.learners": (*sum(LAYERS[:5], ()), "unroll"),
}
# Within fewshot: learners are built on episodes, never the other way round.
EPISODES = (
    "fewshot.episodes",
    "fewshot.sampler",
    "fewshot.datasets",
    "fewshot.backbones",
    "fewshot.augmentation",
    "fewshot._checks",
    "fewshot._random",
)
# Within outer: its folders, lowest first; the files beside them are above all.
OUTER = ("guards", "storage", "reporting", "evaluation", "steps")
# What the experiments share: its folders, lowest first; those of the last two do not import each other.
COMMON = ("commands", "configuration", "results", "data_sets", "models", "runs", "diagnostics", "search")
APART = (("dynamics", "linear_solvers"),)
FOREIGN = ("hydra", "omegaconf", "matplotlib")


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


MODULES = modules()


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """The full names that an import statement may refer to, `from a import b` as both `a` and `a.b`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}: relative import in line {node.lineno}"
        assert node.module is not None
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dependencies(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    names = {name for node in ast.walk(MODULES[module]) for name in imported(node, module)}
    return {name for name in names if name in MODULES and name != module}


def unit(module: str) -> str | None:
    """The name in the layers that a module belongs to; None for the `__init__` of the package and of `fewshot`."""
    parts = module.split(".")[1:]
    if not parts or parts == ["fewshot"]:
        return None
    return ".".join(parts[:2]) if parts[0] == "fewshot" else parts[0]


def allowed(of: str) -> set[str]:
    """The units that a unit may import."""
    if of in BESIDE:
        own = set(EPISODES) if of.startswith("fewshot.") else set()
        return {of, *BESIDE[of], *own}
    layer = next((index for index, names in enumerate(LAYERS) if of in names), None)
    assert layer is not None, f"`{of}` is in no layer: add it to LAYERS or BESIDE in this test, and to the design"
    kept_apart = {name for pair in APART if of in pair for name in pair if name != of}
    return set(sum(LAYERS[: layer + 1], ())) - kept_apart


@pytest.mark.parametrize("module", [name for name in MODULES if unit(name) is not None])
def test_imports_point_down(module: str) -> None:
    own = unit(module)
    assert own is not None
    for name in sorted(dependencies(module)):
        target = unit(name)
        # `from hypertorch import tree` names the package too; the test below sees to it that only a module is taken.
        if target is not None:
            assert target in allowed(own), f"{module} imports {name}, which is above it"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("hypertorch.outer.")])
def test_folders_of_outer_import_from_lower_ones(module: str) -> None:
    own = module.split(".")[2]
    below = OUTER[: OUTER.index(own) + 1] if own in OUTER else None
    for name in sorted(dependencies(module)):
        if below is not None and name.startswith("hypertorch.outer."):
            assert name.split(".")[2] in below, f"{module} imports {name}, which is above it"


def test_outer_is_in_folders() -> None:
    beside = {name.split(".")[2] for name in MODULES if name.startswith("hypertorch.outer.")} - set(OUTER)
    assert beside == {"beginning", "fingerprint", "loop", "real_time", "run", "settings", "trained"}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "common").rglob("*.py")), ids=lambda path: path.stem)
def test_folders_of_the_experiments_import_from_lower_ones(path: Path) -> None:
    *_, own, _ = path.parts
    if own == "common":
        assert path.stem == "__init__", f"{path.name} stands beside the folders: it belongs into one"
        return
    below = COMMON[: COMMON.index(own) + 1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in imported(node, path.stem):
            if name.startswith("experiments."):
                assert name.split(".")[1] == "common", f"{path.stem} imports {name}, an experiment"
                assert name.count(".") == 1 or name.split(".")[2] in below, f"{path.stem} imports {name}, above it"
                assert {own, *name.split(".")[2:3]} != {"diagnostics", "search"}


def test_no_module_imports_the_package_for_its_exports() -> None:
    for module, source in MODULES.items():
        if module == "hypertorch":
            continue
        for node in ast.walk(source):
            if isinstance(node, ast.Import):
                assert "hypertorch" not in {alias.name for alias in node.names}, f"{module} imports the whole package"
            if isinstance(node, ast.ImportFrom) and node.module == "hypertorch":
                for alias in node.names:
                    assert f"hypertorch.{alias.name}" in MODULES, f"{module} imports `{alias.name}` from the package"


def test_there_is_no_cycle() -> None:
    # The package's own `__init__` imports everything and is imported by nothing but for the name of a submodule.
    graph = {name: dependencies(name) - {"hypertorch"} for name in MODULES if name != "hypertorch"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(graph)


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top(module: str) -> None:
    for function in ast.walk(MODULES[module]):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert not inside, f"{module}: import inside a function, line {inside[0].lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_foreign_libraries_stay_where_they_belong(module: str) -> None:
    names = {name for node in ast.walk(MODULES[module]) for name in imported(node, module)}
    for name in names:
        assert name.split(".")[0] not in FOREIGN, f"{module} imports {name}"
        if name.split(".")[0] == "tensorboard" or name.startswith("torch.utils.tensorboard"):
            assert module == "hypertorch.outer.reporting.tensorboard_logger", f"{module} imports {name}"
        assert not name.startswith(("benchmarks", "experiments", "tests")), f"{module} imports {name}"
