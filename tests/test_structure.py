"""What a reader goes through: files, functions and levels of call behind one hypergradient, and calls for each step."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.fewshot import MAML, Conv4, EpisodeSampler, StrokeCharacters

PACKAGE = Path(ht.__file__).parent
EMPTY = {"dict", "set", "list", "Counter", "OrderedDict", "defaultdict", "WeakKeyDictionary", "WeakValueDictionary"}


class Trail:
    """What of the library is called inside a `with` block."""

    def __init__(self) -> None:
        self.calls: Counter[CodeType] = Counter()
        self.depth = 0

    def __enter__(self) -> Trail:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not _is_own(frame.f_code):
            return
        self.calls[frame.f_code] += 1
        depth, above = 0, frame
        while above is not None:
            depth += _is_own(above.f_code)
            above = above.f_back
        self.depth = max(self.depth, depth)

    @property
    def functions(self) -> set[tuple[str, str]]:
        """File and name of everything that has a frame of its own, comprehensions among it."""
        return {(code.co_filename, code.co_qualname) for code in self.calls}

    @property
    def named_functions(self) -> set[tuple[str, str]]:
        """Without comprehensions, which have no frame in newer Pythons."""
        return {(file, name) for file, name in self.functions if not name.endswith(("comp>", "<genexpr>"))}

    @property
    def files(self) -> int:
        return len({code.co_filename for code in self.calls})


def _is_own(code: CodeType) -> bool:
    return code.co_filename.startswith(str(PACKAGE))


class WeightedTraining(ht.InnerProblem):
    """Linear regression with weights of examples, as in README's first example."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(20, 3), torch.randn(20)

    def init_params(self, hparams: ht.types.TensorDict) -> ht.types.TensorDict:
        return {"w": torch.zeros(3)}

    def loss(self, params: ht.types.TensorDict, hparams: ht.types.TensorDict, batch: object) -> torch.Tensor:
        return (hparams["weights"].sigmoid() * (self.x @ params["w"] - self.y).square()).mean()


class Validation(ht.OuterProblem):
    """Fresh data."""

    def init_hparams(self) -> ht.types.TensorDict:
        return {"weights": torch.zeros(20), "lr": torch.tensor(0.1)}

    def loss(self, params: ht.types.TensorDict, hparams: ht.types.TensorDict, batch: object) -> torch.Tensor:
        return params["w"].square().mean()


def test_one_hypergradient_leads_through_few_files_functions_and_levels() -> None:
    sgd = ht.dynamics.SGD(lr=ht.Hyper("lr"), momentum=0.9)
    problem = ht.BilevelProblem(WeightedTraining(), Validation(), dynamics=sgd, num_steps=20)
    hparams = problem.init_hparams()
    ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse())  # which looks at the kind of problem
    with Trail() as trail:
        ht.hypergradient(problem, hparams, backend=ht.hypergradients.Reverse())
    assert trail.files <= 26
    assert len(trail.functions) <= 78
    assert len(trail.named_functions) <= 73
    assert trail.depth <= 12


def test_one_hypergradient_of_maml_leads_through_few_files_functions_and_levels() -> None:
    maml = MAML(Conv4(way=5, downsample="stride", hidden=8), dynamics=ht.dynamics.SGD(lr=0.4), num_steps=1)
    sampler = EpisodeSampler(StrokeCharacters(split="meta_train"), way=5, shot=1, num_queries=5, num_tasks=4)
    source = maml.on(sampler)

    def run() -> None:
        hparams, execution = source.init_hparams(), ht.Execution(tasks="vmap")
        ht.hypergradient(source.at(1), hparams, backend=ht.hypergradients.Reverse(), execution=execution)

    run()
    with Trail() as trail:
        run()
    assert trail.files <= 40
    assert len(trail.functions) <= 146
    assert trail.depth <= 18


def calls_of(run: Callable[[int], object], num_steps: int) -> int:
    run(num_steps)
    with Trail() as trail:
        run(num_steps)
    return trail.calls.total()


def test_one_inner_step_is_few_calls() -> None:
    """With a module of two layers: 26, ten of them for each of the four params and for the module's places."""
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 10))
    module = ht.FunctionalModule(net)
    x, y = torch.randn(100, 20), torch.randint(10, (100,))

    class Inner(ht.InnerProblem):
        def init_params(self, hparams: ht.types.TensorDict) -> ht.types.TensorDict:
            return module.init_params()

        def loss(self, params: ht.types.TensorDict, hparams: ht.types.TensorDict, batch: object) -> torch.Tensor:
            return (hparams["weights"] * F.cross_entropy(module(params, x), y, reduction="none")).mean()

    class Outer(ht.OuterProblem):
        def init_hparams(self) -> ht.types.TensorDict:
            return {"weights": torch.ones(100)}

        def loss(self, params: ht.types.TensorDict, hparams: ht.types.TensorDict, batch: object) -> torch.Tensor:
            return F.cross_entropy(module(params, x), y)

    def run(num_steps: int) -> ht.HypergradientResult:
        problem = ht.BilevelProblem(Inner(), Outer(), dynamics=ht.dynamics.SGD(lr=0.1), num_steps=num_steps)
        return ht.hypergradient(problem, problem.init_hparams(), backend=ht.hypergradients.Reverse())

    assert calls_of(run, 21) - calls_of(run, 20) <= 26


def test_what_the_process_remembers_is_in_one_place() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_empty(node.value):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                found.append(f"{path.relative_to(PACKAGE)}: {ast.unparse(target)}")
    assert found == ["inner/memo.py: _entries"]


def _is_empty(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1] in EMPTY and not value.args
    return (isinstance(value, ast.Dict) and not value.keys) or (isinstance(value, ast.List) and not value.elts)
