"""A network that answers with the weights that training would give, for every strength of an L2 penalty.

scripts/train experiment=hypernetwork
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.data_sets.digits import CLASSES, Images
from experiments.common.models.mlp import MLP
from experiments.common.models.trained_net import TrainedNet
from experiments.common.results.learning_curve import logged
from experiments.common.results.line_styles import COLOURS
from experiments.common.runs.digits_experiment import DigitsExperiment
from experiments.common.runs.experiment import Baseline, refuse_other_problems
from hypertorch.autodiff.noise import mix
from hypertorch.types import Batch, TensorDict, TensorMapping

_ANEW = ht.dynamics.SGD(lr=0.2, momentum=0.95)  # full batch; the problem is strictly convex


@dataclass(eq=False, repr=False, kw_only=True)
class Hypernetwork(DigitsExperiment):
    """Learns the strength of an L2 penalty through a network that answers with the trained weights for each strength.

    The hypernetwork is trained once, while the strength is learnt. An inner step draws strengths from the whole range
    and lowers the training loss, penalty included, of the weights that the network answers with. An outer step moves
    the strength along the derivative of the validation loss of the answer to it. No training is repeated and none is
    differentiated through: the answer itself has the derivative. In the end the answers over the range are compared
    with training anew at each strength.

    Args:
        config: the configuration, for the group `dynamics`, which trains the hypernetwork.
        sizes: images for "train", "validation" and "test"; 0 for all that are left over.
        wrong: share of the training labels that are replaced by random ones, which make a penalty worth while.
        log_l2: least and greatest logarithm of the strength.
        hidden: widths of the hidden layers of the hypernetwork.
        num_drawn: strengths in an inner step.
        num_steps: inner steps between two outer steps.
        anew_steps: of training anew (unit: steps of full-batch gradient descent with momentum).
        num_compared: strengths over the range at which the answer is compared with training anew.
    """

    splits = ("validation", "test")
    metric = "outer_loss"
    mode = "min"

    wrong: float = 0.3
    log_l2: Sequence[float] = (-7.0, 0.0)
    hidden: Sequence[int] = (64,)
    num_drawn: int = 8
    num_steps: int = 20
    anew_steps: int = 1500
    num_compared: int = 15

    def __post_init__(self) -> None:
        if len(self.log_l2) != 2 or not self.log_l2[0] < self.log_l2[1]:
            raise ExpectedFailure(
                f"`experiment.log_l2` is {list(self.log_l2)}: the strengths are drawn between the least and the "
                "greatest logarithm. Write two numbers, the smaller first."
            )
        if self.num_compared < 2:
            raise ExpectedFailure(
                f"`experiment.num_compared` is {self.num_compared}, but a range has two ends. Write 2 or more."
            )
        self._images = self.digit_splits()
        self._images["train"] = with_wrong_labels(self._images["train"], self.wrong, seed=self.settings.seed)
        like = self._images["train"].inputs
        self._range = ht.Box(lower=self.log_l2[0], upper=self.log_l2[1])
        self._answers = Answers(mlp=MLP((1, *self.hidden, CLASSES * (like.shape[1] + 1))), box=self._range)
        self._compared = torch.linspace(self.log_l2[0], self.log_l2[1], self.num_compared).to(like)
        self._dynamics: ht.Dynamics = build(self.config, "dynamics")
        # The hypernetwork that a run trained, and the strength that it chose.
        self._trained: TensorDict | None = None
        self._chosen: TensorDict = self._first()

    @cached_property
    def anew(self) -> Tensor:
        """The weights that training anew gives at each of the compared strengths, shape `(strengths, classes, ...)`."""
        return ht.unroll(self._trained_anew("validation"), {"log_l2": self._compared}).params["weights"]

    def training(self) -> ht.ProblemSource:
        """Returns the training of the hypernetwork, which goes on from outer step to outer step."""
        return ht.BilevelProblem(
            AnswerTraining(self._answers, self._images["train"], num_drawn=self.num_drawn, seed=self.settings.seed),
            JudgedAnswers(self._answers, self._images["validation"], first=self._first()),
            dynamics=self._dynamics,
            num_steps=self.num_steps,
            warm_start=True,
            seed=self.settings.seed,
        )

    def validation(self) -> ht.ProblemSource:
        """Returns training anew with the strength: what the hypernetwork stands for."""
        return self._trained_anew("validation")

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the answers of the hypernetwork that a run trained, or training anew before there is one.

        Raises:
            ExpectedFailure: if other problems are asked for: there are none.
        """
        refuse_other_problems(seed)
        if self._trained is None:
            return self._trained_anew(split)
        outer = JudgedAnswers(
            self._answers, self._images[split], first=self._chosen, compared=(self._compared, self.anew)
        )
        return self._without_steps(self._trained, outer)

    def after(self, trained: ht.Trained) -> Hypernetwork:
        """Returns the experiment that judges the hypernetwork that was trained."""
        found = copy(self)
        found._trained, found._chosen = trained.params, dict(trained.best_hparams)
        return found

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns training anew at the chosen strength, and at the best of the compared ones by validation."""
        best = losses(self.anew, self._images["validation"]).argmin()
        source = self._trained_anew(split)
        return {
            "trained anew": Baseline(source=source, hparams=self._chosen),
            "best of a grid, trained anew": Baseline(source=source, hparams={"log_l2": self._compared[best]}),
        }

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the validation loss of answers and of training anew over the range, and their difference."""
        if self._trained is None:
            return
        images = self._images["validation"]
        over = torch.linspace(float(self._compared[0]), float(self._compared[-1]), 200).to(self._compared)
        draw_responses(
            (over, losses(self._answers(self._trained, over), images)),
            (self._compared, losses(self.anew, images)),
            losses(self._answers(self._trained, self._compared), images),
            folder / "metrics.jsonl",
            folder / "best_response.png",
        )

    def _first(self) -> TensorDict:
        """Returns the middle of the range, before the first outer step."""
        return {"log_l2": self._compared.new_tensor((self._range.lower + self._range.upper) / 2.0)}

    def _trained_anew(self, split: str) -> ht.BilevelProblem:
        inner = PenalisedTraining(self._images["train"])
        outer = JudgedWeights(self._images[split], first=self._first())
        return ht.BilevelProblem(inner, outer, dynamics=_ANEW, num_steps=self.anew_steps)

    def _without_steps(self, params: TensorDict, outer: ht.OuterProblem) -> ht.BilevelProblem:
        return ht.BilevelProblem(TrainedNet(params), outer, dynamics=self._dynamics, num_steps=0)


