"""Episodes drawn from a set of classes, each batch a pure function of seed and step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hypertorch import tree
from hypertorch.autodiff.noise import mix, random_words
from hypertorch.checks.values import check_kind, check_seed
from hypertorch.fewshot._checks import (
    check_count,
    check_num_queries,
    check_num_tasks,
    check_shot,
    check_step,
)
from hypertorch.fewshot.augmentation import Augmentation, Normalisation
from hypertorch.fewshot.datasets.classes import Classes
from hypertorch.fewshot.datasets.image_classes import ImageClasses
from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples, TaskSpec

_AUGMENTATION = 1  # keeps its random stream apart from that of the classes and images
_LAST_WORD = np.uint64(2**64 - 1)


# Equal by identity: `==` of the tensors within has no truth value.
@dataclass(frozen=True, eq=False)
class EpisodeSampler(EpisodeSource):
    """Draws `way`-way `shot`-shot episodes from a data set of classes.

    Each task takes `way` distinct classes, uniformly, and `shot + num_queries` distinct items of each; the first
    `shot` are the support. Labels `0 .. way - 1` follow the order in which the classes were drawn, so they say nothing
    about the data set's own order.

    The choice is the ordering of raw 64-bit words of a Philox stream keyed by `(seed, step)`: the same on every
    platform, device, process and worker, in any order of access, and independent of the generators of numpy and torch.

    Cost: one gather of `num_tasks * way * (shot + num_queries)` items and `num_tasks * num_classes` random words.

    Args:
        dataset: the classes, of images (`ImageClasses`) or of other tensors (`TensorClasses`), on the device where the
            episodes are wanted.
        way: classes per episode, at least 2.
        shot: support items per class, at least 1.
        num_queries: query items per class, at least 1.
        num_tasks: episodes in a batch, at least 1.
        seed: selects the stream of episodes.
        dtype: floating-point type of the inputs; images lie in [0, 1] before normalisation, integers stay integers.
        augmentation: random changes of every image, for episodes to learn from; None for none. They are drawn by
            torch's generator of the device: a function of seed and step, but not the same on every device.
        normalisation: applied last; None for none.

    Raises:
        TypeError: if an argument has the wrong type, or what is for images meets items that are none.
        ValueError: if a number is too small, `way` exceeds the number of classes, or `shot + num_queries` exceeds the
            items of the smallest class.
    """

    dataset: Classes
    _: KW_ONLY
    way: int
    shot: int
    num_queries: int
    num_tasks: int
    seed: int = 0
    dtype: torch.dtype = torch.float32
    augmentation: Augmentation | None = None
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        why = (
            "episodes are drawn from items sorted by class. Pass an `ImageClasses`, such as "
            "`StrokeCharacters(split='meta_train')`, or for data that are no images "
            "`TensorClasses.of({name: tensor, ...})`."
        )
        check_kind("`dataset`", self.dataset, Classes, why)
        check_count("way", self.way, minimum=2, why="one class leaves nothing to tell apart", advice="use 2 or more")
        check_shot(self.shot)
        check_num_queries(self.num_queries)
        check_num_tasks(self.num_tasks)
        check_seed(self.seed)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(
                f"`dtype` is {self.dtype!r}: images in [0, 1] need a floating-point type. Use `torch.float32`."
            )
        self._check_changes()
        self._check_size()

    @property
    def num_classes(self) -> int:
        """Classes to draw from."""
        return self.dataset.num_classes

    def at(self, step: int) -> Episode:
        """Returns the batch of episodes number `step`.

        Args:
            step: which batch, at least 0.

        Returns:
            An `Episode` on the data set's device with `support.inputs` of shape
            `(tasks, way * shot, *item)`, `(channels, height, width)` for images; `support.targets`
            `(tasks, way * shot)` int64; and `query` the same with `num_queries` in place of `shot`.

        Raises:
            TypeError: if `step` is no integer.
            ValueError: if `step` is negative.
        """
        rows = self.rows(step)
        parts = rows[:, :, : self.shot], rows[:, :, self.shot :]
        # The parts lie one after the other, so that one gather serves both and each is a contiguous view of the result.
        # Row numbers are all that travels to the device; the images are there already.
        order, device = torch.from_numpy(np.concatenate([part.ravel() for part in parts])), self.dataset.tensor.device
        if device.type != "cpu":
            order = tree.to_device(order, device)
        inputs = self._changed(self.dataset.inputs(order, self.dtype), step)
        support, query = inputs.split([part.size for part in parts])
        return Episode(self._examples(support, self.shot), self._examples(query, self.num_queries))

    def to(self, device: torch.device | str) -> EpisodeSampler:
        """Returns a sampler of the same episodes that makes them on `device`, where it keeps the data set."""
        return replace(self, dataset=self.dataset.to(device))

    def task_spec(self) -> TaskSpec:
        """Returns what a network must know: the shape of an item, and one output per class."""
        return TaskSpec(item_shape=self.dataset.item_shape, outputs=self.way, is_classification=True)

    def rows(self, step: int) -> np.ndarray:
        """Returns which rows of the data set make up batch `step`.

        Args:
            step: which batch, at least 0.

        Returns:
            int64 `(tasks, way, shot + num_queries)`: by class, support items first.

        Raises:
            TypeError: if `step` is no integer.
            ValueError: if `step` is negative.
        """
        check_step(step)
        counts, starts = self.dataset.counts_array, self.dataset.starts
        largest = int(counts.max())
        # Every class gets as many words as the largest has items: which words are whose depends on no draw.
        words = random_words(self.num_tasks * (self.num_classes + self.way * largest), self.seed, step)
        class_words, image_words = np.split(words, [self.num_tasks * self.num_classes])
        classes = _smallest(class_words.reshape(self.num_tasks, self.num_classes), self.way)
        image_words = image_words.reshape(self.num_tasks, self.way, largest)
        if largest != int(counts.min()):
            # Items that a smaller class does not have sort last, behind those that it has.
            # A word of an item that equals the last one still comes first: the sort below is stable, and items that are
            # not there have the higher positions.
            image_words = np.where(np.arange(largest) < counts[classes][..., None], image_words, _LAST_WORD)
        drawn = np.argsort(image_words, axis=-1, kind="stable")[..., : self.shot + self.num_queries]
        # Positions within a class become rows of the data set; support and query are parts of one draw without
        # replacement, so they share nothing.
        return starts[classes][..., None] + drawn

    def _changed(self, images: Tensor, step: int) -> Tensor:
        if self.augmentation is not None:
            # A generator for each batch: the images of a step do not depend on which steps were asked for before, and
            # torch's global generators stay where they are. Torch takes signed 64-bit seeds, hence the shift.
            generator = torch.Generator(images.device).manual_seed(mix(self.seed, step, _AUGMENTATION) >> 1)
            images = self.augmentation(images, generator)
        return images if self.normalisation is None else self.normalisation(images)

    def _examples(self, inputs: Tensor, per_class: int) -> Examples:
        # Labels are places in the episode, the same for every task: the classes behind them were drawn in random order.
        labels = torch.arange(self.way, device=inputs.device).repeat_interleave(per_class)
        shape = (self.num_tasks, self.way * per_class)
        return Examples(inputs.view(*shape, *self.dataset.item_shape), labels.repeat(self.num_tasks, 1))

    def _check_changes(self) -> None:
        for name in ("augmentation", "normalisation"):
            if getattr(self, name) is not None and not isinstance(self.dataset, ImageClasses):
                raise TypeError(
                    f"`{name}` is {_shown(getattr(self, name))}, but `dataset` is {self.dataset!r}, which holds no "
                    "images: it changes channels and pixels. Pass None, and change the items before they are sorted."
                )
        if self.augmentation is not None:
            why = "images are changed by settings with a range each. Pass one, such as `Augmentation(flip=True)`."
            check_kind("`augmentation`", self.augmentation, Augmentation, why)
        if self.normalisation is not None:
            why = (
                "images are normalised by a mean and a deviation. Pass one, such as "
                "`Normalisation(mean=(0.5,), std=(0.25,))`, or None."
            )
            check_kind("`normalisation`", self.normalisation, Normalisation, why)
            # Tried on one pixel, so that a wrong number of channels is named here and not at the first batch.
            self.normalisation(torch.zeros(1, self.dataset.item_shape[0], 1, 1))

    def _check_size(self) -> None:
        if self.way > self.num_classes:
            raise ValueError(
                f"`way` is {self.way}, but `dataset` has {self.num_classes} classes: the classes of an episode are "
                f"distinct. Use `way` of at most {self.num_classes}, or a data set with more classes."
            )
        smallest = int(self.dataset.counts_array.argmin())
        count, needed = self.dataset.counts[smallest], self.shot + self.num_queries
        if needed > count:
            raise ValueError(
                f"`shot + num_queries` is {self.shot} + {self.num_queries} = {needed}, but class "
                f"{self.dataset.class_names[smallest]!r} has {count} {self.dataset.field}: support and query share no "
                f"{self.dataset.noun}. Lower "
                f"`shot` or `num_queries` until they sum to at most {count}."
            )


def _shown(value: object) -> str:
    return f"{value!r}, a {type(value).__name__}"


def _smallest(words: np.ndarray, count: int) -> np.ndarray:
    """Returns the positions of the `count` smallest words of each row, in ascending order of the words."""
    if count < words.shape[-1]:
        # Sorting only the chosen few: five times faster than sorting thousands of classes.
        chosen = np.argpartition(words, count - 1, axis=-1)[:, :count]
    else:
        chosen = np.broadcast_to(np.arange(count), words.shape)
    # Ties need no rule: two 64-bit words are equal with a chance of 2**-64.
    ascending = np.argsort(np.take_along_axis(words, chosen, axis=-1), axis=-1)
    return np.take_along_axis(chosen, ascending, axis=-1)
