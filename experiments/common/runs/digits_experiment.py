"""An experiment on images of handwritten digits: the settings that all of them have, declared once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from omegaconf import DictConfig

from experiments.common.configuration.reads import Reads
from experiments.common.configuration.settings import ProblemSettings
from experiments.common.data_sets.digits import DigitsName, Images, digit_splits
from experiments.common.runs.experiment import Experiment


@dataclass(eq=False, repr=False)
class DigitsExperiment(Experiment):
    """An experiment that splits images of digits at random and trains with the group `dynamics`.

    A subclass is a dataclass too: its fields are the further settings of its block, and it documents those alone,
    beside the names of its splits. It makes what it needs of them in `__post_init__`.

    Args:
        config: the whole configuration, for the groups.
        settings: the plain settings that all experiments have.
        sizes: images of each split, by its name; 0 for all that are left over.
        data: "digits" (scikit-learn's, embedded) or "mnist".
        root: the folder of MNIST's files; None for the embedded digits.
    """

    READS: ClassVar = Reads(blocks=("dynamics",))

    config: DictConfig
    settings: ProblemSettings
    _: KW_ONLY
    sizes: Mapping[str, int]
    data: DigitsName = "digits"
    root: str | None = None

    def digit_splits(self) -> dict[str, Images]:
        """Returns the images of each split, by its name, drawn with the run's seed.

        Raises:
            ExpectedFailure: if there are not as many images, or the files are missing.
        """
        settings = self.settings
        return digit_splits(
            self.data,
            self.sizes,
            root=self.root,
            seed=settings.seed,
            device=settings.device,
            dtype=settings.dtype,
        )