@dataclass(frozen=True)
class Answers:
    """The hypernetwork: from logarithms of strengths to the weights of softmax regression.

    Args:
        mlp: of one input and `classes * (pixels + 1)` outputs.
        box: the range of the logarithms, which the input runs over from -1 to 1.
    """

    mlp: MLP
    box: ht.Box

    def __call__(self, params: TensorMapping, log_l2: Tensor) -> Tensor:
        """Returns the weights, shape `(strengths, classes, pixels + 1)`; the last column holds the biases."""
        place = 2.0 * (log_l2.reshape(-1, 1) - self.box.lower) / (self.box.upper - self.box.lower) - 1.0
        return self.mlp(params, place).reshape(len(place), CLASSES, -1)


def with_wrong_labels(images: Images, share: float, *, seed: int) -> Images:
    """Returns the same images, each with a random label with this probability."""
    generator = torch.Generator().manual_seed(seed)
    is_wrong = torch.rand(len(images), generator=generator) < share
    guesses = torch.randint(CLASSES, (len(images),), generator=generator)
    labels = torch.where(is_wrong.to(images.labels.device), guesses.to(images.labels), images.labels)
    return Images(inputs=images.inputs, labels=labels)


def outputs(weights: Tensor, images: Images) -> Tensor:
    """Returns the outputs of softmax regression, shape `(strengths, images, classes)`."""
    return torch.einsum("np,kcp->knc", images.inputs, weights[..., :-1]) + weights[:, None, :, -1]


def losses(weights: Tensor, images: Images) -> Tensor:
    """Returns the cross-entropy at each strength, shape `(strengths,)`."""
    logits = outputs(weights, images)
    own = F.cross_entropy(logits.flatten(0, 1), images.labels.repeat(len(logits)), reduction="none")
    return own.reshape(len(logits), -1).mean(dim=1)


def penalised(weights: Tensor, log_l2: Tensor, images: Images) -> Tensor:
    """Returns what training minimises at each strength: `cross-entropy + exp(log_l2) |W|^2 / 2`, `(strengths,)`."""
    return losses(weights, images) + log_l2.reshape(-1).exp() * weights.square().sum(dim=(1, 2)) / 2


class AnswerTraining(ht.InnerProblem):
    """Trains the hypernetwork: the mean over drawn strengths of what training at that strength minimises.

    Args:
        answers: the hypernetwork.
        images: training images and labels.
        num_drawn: strengths in a step.
        seed: of the draws.
    """

    def __init__(self, answers: Answers, images: Images, *, num_drawn: int, seed: int) -> None:
        self._answers = answers
        self._images = images
        self._num_drawn = num_drawn
        self._seed = seed

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns random first weights."""
        return self._answers.mlp.draw(hparams["log_l2"])

    def batch(self, step: int) -> Batch:
        """Returns strengths from all of the range: one in each of as many equal parts of it."""
        generator = torch.Generator().manual_seed(mix(self._seed, step))
        places = torch.arange(self._num_drawn) + torch.rand(self._num_drawn, generator=generator)
        box = self._answers.box
        return (box.lower + (box.upper - box.lower) * places / self._num_drawn).to(self._images.inputs)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the mean over strengths; the outer variables take no part."""
        return penalised(self._answers(params, batch), batch, self._images).mean()


