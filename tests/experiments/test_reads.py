"""What nothing reads is refused, in every command, and what is refused is read by nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from benchmarks import compare_libraries
from experiments import (
    compare_backends,
    evaluate,
    fewshot_table,
    gallery,
    horizon_bias,
    hyperfield,
    lr_range_test,
    metasmoothness,
    search_against_gradients,
    search_benchmark,
    spectral_radius,
    train,
)
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.reads import check_settings_are_read
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import setting_keys
from experiments.common.runs.experiment import experiment_class
from experiments.common.runs.training import TRAINING
from experiments.fewshot.settings import FewShotSettings
from experiments.fewshot_table import planned_cells
from tests.experiments.commands import SINUSOID, TINY, Command
from tests.helpers import pages

COMMANDS = [
    compare_libraries,
    compare_backends,
    evaluate,
    fewshot_table,
    gallery,
    horizon_bias,
    hyperfield,
    lr_range_test,
    metasmoothness,
    search_against_gradients,
    search_benchmark,
    spectral_radius,
    train,
]


@pytest.fixture(autouse=True)
def _no_job() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


@contextmanager
def configs() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def check_training(*overrides: str) -> None:
    """As the command begins, without running it."""
    with configs():
        config = compose("train", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        OmegaConf.set_struct(config, True)
        check_settings_are_read(config, TRAINING | experiment_class(config).READS)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("word", ["+nonsense.foo=1", "++task_nam=1", "+hydra.foo=1", "+hypergradient@nonsense=reverse"])
def test_every_command_refuses_what_it_does_not_read(module: ModuleType, word: str, command: Command) -> None:
    needed = {"evaluate": ["run=nowhere"], "fewshot_table": ["run=false"], "gallery": ["run=false"]}
    code, error = command(*needed.get(module.__name__.rpartition(".")[2], []), word, module=module)
    assert code == 1
    assert error.count("\n") == 1 and error.startswith("error: `"), error
    assert f"`{re.sub(r'^[+]+|=.*', '', word).rpartition('@')[2]}" in error
    assert "its value would have no effect" in error
    assert ("Did you mean task_name?" in error) == ("task_nam" in word)


UNREAD = {
    "a new name": (("+nonsense.foo=1",), ["`nonsense.foo` is no setting", "backbone, dataset, "]),
    "an empty block": (("+nonsense={}",), ["`nonsense` is no setting"]),
    "below a plain setting": (("+evaluation.foo=1",), ["`evaluation.foo`", "lr, num_episodes, num_queries"]),
    "a null that becomes a block": (("+trust.a=1",), ["`trust.a` is no setting"]),
    "in a table": (("+task.foo=1",), ["`task.foo` is no setting", "of `task` are: image_size"]),
    "in a table, for another data set": (("run_lengths.full=10",), ["`run_lengths.full` is referred to by nothing"]),
    "in a table, for another network": (("task.in_features=3",), ["`task.in_features` is referred to by nothing"]),
    "an experiment's own": (("+experiment.num_labellers=3",), ["`experiment.num_labellers` is no argument of FewShot"]),
    "another experiment's setting": (
        ("experiment=noisy_digits", "+evaluation.num_queries=3"), ["`evaluation.num_queries` is no setting"],
    ),
    "no argument": (("+dataset.num_clases=3",), ["of StrokeCharacters", "Did you mean dataset.num_classes?"]),
    "no argument of the chosen": (("dataset=omniglot", "+dataset.drawings=3"), ["of Omniglot", "partition, "]),
    "no argument further down": (
        ("hypergradient=implicit", "+hypergradient.solver.foo=1"),
        ["`hypergradient.solver.foo` is no argument of ConjugateGradient", "damping, max_iterations, tolerance"],
    ),
    "no argument in a list": (
        ("+backbone.hooks=[{_target_: hypertorch.dynamics.SGD, foo: 1}]",), ["`backbone.hooks` is no argument"],
    ),
    "no argument in a table of objects": (
        ("+outer_loop.constraints={lr: {_target_: hypertorch.Box, foo: 1}}",), ["`outer_loop.constraints.lr.foo`"],
    ),
    "a block that is not built": (("experiment=protonet", "dynamics.lr=0.5"), ["`dynamics.lr`", "builds no"]),
    "a choice that is not built": (("experiment=protonet", "dynamics=adam"), ["`dynamics`", "builds no `dynamics`"]),
    "a deletion that does nothing": (("experiment=r2d2", "~dynamics"), ["`dynamics`", "builds no `dynamics`"]),
    "a deletion of a plain setting": (("~seed",), ["`~seed` deletes a setting that the command reads"]),
    "a deletion in a table": (("~task.in_features",), ["`~task.in_features` deletes"]),
    "Hydra's own": (("+hydra.job.foo=1",), ["`hydra.job.foo` is no setting of Hydra"]),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_what_nothing_reads_is_refused(case: str) -> None:
    overrides, expected = UNREAD[case]
    with pytest.raises(ExpectedFailure) as raised:
        check_training(*overrides)
    for text in expected:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("dataset=omniglot", "run_lengths.full=10"),
        ("run_lengths.short=10",),
        ("+run_lengths.mine=7", "task.run_length=mine"),
        ("+mine.lr=0.5", "dynamics.lr=${mine.lr}"),
        ("+mine={way: 3}", "+mine.shot=2", "episodes.way=${mine.way}", "episodes.shot=${mine.shot}"),
        ("experiment=sinusoid", "task.in_features=1"),
        ("+dataset.num_classes=30",),
        ("+outer_loop.checkpoints.keep=5", "+outer_loop.constraints=null"),
        ("~outer_loop.scheduler", "~dynamics.momentum", "~debug"),
        ("experiment=noisy_digits", "experiment.hidden=3", "dynamics=adam", "~dynamics.momentum"),
        ("~hypergradient.derivative", "hydra.job.name=mine", "+hydra.job.env_set.A=b"),
        ("training.augmentation={_target_: hypertorch.fewshot.Augmentation, flip: true}",),
        ("task.metric=outer_loss", "task.mode=min"),
    ],
)
def test_what_is_read_is_taken(overrides: tuple[str, ...]) -> None:
    check_training(*overrides)


def shown_commands() -> list[list[str]]:
    shown = [words for page in pages.PAGES for words in pages.commands(page)]
    words = [rest for program, *rest in shown if program == "scripts/train"]
    return [rest for rest in words if not any(word.startswith("--") for word in rest)]


def test_every_setting_on_the_pages_is_read() -> None:
    assert len(shown_commands()) > 3
    for words in shown_commands():
        check_training(*words)


@pytest.mark.slow
def test_every_setting_of_every_cell_is_read(tmp_path: Path) -> None:
    with configs():
        table = compose("fewshot_table")
        known = ",".join(table.known_settings)
        cells = list(planned_cells(compose("fewshot_table", [f"data={tmp_path}", f"settings=[{known}]"])))
    assert len(cells) > 50
    for cell in cells:
        check_training(*cell.overrides)


def test_what_the_command_passes_itself_is_no_setting(command: Command) -> None:
    for word, named in (
        ("+dataset.split=null", "`dataset.split` is None"),
        ("+episodes.seed=3", "`episodes.seed` is 3"),
        ("+episodes.dataset=3", "`episodes.dataset` is 3"),
        ("+learner.backbone=3", "`learner.backbone` is 3"),
        ("+outer_loop.loggers=[]", "`outer_loop.loggers` is []"),
        ("+outer_loop.backend=null", "`outer_loop.backend` is None"),
        ("+outer_loop.checkpoints.directory=x", "`outer_loop.checkpoints.directory` is 'x'"),
    ):
        code, error = command(*TINY, word, "paths.run_dir=here")
        assert code == 1
        assert error.count("\n") == 1 and named in error and "would have no effect" in error, error
        assert not Path("here/config.yaml").exists()


def test_a_null_is_an_argument(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("hypertorch.fewshot.StrokeCharacters", lambda **given: asked.append(given) or 1 / 0)
    monkeypatch.setattr("experiments.common.configuration.reads._arguments_of", lambda target: None)
    with pytest.raises(ZeroDivisionError):
        command(*TINY, "+dataset.cache_dir=null")
    assert asked == [{"split": "meta_train", "cache_dir": None}]


def test_the_settings_that_are_listed_are_those_of_the_choice(command: Command) -> None:
    code, error = command("dataset=omniglot", "dataset.foo=1")
    assert code == 1
    assert (
        "The settings of `dataset` are: _target_, download, image_size, partition, progress, root, rotations" in error
    )
    code, error = command("--multirun", "dataset=omniglot,strokes", "hypergradient=implicit", "hypergradient.foo=1")
    assert code == 1 and "_target_, map, residual_tolerance, solver, stationarity_tolerance" in error
    code, error = command("dataset=omnigolt", "dataset.foo=1")
    assert code == 1 and "`dataset` is 'omnigolt'" in error and "Did you mean omniglot?" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("hydra/sweeper=optuna",),
            "`hydra/sweeper` is 'optuna', which is not installed: it cannot be used. Choose one of",
        ),
        (("--multirun", "hydra/launcher=ray", "seed=1,2"), "`hydra/launcher` is 'ray', which is not installed"),
        (("+experiment=maml",), "`+experiment=...` adds a second choice"),
        (("+experiment=mmal",), "`experiment` is 'mmal'"),
        (("hydra.foo=1",), "`hydra.foo` is no setting of Hydra"),
        (("~evaluation.lr",), "`~evaluation.lr` deletes what is not there, or is null already"),
        (("learner._target_=nonsense.Foo",), "`learner` names 'nonsense.Foo', which cannot be built"),
        (("hypergradient=implicit", "hypergradient.solver.max_iterations=-1"), "error: `max_iterations` of `Conjugate"),
    ],
)
def test_an_unknown_choice_is_one_line(words: tuple[str, ...], expected: str, command: Command) -> None:
    code, error = command(*words, "debug=default")
    assert code == 1
    assert error.count("\n") == 1 and expected in error, error


def test_every_job_of_a_multirun_says_what_it_does_not_read(command: Command) -> None:
    code, error = command("--multirun", *SINUSOID, "+nonsense.foo=1,2", "paths.sweep_dir=sweep")
    assert code == 1
    assert error.count("error: job ") == error.count("`nonsense.foo` is no setting") == error.count("\n") == 2


SETTINGS: dict[str, tuple[type, ...]] = {
    "train": (TrainSettings, FewShotSettings),
    "evaluate": (evaluate.EvaluateSettings,),
    "spectral_radius": (spectral_radius.SpectrumSettings,),
    "horizon_bias": (horizon_bias.HorizonSettings,),
    "hyperfield": (hyperfield.FieldSettings,),
    "lr_range_test": (lr_range_test.RangeSettings,),
    "metasmoothness": (metasmoothness.SmoothnessSettings,),
    "compare_backends": (compare_backends.CompareSettings,),
    "gallery": (gallery.GallerySettings,),
    "fewshot_table": (fewshot_table.TableSettings,),
    "compare_libraries": (compare_libraries.BenchmarkSettings,),
    "search_against_gradients": (search_against_gradients.AgainstSettings,),
    "search_benchmark": (search_benchmark.BenchmarkSettings,),
}
MODULES = {module.__name__.rpartition(".")[2]: module for module in COMMANDS}


def all_classes(kinds: Iterable[type]) -> Iterator[type]:
    """The dataclasses of settings, those of their blocks included."""
    for kind in kinds:
        yield kind
        yield from all_classes(inner for inner in get_type_hints(kind).values() if is_dataclass(inner))


@pytest.mark.parametrize(
    "name",
    ["train", "evaluate", "spectral_radius", "horizon_bias", "hyperfield", "compare_backends", "metasmoothness",
             "lr_range_test"],
)  # fmt: skip
def test_every_setting_that_is_declared_is_used(
    name: str, command: Command, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded after the settings are parsed."""
    used: set[tuple[type, str]] = set()
    classes = list(all_classes(SETTINGS[name]))

    def recording(self: object, attribute: str) -> object:
        used.add((type(self), attribute))
        return object.__getattribute__(self, attribute)

    for kind in classes:
        monkeypatch.setattr(kind, "__getattribute__", recording)
    small = (
        "experiment.num_labellers=2", "experiment.scans_each=4", "experiment.num_validation=8", "experiment.hidden=2",
    )  # fmt: skip
    words = {
        "train": SINUSOID,
        "evaluate": (f"run={finished}", "num_episodes=2", "dataset_root=null"),
        "spectral_radius": (*small, "horizon=3", "steps=[0]", "dimension=8"),
        "horizon_bias": (*small, "horizon=3", "windows=[1]", "num_steps=[2,3]", "implicit.residual_tolerance=null"),
        "lr_range_test": (*small, "min_lr=1e-3"),
        "hyperfield": (*small, "points=2", "num_steps=2"),
        "metasmoothness": ("experiment.num_steps=2", "num_problems=1"),
        "compare_backends": (*small, "num_steps=[2]", "repeats=1", "only=[reverse]"),
    }
    code, error = command(*words[name], "paths.run_dir=here", module=MODULES[name])
    assert code == 0, error
    declared = {(kind, item.name) for kind in classes for item in fields(kind)}
    unused = {attribute for _, attribute in declared - used}
    # The run's folder is chosen before the settings are parsed.
    assert unused <= {"resume"}, unused


