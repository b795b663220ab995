"""Every YAML file composes, and every experiment builds the objects it names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

import experiments.common.runs.resolvers  # noqa: F401
import hypertorch as ht
from experiments.common.configuration.building import make
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.runs.experiment import Experiment, build_experiment
from experiments.common.runs.training import build_outer_optimizer
from experiments.fewshot.learners import judged_learner, trained_learner
from experiments.fewshot.settings import FewShotSettings
from hypertorch.fewshot import Episode, EpisodeSource, Examples, Learner
from tests.helpers.data import real_data

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
CHOICES = [(path.parent.name, path.stem) for path in sorted(CONFIGS.glob("*/*.yaml"))]
EXPERIMENTS = [name for group, name in CHOICES if group == "experiment"]
# What a file needs of other groups to be of use.
COMPANIONS = {
    ("dataset", "sinusoid"): ["experiment=sinusoid"],
    ("backbone", "mlp"): ["experiment=sinusoid"],
}


@pytest.fixture(autouse=True)
def _hydra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HYPERTORCH_DATA", raising=False)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    config = compose("train", list(overrides))
    OmegaConf.resolve(config)
    return config


def test_groups_are_those_of_the_design() -> None:
    assert set(GROUPS) == {
        "backbone", "dataset", "debug", "dynamics", "experiment", "fewshot", "hypergradient", "learner", "outer_loop",
        "outer_optimizer", "parts", "paths",
    }  # fmt: skip


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_file_composes(group: str, name: str) -> None:
    companions = COMPANIONS.get((group, name), [])
    config = composed(*companions, f"{group}={name}")
    parse(TrainSettings, config)


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_every_command_composes(name: str) -> None:
    assert compose(name).task_name == name


def leaves(block: object, path: str = "") -> dict[str, object]:
    if not isinstance(block, dict):
        return {path: block}
    return {name: value for key in block for name, value in leaves(block[key], f"{path}.{key}".lstrip(".")).items()}


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "dataset"])
def test_what_a_data_set_says_reaches_the_run(name: str) -> None:
    """A default that is composed later must not take it back; an experiment's own file may."""
    experiment = "sinusoid" if name == "sinusoid" else "protonet"
    said, own = (
        leaves(yaml.safe_load((CONFIGS / group / f"{choice}.yaml").read_text(encoding="utf-8")))
        for group, choice in (("dataset", name), ("experiment", experiment))
    )
    config = compose("train", [f"experiment={experiment}", f"dataset={name}"])
    composed_leaves = leaves(OmegaConf.to_container(config, resolve=False))
    kept = {path: value for path, value in said.items() if path != "defaults" and path not in own}
    assert kept and {path: composed_leaves.get(path) for path in kept} == kept


