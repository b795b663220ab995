"""Products that a compiled loop back reads and does not make again: how many, from which sizes on, the same numbers.

The graphs are those that PyTorch's compiler gets; here they are run without making code of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

import hypertorch as ht
from hypertorch.hypergradients.reverse_mode.compiled import compilation, kept_products, not_compilable
from hypertorch.hypergradients.reverse_mode.compiled.looped_steps import ONE_BY_ONE, UNLOOPED
from hypertorch.inner import memo
from hypertorch.types import Batch, TensorDict
from tests.helpers.memo import set_aside
from tests.helpers.problems import LambdaInner, LambdaOuter, normal, task_problem

Reverse = ht.hypergradients.Reverse
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
TURNED = torch.ops.prims.rev.default


def loops_of(graph: fx.Graph) -> list[Counter[Any]]:
    """Returns what the steps of each loop call, and how often."""
    loops = [kept_products._Loop.of(node) for node in graph.nodes if node.target is torch.ops.higher_order.scan]
    return [Counter(node.target for node in loop.body.graph.nodes) for loop in loops]


class Graphs:
    """Graphs that were compiled: how many products the steps of each loop make, before and after the change."""

    def __init__(self) -> None:
        self.products: list[tuple[list[int], list[int]]] = []
        self.turned: list[int] = []

    def compile(self, graph: fx.GraphModule, _: Any) -> Any:
        before = [sum(calls[name] for name in PRODUCTS) for calls in loops_of(graph.graph)]
        kept_products.KeptProducts()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        after = [sum(calls[name] for name in PRODUCTS) for calls in loops_of(graph.graph)]
        self.products.append((before, after))
        shapes = [node.meta["val"].ndim for node in graph.graph.nodes if node.target is TURNED]
        self.turned.append(sum(axes > 1 for axes in shapes))
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    set_aside(
        monkeypatch,
        compilation.PROGRAMS,
        UNLOOPED,
        ONE_BY_ONE,
        not_compilable.REFUSED,
        not_compilable.ATTEMPTS,
        not_compilable.WARNED,
    )
    graphs = Graphs()
    backend = aot_autograd(fw_compiler=graphs.compile, decompositions=select_decomp_table())
    monkeypatch.setattr(compilation, "BACKEND", backend)
    return graphs


def network(sizes: tuple[int, int, int], num_steps: int, lr: Any = 0.3) -> ht.BilevelProblem:
    """Returns a network of two layers, with weights of its examples; a layer has its inputs last, as in PyTorch."""
    features, hidden, classes = sizes
    x, y = normal(12, features, seed=1), torch.arange(12) % classes
    first = {"w": normal(hidden, features, seed=2) / 4, "v": normal(classes, hidden, seed=3) / 4}

    def predict(params: TensorDict) -> Tensor:
        return F.linear(F.linear(x, params["w"]).tanh(), params["v"])

    def inner(params: TensorDict, hparams: TensorDict, _: Batch) -> Tensor:
        return (hparams["weights"] * F.cross_entropy(predict(params), y, reduction="none")).mean()

    def outer(params: TensorDict, _: TensorDict, __: Batch) -> Tensor:
        return predict(params).square().mean() + params["w"].square().sum()

    hparams = {"weights": torch.linspace(0.5, 1.5, 12, dtype=torch.float64)}
    if isinstance(lr, ht.Hyper):
        hparams[lr.name] = torch.linspace(0.1, 0.3, 12, dtype=torch.float64)
    dynamics = ht.dynamics.SGD(lr=lr, momentum=0.5)
    return ht.BilevelProblem(
        LambdaInner(lambda _: first, inner), LambdaOuter(hparams, outer), dynamics=dynamics, num_steps=num_steps
    )


def assert_eager(problem: ht.BilevelProblem, **options: Any) -> ht.HypergradientResult:
    """Asserts that a loop in a program gives the eager number."""
    hparams = problem.init_hparams()
    eager = ht.hypergradient(problem, hparams, backend=Reverse(), **options)
    result = ht.hypergradient(problem, hparams, backend=Reverse(compile=True), **options)
    assert not memo.entries(UNLOOPED)
    torch.testing.assert_close(result.outer_loss, eager.outer_loss, rtol=1e-12, atol=1e-14)
    for name, value in {**eager.grads, **eager.params}.items():
        torch.testing.assert_close({**result.grads, **result.params}[name], value, rtol=1e-10, atol=1e-13)
    return result


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("sizes", "kept"), [((20, 32, 3), 2), ((20, 4, 20), 2), ((4, 32, 3), 1), ((4, 5, 3), 0)], ids=str
)
def test_products_that_sum_many_numbers_are_kept(graphs: Graphs, sizes: tuple[int, int, int], kept: int) -> None:
    """Of a step's `x @ w`, `h @ v` and `g @ v`, those that sum 16 numbers or more."""
    assert_eager(network(sizes, num_steps=12))
    ((before, after),) = graphs.products
    assert after[0] == before[0] == 5
    assert before[1] - after[1] == kept
    # No state is turned around whole.
    assert graphs.turned == [0]