@pytest.mark.parametrize("name", SETTINGS)
def test_every_plain_setting_of_a_file_is_declared_and_the_other_way_round(name: str) -> None:
    files = [MODULES[name].MAIN_CONFIG, *([CONFIGS / "fewshot/default.yaml"] if name == "train" else [])]
    held = {key for file in files for key, _ in leaves(OmegaConf.load(file))}
    blocks = {
        "train": ("experiment.", "training.augmentation"),
        "horizon_bias": ("implicit.",),
        "compare_backends": ("backends.",),
        "fewshot_table": ("known_settings.", "cell_settings.", "published."),
        "gallery": ("known.",),
        "metasmoothness": ("variants.",),
        "compare_libraries": ("works.", "sweeps."),
        "search_against_gradients": ("tasks.",),
        "search_benchmark": ("tasks.", "methods."),
    }.get(name, ())
    plain = {key for key in held if not key.startswith(("defaults", "hydra", "task_name", *blocks))}
    declared = {key for kind in SETTINGS[name] for key in setting_keys(kind)}
    # Data sets say what a task is, and the loop's own file how long it runs.
    elsewhere = {"task.metric", "task.mode", "outer_loop.num_outer_steps", "outer_loop.progress"}
    assert plain == declared - elsewhere


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and len(node):
            yield from leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", node
