import pytest
import torch

from hypertorch.fewshot.episodes import Episode, EpisodeSource, Examples


def test_an_episode_is_a_tree_of_tensors():
    examples = Examples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    episode = Episode(support=examples, query=examples)
    (inputs, targets), query = episode
    assert inputs is episode.support.inputs
    assert targets is episode.support.targets
    assert query is episode.query


def test_a_source_has_to_say_what_a_batch_is():
    with pytest.raises(TypeError, match="abstract"):
        EpisodeSource()
