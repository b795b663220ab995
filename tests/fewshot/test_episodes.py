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


class Pairs(EpisodeSource):
    num_tasks = 2

    def at(self, step):
        points = torch.arange(12.0).reshape(2, 3, 2) + step
        return Episode(Examples(points, points), Examples(points + 1, points - 1))


def test_episodes_of_any_source_are_moved_to_a_device():
    moved = Pairs().to("meta")
    assert moved.num_tasks == 2 and moved.task_spec() == Pairs().task_spec()
    for part, of_source in zip(moved.at(5), Pairs().at(5), strict=True):
        assert all(tensor.device.type == "meta" for tensor in part)
        assert [tensor.shape for tensor in part] == [tensor.shape for tensor in of_source]
    back = moved.to("cpu").at(5)
    assert torch.equal(back.query.targets, Pairs().at(5).query.targets)
