"""A network over data sets: what it answers does not depend on the order of the examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypertorch.checks.argument_types import typed
from hypertorch.checks.values import is_count


class DeepSet(nn.Module):
    """Embeds data sets of any number of examples: `outputs(mean of features(example), logarithm of the number)`.

    The mean hides how many examples there are, so their number is told beside it.

    Args:
        num_inputs: entries of an example, such as the pixels of an image and a one-hot label.
        width: units of the hidden layers, two before the mean and one after it.
        num_outputs: entries of an embedding.

    Raises:
        ValueError: if a number is no count.

    References:
        Zaheer et al. (2017), Deep sets.
    """

    def __init__(self, num_inputs: int, *, width: int = 64, num_outputs: int = 16) -> None:
        super().__init__()
        for name, value in (("num_inputs", num_inputs), ("width", width), ("num_outputs", num_outputs)):
            if not is_count(value):
                raise ValueError(f"`{name}` is {value!r}, which is no count. Pass a whole number of at least 1.")
        self.features = nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        # A last bias would move all embeddings alike, and no distance.
        last = nn.Linear(width, num_outputs, bias=False)
        self.outputs = nn.Sequential(nn.Linear(width + 1, width), nn.ReLU(), last)

    def forward(self, examples: Tensor, sizes: Tensor) -> Tensor:
        """Returns the embeddings.

        Args:
            examples: shape `(sets, most, num_inputs)`; rows beyond a set's own number of examples take no part.
            sizes: examples of each set, at least 1, shape `(sets,)`. Of a set with more than `most`, the rows are a
                sample.

        Returns:
            Shape `(sets, num_outputs)`.
        """
        is_there = torch.arange(examples.shape[1], device=sizes.device) < sizes.unsqueeze(1)
        # Chosen, not multiplied by 0: what lies there may be infinite.
        features = self.features(torch.where(is_there.unsqueeze(2), examples, 0.0))
        means = (features * is_there.unsqueeze(2)).sum(dim=1) / is_there.sum(dim=1, keepdim=True)
        return self.outputs(torch.cat([means, sizes.to(means.dtype).log().unsqueeze(1)], dim=1))


@typed("sets")
def pad_sets(sets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns data sets of different numbers of examples as one tensor, and these numbers.

    Args:
        sets: each of shape `(examples, inputs)`, with at least one example.

    Returns:
        Shape `(sets, most, inputs)`, zeros beyond a set's own examples; and shape `(sets,)`, integers.

    Raises:
        ValueError: if there is no set, a set is empty or holds what is not finite, or the shapes differ beyond the
            number of examples.
    """
    if not sets:
        raise ValueError("`sets` is empty: there is no data set to embed. Pass at least one.")
    for position, examples in enumerate(sets):
        if examples.dim() != 2 or not len(examples) or examples.shape[1] != sets[0].shape[-1]:
            raise ValueError(
                f"`sets[{position}]` has the shape {tuple(examples.shape)}, and `sets[0]` {tuple(sets[0].shape)}: a "
                "data set has a row for each example, at least one, and all have the same columns. Flatten each "
                "example, and append its label."
            )
        if not bool(examples.isfinite().all()):
            raise ValueError(
                f"`sets[{position}]` holds NaN or infinity: its embedding would be NaN. Replace what is missing."
            )
    most = max(len(examples) for examples in sets)
    padded = torch.stack([F.pad(examples, (0, 0, 0, most - len(examples))) for examples in sets])
    return padded, torch.tensor([len(examples) for examples in sets], device=padded.device)
