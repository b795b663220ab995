"""Which classes have to do with each other: a learnt matrix of interactions between the tasks of telling them.

scripts/train experiment=task_interactions
scripts/train experiment=task_interactions_cifar100 experiment.root=FOLDER
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.building import build
from experiments.common.configuration.outer_updates import build_outer_optimizer, build_scheduler
from experiments.common.configuration.readers import whole_number
from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.data_sets.cifar_features import NewClasses, cifar100_features
from experiments.common.data_sets.digits import CLASSES, DigitsName, Images, digit_splits, random_splits
from experiments.common.models.labelled_images import CleanImages, first_params, logits
from experiments.common.runs.experiment import Baseline, Experiment, refuse_other_problems
from hypertorch.types import Batch, TensorDict

# Of the single task: what `rho` is chosen from.
_GRID = (0.0, *np.geomspace(1e-4, 1.0, 17).tolist())


class TaskInteractions(Experiment):
    """Learns how strongly the weights of any two classes are drawn together, and all of them to 0, from few images.

    The inner problem is softmax regression on whitened principal components, which are those of images without labels.
    The outer loss is the cross-entropy by cross-validation: each fold is a task, trained on the other folds. For the
    test the classifier is trained on all labelled images, with the values found; baselines likewise. Interactions
    start at 0, and `rho` where it is best without them.

    Args:
        config: the configuration, for the group `dynamics` and, for a baseline, those of the outer loop.
        settings: the plain settings of all experiments.
        sizes: images: "labelled", "unlabelled" and "test"; 0 for all that are left over.
        data: "digits" (embedded) or "mnist".
        root: the folder of MNIST's files; None for the embedded digits.
        components: principal components.
        whitened: whether all components have unit variance; otherwise the first has, and the others keep their ratio.
        folds: parts that the labelled images are split into for cross-validation.
        num_steps: the horizon (unit: steps).
    """

    READS: ClassVar = Reads(blocks=("dynamics",))
    splits = ("test",)
    metric = "outer_loss"
    mode = "min"
    published: ClassVar = {
        "Franceschi et al. 2017, CIFAR-10 / CIFAR-100 (quoted from memory)": "single task 67.5 / 19.0 %, one constant "
        "for all pairs 69.4 / 19.2 %, learnt interactions 71.6 / 22.1 %",
    }

    def __init__(
        self,
        config: DictConfig,
        settings: ProblemSettings,
        *,
        sizes: Mapping[str, int],
        data: DigitsName = "digits",
        root: str | None = None,
        components: int = 30,
        whitened: bool = True,
        folds: int = 4,
        num_steps: int = 60,
    ) -> None:
        super().__init__(config, settings)
        if not isinstance(whitened, bool):
            raise ExpectedFailure(f"`experiment.whitened` is {whitened!r}, but it is a switch. Use true or false.")
        self._sizes, self._root = sizes, root
        self._data: DigitsName = data
        self._dynamics = build(config, "dynamics")
        self._components, self._folds, self._num_steps = components, folds, num_steps
        self._whitened = whitened

    @cached_property
    def images(self) -> dict[str, Images]:
        """The labelled images and those of the test, as components."""
        images = self.read_images()
        if self._folds < 2 or len(images["labelled"]) % self._folds:
            raise ExpectedFailure(
                f"`experiment.folds` is {self._folds}, but {len(images['labelled'])} labelled images are to be split "
                "into folds of the same size, at least 2. Use a divisor of their number, such as 2."
            )
        return with_components(images, self._components, whitened=self._whitened)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return tuple(str(digit) for digit in range(CLASSES))

    def read_images(self) -> dict[str, Images]:
        """Returns the images of each set, which are drawn by the seed."""
        settings = self.settings
        return digit_splits(
            self._data, self._sizes, root=self._root, seed=settings.seed, device=settings.device, dtype=settings.dtype
        )

    def training(self) -> ht.ProblemSource:
        """Returns the folds, each a task: trained on the others, judged on itself."""
        return self._cross_validation()

    def validation(self) -> ht.ProblemSource:
        """Returns the same folds."""
        return self.training()

    def evaluation(self, split: str, *, seed: int | None = None) -> ht.ProblemSource:
        """Returns the problem of training on all labelled images, judged on the test images.

        Raises:
            ExpectedFailure: if other problems are asked for: there are none.
        """
        refuse_other_problems(seed)
        inputs, labels = self.images["labelled"].pairs()
        tests = self.images[split]
        # One task.
        return self._problem((inputs[None], labels[None]), (tests.inputs[None], tests.labels[None]))

    def baselines(self, split: str) -> Mapping[str, Baseline]:
        """Returns the single task, its `rho` from a grid, and one learnt constant for all pairs of classes."""
        source = self.evaluation(split)
        return {
            "single task": Baseline(source=source, hparams=source.init_hparams()),
            "one constant for all pairs": Baseline(source=source, hparams=self.one_constant()),
        }

    @cached_property
    def single_task_rho(self) -> float:
        """The `rho` of a grid that cross-validation likes best where there are no interactions."""
        source = self._cross_validation(first_rho=0.0)
        none = source.init_hparams()

        def loss(rho: float) -> float:
            hparams = {**none, "rho": torch.full_like(none["rho"], rho)}
            return ht.evaluate(source, hparams, num_episodes=self._folds).metrics[self.metric].mean

        return min(_GRID, key=loss)

    def one_constant(self) -> TensorDict:
        """Returns `rho` and one interaction for all pairs, learnt as the interactions are."""
        loop = ht.OuterLoop(
            self._cross_validation(num_interactions=1),
            optimizer=build_outer_optimizer(self.config),
            backend=build(self.config, "hypergradient"),
            scheduler=build_scheduler(self.config),
        )
        return loop.run(self.config.outer_loop.num_outer_steps).hparams

    def draw(self, hparams: TensorDict, folder: Path) -> None:
        """Draws the matrix of interactions."""
        draw_matrix(matrix(hparams["interactions"]), self.names, folder / "matrix.png")

    def _cross_validation(
        self, *, num_interactions: int | None = None, first_rho: float | None = None
    ) -> ht.BilevelProblem:
        inputs, labels = self.images["labelled"].pairs()
        place = torch.arange(len(labels), device=labels.device).reshape(self._folds, -1)
        others = torch.stack([torch.cat([*place[:fold], *place[fold + 1 :]]) for fold in range(self._folds)])
        trained_on, judged_on = (inputs[others], labels[others]), (inputs[place], labels[place])
        return self._problem(trained_on, judged_on, num_interactions, first_rho)

    def _problem(
        self,
        trained_on: tuple[Tensor, Tensor],
        judged_on: tuple[Tensor, Tensor],
        num_interactions: int | None = None,
        first_rho: float | None = None,
    ) -> ht.BilevelProblem:
        rho = self.single_task_rho if first_rho is None else first_rho
        classes = len(self.names)
        first = {
            "rho": trained_on[0].new_tensor(rho),
            "interactions": trained_on[0].new_zeros(num_interactions or math.comb(classes, 2)),
        }
        at_least_0 = ht.Box(lower=0.0)
        return ht.BilevelProblem(
            InteractingClasses(data=trained_on, classes=classes),
            CleanImages(data=judged_on, first=first, constraints=dict.fromkeys(first, at_least_0)),
            dynamics=self._dynamics,
            num_steps=self._num_steps,
            num_tasks=len(trained_on[0]),
            seed=self.settings.seed,
        )


class PhotographInteractions(TaskInteractions):
    """The same for photographs, as outputs of a network that was trained on photographs of other classes.

    Args:
        config: the configuration, for the group `dynamics` and, for a baseline, those of the outer loop.
        settings: the plain settings of all experiments.
        sizes: images: "labelled", "unlabelled" and "test"; 0 for all that are left over.
        root: the folder of CIFAR-100.
        classes: which classes, a part of CIFAR-FS: "meta_test", or "meta_val" to choose settings by.
        num_epochs: of the training of the network, on the classes of "meta_train".
        features: the folder in which its outputs are kept; None for the user's cache folder.
        components: principal components.
        whitened: whether all components have unit variance; otherwise the first has, and the others keep their ratio.
        folds: parts that the labelled images are split into for cross-validation.
        num_steps: the horizon (unit: steps).
    """

    def __init__(
        self,
        config: DictConfig,
        settings: ProblemSettings,
        *,
        sizes: Mapping[str, int],
        root: str | None = None,
        classes: NewClasses = "meta_test",
        num_epochs: int = 12,
        features: str | None = None,
        components: int = 30,
        whitened: bool = True,
        folds: int = 4,
        num_steps: int = 60,
    ) -> None:
        shared = {"components": components, "whitened": whitened, "folds": folds, "num_steps": num_steps}
        super().__init__(config, settings, sizes=sizes, **shared)
        whole_number(config, "experiment.num_epochs", minimum=1, purpose="the network of the features is trained")
        self._root, self._num_epochs, self._features = root, num_epochs, features
        self._classes: NewClasses = classes

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return self._photographs[1]

    def read_images(self) -> dict[str, Images]:
        """Returns the images of each set, which are drawn by the seed."""
        features, names = self._photographs
        inputs = features.flatten(0, 1).to(self.settings.device, self.settings.dtype)
        labels = torch.arange(len(names), device=inputs.device).repeat_interleave(features.shape[1])
        source = f"`experiment.classes={self._classes}`"
        return random_splits(inputs, labels, self._sizes, source=source, seed=self.settings.seed)

    @cached_property
    def _photographs(self) -> tuple[Tensor, tuple[str, ...]]:
        # When they are needed, because a network may have to be trained.
        return cifar100_features(self._root, self._classes, num_epochs=self._num_epochs, folder=self._features)


class InteractingClasses(ht.InnerProblem):
    """Softmax regression: `cross-entropy + rho ||W||^2 + sum_jk C_jk ||w_j - w_k||^2`, where row `w_j` is of class j.

    Args:
        data: inputs of shape `(tasks, images, components)` and labels of shape `(tasks, images)`.
        classes: how many there are.
    """

    def __init__(self, *, data: tuple[Tensor, Tensor], classes: int) -> None:
        self._data = data
        self._classes = classes

    def init_params(self, hparams: TensorDict) -> TensorDict:
        """Returns zeros."""
        components = self._data[0].shape[-1]
        first = first_params(components, hidden=0, generator=torch.Generator(), classes=self._classes)
        return {name: value.to(hparams["rho"]) for name, value in first.items()}

    def batch(self, step: int) -> Batch:
        """Returns all of the images."""
        return self._data

    def loss(self, params: TensorDict, hparams: TensorDict, batch: Batch) -> Tensor:
        """Returns the cross-entropy and the penalties; biases have none."""
        inputs, labels = batch
        weight = params["output.weight"]
        first, second = _pairs(len(weight), weight.device)
        distances = (weight[first] - weight[second]).square().sum(dim=1)
        # Every pair stands in the matrix twice.
        penalty = hparams["rho"] * weight.square().sum() + 2.0 * (hparams["interactions"] * distances).sum()
        return F.cross_entropy(logits(params, inputs), labels) + penalty


def matrix(interactions: Tensor) -> Tensor:
    """Returns the symmetric matrix with a diagonal of 0, shape `(classes, classes)`.

    Args:
        interactions: of the pairs of classes, row by row above the diagonal, shape `(pairs,)`.
    """
    # `n (n - 1) / 2` pairs of `n` classes.
    classes = (1 + math.isqrt(1 + 8 * len(interactions))) // 2
    pairs = _pairs(classes, interactions.device)
    above = interactions.new_zeros(classes, classes).index_put(tuple(pairs), interactions)
    return above + above.T


def with_components(images: Mapping[str, Images], components: int, *, whitened: bool) -> dict[str, Images]:
    """Returns the labelled images and those of the test as principal components.

    Args:
        images: "labelled", "unlabelled" and "test"; the components are those of "unlabelled".
        components: how many; at most the pixels, and the unlabelled images.
        whitened: whether all have unit variance; otherwise the first has.
    """

    def pixels(part: str) -> np.ndarray:
        return images[part].inputs.double().cpu().numpy()

    analysis = PCA(components, whiten=whitened, svd_solver="full").fit(pixels("unlabelled"))
    scale = 1.0 if whitened else analysis.explained_variance_[0] ** -0.5
    return {
        part: Images(
            inputs=torch.from_numpy(scale * analysis.transform(pixels(part))).to(images[part].inputs),
            labels=images[part].labels,
        )
        for part in ("labelled", "test")
    }


def draw_matrix(interactions: Tensor, names: Sequence[str], path: Path) -> None:
    """Draws the interactions of all pairs of classes.

    Args:
        interactions: the matrix, shape `(classes, classes)`.
        names: of the classes.
        path: the picture.
    """
    is_long = max(map(len, names)) > 2
    figure = Figure(figsize=(7.6, 6.6) if is_long else (5.6, 4.8), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(interactions.detach().cpu().numpy(), cmap="viridis", vmin=0)
    spelt = [name.replace("_", " ") for name in names]
    axes.set_xticks(range(len(names)), spelt, rotation=90 if is_long else 0)
    axes.set_yticks(range(len(names)), spelt)
    axes.set(xlabel="class k", ylabel="class j", title="Learnt interactions: large where\nweights are drawn together")
    figure.colorbar(shown, ax=axes, label="interaction $C_{jk}$")
    figure.savefig(path, dpi=100)


def _pairs(classes: int, device: torch.device) -> Tensor:
    """Returns the pairs of classes, shape `(2, pairs)`."""
    return torch.triu_indices(classes, classes, offset=1, device=device)
