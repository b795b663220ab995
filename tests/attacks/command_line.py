"""What is typed behind a command: settings, groups and folders that are not what they should be."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from experiments import (
    compare_backends,
    evaluate,
    fewshot_table,
    gallery,
    horizon_bias,
    lr_range_test,
    metasmoothness,
    search_against_gradients,
    search_benchmark,
    spectral_radius,
    train,
)
from tests.attacks.attack import CANARY, Attack
from tests.attacks.commands import typed
from tests.attacks.strangers import Touch
from tests.experiments.commands import SINUSOID

# Kinds that only `-m slow` carries out: each input composes a configuration, which takes a third of a second.
SLOW = ("other commands", "settings of a run", "settings of a run, one by one", "folders of strangers")

NUMBERS = (
    "nan",
    "inf",
    "-1",
    "true",
    "2.5",
    "abc",
    "[1]",
    "{a: 1}",
    "''",
    "[]",
    "${foo}",
    "1e400",
    "${oc.env:NO_SUCH}",
)
WHOLE = (
    "seed",
    "threads",
    "outer_loop.num_outer_steps",
    "outer_loop.log_every",
    "outer_loop.most_non_finite",
    "outer_loop.checkpoints.every",
    "outer_loop.checkpoints.keep",
    "outer_loop.snapshots.every",
    "validation.every",
    "validation.num_episodes",
    "evaluation.num_episodes",
    "evaluation.num_queries",
    "episodes.num_tasks",
    "episodes.shot",
    "episodes.num_queries",
    "learner.num_steps",
    "execution.chunk",
    "pictures.num_episodes",
    "backbone.hidden",
)
POSITIVE = ("dynamics.lr", "outer_optimizer.lr", "outer_loop.clip_norm")
WORDS = (
    "device",
    "dtype",
    "resume",
    "outer_loop.progress",
    "outer_loop.on_non_finite",
    "execution.tasks",
    "execution.inner_dtype",
)
GROUPS = ("dynamics", "learner", "hypergradient", "outer_optimizer", "backbone", "dataset", "outer_loop", "experiment")
# What is right for a setting although most others refuse it.
TAKEN = {
    ("dynamics.lr", "[1]"),
    ("backbone.hidden", "[1]"),
    ("backbone.hidden", "[]"),
    ("evaluation.num_queries", "null"),
    ("outer_loop.clip_norm", "2.5"),
    ("dynamics.lr", "2.5"),
    ("outer_optimizer.lr", "2.5"),
    ("resume", "true"),
    ("outer_loop.progress", "true"),
}

SINGLE: dict[str, tuple[str, ...]] = {
    "a seed beyond 64 bits": ("seed=1" + "0" * 30,),
    "threads beyond the machine": ("threads=1000000000",),
    "a huge clip_norm": ("outer_loop.clip_norm=1" + "0" * 400,),
    "a number for the snapshots": ("outer_loop.snapshots=3",),
    "null for the snapshots": ("outer_loop.snapshots=null",),
    "a number for the checkpoints": ("outer_loop.checkpoints=3",),
    "a block for a length": ("outer_loop.schedule_length={a: 1}",),
    "an added setting": ("+nonsense=1",),
    "an added block": ("+nonsense.foo=1",),
    "an added setting of a group": ("+dynamics.foo=1",),
    "an added setting of a nested group": ("+hypergradient.foo.bar=1",),
    "an added setting of a loop": ("+outer_loop.foo=1",),
    "an added setting of a plain block": ("+validation.foo=1",),
    "a forced setting": ("++dynamics.lrr=1",),
    "a misspelt setting": ("dynamics.lrr=1",),
    "a misspelt group": ("dynamic=adam",),
    "an option that there is not": ("dynamics=adamm",),
    "a setting of another option": ("dynamics=sgd", "dynamics.beta1=0.5"),
    "an added setting of another option": ("dynamics=sgd", "+dynamics.beta1=0.5"),
    "an unknown experiment": ("experiment=sinusoids",),
    "an experiment of a number": ("experiment=3",),
    "an experiment upwards": ("experiment=../train",),
    "an absolute experiment": ("experiment=/etc/passwd",),
    "a group upwards": ("dynamics=../train",),
    "an empty group": ("dynamics=",),
    "two options of a group": ("dynamics=[sgd,adam]",),
    "a sweep without --multirun": ("seed=1,2",),
    "an added word of Hydra's in a group": ("+dynamics._convert_=nonsense",),
    "another added word of Hydra's in a group": ("+dynamics._partial_=false",),
    "a flag that needs another": ("--resolve",),
    "a flag that needs a word of Hydra's": ("--shell-completion",),
    "a pickle of Hydra's": ("--experimental-rerun", "pickle.safetensors"),
    "the beginning of that flag": ("--exp=pickle.safetensors",),
    "flags that exclude each other": ("--multirun", "--run"),
    "a folder of kept states that is none": ("hypergradient.checkpoint_every=1", "hypergradient.spill_to=nowhere"),
    "a folder of kept states without any": ("hypergradient.spill_to=.",),
    "a folder where no kept state can lie": ("hypergradient.checkpoint_every=1", "hypergradient.spill_to=/proc"),
    "a name that is too long for kept states": (
        "hypergradient.checkpoint_every=1",
        "hypergradient.spill_to=" + "x" * 5000,
    ),
    "an open bracket": ("backbone.hidden=[1,2",),
    "a closing bracket": ("backbone.hidden=1]",),
    "an open brace": ("outer_loop={a: 1",),
    "an open quote": ("task_name='abc",),
    "no equals sign": ("seed",),
    "an equals sign alone": ("=",),
    "a value without a name": ("=1",),
    "an added setting and a value without a name": ("+nonsense=1", "=1"),
    "tasks beyond counting": ("episodes.num_tasks=1" + "0" * 30,),
    "examples beyond counting": ("episodes.shot=1" + "0" * 30,),
    "queries beyond counting": ("evaluation.num_queries=1" + "0" * 30,),
    "a plus alone": ("+",),
    "a tilde alone": ("~",),
    "a deleted setting": ("~seed",),
    "a deleted group": ("~dynamics",),
    "a deleted setting that there is not": ("~nonsense",),
    "a reference to nothing": ("seed=${foo}",),
    "a reference to itself": ("seed=${seed}",),
    "a reference to the environment": ("seed=${oc.env:NO_SUCH_VARIABLE}",),
    "a resolver that there is not": ("seed=${nonsense:1}",),
    "an open reference": ("seed=${foo",),
    "a path in a setting's name": ("../seed=1",),
    "a null for the seed": ("seed=null",),
    "a null for a group": ("dynamics=null",),
    "a null for the learner": ("learner=null",),
    "a target of the system": ("dynamics._target_=os.system",),
    "a target that there is not": ("dynamics._target_=nonsense.Nonsense",),
    "a target that is no class": ("dynamics._target_=hypertorch.dynamics",),
    "a target of another kind": ("dynamics._target_=hypertorch.Box",),
    "an empty target": ("dynamics._target_=",),
    "a number for a target": ("dynamics._target_=3",),
    "an experiment of another target": ("experiment._target_=builtins.dict",),
    "a split that there is not": ("evaluation.splits=[meta_tset]",),
    "a number for the splits": ("evaluation.splits=3",),
    "no splits": ("evaluation.splits=[]",),
    "a training split that there is not": ("dataset=strokes", "train_split=meta_tset"),
    "trust of a number": ("trust=[3]",),
    "trust without a start": ("trust=[os]",),
    "a run to go on with that there is not": ("resume=true", "paths.run_dir=nowhere"),
    "nothing to go on with": ("resume=true",),
    "an empty run folder": ("paths.run_dir=",),
    "an empty folder of runs": ("paths.runs=",),
    "an empty folder of logs": ("paths.log_dir=",),
    "a run folder with a zero byte": ("paths.run_dir=a\0b",),
    "a run folder below a file": ("paths.run_dir=file/x",),
    "a file for a run folder": ("paths.run_dir=file",),
    "a name that is too long": ("paths.run_dir=" + "x" * 5000,),
    "a folder of runs that is a file": ("paths.runs=file",),
    "a device for a run folder": ("paths.run_dir=/dev/null",),
    "a run folder of a number": ("paths.run_dir=[1]",),
    "a task name upwards": ("task_name=../../up",),
    "an absolute task name": ("task_name=/tmp/up",),
    "an empty task name": ("task_name=",),
    "a start that there is not": ("start_from=nowhere",),
    "an empty start": ("start_from=",),
    "a start from a pipe": ("start_from=pipe",),
    "a start from a device": ("start_from=/dev/zero",),
    "a start from a text": ("start_from=file",),
    "a start from a pickle": ("start_from=pickle.safetensors",),
    "a start with a zero byte": ("start_from=a\0b",),
    "a start that is too long": ("start_from=" + "x" * 5000,),
    "a data set that there is not": ("dataset=image_folder", "dataset.root=nowhere"),
    "an unknown setting of Hydra": ("hydra.nonsense=1",),
    "an unknown sweeper": ("hydra/sweeper=nonsense", "--multirun"),
    "an unknown launcher": ("hydra/launcher=nonsense", "--multirun"),
}

OTHERS: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "a backend that is a word, in a list": (compare_backends, ("backends=[foo]",)),
    "backends of a number": (compare_backends, ("backends=3",)),
    "backends of a word": (compare_backends, ("backends=foo",)),
    "no backends": (compare_backends, ("backends=null",)),
    "a backend of a number": (compare_backends, ("+backends.mine=3",)),
    "a backend of null": (compare_backends, ("backends.reverse=null",)),
    "a backend without a target": (compare_backends, ("+backends.mine={a: 1}",)),
    "an unknown backend alone": (compare_backends, ("only=[foo]",)),
    "a number alone": (compare_backends, ("only=3",)),
    "numbers of steps of words": (compare_backends, ("num_steps=[a]",)),
    "a negative number of steps": (compare_backends, ("num_steps=[-1]",)),
    "repeats of NaN": (compare_backends, ("repeats=nan",)),
    "an evaluation of nothing": (evaluate, ()),
    "an evaluation of no folder": (evaluate, ("run=nowhere",)),
    "an evaluation of an empty name": (evaluate, ("run=",)),
    "an evaluation of a file": (evaluate, ("run=file",)),
    "an evaluation of a pipe": (evaluate, ("run=pipe",)),
    "an evaluation of a device": (evaluate, ("run=/dev/zero",)),
    "an evaluation of a zero byte": (evaluate, ("run=a\0b",)),
    "an evaluation of null": (evaluate, ("run=null",)),
    "an evaluation of a list": (evaluate, ("run=[a]",)),
    "a table of unknown learners": (fewshot_table, ("run=false", "learners=[nonsense]")),
    "a table of a number of learners": (fewshot_table, ("run=false", "learners=3")),
    "a table of unknown settings": (fewshot_table, ("run=false", "settings=[nonsense]")),
    "a table of data that there is not": (fewshot_table, ("data=nowhere", "learners=maml")),
    "a table with a seed of NaN": (fewshot_table, ("run=false", "seed=nan")),
    "a gallery of unknown experiments": (gallery, ("run=false", "works=3")),
    "a horizon of words": (horizon_bias, ("windows=[a]",)),
    "windows of a number": (horizon_bias, ("windows=nan",)),
    "rates of words": (lr_range_test, ("min_lr=abc",)),
    "rates the wrong way round": (lr_range_test, ("min_lr=1", "max_lr=0.1")),
    "a step size of NaN": (metasmoothness, ("step_size=nan",)),
    "a radius at a step beyond": (spectral_radius, ("step=1000000",)),
    "a benchmark of unknown methods": (search_benchmark, ("methods=[nonsense]",)),
    "a search of unknown methods": (search_against_gradients, ("methods=[nonsense]",)),
}


@cache
def finished() -> Path:
    """Returns the folder of a short run, made once."""
    folder = Path(tempfile.mkdtemp()) / "run"
    typed(folder.parent, *SINUSOID, f"paths.run_dir={folder}")
    return folder


def edited(change: Callable[[str], str]) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        file = run / "config.yaml"
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")

    return spoil


def replaced(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        for file in [*run.glob("checkpoints/*")] if name == "checkpoints" else [run / name]:
            file.write_bytes(content(run.parent / CANARY))

    return spoil


def piped(name: str) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        for file in [*run.glob("checkpoints/*")] if name == "checkpoints" else [run / name]:
            file.unlink()
            os.mkfifo(file)

    return spoil


def linked(name: str, target: str) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        for file in [*run.glob("checkpoints/*")] if name == "checkpoints" else [run / name]:
            file.unlink()
            file.symlink_to(target)

    return spoil


def tagged(path: Path) -> str:
    return f"!!python/object/apply:os.system ['touch {path}']"


def touching(path: Path) -> bytes:
    return f"dynamics: {{_target_: os.system, command: 'touch {path}'}}\nexperiment: {{_target_: os.system}}\n".encode()


SPOILT: dict[str, Callable[[Path], object]] = {
    "a tag of Python": replaced("config.yaml", lambda path: tagged(path).encode()),
    "a tag of Python inside": replaced("config.yaml", lambda path: f"seed: {tagged(path)}".encode()),
    "a tag of a name": replaced("config.yaml", lambda path: b"seed: !!python/name:os.system"),
    "an unknown tag": replaced("config.yaml", lambda path: b"seed: !mine 1"),
    "a target of the system": replaced("config.yaml", touching),
    "a smuggled target": edited(lambda text: text.replace("hypertorch.dynamics.SGD", "os.system")),
    "a target of eval": edited(lambda text: text.replace("hypertorch.dynamics.SGD", "builtins.eval")),
    "a reference": edited(lambda text: text.replace("lr: 0.01", "lr: ${oc.env:HOME}")),
    "broken brackets": replaced("config.yaml", lambda path: b"a: [1\nb: 2"),
    "tabs": replaced("config.yaml", lambda path: b"a:\n\tb: 1"),
    "UTF-16": replaced("config.yaml", lambda path: "seed: 0 # Größe".encode("utf-16")),
    "Latin 1": replaced("config.yaml", lambda path: "seed: 0 # Größe".encode("latin1")),
    "zero bytes": replaced("config.yaml", lambda path: bytes(100)),
    "a list": replaced("config.yaml", lambda path: b"- a"),
    "nothing": replaced("config.yaml", lambda path: b""),
    "a bomb of references": replaced("config.yaml", lambda path: b"a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]"),
    "a pickle for the configuration": replaced("config.yaml", lambda path: pickle.dumps(Touch(path))),
    "a pipe for the configuration": piped("config.yaml"),
    "a pipe for the records": piped("metrics.jsonl"),
    "a device for the records": linked("metrics.jsonl", "/dev/zero"),
    "a device for the configuration": linked("config.yaml", "/dev/zero"),
    "a link in a circle": linked("config.yaml", "config.yaml"),
    "a link to nothing": linked("config.yaml", "nothing"),
    "pickles for tensors": replaced("checkpoints", lambda path: pickle.dumps(Touch(path))),
    "texts for tensors": replaced("checkpoints", lambda path: b"no tensors"),
    "empty files for tensors": replaced("checkpoints", lambda path: b""),
    "a huge header": replaced("checkpoints", lambda path: (2**62).to_bytes(8, "little") + b"{}"),
    "a header that is no JSON": replaced("checkpoints", lambda path: (4).to_bytes(8, "little") + b"{{{{"),
    "pipes for tensors": piped("checkpoints"),
    "devices for tensors": linked("checkpoints", "/dev/zero"),
    "links to nothing for tensors": linked("checkpoints", "nothing"),
}
ENTRIES: dict[str, Callable[[Path], object]] = {
    "evaluate": lambda folder: typed(folder, "run=strange", "paths.run_dir=judged", module=evaluate),
    "start_from": lambda folder: typed(folder, *SINUSOID, "start_from=strange", "paths.run_dir=new"),
    "resume": lambda folder: typed(
        folder, *SINUSOID, "resume=true", "paths.run_dir=strange", "outer_loop.num_outer_steps=3"
    ),
}


def in_folder(*words: str, module: ModuleType = train) -> Callable[[Path], object]:
    def carry_out(folder: Path) -> object:
        (folder / "file").write_text("no run", encoding="utf-8")
        os.mkfifo(folder / "pipe")
        (folder / "pickle.safetensors").write_bytes(pickle.dumps(Touch(folder / CANARY)))
        return typed(folder, *words, module=module)

    return carry_out


def spoilt(spoil: Callable[[Path], object], entry: Callable[[Path], object]) -> Callable[[Path], object]:
    def carry_out(folder: Path) -> object:
        shutil.copytree(finished(), folder / "strange")
        spoil(folder / "strange")
        return entry(folder)

    return carry_out


def one_by_one() -> Iterator[tuple[str, str]]:
    for keys, values in (
        ((*WHOLE, *POSITIVE), NUMBERS),
        (WORDS, ("3", "nonsense", "[cpu]", "{a: 1}", "''", "${foo}")),
        (GROUPS, ("3", "nonsense", "[]", "{a: 1}", "''", "${foo}")),
    ):
        yield from ((key, value) for key in keys for value in values)


def attacks() -> Iterator[Attack]:
    """Yields every command line, and every run's folder of a stranger by every command that reads one."""
    for name, words in SINGLE.items():
        yield Attack("settings of a run", name, in_folder(*SINUSOID, *words))
    for name, (module, words) in OTHERS.items():
        yield Attack("other commands", name, in_folder(*words, module=module))
    for name, spoil in SPOILT.items():
        for entry, command in ENTRIES.items():
            # Outer variables may lie in a folder that has no configuration.
            if entry == "start_from" and name.startswith("a link"):
                continue
            # Only a run that goes on reads the records.
            if entry != "resume" and name.endswith("for the records"):
                continue
            yield Attack("folders of strangers", f"{name}, {entry}", spoilt(spoil, command))
    for key, value in one_by_one():
        if (key, value) not in TAKEN:
            yield Attack("settings of a run, one by one", f"{key}={value}", in_folder(*SINUSOID, f"{key}={value}"))
