"""A few-shot data set of one's own: straight lines, a regression task each."""

from dataclasses import dataclass

import torch

from hypertorch.fewshot import Episode, EpisodeSource, Examples


@dataclass(frozen=True, kw_only=True)
class Lines(EpisodeSource):
    """Each task is a line `y = slope x + offset`; support and query are points of it."""

    shot: int = 5
    num_queries: int = 10
    num_tasks: int = 4
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def at(self, step):
        # A pure function of seed and step: a run can be resumed, and a batch asked for again.
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        count = self.shot + self.num_queries
        inputs = torch.rand(self.num_tasks, count, 1, generator=generator, dtype=self.dtype)
        slope, offset = torch.randn(2, self.num_tasks, 1, 1, generator=generator, dtype=self.dtype)
        targets = slope * inputs + offset
        return Episode(
            Examples(inputs[:, : self.shot], targets[:, : self.shot]),
            Examples(inputs[:, self.shot :], targets[:, self.shot :]),
        )
