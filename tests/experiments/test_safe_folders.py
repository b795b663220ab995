"""A run's folder that a stranger made: no code that it names runs, and what is broken is said in one line."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import hypertorch as ht
from experiments import evaluate, fewshot_table, train
from experiments.common.commands.config_errors import CONFIGS
from experiments.common.commands.failures import ExpectedFailure
from experiments.common.configuration.settings import TrainSettings
from experiments.common.configuration.typed_settings import parse
from experiments.common.runs.run_folder import RunFolder, read_config
from experiments.common.runs.trust import check_trusted
from experiments.evaluate import as_trained
from tests.experiments.commands import SINUSOID, Command

HARMLESS = {"_target_": "hypertorch.dynamics.SGD", "lr": 0.1}


class Pickled:
    """Writes a file when it is read back."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._path, "the code of a stranger ran")


def pickle_through_torch_load(folder: Path, evidence: Path) -> dict[str, Any]:
    torch.save(Pickled(evidence), folder / "weights.pt")
    return {"_target_": "torch.load", "f": str(folder / "weights.pt"), "weights_only": False}


def file_through_pathlib(folder: Path, evidence: Path) -> dict[str, Any]:
    path = {"_target_": "pathlib.Path", "_args_": [str(evidence)]}
    return {"_target_": "pathlib.Path.write_text", "self": path, "data": "the code of a stranger ran"}


Attack = Callable[[Path, Path], dict[str, Any]]
attacks = pytest.mark.parametrize("attack", [pickle_through_torch_load, file_through_pathlib])
places = pytest.mark.parametrize("place", ["dynamics", "backbone.hidden.1"])


