"""A network that looks for the minimum of functions it sees values of alone, learnt on functions with gradients.

scripts/train experiment=black_box_optimizer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import process_time
from typing import ClassVar, get_args

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.results.line_styles import line_styles
from experiments.common.results.reporting import write_csv
from experiments.common.runs.experiment import Baseline, Experiment
from experiments.common.runs.seeds import Purpose, run_seed
from experiments.common.search.black_boxes import Functions, GaussianProcess, Varied, branin, hartmann3
from experiments.common.search.optuna_search import SamplerName, optuna, search
from hypertorch import tree
from hypertorch.autodiff.inner_loss import InnerLoss
from hypertorch.types import Batch, TensorDict

_AT_ONCE = 100  # functions of a problem that judges
_NO_VALUE = float("inf")  # least of the values before the first query
_CLASSICAL = {2: ("branin", branin), 3: ("hartmann3", hartmann3)}


class BlackBoxOptimizer(Experiment):
    """Learns where to query a function next, so that the least of the values that were seen is small.

    The inner loop is the search: its state holds the last query, the least value and the memory of an LSTM, whose
    weights are the outer variables. The functions that it learns on are draws of a Gaussian process. The hypergradient
    runs through them, so that they must be differentiable; the LSTM itself sees their values alone. It is judged on
    fresh draws and, in two and three dimensions, on Branin's and Hartmann's functions.

    Args:
        config: the configuration.
        settings: the plain settings of all experiments.
        dimension: of the cube that the functions live on: 1, 2 or 3.
        lengthscale: of the Gaussian process.
        hidden: size of the LSTM's memory.
        queries: of a search.
        num_functions: draws of an outer step.
        curve_functions: functions that the picture shows the means of.
        search_functions: those that Optuna's searches are judged on; None for none of these searches.
    """

    metric = "best_value"
    mode = "min"
    published: ClassVar = {
        "Chen et al. 2017": "curves: better than random search and TPE, near a Gaussian process in low dimensions; "
        "0.02 s for 100 queries, against 16 to 21 s (TPE) and 1239 to 2768 s (Spearmint)",
    }

    def __init__(
        self,
        config: DictConfig,
        settings: ProblemSettings,
        *,
        dimension: int = 2,
        lengthscale: float = 0.3,
        hidden: int = 32,
        queries: int = 20,
        num_functions: int = 128,
        curve_functions: int = 1000,
        search_functions: int | None = None,
    ) -> None:
        super().__init__(config, settings)
        if search_functions is not None:
            optuna("experiment.search_functions")
        self._families: dict[str, Functions] = {"test": GaussianProcess(dimension, lengthscale)}
        if dimension in _CLASSICAL:
            name, function = _CLASSICAL[dimension]
            self._families = {name: Varied(dimension, function), **self._families}
        self.splits = ("validation", *self._families)
        self._like = torch.zeros((), dtype=settings.dtype, device=settings.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._dynamics = LearnedSearch(Proposer(dimension, hidden).to(self._like))
        self._queries, self._num_functions = queries, num_functions
        if curve_functions < 1:
            raise ExpectedFailure(
                f"`experiment.curve_functions` is {curve_functions}: the picture shows means over them, and of "
                "none there is no mean. Use 1 or more."
            )
        self._curve_functions, self._search_functions = curve_functions, search_functions

    def training(self) -> ht.ProblemSource:
        """Returns searches on new draws for every outer step."""
        return self._searches("training", self._families["test"], count=self._num_functions)

    def validation(self) -> ht.ProblemSource:
        """Returns searches on other draws."""
        return self._searches("validation", self._families["test"])

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns searches on fresh functions."""
        purpose = "validation" if split == "validation" else "evaluation"
        return self._searches(purpose, self._family(split), seed=seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns random search with as many queries, and with twice as many."""
        hparams = self.training().init_hparams()
        return {
            name: Baseline(source=self._random(split, queries), hparams=hparams)
            for name, queries in (("random", self._queries), ("random, twice as many queries", 2 * self._queries))
        }

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the best value against the number of queries, and writes these figures with what a query costs."""
        curves = {split: self._curves(split, hparams) for split in self._families}
        write_csv(folder / "queries.csv", [row for split, own in curves.items() for row in table(split, own)])
        names = {"test": "fresh draws of the Gaussian process", "branin": "Branin", "hartmann3": "Hartmann"}
        draw_searches(curves, names, folder / "queries.png")

    def _family(self, split: str) -> Functions:
        return self._families["test" if split == "validation" else split]

    def _searches(
        self, purpose: Purpose, functions: Functions, *, count: int = _AT_ONCE, seed: int | None = None
    ) -> ht.ProblemSource:
        """Returns learnt searches on functions of their own for every outer step."""

        def problem(own: int) -> ht.BilevelProblem:
            drawn = Drawn(functions, functions.draw(count, own, self._like))
            steps = self._queries - 1  # after the last of them the last query is judged
            return ht.BilevelProblem(
                Search(drawn), BestValue(drawn), dynamics=self._dynamics, num_steps=steps, num_tasks=count
            )

        return self.reseeded(purpose, problem, seed=seed)

    def _random(self, split: str, queries: int) -> ht.ProblemSource:
        """Returns random searches on the functions of the evaluation, each made at once: without steps."""
        source, seed = self.evaluation(split), run_seed(self.settings.seed, "search", 0)

        def problem(outer_step: int) -> ht.BilevelProblem:
            learnt = source.at(outer_step)
            inner = RandomSearch(Drawn(self._family(split), learnt.outer.batch(outer_step)), queries)
            return replace(learnt, inner=inner, dynamics=ht.dynamics.SGD(lr=0.0), num_steps=0, seed=seed)

        return ht.Problems(problem)

    def _curves(self, split: str, hparams: TensorDict) -> dict[str, Curve]:
        """Returns the best values of each search on the functions of the evaluation, by its name."""
        functions, source, count = self._family(split), self.evaluation(split), self._curve_functions
        parts, execution = range(-(-count // _AT_ONCE)), self.settings.execution.of(source)

        def learnt() -> Tensor:
            after = range(self._queries)
            runs = [
                ht.unroll(source.at(part), hparams, outer_step=part, metrics_after=after, execution=execution)
                for part in parts
            ]
            return torch.cat([run.metrics_after[self.metric] for run in runs])[:count]

        def random() -> Tensor:
            problems = self._random(split, 2 * self._queries)
            values = []
            for part in parts:
                places = ht.unroll(problems.at(part), hparams, outer_step=part, execution=execution).params["place"]
                values.append(torch.vmap(functions)(places, source.at(part).outer.batch(part)))
            return torch.cat(values)[:count]

        def by_optuna(name: SamplerName) -> Tensor:
            rows = []
            for position in range(self._search_functions or 0):
                part, task = divmod(position, _AT_ONCE)
                own = {key: value[task] for key, value in source.at(part).outer.batch(part).items()}

                def value(place: Tensor, own: TensorDict = own) -> float:
                    return float(functions(place.to(self._like), own))

                seed = run_seed(self.settings.seed, "search", position) >> 33  # of 31 bits
                rows.append(search(name, value, functions.dimension, self._queries, seed=seed))
            return self._like.new_tensor(rows)

        found = {"learnt LSTM": timed(learnt), "random": timed(random)}
        if self._search_functions is not None:
            found |= {name: timed(partial(by_optuna, name)) for name in get_args(SamplerName)}
        return found


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How a search went on several functions.

    Args:
        best: least value so far, shape `(functions, queries)`.
        microseconds: of CPU time for a query, the function's own among them.
    """

    best: Tensor
    microseconds: float


def timed(run: Callable[[], Tensor]) -> Curve:
    """Returns the curve of a search.

    Args:
        run: returns the values of the queries, or the least so far, shape `(functions, queries)`.
    """
    start = process_time()
    values = run().cpu()
    seconds = process_time() - start
    return Curve(best=values.cummin(dim=1).values, microseconds=1e6 * seconds / values.numel())


class Proposer(nn.Module):
    """An LSTM that turns the last query, its value and the least value so far into the next query.

    Args:
        dimension: of a query.
        hidden: size of the memory.
    """

    def __init__(self, dimension: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell = nn.LSTMCell(dimension + 2, hidden)
        self.output = nn.Linear(hidden, dimension)

    def forward(self, place: Tensor, value: Tensor, best: Tensor, state: TensorDict) -> tuple[Tensor, TensorDict]:
        """Returns the next query in the unit cube, and the memory; all tensors may have a leading tasks axis."""
        seen = torch.cat([2 * place - 1, torch.stack([value, best], dim=-1)], dim=-1)
        hidden, cell = self.cell(seen, (state["hidden"], state["cell"]))
        return self.output(hidden).sigmoid(), {"hidden": hidden, "cell": cell}


@dataclass(frozen=True, eq=False)
class LearnedSearch(ht.Dynamics):
    """Queries the inner loss, without its gradient, and moves to where the proposer says.

    Args:
        proposer: the network, with its first weights; they are outer variables called `proposer.{weight}`.
    """

    proposer: Proposer

    def init_hparams(self) -> TensorDict:
        """Returns the weights of the proposer."""
        return tree.with_prefix("proposer", self._function.init_params())

    def init(self, params: TensorDict, hparams: TensorDict) -> TensorDict:
        """Returns an empty memory."""
        zeros = params["place"].new_zeros(*params["place"].shape[:-1], self.proposer.hidden)
        return {"hidden": zeros, "cell": zeros.clone()}

    def step(
        self, loss: InnerLoss, params: TensorDict, state: TensorDict, hparams: TensorDict, index: int
    ) -> tuple[TensorDict, TensorDict]:
        """Returns the next query and the least value so far, and the memory."""
        weights = {name: hparams[f"proposer.{name}"] for name in self._function.trained_names()}
        value = loss(params, hparams)
        best = torch.minimum(params["best"], value)
        place, state = self._function(weights, params["place"], value, best, state)
        return {"place": place, "best": best}, state

    @cached_property
    def _function(self) -> ht.FunctionalModule:
        return ht.FunctionalModule(self.proposer)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Functions, one for each task.

    Args:
        family: of them.
        coefficients: with a leading tasks axis.
    """

    family: Functions
    coefficients: TensorDict


class Search(ht.InnerProblem):
    """Looks for the minimum of a function: the inner variables are the next query and the least value so far.

    Args:
        drawn: the functions.
    """

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the first query, which is learnt, and no value."""
        place = hparams["first_query"].sigmoid()
        return {"place": place, "best": place.new_tensor(_NO_VALUE)}

    def batch(self, step: int) -> Batch:
        """Returns the coefficients."""
        return self._drawn.coefficients

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the value at the query."""
        return self._drawn.family(params["place"], batch)  # type: ignore[arg-type]


class RandomSearch(Search):
    """Makes all queries at once, at random.

    Args:
        drawn: the functions.
        queries: how many.
    """

    def __init__(self, drawn: Drawn, queries: int) -> None:
        super().__init__(drawn)
        self._queries = queries

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns uniform queries, shape `(queries, dimension)`, and no value."""
        like = hparams["first_query"]
        places = torch.rand((self._queries, *like.shape), dtype=like.dtype, device=like.device)
        return {"place": places, "best": like.new_tensor(_NO_VALUE)}


class BestValue(ht.OuterProblem):
    """Judges a search by the least value that it saw.

    It is the loss "observed improvement" of the paper, `sum_t min(f(x_t) - min_{i<t} f(x_i), 0)`, plus the value at the
    first query: the terms of the sum telescope.

    Args:
        drawn: the functions.
    """

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn

    def init_hparams(self) -> TensorDict:
        """Returns the first query, as a logit: the centre of the cube."""
        like = next(value for value in self._drawn.coefficients.values() if value.is_floating_point())
        return {"first_query": like.new_zeros(self._drawn.family.dimension)}

    def batch(self, outer_step: int) -> Batch:
        """Returns the coefficients."""
        return self._drawn.coefficients

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the least of the values before and of those at the last queries."""
        return torch.minimum(params["best"], self._drawn.family(params["place"], batch).min())  # type: ignore[arg-type]

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the least value."""
        return {"best_value": self.loss(params, hparams, batch)}


def table(split: str, curves: Mapping[str, Curve]) -> list[dict[str, object]]:
    """Returns a row for every search and number of queries.

    Args:
        split: what the functions are.
        curves: by the name of the search, the first the learnt one.
    """
    learnt = next(iter(curves.values())).best
    rows: list[dict[str, object]] = []
    for name, curve in curves.items():
        # Some searches are run on the first of the functions alone: on these the difference is taken.
        count, queries = (min(sizes) for sizes in zip(curve.best.shape, learnt.shape, strict=True))
        behind = curve.best[:count, :queries] - learnt[:count, :queries]
        for query, column in enumerate(curve.best.T):
            mean, half_width = interval(column)
            row = {"functions": split, "search": name, "number of functions": len(column), "queries": query + 1}
            row |= {"best value": mean, "half width": half_width}
            if query < queries:
                mean, half_width = interval(behind[:, query])
                row |= {"above the learnt": mean, "half width of that": half_width}
            rows.append({**row, "CPU microseconds per query": curve.microseconds})
    return rows


def interval(values: Tensor) -> tuple[float, float]:
    """Returns the mean, and half of its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)


def draw_searches(curves: Mapping[str, Mapping[str, Curve]], titles: Mapping[str, str], path: Path) -> None:
    """Draws the best value against the number of queries, with intervals.

    Args:
        curves: by the functions and the search.
        titles: of the functions.
        path: the picture.
    """
    figure = Figure(figsize=(6.2 * len(curves), 4.6), layout="constrained")
    for axes, (split, own) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for (name, curve), style in zip(own.items(), line_styles(own).values(), strict=True):
            mean, half = torch.tensor([interval(column) for column in curve.best.T]).T
            queries = range(1, len(mean) + 1)
            axes.fill_between(queries, mean - half, mean + half, color=style["color"], alpha=0.2, linewidth=0)
            label = f"{name} ({len(curve.best)} functions, {curve.microseconds:.3g} \N{MICRO SIGN}s a query)"
            axes.plot(queries, mean, label=label, **{**style, "markevery": 3, "markersize": 7})
        axes.set(xlabel="number of queries", ylabel="least value so far", title=titles[split])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)