class JudgedAnswers(ht.OuterProblem):
    """Judges the answer to the learnt strength.

    Args:
        answers: the hypernetwork.
        images: what it is judged on.
        first: the strength's logarithm before the first outer step, `log_l2` of shape `()`.
        compared: strengths, and the weights that training anew gives at each; None for no comparison.
    """

    def __init__(
        self, answers: Answers, images: Images, *, first: TensorDict, compared: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._answers = answers
        self._images = images
        self._first = first
        self._compared = compared

    def init_hparams(self) -> TensorDict:
        """Returns the logarithm of the strength."""
        return dict(self._first)

    def constraints(self) -> Mapping[str, ht.Constraint]:
        """Returns the range of the strengths that the hypernetwork is trained for."""
        return {"log_l2": self._answers.box}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy of the answer: its derivative in the strength runs through the answer."""
        return losses(self._answers(params, hparams["log_l2"]), self._images)[0]

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the accuracy and, over the range, how far answers are from training anew, relative to its loss."""
        found = figures(self._answers(params, hparams["log_l2"]), hparams, self._images)
        if self._compared is not None:
            strengths, anew = self._compared
            goal = losses(anew, self._images)
            gaps = (losses(self._answers(params, strengths), self._images) - goal).abs() / goal
            found |= {"mean_gap": gaps.mean(), "greatest_gap": gaps.max()}
        return found


class PenalisedTraining(ht.InnerProblem):
    """Trains softmax regression from zero, side by side at each strength that is given.

    Args:
        images: training images and labels.
    """

    def __init__(self, images: Images) -> None:
        self._images = images

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns zeros, shape `(strengths, classes, pixels + 1)`."""
        strengths, pixels = hparams["log_l2"].numel(), self._images.inputs.shape[1]
        return {"weights": self._images.inputs.new_zeros(strengths, CLASSES, pixels + 1)}

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the sum over strengths: each has weights of its own."""
        return penalised(params["weights"], hparams["log_l2"], self._images).sum()


class JudgedWeights(ht.OuterProblem):
    """Judges trained weights, as a mean over the strengths.

    Args:
        images: what they are judged on.
        first: the strength's logarithm before the first outer step.
    """

    def __init__(self, images: Images, *, first: TensorDict) -> None:
        self._images = images
        self._first = first

    def init_hparams(self) -> TensorDict:
        """Returns the logarithm of the strength."""
        return dict(self._first)

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy."""
        return losses(params["weights"], self._images).mean()

    def metrics(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> TensorDict:
        """Returns the accuracy."""
        return figures(params["weights"], hparams, self._images)


def figures(weights: Tensor, hparams: TensorDict, images: Images) -> TensorDict:
    """Returns accuracy and strength, as means."""
    right = outputs(weights, images).argmax(dim=-1) == images.labels
    return {"accuracy": right.to(weights.dtype).mean(), "log_l2": hparams["log_l2"].mean()}


def draw_responses(
    answered: tuple[Tensor, Tensor], anew: tuple[Tensor, Tensor], compared: Tensor, metrics: Path, path: Path
) -> None:
    """Draws the validation loss over the range by both, their difference, and the learnt strength.

    Args:
        answered: logarithms of strengths, and the loss of the answer to each.
        anew: the same of training anew.
        compared: the loss of the answers at the strengths of `anew`.
        metrics: the run's metrics.jsonl.
        path: the picture.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    curves, gaps, run = figure.subplots(1, 3)
    curves.plot(*(part.cpu() for part in answered), color=COLOURS[0], linewidth=2, label="the network's answer")
    curves.plot(*(part.cpu() for part in anew), "o", color=COLOURS[1], label="trained anew")
    curves.set(
        xlabel="logarithm of the L2 penalty", ylabel="validation loss", title="One network against many trainings"
    )
    gaps.plot(anew[0].cpu(), (100.0 * (compared - anew[1]) / anew[1]).cpu(), marker="o", color=COLOURS[0])
    gaps.axhspan(-5.0, 5.0, color="0.9", label="5 % either way")
    gaps.set(
        xlabel="logarithm of the L2 penalty", ylabel="answer above trained anew (% of the loss)", title="Difference"
    )
    best = answered[0][answered[1].argmin()].item()
    run.plot(*logged(metrics, "hparams/log_l2"), color=COLOURS[0], label="learnt")
    run.axhline(best, color="0.5", linestyle="--", label="lowest point of the final answers")
    run.set(xlabel="outer step", ylabel="logarithm of the L2 penalty", title="Learnt while the network is trained")
    for axes in (curves, gaps, run):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=85)
