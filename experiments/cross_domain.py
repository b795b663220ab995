"""Few-shot learning for domains never seen: how strongly to disturb the features of a learner while it is trained.

scripts/train experiment=cross_domain
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import ProblemSettings, TrainSettings
from experiments.common.data_sets.domains import load_domain
from experiments.common.models.mlp import accuracy
from experiments.common.models.transformed_learner import (
    Episodes,
    TransformedLearner,
    episodes_at,
    with_transformations,
)
from experiments.common.results.line_styles import COLOURS, MARKERS
from experiments.common.runs.experiment import Baseline, Experiment, refuse_other_length
from experiments.common.runs.seeds import run_seed
from hypertorch.autodiff.noise import mix, random_permutation
from hypertorch.fewshot import Conv4, EpisodeSampler, ProtoNet
from hypertorch.types import Batch, TensorDict, TensorMapping

_NONE = -50.0  # softplus of it is 2e-22: no noise
_PUBLISHED = (0.3, 0.5)  # of scales and of shifts, before the softplus

EpisodesOfStep: TypeAlias = Callable[[int], Episodes]


class CrossDomain(Experiment):
    """Learns how strongly the features of a few-shot learner are disturbed in training, so that it serves new domains.

    A feature-wise transformation layer after each norm layer turns channel `c` into `gamma_c f_c + beta_c` with
    `gamma_c ~ N(1, softplus(G_c)^2)` and `beta_c ~ N(0, softplus(B_c)^2)`, drawn for each training episode. The weights
    of the learner are the inner variables; `G` and `B` are the outer variables. The learner is trained once: each outer
    step goes on from where the last one stopped, by a few steps on episodes of seen domains but for one, and moves `G`
    and `B` along the hypergradient of the loss on episodes of that one, without the layers. The learner at the end of
    the run is what is judged, on new classes of the seen domains and on the held-out domain.

    Args:
        config: the configuration, for the group `dynamics`.
        settings: the plain settings of all experiments.
        domains: names of the domains; see `load_domain`.
        held_out: the one of them that is only judged on.
        root: folder of the data sets that are not embedded.
        way: classes of an episode.
        shot: support images of a class.
        num_queries: query images of a class.
        hidden: channels of each of the four convolutional layers.
        every: inner steps of an outer step.
        outer_episodes: episodes that an outer step judges on.
        num_pretraining: steps without layers before the run (unit: inner steps).
        num_updates: outer steps of a run, for the baselines.
    """

    READS: ClassVar = Reads(blocks=("dynamics",))
    metric = "accuracy"
    mode = "max"
    published: ClassVar = {
        "5-way 1-shot (photographs, RelationNet on a ResNet-10; Tseng et al. 2020, quoted from memory)": "with learnt "
        "layers 48.4 % on held-out birds, 32.2 on cars, 50.7 on places, 35.0 on plants",
    }

    def __init__(
        self,
        config: DictConfig,
        settings: ProblemSettings,
        *,
        domains: Sequence[str],
        held_out: str,
        root: str | None = None,
        way: int = 5,
        shot: int = 1,
        num_queries: int = 5,
        hidden: int = 32,
        every: int = 10,
        outer_episodes: int = 4,
        num_pretraining: int = 300,
        num_updates: int,
    ) -> None:
        super().__init__(config, settings)
        self._seen = [name for name in dict.fromkeys(domains) if name != held_out]
        if held_out not in domains or len(self._seen) < 2:
            raise ExpectedFailure(
                f"`experiment.held_out` is {held_out!r}, of `experiment.domains` {list(domains)}: it must be one of "
                "them, and two others are needed, one to train on and one to judge the layers on. Add domains."
            )
        self._domains = {name: load_domain(name, root) for name in (*self._seen, held_out)}
        self._held_out = held_out
        self.splits = ("validation", *self._seen, held_out)
        self._episodes = {"way": way, "shot": shot, "num_queries": num_queries, "dtype": settings.dtype}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = with_transformations(Conv4(hidden=hidden, downsample="stride"))
            self._learner = TransformedLearner(ProtoNet(network.to(settings.device, settings.dtype), way=way))
        self._samplers, self._outer_samplers = (
            [
                self._sampler(name, "meta_train", mix(run_seed(settings.seed, "training", index), place), num_tasks)
                for index, name in enumerate(self._seen)
            ]
            for place, num_tasks in enumerate((1, outer_episodes))
        )
        self._dynamics: ht.Dynamics = build(config, "dynamics")
        self._every, self._num_updates, self._num_pretraining = every, num_updates, num_pretraining
        self._end: TensorDict = {}
        self._learnt: TensorDict | None = None

    def training(self) -> ht.ProblemSource:
        """Returns the run that goes on, by episodes of all seen domains but one, judged on episodes of that one."""
        return replace(self._run(self._seen_training(), self._unseen_episodes, self._every), warm_start=True)

    def validation(self) -> ht.ProblemSource:
        """Returns whole runs with layers that stay as they are, judged on new classes of the seen domains."""
        run = self._run(self._seen_training(), self._episodes_of("validation"), self._every * self._num_updates)
        return ht.Problems(lambda _: run)

    def after(self, trained: ht.Trained) -> CrossDomain:
        """Returns the experiment that judges the learner at the end of the run."""
        found = copy(self)
        found._end = trained.params
        found._learnt = trained.best_hparams
        return found

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the learner at the end of the run, on episodes of validation classes or of a domain's test classes.

        Raises:
            ExpectedFailure: if there was no run.
        """
        if not self._end:
            raise ExpectedFailure(
                "`experiment` is CrossDomain, whose outcome is the learner of its single run: it cannot be made of the "
                "outer variables alone. Look into the run's results.json, or train again."
            )
        return self._judged(split, self._end, seed)

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns learners trained on the same episodes: without layers, with fixed ones, and anew with the learnt."""
        return {
            name: Baseline(source=self._judged(split, params), hparams=hparams)
            for name, (hparams, params) in self._trained.items()
        }

    def check_training(self, settings: TrainSettings) -> None:
        """Refuses a run of another length than `num_updates`."""
        refuse_other_length(settings, self._num_updates)

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the accuracy on each domain, and how strong each channel's noise became."""
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        draw_accuracies(results, hparams, self._held_out, folder / "domains.png")

    @cached_property
    def _first(self) -> TensorDict:
        """The weights that every run starts with: trained without layers, on all seen domains in turn."""
        samplers, offset = self._samplers, self._every * self._num_updates  # other episodes than later
        training = EpisodeTraining(
            learner=self._learner,
            episodes=lambda step: episodes_at(samplers[step % len(samplers)], offset + step),
            first=self._learner.first_weights,
            has_layers=False,
        )
        return self._end_of(training, self._learner.noise_of(_NONE, _NONE), self._num_pretraining)

    @cached_property
    def _trained(self) -> Mapping[str, tuple[TensorDict, TensorDict]]:
        """Outer variables that stay as they are, and the weights that a whole run ends with, by name."""
        none, published = self._learner.noise_of(_NONE, _NONE), self._learner.noise_of(*_PUBLISHED)
        chosen = {"no layers": none, "fixed layers": published}
        if self._learnt is not None:
            chosen["learnt layers, trained anew"] = self._learnt
        ends: dict[str, tuple[TensorDict, TensorDict]] = {}
        for name, hparams in chosen.items():
            training = self._seen_training(has_layers=hparams is not none)
            ends[name] = hparams, self._end_of(training, hparams, self._every * self._num_updates)
        return ends

    def _seen_training(self, *, has_layers: bool = True) -> EpisodeTraining:
        return EpisodeTraining(
            learner=self._learner,
            episodes=self._seen_episodes,
            first=self._first,
            seed=self.settings.seed,
            has_layers=has_layers,
        )

    def _end_of(self, training: EpisodeTraining, hparams: TensorDict, num_steps: int) -> TensorDict:
        """Returns the weights after some steps."""
        return ht.unroll(self._run(training, self._episodes_of("validation"), num_steps), hparams).params

    def _run(self, training: ht.InnerProblem, judged_on: EpisodesOfStep, num_steps: int) -> ht.BilevelProblem:
        judge = OtherEpisodes(learner=self._learner, episodes=judged_on)
        return ht.BilevelProblem(training, judge, dynamics=self._dynamics, num_steps=num_steps, seed=self.settings.seed)

    def _judged(self, split: str, weights: TensorDict, seed: int | None = None) -> ht.ProblemSource:
        """Returns a learner that takes no more steps, on an episode for every outer step."""
        problem = self._run(TrainedLearner(weights), self._episodes_of(split, seed), 0)
        return ht.Problems(lambda _: problem)

    def _seen_episodes(self, step: int) -> Episodes:
        """Returns an episode of an inner step, of the domains that its outer step does not judge on, in turn."""
        _, *others = self._order(step // self._every)
        return episodes_at(self._samplers[others[step % len(others)]], step)

    def _unseen_episodes(self, outer_step: int) -> Episodes:
        """Returns episodes of the seen domain that an outer step judges on."""
        return episodes_at(self._outer_samplers[self._order(outer_step)[0]], outer_step)

    def _order(self, outer_step: int) -> list[int]:
        """Returns the seen domains in the order of an outer step."""
        return random_permutation(len(self._seen), self.settings.seed, outer_step).tolist()

    def _episodes_of(self, split: str, seed: int | None = None) -> EpisodesOfStep:
        """Returns episodes of a domain's test classes; for "validation", of all seen domains' validation classes."""
        names, part = (self._seen, "meta_val") if split == "validation" else ([split], "meta_test")
        own = run_seed(self.settings.seed if seed is None else seed, "evaluation", self.splits.index(split))
        samplers = [self._sampler(name, part, mix(own, index)) for index, name in enumerate(names)]
        return lambda step: episodes_at(samplers[step % len(samplers)], step)

    def _sampler(self, domain: str, part: str, seed: int, num_tasks: int = 1) -> EpisodeSampler:
        classes = self._domains[domain][part].to(self.settings.device)
        return EpisodeSampler(classes, num_tasks=num_tasks, seed=seed, **self._episodes)


class EpisodeTraining(ht.InnerProblem):
    """Trains a learner's weights on episodes, with transformations drawn for each of them.

    Args:
        learner: the learner.
        episodes: of an inner step.
        first: the first weights.
        seed: of the transformations.
        has_layers: whether there are any.
    """

    def __init__(
        self,
        *,
        learner: TransformedLearner,
        episodes: EpisodesOfStep,
        first: TensorDict,
        seed: int = 0,
        has_layers: bool = True,
    ) -> None:
        self._learner, self._episodes, self._first = learner, episodes, first
        self._seed, self._has_layers = seed, has_layers

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the first weights, which are not learnt by the outer loop."""
        return dict(self._first)

    def batch(self, step: int) -> Batch:
        """Returns episodes, and normal numbers for the layers."""
        return self._episodes(step), self._learner.draw(self._seed, step) if self._has_layers else None

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy of the queries, with layers the mean over two opposite draws."""
        episodes, drawn = batch
        if drawn is None:
            return F.cross_entropy(*self._learner.answers(params, episodes))
        # With its negative, a draw's first-order effect cancels, which would drown the effect of its strength.
        both = drawn, {name: -value for name, value in drawn.items()}
        disturbed = [self._learner.disturbed(params, hparams, one) for one in both]
        return torch.stack([F.cross_entropy(*self._learner.answers(own, episodes)) for own in disturbed]).mean()


class TrainedLearner(ht.InnerProblem):
    """Weights that no step changes.

    Args:
        weights: of a learner.
    """

    def __init__(self, weights: TensorDict) -> None:
        self._weights = weights

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns the weights."""
        return self._weights

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns 0: nothing is trained."""
        return next(iter(params.values())).new_zeros(())


class OtherEpisodes(ht.OuterProblem):
    """Judges a learner's weights on episodes without transformations.

    Args:
        learner: the learner.
        episodes: of an outer step.
    """

    def __init__(self, *, learner: TransformedLearner, episodes: EpisodesOfStep) -> None:
        self._learner, self._episodes = learner, episodes

    def init_hparams(self) -> TensorDict:
        """Returns the published strengths, for every channel of each layer."""
        return self._learner.noise_of(*_PUBLISHED)

    def batch(self, outer_step: int) -> Batch:
        """Returns episodes."""
        return self._episodes(outer_step)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy of the queries."""
        return F.cross_entropy(*self._learner.answers(params, batch))

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the accuracy, and the mean standard deviation of the transformations' scales and shifts."""

        def mean_spread(kind: str) -> Tensor:
            return F.softplus(torch.cat([value for name, value in hparams.items() if name.endswith(kind)])).mean()

        return {
            "accuracy": accuracy(*self._learner.answers(params, batch)),
            "scale_spread": mean_spread("gamma"),
            "shift_spread": mean_spread("beta"),
        }


def draw_accuracies(results: Mapping[str, Mapping], hparams: TensorMapping, held_out: str, path: Path) -> None:
    """Draws the accuracy on each domain with its interval, and the noise of each channel.

    Args:
        results: the contents of the run's results.json.
        hparams: the learnt outer variables.
        held_out: name of the held-out domain.
        path: the picture.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.2, 1.0))[0]
    bars = left.subplots()
    judged = {"learnt layers": results["metrics"], **results["baselines"]}
    splits = list(results["metrics"])
    for index, (name, own) in enumerate(judged.items()):
        figures = [own[split]["accuracy"] for split in splits]
        bars.errorbar(
            [place + 0.15 * (index - (len(judged) - 1) / 2) for place in range(len(splits))],
            [100 * one["mean"] for one in figures],
            yerr=[100 * (one["half_width_95"] or 0.0) for one in figures],
            fmt=MARKERS[index],
            color=COLOURS[index],
            capsize=4,
            label=name,
        )
    labels = {"validation": "validation classes\nof seen domains", held_out: f"{held_out}\n(never seen)"}
    bars.set_xticks(range(len(splits)), [labels.get(split, split) for split in splits])
    bars.set(ylabel="accuracy on new classes (%)", title="Episodes of each domain, with 95 % intervals")
    bars.legend(frameon=False)
    cells = right.subplots(2, 1, sharex=True)
    for cell, kind, start in zip(cells, ("gamma", "beta"), _PUBLISHED, strict=True):
        spreads = {name.split(".")[0]: F.softplus(value) for name, value in hparams.items() if name.endswith(kind)}
        first = 0
        for colour, (layer, spread) in zip(COLOURS, spreads.items(), strict=False):
            places = range(first, first + len(spread))
            cell.plot(places, spread.detach().cpu().numpy(), ".", color=colour, label=layer.replace("layer", "layer "))
            first += len(spread)
        cell.axhline(float(F.softplus(torch.tensor(start))), color="black", linestyle="--", linewidth=1, label="start")
        cell.set_ylim(bottom=0.0)
    cells[0].set(ylabel="standard deviation\nof the scale", title="Learnt noise of each channel")
    cells[1].set(ylabel="standard deviation\nof the shift", xlabel="channel, layer by layer")
    handles, names = cells[0].get_legend_handles_labels()
    right.legend(handles, names, frameon=False, ncols=len(names), loc="outside lower center", columnspacing=1.2)
    for axes in (bars, *cells):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