@pytest.mark.slow
def test_products_of_tasks_are_kept(graphs: Graphs) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(20, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3)).double()
    problem = task_problem(module, item=(20,), num_steps=4)
    assert_eager(problem, execution=ht.Execution(tasks="vmap"))
    assert any(after[1] < before[1] for before, after in graphs.products)


def test_one_program_serves_every_horizon(graphs: Graphs) -> None:
    before = counters["stats"]["unique_graphs"]
    for num_steps in (12, 9, 30):
        cost = assert_eager(network((20, 32, 3), num_steps)).stats
        assert (cost.steps, cost.vjps, cost.stored_states) == (2 * num_steps, num_steps, num_steps + 1)
    assert counters["stats"]["unique_graphs"] - before == 1


def test_a_schedule_that_is_too_short_for_a_longer_horizon_is_refused_as_without_compilation(graphs: Graphs) -> None:
    lr = ht.Hyper("lr", per="step")
    assert_eager(network((20, 32, 3), 12, lr))
    problem = network((20, 32, 3), 13, lr)
    said = []
    for compiled in (False, True):
        with pytest.raises(ValueError, match="12") as error:
            ht.hypergradient(problem, problem.init_hparams(), backend=Reverse(compile=compiled))
        said.append(str(error.value))
    assert said[0] == said[1]
    assert graphs.products


def test_what_only_looks_alike_is_made_again() -> None:
    """One step sums with 1, the other with 1.0; of other inputs, or at random, nothing is alike."""

    def body(graph: fx.Graph, number: Any, swapped: bool) -> fx.Node:
        left, right = (graph.placeholder(name) for name in ("left", "right"))
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (right if swapped else left, number))
        product = graph.call_function(
            torch.ops.aten.mm.default,
            (scaled, graph.call_function(torch.ops.aten.rand_like.default, (left,)) if number is None else right),
        )
        graph.output([product])
        return product

    known: dict[Any, int] = {}

    def meaning(number: Any, swapped: bool = False) -> Any:
        graph = fx.Graph()
        product = body(graph, number, swapped)
        module = fx.GraphModule({}, graph)
        loop = kept_products._Loop(product, module, [], [], [])
        return kept_products._meanings(loop, ["left", "right"], known)[
            next(node for node in module.graph.nodes if node.target in PRODUCTS)
        ]

    assert isinstance(meaning(1), int)  # and not all that it is made of, which takes hours to compare for large steps
    assert meaning(1) == meaning(1)
    assert meaning(1) != meaning(1.0)
    assert meaning(1) != meaning(1, swapped=True)
    assert meaning(None) != meaning(None)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(20, 32, 3), (20, 4, 20)], ids=str)
def test_kept_products_in_machine_code_give_the_eager_number(
    sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_aside(
        monkeypatch,
        compilation.PROGRAMS,
        UNLOOPED,
        ONE_BY_ONE,
        not_compilable.REFUSED,
        not_compilable.ATTEMPTS,
        not_compilable.WARNED,
    )
    for num_steps in (5, 12, 30):
        assert_eager(network(sizes, num_steps))