def attacked(run: Path, folder: Path, attack: Attack, place: str) -> Path:
    """Returns the file that is there once the attack has succeeded."""
    evidence = folder.parent / "evidence"
    shutil.copytree(run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    where, *rest = place.split(".")
    harmful = {"_target_": "builtins.dict", "inside": [attack(folder, evidence)]} if rest else attack(folder, evidence)
    if rest:
        config[where][rest[0]][int(rest[1])] = harmful
    else:
        config[where] = harmful
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return evidence


def refused(outcome: tuple[int, str], *parts: str) -> None:
    code, error = outcome
    assert code == 1, error
    assert error.count("error: ") == 1 and "Traceback" not in error, error
    line = error[error.index("error: ") :]
    assert line.count("\n") == 1, error
    for part in parts:
        assert part in line, error


@attacks
@places
def test_evaluation_runs_no_code_of_the_folder(
    attack: Attack, place: str, finished: Path, command: Command, tmp_path: Path
) -> None:
    evidence = attacked(finished, tmp_path / "strange", attack, place)
    refused(command("run=strange", module=evaluate), f"`{place}", "trust=[my_package]")
    assert not evidence.exists()


@attacks
def test_a_start_runs_no_code_of_the_folder(attack: Attack, finished: Path, command: Command, tmp_path: Path) -> None:
    evidence = attacked(finished, tmp_path / "strange", attack, "backbone")
    refused(command(*SINUSOID, "start_from=strange"), "`backbone._target_`", "trust=[my_package]")
    assert not evidence.exists()


@attacks
def test_going_on_runs_no_code_of_the_folder(attack: Attack, finished: Path, command: Command, tmp_path: Path) -> None:
    evidence = attacked(finished, tmp_path / "strange", attack, "backbone")
    refused(command(*SINUSOID, "resume=true", "paths.run_dir=strange"), "`backbone._target_`", "was started with")
    assert not evidence.exists()


@attacks
@pytest.mark.parametrize("run", [True, False])
def test_the_table_runs_no_code_of_a_cell(
    attack: Attack, run: bool, finished: Path, command: Command, tmp_path: Path
) -> None:
    cell = tmp_path / "cells/maml-omniglot_5way_1shot-seed0"
    evidence = attacked(finished, cell, attack, "backbone")
    words = ("data=.", "cells=cells", "learners=maml", f"run={str(run).lower()}")
    refused(command(*words, module=fewshot_table), "`backbone._target_`", "trust=[my_package]")
    (cell / "results.json").unlink()
    refused(command(*words, module=fewshot_table), "`backbone._target_`", "trust=[my_package]")
    assert not evidence.exists() and not evidence.with_name("cells").joinpath("evidence").exists()


@attacks
def test_the_attacks_are_real(attack: Attack, tmp_path: Path) -> None:
    """Hydra itself carries both out."""
    from hydra.utils import instantiate

    instantiate(attack(tmp_path, tmp_path / "evidence"))
    assert (tmp_path / "evidence").read_text() == "the code of a stranger ran"


@pytest.mark.parametrize("name", ["checkpoints/hparams.safetensors", "checkpoints/step_00000002.safetensors"])
@pytest.mark.parametrize("how", ["evaluate", "start", "resume"])
def test_a_pickle_in_place_of_tensors_is_not_read(
    name: str, how: str, finished: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "strange")
    for path in (tmp_path / "strange/checkpoints").iterdir():
        path.unlink()
    (tmp_path / "strange" / name).write_bytes(pickle.dumps(Pickled(tmp_path / "evidence")))
    if how == "evaluate":
        refused(command("run=strange", module=evaluate), "cannot be read")
    elif how == "start":
        path = "strange" if "hparams" in name else f"strange/{name}"
        refused(command(*SINUSOID, f"start_from={path}"), "cannot be read")
    elif "step" in name:
        refused(command(*SINUSOID, "resume=true", "paths.run_dir=strange"), "cannot be read")
    assert not (tmp_path / "evidence").exists()


NOT_BUILT = [
    "os.system",
    "builtins.eval",
    "builtins.dict",
    "antigravity.open",
    "hypertorch.outer.storage.tensor_files.os.system",
    "hypertorch.outer.storage.tensor_files.Path",
    "hypertorch.outer.storage.tensor_files.save_file",
    "hypertorch.fewshot.datasets.cifar100_files.pickle.loads",
    "hypertorch.save_hparams",
    "hypertorch.dynamics.schedules.math.exp",
    "hypertorch.dynamics.schedules._check_steps",
    "hypertorch.hypergradients.hypergradient",
    "hypertorch.fewshot.learners",
    "hypertorch",
    "hypertorch.",
    "",
    "hypertorch.fewshot.MAML.__init__",
    "hypertorch.fewshot.MAML.__class__",
    "hypertorch.fewshot.Conv4.load_state_dict",
    "torch.load",
    "torch.optim.sys.modules",
    "torch.optim.adam.torch.load",
    "torch.optim.Adam.step",
    "torch.optim.lr_scheduler.partial",
    "torch.hub.load",
    "torch.nn.Linear",
    "hydra.utils.get_class",
    "hydra.utils.get_method",
    "hydra.utils.call",
    "hydra.utils.instantiate",
    "hydra._internal.instantiate._instantiate2.instantiate",
    "experiments.noisy_digits.noisy_digits",
    "experiments.noisy_digits.Scans",
    "experiments.noisy_digits.Experiment",
    "experiments.noisy_digits.load_digits",
    "experiments.noisy_digits.NoisyDigits.draw",
    "experiments.common.runs.experiment.Experiment",
    "experiments.common.runs.run_folder.Path",
    "experiments.train.main",
    "experiments.train.sys.exit",
    "experiments.fewshot.experiment.FewShot",
    "experiments.absent.Absent",
    3,
    None,
    ["hypertorch.dynamics.SGD"],
    {"_target_": "hypertorch.dynamics.SGD"},
]


@pytest.mark.parametrize("target", NOT_BUILT, ids=repr)
def test_only_public_classes_are_built(target: object) -> None:
    # The project's own modules of experiments are imported to look at them; a name outside of them imports nothing.
    for own in ("experiments.noisy_digits", "experiments.fewshot"):
        importlib.import_module(own)
    loaded = set(sys.modules)
    for values in (
        {"learner": {"_target_": target}},
        {"learner": {**HARMLESS, "lr": [0, {"deep": [{"_target_": target, "_partial_": True}]}]}},
        {"learner": {**HARMLESS, "_args_": [{"_target_": target}]}},
        {"_target_": target},
    ):
        with pytest.raises(ExpectedFailure, match="only public classes, schedules and data sets of hypertorch"):
            check_trusted(values, place="config.yaml", trusted=[])
    assert set(sys.modules) == loaded


def named_by_the_configs() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*/*.yaml"))]
    return sorted({name for text in texts for name in re.findall(r"^\s*_target_: (\S+)$", text, flags=re.MULTILINE)})


@pytest.mark.parametrize(
    "target", [*named_by_the_configs(), "hypertorch.fewshot.learners.MAML", "hypertorch.dynamics.schedules.cosine",
               "torch.optim.SGD"],
)  # fmt: skip
def test_public_classes_are_built(target: str) -> None:
    check_trusted({"a": [{"_target_": target, "_partial_": True}]}, place="config.yaml", trusted=[])


def test_a_class_of_a_package_of_ones_own_is_built_once_it_is_trusted(
    finished: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages/homemade"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os\nfrom pathlib import Path\n", encoding="utf-8")
    (package / "networks.py").write_text(
        "import hypertorch.fewshot\n\nclass Small(hypertorch.fewshot.MLP):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    shutil.copytree(finished, tmp_path / "own")
    file = tmp_path / "own/config.yaml"
    text = file.read_text(encoding="utf-8")
    assert text.count("hypertorch.fewshot.MLP") == 1
    file.write_text(text.replace("hypertorch.fewshot.MLP", "homemade.networks.Small"), encoding="utf-8")
    words = ("run=own", "num_episodes=4", "paths.run_dir=evaluated")
    refused(command(*words, module=evaluate), "`backbone._target_`", "'homemade.networks.Small'", "trust=[my_package]")
    assert "homemade" not in sys.modules
    refused(command(*words, "trust=[home]", module=evaluate), "'homemade.networks.Small'")
    code, error = command(*words, "trust=[homemade]", module=evaluate)
    assert code == 0, error
    # The package is trusted, not what it imports.
    for name in ("homemade.os.system", "homemade.Path.write_text", "homemade.networks.hypertorch.save_hparams"):
        file.write_text(text.replace("hypertorch.fewshot.MLP", name), encoding="utf-8")
        refused(command(*words, "trust=homemade", module=evaluate), f"'{name}'")
    file.write_text(text.replace("hypertorch.fewshot.MLP", "homemade.gone.Small"), encoding="utf-8")
    refused(command(*words, "trust=homemade", module=evaluate), "`trust` is there for 'homemade.gone.Small'")


@pytest.mark.parametrize("word", ["trust=[]", "trust=[3]", 'trust=["a b"]', "trust={a: b}"])
def test_what_is_no_package_is_not_trusted(word: str, finished: Path, command: Command) -> None:
    refused(command(f"run={finished}", word, module=evaluate), "`trust")


def test_trust_that_does_nothing_is_refused(command: Command) -> None:
    refused(command(*SINUSOID, "trust=[homemade]"), "`trust` is ['homemade']", "`start_from` is null")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "an interpolation": (lambda file: swap(file, "lr: 0.01", "lr: ${oc.decode:0.01}"), "`dynamics.lr` in"),
    "the environment": (lambda file: swap(file, "dtype: float32", "dtype: ${oc.env:HOME}"), "`dtype` in"),
    "a resolver in a list": (lambda file: swap(file, "- 40", "- ${oc.create:{a:1}}"), "`backbone.hidden.0` in"),
    "a tag": (
        lambda file: file.write_text("a: !!python/object/apply:os.system ['true']"),
        "a tag or too many brackets in line 1",
    ),
    "a path by tag": (
        lambda file: file.write_text("a: 1\nb: !!python/object/apply:pathlib.Path [x]"),
        "brackets in line 2",
    ),
    "a bomb": (lambda file: file.write_text("a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]"), "has a reference"),
    "no YAML": (lambda file: file.write_text("a: [1\nb: 2"), "is no YAML"),
    "two values for one": (lambda file: file.write_text("a: 1\na: 2"), "is no YAML"),
    "brackets without end": (lambda file: file.write_text("a: " + "[" * 50_000), "too many brackets"),
    "another encoding": (lambda file: file.write_bytes("name: Größe".encode("utf-16")), "is no text in UTF-8"),
    "bytes": (lambda file: file.write_bytes(bytes(range(256))), "is no text in UTF-8"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is no file"),
    "a huge file": (lambda file: file.write_text("a: 1\n" + "#" * 2**21), "has 2 MiB"),
    "a list": (lambda file: file.write_text("- a"), "holds no settings"),
    "a word": (lambda file: file.write_text("word"), "has no `experiment`"),
    "nothing": (lambda file: file.write_text(""), "holds no settings"),
    "no number for a seed": (lambda file: swap(file, "seed: 0", "seed: abc"), "`seed` is 'abc'"),
    "another command's": (lambda file: file.write_text("works: {}"), "has no `experiment`"),
}


def swap(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def evaluation_of(folder: Path) -> evaluate.EvaluateSettings:
    return evaluate.EvaluateSettings(
        run=str(folder), trust=[], split=None, num_episodes=None, num_queries=None, seed=None, dataset_root=None,
        device=torch.device("cpu"), resume=False,
    )  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_configuration_is_one_line(case: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "strange")
    spoil, expected = BROKEN[case]
    spoil(tmp_path / "strange/config.yaml")
    run = RunFolder(tmp_path / "strange")
    with pytest.raises(ExpectedFailure) as raised:
        parse(TrainSettings, as_trained(evaluation_of(run.path), run, device_name="cpu"))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_command_says_that_a_configuration_is_broken(finished: Path, command: Command, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "strange")
    BROKEN["the environment"][0](tmp_path / "strange/config.yaml")
    for words, module in (
        (("run=strange",), evaluate),
        ((*SINUSOID, "resume=true", "paths.run_dir=strange"), train),
        ((*SINUSOID, "start_from=strange"), train),
    ):
        refused(command(*words, module=module), "`dtype` in", "'${oc.env:HOME}'")


@pytest.mark.parametrize("content", [b"a: [", b"- {a: 1}"])
def test_a_broken_list_of_settings_is_one_line(content: bytes, command: Command, tmp_path: Path) -> None:
    assert command(*SINUSOID)[0] == 0
    (folder,) = (tmp_path / "outputs/train/runs").iterdir()
    (folder / "overrides.yaml").write_bytes(content)
    refused(command(*SINUSOID, "resume=true"), "overrides.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is no JSON"),
        (b"[" * 50_000, "is no JSON"),
        (b"3", "holds a int"),
        (b"{}", "KeyError: 'metrics'"),
        (b'{"metrics": 3}', "is not as a run writes it"),
        (b'{"metrics": {"meta_test": {"accuracy": {"mean": "high"}}}}', "is not as a run writes it"),
        (b"\xff\xfe", "is no text in UTF-8"),
        (b" " * (2**20 + 1), "has 1 MiB"),
    ],
)
def test_broken_figures_of_a_cell_are_one_line(content: bytes, expected: str, command: Command, tmp_path: Path) -> None:
    cell = tmp_path / "cells/maml-omniglot_5way_1shot-seed0"
    cell.mkdir(parents=True)
    (cell / "results.json").write_bytes(content)
    refused(command("run=false", "cells=cells", "learners=maml", module=fewshot_table), expected)


def test_the_configuration_of_a_run_is_what_was_written(finished: Path) -> None:
    config = read_config(finished)
    assert config.dynamics.lr == 0.01 and config.learner._target_ == "hypertorch.fewshot.MAML"
    assert json.loads((finished / "results.json").read_text(encoding="utf-8"))["seed"] == config.seed == 0
    assert train.failures is not evaluate.failures


def test_variables_of_another_experiment_are_not_judged(finished: Path, command: Command, tmp_path: Path) -> None:
    variables = ht.load_hparams(finished)
    name, value = next(iter(variables.items()))
    others = {
        "renamed": {**{key: own for key, own in variables.items() if key != name}, "other": value},
        "longer": {**variables, name: torch.cat([value, value])},
        "more": {**variables, "extra": torch.zeros(2)},
    }
    altered = tmp_path / "altered"
    shutil.copytree(finished, altered)
    path = altered / "checkpoints" / "hparams.safetensors"
    for case, own in others.items():
        ht.save_hparams(path, own)
        code, error = command(f"run={altered}", f"paths.run_dir=judged-{case}", module=evaluate)
        assert code == 1 and error.count("\n") == 1, error
        assert "whose outer variables are not those of its experiment" in error
