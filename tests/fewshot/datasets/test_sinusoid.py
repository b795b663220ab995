import numpy as np
import pytest
import torch

from hypertorch.fewshot.datasets.sinusoid import Sinusoid


def test_shapes_and_types():
    episode = Sinusoid(shot=3, num_queries=7, num_tasks=4).at(0)
    assert episode.support.inputs.shape == episode.support.targets.shape == (4, 3, 1)
    assert episode.query.inputs.shape == episode.query.targets.shape == (4, 7, 1)
    assert episode.query.targets.dtype == torch.float32


def test_each_task_is_one_sine_in_the_stated_ranges():
    support, query = Sinusoid(shot=10, num_queries=10, num_tasks=200, dtype=torch.float64).at(3)
    x = torch.cat([support.inputs, query.inputs], dim=1)[..., 0].numpy()
    y = torch.cat([support.targets, query.targets], dim=1)[..., 0].numpy()
    assert np.abs(x).max() <= 5
    assert np.abs(x).max() > 4.9
    amplitudes, phases = [], []
    for task_x, task_y in zip(x, y, strict=True):
        # y = a sin x - b cos x, with a = amplitude cos phase and b = amplitude sin phase, is linear in (a, b).
        (a, b), residual, *_ = np.linalg.lstsq(np.stack([np.sin(task_x), -np.cos(task_x)], axis=1), task_y, rcond=None)
        assert residual[0] < 1e-25
        amplitudes.append(np.hypot(a, b))
        phases.append(np.arctan2(b, a))
    assert 0.1 <= min(amplitudes) < 0.5 < 4.5 < max(amplitudes) <= 5.0
    assert -1e-9 <= min(phases) < 0.2 < 2.9 < max(phases) <= np.pi
    assert abs(np.mean(phases) - np.pi / 2) < 0.4


def test_batches_are_a_function_of_seed_and_step():
    def inputs(seed, step):
        return Sinusoid(seed=seed).at(step).query.inputs

    assert torch.equal(inputs(1, 5), inputs(1, 5))
    assert not torch.equal(inputs(1, 5), inputs(1, 6))
    assert not torch.equal(inputs(1, 5), inputs(2, 5))


def test_the_numbers_of_a_seed_never_change():
    support, query = Sinusoid(shot=1, num_queries=2, num_tasks=1, seed=2024, dtype=torch.float64).at(11)
    assert support.inputs.flatten().tolist() == GOLDEN_SUPPORT
    assert query.inputs.flatten().tolist() == GOLDEN_QUERY
    np.testing.assert_allclose(query.targets.flatten().numpy(), GOLDEN_TARGETS, rtol=1e-13)


GOLDEN_SUPPORT = [1.7168141233280254]
GOLDEN_QUERY = [3.3047848328439127, 2.7858145536140464]
GOLDEN_TARGETS = [0.4413595669476, 1.0692273212957346]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shot": 0}, ValueError, r"`shot` must be at least 1, got 0"),
        ({"num_queries": 0}, ValueError, r"`num_queries` must be at least 1, got 0"),
        ({"num_tasks": 0}, ValueError, r"`num_tasks` must be at least 1, got 0"),
        ({"seed": 1.5}, TypeError, r"`seed` is 1.5, a float"),
        ({"dtype": torch.int32}, TypeError, r"`dtype` is torch.int32: a sine has real values.*torch.float32"),
    ],
)
def test_impossible_settings_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        Sinusoid(**changes)


def test_impossible_steps_are_refused():
    with pytest.raises(ValueError, match=r"`step` must be at least 0, got -3"):
        Sinusoid().at(-3)