def test_the_inputs_of_a_network_follow_the_size_of_images() -> None:
    config = composed("experiment=maml", "dataset=image_folder", "task.image_size=32")
    assert config.task.in_features == 3 * 32 * 32


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds(experiment: str) -> None:
    config = composed(f"experiment={experiment}")
    if (data := OmegaConf.select(config, "experiment.data")) in ("mnist", "omniglot"):
        config.experiment.root = str(real_data(data))
    if "omniglot" in OmegaConf.select(config, "experiment.domains", default=[]):
        config.experiment.root = str(real_data("omniglot").parent)
    built = build_experiment(config, parse(TrainSettings, config))
    assert isinstance(built, Experiment) and built.splits and built.metric and built.mode in ("max", "min")
    assert isinstance(make(config, "hypergradient")(), ht.Hypergradient)
    assert callable(build_outer_optimizer(config))
    if "dataset" in config and config.dataset is None:
        assert isinstance(make(config, "episodes")(), EpisodeSource)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_target_exists(path: Path) -> None:
    targets = list(found_under("_target_", yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert all(callable(get_object(target)) for target in targets)
    if path.parent.name in ("backbone", "dynamics", "hypergradient", "learner", "outer_optimizer"):
        assert targets or "defaults" in path.read_text(encoding="utf-8")


def found_under(key: str, value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for item in value.values():
            yield from found_under(key, item)


DYNAMICS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS.glob("dynamics/*.yaml")}
PLAIN_DYNAMICS = [
    name for name, values in DYNAMICS.items() if not any(isinstance(x, (dict, list)) for x in values.values())
]


@pytest.mark.parametrize("name", PLAIN_DYNAMICS)
def test_an_inner_optimiser_has_the_numbers_of_its_class(name: str) -> None:
    rule = instantiate(DYNAMICS[name])
    # Gradient descent has no step size of its own.
    own = {"lr": rule.lr} if name in ("sgd", "reversible_momentum") else {}
    assert isinstance(rule, ht.Dynamics) and vars(rule) == vars(type(rule)(**own))


@pytest.mark.parametrize("name", sorted(set(DYNAMICS) - set(PLAIN_DYNAMICS)))
def test_an_inner_optimiser_made_of_parts_builds(name: str) -> None:
    assert isinstance(make(composed(f"dynamics={name}", "~dynamics.lr"), "dynamics")(), ht.Dynamics)


def test_every_inner_optimiser_is_in_a_file() -> None:
    exported = {getattr(ht.dynamics, name) for name in ht.dynamics.__all__}
    classes = {item for item in exported if inspect.isclass(item) and not inspect.isabstract(item)}
    leaves = {item for item in classes if issubclass(item, ht.Dynamics)}
    targets = {get_object(target) for values in DYNAMICS.values() for target in found_under("_target_", values)}
    # Learnt first buffers are tensors, which no file holds.
    assert leaves - targets == {ht.dynamics.LearnedBuffers}


def test_any_rule_can_be_clipped() -> None:
    config = composed("dynamics=clipped", "dynamics@dynamics.rule=adam", "dynamics.max_value=0.1", "~dynamics.lr")
    clipped = make(config, "dynamics")()
    assert isinstance(clipped, ht.dynamics.Clipped) and isinstance(clipped.rule, ht.dynamics.Adam)
    assert (clipped.max_norm, clipped.max_value) == (1.0, 0.1)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_first_comment_of_an_experiment_is_its_command(experiment: str) -> None:
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1] == f"# scripts/train experiment={experiment}"


def test_folders_are_named_in_one_place() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name != "paths":
            assert "outputs/" not in str(values), f"{path} names a folder"


def test_the_root_of_a_data_set_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert composed("dataset=omniglot").dataset.download is True
    monkeypatch.setenv("HYPERTORCH_DATA", "somewhere")
    config = composed("dataset=omniglot")
    assert config.dataset.root == "somewhere"
    assert config.dataset.download is False


def test_debugging_is_short_and_on_the_cpu() -> None:
    config = composed("debug=default", "device=auto")
    assert config.outer_loop.num_outer_steps <= 2
    assert composed("debug=default").device == "cpu"


def test_the_evaluation_has_an_inner_learning_rate_of_its_own() -> None:
    config = composed(
        "experiment=imaml", "dynamics.lr=0.1", "learner.num_steps=6", "evaluation.lr=0.02", "evaluation.num_steps=14"
    )
    images = Examples(torch.zeros(5, 1, 28, 28), torch.arange(5))

    def inner_loop(learner: Learner) -> tuple[object, int]:
        problem = learner.problem(Episode(images, images), None)
        assert isinstance(problem.dynamics, ht.dynamics.SGD)
        return problem.dynamics.lr, problem.num_steps

    settings, own = parse(TrainSettings, config), parse(FewShotSettings, config)
    assert inner_loop(judged_learner(config, settings, own)) == (0.02, 14)
    assert inner_loop(trained_learner(config, settings, own)) == (0.1, 6)


def test_files_that_configs_name_are_there() -> None:
    root = CONFIGS.parent
    texts = {path: path.read_text(encoding="utf-8") for path in CONFIGS.rglob("*.yaml")}
    named = {name for text in texts.values() for name in re.findall(r"\b(?:experiments|scripts)/[\w/]+\.py\b", text)}
    assert named
    assert sorted(name for name in named if not (root / name).is_file()) == []
