"""The commands from end to end: what a run leaves, how it goes on, and how it fails."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import hypertorch as ht
from experiments import evaluate, train
from experiments.common.runs.run_folder import RunFolder
from experiments.fewshot.streams import EpisodeStreams
from hypertorch.fewshot import HyperRepresentation
from hypertorch.outer.storage.checkpoints import load_checkpoint
from hypertorch.outer.storage.one_writer import one_writer
from tests.experiments.commands import SINUSOID, TINY, Command

ROOT = Path(__file__).resolve().parent.parent.parent


def only_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "outputs/train/runs").iterdir()
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("experiment", ["hyper_representation", "maml", "sinusoid"])
def test_a_run_leaves_everything(experiment: str, command: Command, tmp_path: Path) -> None:
    overrides = SINUSOID if experiment == "sinusoid" else (f"experiment={experiment}", *TINY)
    learns_step_size = experiment == "hyper_representation"
    overrides = (*overrides, f"learner.learn_lr={'one' if learns_step_size else 'null'}")
    code, error = command(*overrides)
    assert code == 0, error
    folder = only_run(tmp_path)
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "results.json",
        "learning_curve.png",
        "episodes.png",
        "adaptation.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "step_sizes.png").exists() == learns_step_size
    assert list((folder / "checkpoints").glob("step_*.safetensors"))
    assert (folder / "checkpoints/hparams.safetensors").exists()
    assert list((folder / "tensorboard").glob("events.*"))
    results = json.loads((folder / "results.json").read_text())
    metric = "mse" if experiment == "sinusoid" else "accuracy"
    assert set(results["metrics"]) == {"meta_train", "meta_val", "meta_test"}
    assert results["metrics"]["meta_test"][metric]["num_episodes"] == 4
    assert results["command"] == " ".join(["scripts/train", *overrides])
    assert results["seed"] == 0
    assert "${" not in (folder / "config.yaml").read_text()


def test_a_longer_run_goes_on_bit_for_bit(command: Command, tmp_path: Path) -> None:
    whole = (*SINUSOID, "paths.run_dir=whole")
    parts = (*SINUSOID, "paths.run_dir=parts")
    assert command(*whole, "outer_loop.num_outer_steps=4")[0] == 0
    assert command(*parts, "outer_loop.num_outer_steps=2")[0] == 0
    assert command(*parts, "outer_loop.num_outer_steps=4", "resume=true")[0] == 0
    one, other = (tmp_path / name / "checkpoints/hparams.safetensors" for name in ("whole", "parts"))
    assert ht.load_hparams(one).keys() == ht.load_hparams(other).keys()
    for name, value in ht.load_hparams(one).items():
        assert torch.equal(value, ht.load_hparams(other)[name])
    untimed = [
        [
            {key: value for key, value in record.items() if key != "steps_per_second"}
            for record in records(tmp_path / name)
        ]
        for name in ("whole", "parts")
    ]
    assert untimed[0] == untimed[1]
    # What the first part took is not known to the second.
    spent = [json.loads((tmp_path / name / "results.json").read_text())["cpu_seconds"] for name in ("whole", "parts")]
    assert spent[0] > 0 and spent[1] is None


def test_resume_finds_the_latest_run_of_the_same_command(command: Command, tmp_path: Path) -> None:
    assert command(*SINUSOID)[0] == 0
    folder = only_run(tmp_path)
    code, error = command(*SINUSOID, "resume=true")
    assert code == 0
    assert f"resuming in {folder.relative_to(tmp_path)}" in error.replace(str(tmp_path) + "/", "")
    assert only_run(tmp_path) == folder
    code, error = command(*SINUSOID, "seed=1", "resume=true")
    assert code == 1
    assert "no run of the same command (debug=fewshot experiment=sinusoid" in error


def test_a_run_that_another_process_writes_is_left_alone(command: Command, tmp_path: Path) -> None:
    assert command(*SINUSOID, "paths.run_dir=here")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "here").rglob("*") if path.is_file()}
    with one_writer(tmp_path / "here"):
        code, error = command(*SINUSOID, "paths.run_dir=here", "resume=true")
    assert code == 1
    assert f"is being written by process {os.getpid()} on" in error and len(error.strip().splitlines()) == 1
    after = {path: path.read_bytes() for path in before if path.name != ".writer.json"}
    assert after == {path: content for path, content in before.items() if path in after}
    assert command(*SINUSOID, "paths.run_dir=here", "resume=true")[0] == 0


def test_a_run_of_a_version_that_lacked_a_switch_is_gone_on_with(command: Command, tmp_path: Path) -> None:
    assert command(*SINUSOID, "paths.run_dir=here")[0] == 0
    file = tmp_path / "here/config.yaml"
    text = file.read_text(encoding="utf-8")
    block = "execution:\n  tasks: auto\n  chunk: null\n  inner_dtype: null\n"
    assert block in text
    file.write_text(text.replace(block, ""), encoding="utf-8")
    assert command(*SINUSOID, "paths.run_dir=here", "resume=true")[0] == 0
    code, error = command(*SINUSOID, "paths.run_dir=here", "execution.tasks=loop", "resume=true")
    assert code == 1
    assert "`execution.tasks` is 'loop', but the run in" in error


@pytest.mark.parametrize(
    "change",
    [
        "evaluation.num_steps=3",
        pytest.param("evaluation.num_queries=3", marks=pytest.mark.slow),
        pytest.param("evaluation.lr=0.5", marks=pytest.mark.slow),
    ],
)
def test_what_changes_a_validation_is_not_changed_in_the_middle(change: str, command: Command) -> None:
    assert command("experiment=maml", *TINY, "paths.run_dir=here")[0] == 0
    code, error = command("experiment=maml", *TINY, "paths.run_dir=here", "resume=true", change)
    assert code == 1
    assert f"`{change.split('=', maxsplit=1)[0]}` is" in error and "but the run in" in error


def test_a_finished_run_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    assert command(*SINUSOID, "paths.run_dir=here")[0] == 0
    before = (tmp_path / "here/results.json").read_bytes()
    code, error = command(*SINUSOID, "paths.run_dir=here")
    assert code == 1
    assert "`paths.run_dir` is" in error
    assert "resume=true" in error
    code, error = command(*SINUSOID, "paths.run_dir=here", "dynamics.lr=0.5", "resume=true")
    assert code == 1
    assert "`dynamics.lr` is 0.5, but the run in" in error
    assert (tmp_path / "here/results.json").read_bytes() == before


def test_evaluation_repeats_the_figures_of_the_run(command: Command, tmp_path: Path) -> None:
    assert command(*SINUSOID, "paths.run_dir=trained")[0] == 0
    code, error = command("run=trained", "num_episodes=4", "paths.run_dir=evaluated", module=evaluate)
    assert code == 0, error
    trained, evaluated = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("trained", "evaluated")
    )
    assert trained["metrics"]["meta_test"] == evaluated["metrics"]["meta_test"]


def test_the_test_classes_can_be_left_alone(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    evaluation = EpisodeStreams.evaluation
    monkeypatch.setattr(EpisodeStreams, "evaluation", lambda *given: asked.append(given[1]) or evaluation(*given))
    code, error = command(*TINY, "evaluation.splits=[meta_val,meta_train]", "paths.run_dir=trained")
    assert code == 0, error
    assert list(json.loads((tmp_path / "trained/results.json").read_text())["metrics"]) == ["meta_train", "meta_val"]
    assert set(asked) == {"meta_train", "meta_val"}


@pytest.mark.parametrize("num_queries", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_evaluation_has_a_number_of_queries_of_its_own(
    num_queries: int, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*TINY, "paths.run_dir=trained")[0] == 0
    judged = []
    on = HyperRepresentation.on
    monkeypatch.setattr(
        HyperRepresentation, "on", lambda learner, source, **k: judged.append(source) or on(learner, source, **k)
    )
    arguments = ("run=trained", "num_episodes=4", f"num_queries={num_queries}", "paths.run_dir=evaluated")
    code, error = command(*arguments, module=evaluate)
    assert code == 0, error
    assert judged[0].at(0).query.targets.shape[1] == 5 * num_queries
    assert f"num_queries={num_queries}" in json.loads((tmp_path / "evaluated/results.json").read_text())["command"]


def test_a_run_starts_from_the_best_of_another(command: Command, tmp_path: Path) -> None:
    assert command(*SINUSOID, "paths.run_dir=first")[0] == 0
    again = (*SINUSOID, "paths.run_dir=second", "start_from=first", "outer_optimizer.lr=0")
    code, error = command(*again)
    assert code == 0, error
    first, second = (ht.load_hparams(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert command(*again, "resume=true")[0] == 0


def test_a_run_of_another_learner_is_no_start(command: Command) -> None:
    assert command(*SINUSOID, "paths.run_dir=first")[0] == 0
    code, error = command("experiment=maml", *TINY, "start_from=first")
    assert code == 1
    assert "error: `start_from` differs from the outer variables of the problem" in error
    assert "Traceback" not in error


def test_a_multirun_goes_on_after_a_failed_job(command: Command, tmp_path: Path) -> None:
    code, error = command("--multirun", *SINUSOID, "dynamics.lr=-1,0.01", "paths.sweep_dir=sweep")
    assert code == 1
    assert "error: job 0 (" in error
    assert "`lr` of `SGD` is -1" in error
    assert not (tmp_path / "sweep/0/results.json").exists()
    assert (tmp_path / "sweep/1/results.json").exists()


# Steps of a length that the numbers can hold, and that no run can.
AWAY = ("outer_optimizer=sgd", "outer_optimizer.lr=1e38", "outer_optimizer.momentum=0.0")
FAILURES = {
    "unknown group choice": (("experiment=mmal",), ["`experiment` is 'mmal'", "Did you mean maml?"]),
    "unknown group": (("datset=omniglot",), ["`datset` is no setting", "Did you mean dataset?"]),
    "unknown setting": (
        ("outer_loop.num_steps=3",),
        ["`outer_loop.num_steps` is no setting", "num_outer_steps, ", "Did you mean outer_loop.num_outer_steps"],
    ),
    "no value": (("seed",), ["`seed` is not of the form setting=value"]),
    "several values": (("seed=1,2",), ["`seed=1,2` gives several values", "--multirun"]),
    "group chosen twice": (("+dataset=omniglot",), ["`+dataset=...` adds a second choice"]),
    "groups that do not fit": (("dataset=sinusoid",), ["`backbone.in_channels` is taken from `task.in_channels`"]),
    "unknown argument": (("+dynamics.speed=1",), ["`dynamics.speed` is no argument of SGD", "momentum"]),
    "block replaced by a number": (("episodes=5",), ["episodes.way", "`episodes` is not a container"]),
    "block replaced by null": (("~dynamics",), ["`dynamics` is {", "which names nothing to build"]),
    "word for a width": (("backbone.hidden=wide",), ["`hidden` is 'wide'", "positive whole number"]),
    "negative length": (("outer_loop.num_outer_steps=-1",), ["`outer_loop.num_outer_steps` is -1"]),
    "word for a number": (("validation.every=often",), ["`validation.every` is 'often'"]),
    "word for a switch": (("resume=maybe",), ["`resume` is 'maybe'"]),
    "unknown device": (("device=tpu",), ["`device` is 'tpu'", "cpu, cuda, auto"]),
    "unknown type": (("dtype=float16",), ["`dtype` is 'float16'", "float64"]),
    "way of one": (("episodes.way=1",), ["`way` must be at least 2, got 1"]),
    "word for way": (("episodes.way=five",), ["`way` is 'five'"]),
    "way larger than the number of classes": (("episodes.way=5000",), ["`way` is 5000", "classes"]),
    "way of training larger than the number of classes": (
        ("experiment=protonet", "training.way=5000"),
        ["`way` is 5000", "In training `way` is the setting training.way=5000"],
    ),
    "more drawings than there are": (("episodes.shot=15", "episodes.num_queries=15"), ["`shot + num_queries`"]),
    "negative step size": (("dynamics.lr=-0.1",), ["`lr` of `SGD` is -0.1"]),
    "wrong outer optimizer": (("outer_optimizer.lr=-1",), ["`outer_optimizer` is Adam(", "Invalid learning rate: -1"]),
    "backend that cannot serve": (
        ("hypergradient.checkpoint_every=50",),
        ["checkpoint_every=50", "`num_steps` = 5"],
    ),
    "missing data": (("dataset=omniglot", "dataset.root=nowhere"), ["nowhere"]),
    "non-finite inner loss": (
        ("experiment=maml", "dynamics.lr=1e38", "learner.num_steps=3"),
        ["NaN or infinity", "inner step"],
    ),
    "finite variables without finite outputs": (
        (
            "experiment=maml",
            *AWAY,
            "outer_loop.num_outer_steps=1",
        ),
        ["`outer_loss` of the best outer variables of 1 outer steps is nan on meta_train", "outer_optimizer.lr"],
    ),
    "evaluation on no split": (("evaluation.splits=[]",), ["`evaluation.splits` is []", "example"]),
    "evaluation on an unknown split": (
        ("evaluation.splits=[test]",),
        ["`evaluation.splits` lists 'test'", "meta_train, meta_val, meta_test"],
    ),
    "step size of a learner without inner steps": (
        ("experiment=protonet", "evaluation.lr=0.1"),
        ["`evaluation.lr` is 0.1, but ProtoNet takes no inner steps"],
    ),
    "step size of a learner that learns its own": (
        ("experiment=meta_sgd", "evaluation.lr=0.1"),
        ["`evaluation.lr` is 0.1, but MetaSGD learns its step sizes"],
    ),
    "inner steps of a learner without any": (
        ("experiment=protonet", "evaluation.num_steps=5"),
        ["`evaluation.num_steps` is 5, but ProtoNet takes no inner steps"],
    ),
    "more inner steps than learnt step sizes": (
        ("experiment=maml", "learner.learn_lr=step", "learner.num_steps=1", "evaluation.num_steps=3"),
        ["`evaluation.num_steps`", "'log_lr' has shape (1,) there and (3,) in the evaluation"],
    ),
    "a head for other classes than in training": (
        ("experiment=anil", "training.way=7"),
        ["`training.way`", "'head.weight' has shape (7, ", "(5, "],
    ),
    "training on the test classes": (
        ("train_split=meta_train+meta_test",),
        ["`train_split` is 'meta_train+meta_test'", "says nothing of unseen ones"],
    ),
    "training on no split": (("train_split=train",), ["`train_split` is 'train', which names no classes"]),
    "choosing on what was learned from": (
        ("train_split=meta_train+meta_val", "validation.every=1", "outer_loop.num_outer_steps=2"),
        ["`train_split`", "chosen on classes that were learned from", "validation.every=2"],
    ),
    "start from no run": (("start_from=nowhere",), ["`start_from` is 'nowhere'", "where there is no file"]),
    "no experiment's class": (
        ("experiment._target_=hypertorch.dynamics.SGD", "+experiment.lr=0.1"),
        ["`experiment._target_` is 'hypertorch.dynamics.SGD', which is no experiment"],
    ),
    "resume without a run": (("resume=true",), ["error: `resume` is True", "no run of the same command", "start anew"]),
    "hyperparameter that does nothing": (
        ("experiment=maml", "learner.num_steps=0", "learner.learn_lr=one"),
        ["`hparams['log_lr']` does not reach the outer loss"],
    ),
    "network for other images": (("task.in_channels=3",), ["`images` have shape", "`in_channels`"]),
    "network for other classes": (
        ("experiment=maml", "backbone.way=3"),
        ["labels up to 4, but the network has 3 outputs"],
    ),
    "resume of a folder without a run": (
        ("resume=true", "paths.run_dir=new"),
        ["`paths.run_dir` is", "no run to go on"],
    ),
}


def test_there_is_nothing_to_run_without_an_experiment(command: Command) -> None:
    code, error = command("~experiment")
    assert code == 1
    assert "`experiment` is None, which names nothing to build" in error and error.count("\n") == 1, error


NOISY = ("experiment=noisy_digits", "debug=default", "outer_loop.progress=false", "experiment.num_steps=3")
NOISY_FAILURES = {
    "another experiment's group": (
        ("dataset=omniglot",),
        ["`dataset` is no setting", "dynamics, evaluation, execution, experiment"],
    ),
    "another experiment's setting": (("+evaluation.lr=1",), ["`evaluation.lr` is no setting"]),
    "unknown argument": (("experiment.labellers=3",), ["`experiment.labellers`", "experiment.num_labellers"]),
    "way to run tasks": (("execution.tasks=loop",), ["`execution.tasks` is 'loop'", "not a batch of tasks"]),
    "the same problem again": (("evaluation.num_episodes=3",), ["`evaluation.num_episodes` is 3", "repetitions"]),
    "the same problem validated on": (("validation.num_episodes=3",), ["`validation.num_episodes` is 3"]),
    "unknown split": (("evaluation.splits=[meta_test]",), ["lists 'meta_test'", "validation, test"]),
    "too much data": (("experiment.scans_each=1000",), ["there are 1797 scans"]),
    "no dynamics": (("dynamics._target_=hypertorch.Box",), ["`dynamics"]),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", NOISY_FAILURES)
def test_a_mistake_in_another_experiment_gives_one_message(case: str, command: Command, tmp_path: Path) -> None:
    overrides, expected = NOISY_FAILURES[case]
    code, error = command(*NOISY, *overrides, "paths.run_dir=here")
    assert code == 1
    assert "Traceback" not in error and error.count("error: ") == 1
    for text in expected:
        assert text in error, error
    assert not (tmp_path / "here/config.yaml").exists()


def test_an_experiment_that_is_not_few_shot_has_all_that_a_run_has(command: Command, tmp_path: Path) -> None:
    """Folder, table, going on bit for bit, a start from it, evaluation of it, and nothing of a stranger's."""
    code, error = command(*NOISY, "paths.run_dir=whole", "outer_loop.num_outer_steps=4")
    assert code == 0, error
    for name in ("config.yaml", "metrics.jsonl", "results.json", "learning_curve.png", "trust.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0, name
    assert list((tmp_path / "whole/tensorboard").glob("events.*"))
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert list(results["metrics"]) == ["validation", "test"]
    assert set(results["baselines"]) == {"equal trust", "true labels", "validation scans alone"}
    assert list(results["baselines"]["validation scans alone"]) == ["test"]
    assert command(*NOISY, "paths.run_dir=parts")[0] == 0
    assert command(*NOISY, "paths.run_dir=parts", "outer_loop.num_outer_steps=4", "resume=true")[0] == 0
    whole, parts = (ht.load_hparams(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert command(*NOISY, "paths.run_dir=next", "start_from=whole", "outer_optimizer.lr=0")[0] == 0
    assert all(torch.equal(whole[name], value) for name, value in ht.load_hparams(tmp_path / "next").items())
    code, error = command("run=whole", "paths.run_dir=again", module=evaluate)
    assert code == 0, error
    again = json.loads((tmp_path / "again/results.json").read_text())
    assert again["metrics"] == {"test": results["metrics"]["test"]}
    for words, expected in (
        (("num_queries=3",), "the run's experiment has no queries"),
        (("dataset_root=there",), "comes from no folder"),
        (("num_episodes=3",), "repetitions"),
        (("seed=3",), "`seed` is 3"),
        (("split=meta_test",), "validation, test"),
    ):
        code, error = command("run=whole", *words, "paths.run_dir=refused", module=evaluate)
        assert code == 1 and expected in error, error
        shutil.rmtree(tmp_path / "refused", ignore_errors=True)
    config = OmegaConf.load(tmp_path / "whole/config.yaml")
    config.experiment._target_ = "os.system"
    OmegaConf.save(config, tmp_path / "whole/config.yaml")
    code, error = command("run=whole", "paths.run_dir=strange", module=evaluate)
    assert code == 1 and "`experiment._target_`" in error and "trust=[my_package]" in error, error


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", FAILURES)
def test_a_mistake_gives_one_message(case: str, command: Command) -> None:
    overrides, expected = FAILURES[case]
    code, error = command(*TINY, *overrides)
    assert code == 1
    assert "Traceback" not in error
    assert error.count("error: ") == 1
    for text in expected:
        assert text in error, error


def test_a_last_step_into_infinity_leaves_no_result(command: Command, tmp_path: Path) -> None:
    words = (
        *SINUSOID,
        *AWAY,
        "paths.run_dir=here",
    )
    code, error = command(*words, "outer_loop.num_outer_steps=1")
    assert code == 1
    assert "holds NaN or infinity after 1 outer steps" in error and "Lower the outer learning rate" in error, error
    assert not list((tmp_path / "here").rglob("*.safetensors"))
    assert not (tmp_path / "here/results.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_not_evaluated(value: float, finished: Path, command: Command, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "own")
    file = tmp_path / "own/checkpoints/hparams.safetensors"
    hparams = ht.load_hparams(file)
    next(iter(hparams.values())).view(-1)[0] = value
    ht.save_hparams(file, hparams)
    for words, module in ((("run=own",), evaluate), ((*SINUSOID, "start_from=own"), train)):
        code, error = command(*words, module=module)
        assert code == 1
        assert error.count("\n") == 1 and "holds NaN or infinity in" in error, error


def test_an_unfinished_run_is_evaluated_by_its_newest_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "own")
    folder = RunFolder(tmp_path / "own")
    device = torch.device("cpu")
    best = ht.load_hparams(folder.hparams)
    folder.hparams.unlink()
    first, second = ht.Checkpoints(folder.checkpoints).paths()
    for path, value in ((first, 1.0), (second, 2.0)):
        changed = replace(load_checkpoint(path, remedy=""), best_hparams={n: v * 0 + value for n, v in best.items()})
        ht.Checkpoints(folder.checkpoints).save(changed)
    assert all(bool((value == 2.0).all()) for value in evaluate.load_best(folder, device).values())
    assert f"evaluating {second.name}" in capsys.readouterr().err
    ht.save_hparams(folder.hparams, best)
    assert all(torch.equal(value, best[name]) for name, value in evaluate.load_best(folder, device).items())


def test_evaluation_of_no_run_gives_one_message(command: Command) -> None:
    code, error = command("run=nowhere", module=evaluate)
    assert code == 1
    assert "`run` is 'nowhere'" in error
    code, error = command(module=evaluate)
    assert code == 1
    assert "`run` is not given" in error


def test_a_bug_keeps_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(train, "build_outer_loop", broken)
    with pytest.raises(ValueError, match="not enough values"):
        command(*SINUSOID)


def test_an_interrupt_leaves_a_run_that_goes_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate_splits", interrupted)
        code, error = command(*SINUSOID)
    assert code == 1
    assert "interrupted" in error
    assert "resume=true" in error
    assert command(*SINUSOID, "resume=true")[0] == 0
    assert (only_run(tmp_path) / "results.json").exists()


def test_the_script_runs_as_a_process(tmp_path: Path) -> None:
    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        command = [sys.executable, str(ROOT / "experiments/train.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = script(*SINUSOID)
    assert done.returncode == 0, done.stderr
    assert "meta_test" in done.stdout
    assert "peak memory" in done.stdout
    failed = script("sed=1")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "Did you mean seed?" in failed.stderr


def test_the_saved_configuration_is_that_of_the_run(command: Command, tmp_path: Path) -> None:
    assert command(*SINUSOID, "dynamics.lr=0.02")[0] == 0
    folder = only_run(tmp_path)
    assert OmegaConf.load(folder / "config.yaml").dynamics.lr == 0.02
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == [*SINUSOID, "dynamics.lr=0.02"]


def test_the_number_of_threads_is_a_setting(command: Command) -> None:
    before = torch.get_num_threads()
    try:
        code, error = command(*SINUSOID, "threads=2")
        assert code == 0, error
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    code, error = command("experiment=maml", *TINY, "threads=0")
    assert code == 1
    assert "`threads` is 0" in error


def test_how_tasks_are_run_is_a_setting(command: Command) -> None:
    code, error = command("experiment=maml", *TINY, "execution.tasks=fast")
    assert code == 1
    assert "`execution.tasks` is 'fast'" in error


@pytest.mark.slow
def test_no_part_of_a_run_measures_where_the_route_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    ht.memo.clear()
    monkeypatch.setattr("hypertorch.inner.tasks._faster_route", lambda *_: measured.append(1) or "vmap")
    code, error = command("experiment=maml", *TINY, "execution.tasks=loop")
    assert code == 0, error
    assert not measured
    code, error = command("experiment=maml", *TINY, "seed=1")
    assert code == 0, error
    assert len(measured) == 2  # of the hypergradient and of a plain run; each was kept for the rest


def test_the_backend_of_implicit_maml_is_a_choice(command: Command) -> None:
    code, error = command("experiment=imaml", *TINY, "hypergradient=reverse", "execution.tasks=loop")
    assert code == 0, error


def test_a_split_with_too_few_classes_is_named(command: Command) -> None:
    code, error = command("experiment=maml", *TINY, "episodes.way=200", "training.way=5")
    assert code == 1
    assert "the episodes of meta_val, to validate on: `way` is 200" in error
