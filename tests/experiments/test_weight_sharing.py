"""Weight sharing: alphabets and their turned copies, and nets whose weights are mixed layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hypertorch as ht
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.data_sets.alphabets import Alphabets, load_alphabets
from experiments.weight_sharing import AlphabetTraining, HeldOutDrawings, MixedNets, labelled
from tests.experiments.commands import Command, results_of
from tests.helpers.data import real_data


def strokes(seed: int = 0, **changed: object) -> Alphabets:
    settings: dict = {"root": None, "num_alphabets": 2, "num_characters": 3, "num_drawings": 4, "image_size": 8}
    return load_alphabets("strokes", seed=seed, **{**settings, **changed})


def test_each_alphabet_comes_upright_and_turned() -> None:
    found = strokes()
    assert found.images.shape == (4, 3, 4, 64)
    assert found.names[2:] == tuple(f"{name}, turned" for name in found.names[:2])
    upright, turned = found.images.unflatten(-1, (8, 8)).split(2)
    torch.testing.assert_close(turned, upright.rot90(1, dims=(-2, -1)))
    # No drawing is there twice, and another seed draws others.
    assert len({tuple(row) for row in found.images[:2].flatten(0, 2).tolist()}) == 2 * 3 * 4
    assert not torch.equal(strokes(seed=1).images, found.images)
    torch.testing.assert_close(strokes().images, found.images)


def test_alphabets_of_omniglot_are_of_one_alphabet_each() -> None:
    root = str(real_data("omniglot"))
    found = load_alphabets(
        "omniglot", root=root, num_alphabets=5, num_characters=20, num_drawings=15, image_size=14, seed=0
    )
    assert found.images.shape == (10, 20, 15, 196)
    assert len(set(found.names[:5])) == 5
    # Three alphabets of the background part have as many characters as this.
    with pytest.raises(ExpectedFailure, match="has 3 alphabets with 48 characters or more"):
        load_alphabets("omniglot", root=root, num_alphabets=5, num_characters=48, num_drawings=1, image_size=14, seed=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"root": "somewhere"}, "made-up characters: they need no folder"),
        ({"num_drawings": 21}, "asks for 21 drawings of a character, but each has 20"),
        ({"num_alphabets": 0}, "`experiment.num_alphabets` is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ExpectedFailure, match=message):
        strokes(**changed)


def test_other_names_and_folders_without_omniglot_are_refused(tmp_path: Path) -> None:
    settings: dict = {"num_alphabets": 1, "num_characters": 2, "num_drawings": 1, "image_size": 8, "seed": 0}
    with pytest.raises(ExpectedFailure, match="Use strokes or omniglot"):
        load_alphabets("letters", root=None, **settings)  # type: ignore[arg-type]
    with pytest.raises(ExpectedFailure, match="`experiment.root` is null"):
        load_alphabets("omniglot", root=None, **settings)
    with pytest.raises(ExpectedFailure, match="Omniglot cannot be read there"):
        load_alphabets("omniglot", root=str(tmp_path), **settings)


def params_of(nets: MixedNets) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    same = nets.draw(torch.zeros((), dtype=torch.float64))
    return {name: value + torch.randn_like(value) for name, value in same.items()}


def test_nets_are_mixed_layer_by_layer() -> None:
    nets, like = MixedNets((5, 4, 3), num_nets=2), torch.zeros((), dtype=torch.float64)
    params, inputs = params_of(nets), torch.randn(2, 6, 5, dtype=torch.float64)
    hparams = {f"{layer}.mixing": torch.randn(2, 2, dtype=torch.float64) for layer in nets.layers}
    for net in range(2):
        hidden = inputs[net]
        for layer in nets.layers:
            row = hparams[f"{layer}.mixing"][net]
            weights = row[0] * params[layer][0] + row[1] * params[layer][1]
            hidden = hidden @ weights[:-1] + weights[-1]
            hidden = hidden if layer == "layer2" else hidden.tanh()
        torch.testing.assert_close(nets(params, hparams, inputs)[net], hidden)
    # What shares nothing is the net itself, and what shares all is one net for all.
    separate = nets.mixing({"layer1": 0.0, "layer2": 0.0}, like)
    changed = {name: torch.cat([value[:1], 2.0 * value[1:]]) for name, value in params.items()}
    assert torch.equal(nets(changed, separate, inputs)[0], nets(params, separate, inputs)[0])
    tied = nets.mixing({"layer1": 1.0, "layer2": 1.0}, like)
    one = nets(params, tied, inputs[:1].expand(2, -1, -1))
    torch.testing.assert_close(one[0], one[1])
    # All nets start alike, so that every mixing with rows that sum to 1 starts alike too.
    drawn = nets.draw(like)
    torch.testing.assert_close(nets(drawn, separate, inputs), nets(drawn, tied, inputs))


@pytest.mark.parametrize("backend", [ht.hypergradients.Reverse(), ht.hypergradients.Reversible()])
def test_the_hypergradient_is_right(backend: ht.Hypergradient) -> None:
    images = strokes(num_drawings=3).images.double()
    nets = MixedNets((64, 3, 3), num_nets=4)
    first = nets.mixing({"layer1": 0.5, "layer2": 0.3}, images)
    problem = ht.BilevelProblem(
        AlphabetTraining(nets=nets, data=labelled(images[:, :, :2]), l2=0.01),
        HeldOutDrawings(nets=nets, data=labelled(images[:, :, 2:]), first=first),
        dynamics=ht.dynamics.ReversibleMomentum(lr=1.0),
        num_steps=4,
    )
    assert ht.check_hypergradient(problem, problem.init_hparams(), backend).passed


def test_labels_are_the_characters() -> None:
    images = torch.arange(2 * 3 * 2, dtype=torch.float64).reshape(2, 3, 2, 1)
    inputs, labels = labelled(images)
    assert inputs.shape == (2, 6, 1) and labels.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    torch.testing.assert_close(inputs[1, labels[1] == 2].flatten(), images[1, 2].flatten())


def test_the_command_leaves_figures_and_a_picture(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = results_of(
        command, folder,
        "experiment=weight_sharing", "outer_loop.num_outer_steps=2", "validation.every=1",
        "experiment.num_characters=3", "experiment.num_steps=10",
    )  # fmt: skip
    assert set(results["baselines"]) >= {"separate", "lowest layer tied"}
    assert (folder / "mixing.png").stat().st_size > 0
    code, error = command("experiment=weight_sharing", "experiment.num_test=0", f"paths.run_dir={tmp_path / 'none'}")
    assert code == 1 and "each set needs a drawing of every character" in error
